"""The latents of a data set: written once as shards by the trained autoencoder, for a prior to train on.

    latents/  000000-000000.tar ...  index.json  statistics.json

A record holds the caption and float16 [2, *latent_shape], mean and deviation; or, where latents are points, float32
[1, *latent_shape], and the PSNR of the fit in its .json. Where a bank of latents was trained, they are its rows. Priors
never load the autoencoder.
"""

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Float64
from torch import Tensor
from torch.utils.data import Dataset

from distributed_inr.data import storage
from distributed_inr.data.reader import ShardDataset, stream
from distributed_inr.data.shard_writer import ShardWriter, write_index
from distributed_inr.data.shards import ShardIndex
from distributed_inr.domains.domain import Record, Signal, collate
from distributed_inr.experiment import Experiment
from distributed_inr.generation import load_weights
from distributed_inr.launch import Worker
from distributed_inr.models import FieldAutoencoder
from distributed_inr.models.latent_prior import statistics_shape
from distributed_inr.run_folder import Stage, write_text
from distributed_inr.training.bank import read_rows
from distributed_inr.training.checkpoint_reader import BANK
from distributed_inr.training.fragments import is_first, sum_over_ranks

_SHARD_BYTES = 64 * 2**20


@torch.no_grad()
def write_latents(worker: Worker, *, experiment: Experiment, stage: Stage, shards: "LatentShards") -> None:
    """Write mean and deviation of every training signal's latent, and of its copies, as shards; and their statistics.

    Shard k holds the same block of samples for every number of workers.
    """
    stage.check_shared()
    if is_first():
        stage.clear()  # what an interrupted attempt has left
    if dist.is_initialized():
        dist.barrier()
    domain, folder = experiment.domain, stage.folder
    weights = experiment.folder / "autoencoder" / "model.safetensors"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = experiment.autoencoder.build(domain)
    load_weights(module, weights)
    module.to(device)
    rows = None if experiment.bank is None else read_rows(weights.with_name(BANK))
    dataset = experiment.dataset(experiment.data.index(experiment.data.train))
    about = {"from": dataset.index.fingerprint, "copies": shards.copies, "autoencoder": storage.sha256_of(weights)}

    blocks = range(worker.rank, shards.num_blocks, worker.world)
    batches = _Batches(dataset, shards, blocks, experiment.evaluation.batch_size)
    sums = torch.zeros(4, *statistics_shape(shards.shape), dtype=torch.float64, device=device)
    psnr = torch.zeros(2, dtype=torch.float64, device=device)
    writer: ShardWriter | None = None
    for step, batch in enumerate(stream(batches, range(len(batches)), experiment.data.num_loaders)):
        if batches.starts_block(step):
            if writer is not None:
                writer.close(write_index=False)
            prefix = f"{batches.block(step):06d}-"
            writer = ShardWriter(folder, domain="latent", protocol=about, prefix=prefix)
        assert writer is not None and batch.mask is not None
        good = batch.rows(batch.mask.nonzero().flatten().tolist())
        for copy, signal in enumerate(domain.copies(good.to(device)) if len(good) else ()):
            if rows is None:
                mean, deviation = module.posterior(signal)
            else:
                assert good.number is not None
                mean, deviation = rows[good.number].to(device), None
            found = mean[:, None] if deviation is None else torch.stack([mean, deviation], dim=1).half()
            sums += _sums(found)
            records = _records(signal, copy, found)
            if deviation is None:
                fits = _psnr(module, signal, mean)
                psnr += torch.stack([torch.ones_like(fits), fits]).double().sum(1)
                for record, fit in zip(records, fits.tolist(), strict=True):
                    record["json"] = json.dumps({"psnr": round(fit, 3)}).encode()
            for record in records:
                writer.write(record)
        if is_first():
            done = (step + 1) / len(batches)
            worker.progress(round(done * len(dataset)), len(dataset), {})
    if writer is not None:
        writer.close(write_index=False)

    count, mean, square, variance = sum_over_ranks(sums)
    num_fitted, fits = sum_over_ranks(psnr).tolist()
    if is_first():  # after the sums, to which every rank came with its shards written
        mean, square, variance = mean / count, square / count, variance / count
        deviation = (square - mean.square() + variance).clamp(min=0).sqrt()
        deviation = torch.where(deviation > 0, deviation, 1.0)  # a number that never varies is left as it is
        statistics = {"mean": mean.tolist(), "deviation": deviation.tolist(), "latent_shape": shards.shape}
        if num_fitted:
            statistics["psnr"] = fits / num_fitted
        write_text(folder / "statistics.json", json.dumps(statistics, indent=1) + "\n")
        write_index(folder, domain="latent", protocol=about)


def _sums(found: Float[Tensor, "batch mean_and_deviation *latent_shape"]) -> Float64[Tensor, "4 *statistics"]:
    """Count, and sums of the mean, its square, and the variance, over a batch and the cells of its planes."""
    mean, *deviation = found.double().unbind(1)
    variance = deviation[0].square() if deviation else torch.zeros_like(mean)
    over = (0,) if mean.dim() == 3 else (0, 2, 3)
    sums = torch.stack([m.sum(over) for m in (torch.ones_like(mean), mean, mean.square(), variance)])
    return sums.view(4, *statistics_shape(tuple(mean.shape[1:])))


def _records(signal: Signal, copy: int, latents: Tensor) -> list[Record]:
    records = []
    for key, text, latent in zip(signal.key, signal.text, latents.cpu().numpy(), strict=True):
        file = io.BytesIO()
        np.save(file, latent, allow_pickle=False)
        record: Record = {"__key__": f"{key}#{copy}" if copy else key, "latent.npy": file.getvalue()}
        records.append(record | ({"txt": text.encode()} if text else {}))
    return records


def _psnr(module: FieldAutoencoder, signal: Signal, latent: Tensor) -> Float[Tensor, " batch"]:
    """Of each fitted function on what the encoder saw, in dB."""
    queries, values = module.domain.measurements(signal)
    error = module.domain.squared_error(module.domain.observe(module.decode(latent), queries), values)
    return 20 * math.log10(module.domain.value_span) - 10 * error.log10()


def refuse_foreign_latents(index: ShardIndex, folder: Path, weights: Path) -> None:
    """Raise ValueError where a folder's latents were not written by the autoencoder of these weights."""
    found, expected = index.protocol.get("autoencoder"), storage.sha256_of(weights)
    if found not in (None, expected):  # earlier versions did not write it
        raise ValueError(
            f"{folder} holds latents of another autoencoder (sha256 {found[:12]}, {weights} has {expected[:12]}); "
            f"bring back the ones that belong together, or delete {folder} to write it again"
        )


@dataclass(frozen=True)
class LatentShards:
    """How the latents of a set lie in shards: blocks of samples that depend on the set alone, not on the workers."""

    shape: tuple[int, ...]
    num_samples: int
    copies: int
    record_bytes: int

    @staticmethod
    def of(experiment: Experiment, index: ShardIndex, autoencoder: FieldAutoencoder) -> "LatentShards":
        """Reads one sample, which also shows whether the data are what the domain expects."""
        signal, _ = experiment.dataset(index).signal(0)
        return LatentShards.sized(experiment, index.num_samples, autoencoder, has_text=bool(signal.text))

    @staticmethod
    def sized(
        experiment: Experiment, num_samples: int, autoencoder: FieldAutoencoder, *, has_text: bool
    ) -> "LatentShards":
        """Those of a set that is not at hand."""
        shape = autoencoder.latent_shape
        members = [128 + 4 * math.prod(shape)] + [1] * (has_text + (not autoencoder.is_variational))
        size = sum(512 + -(-member // 512) * 512 for member in members)
        return LatentShards(shape, num_samples, experiment.domain.num_copies, size)

    @property
    def num_bytes(self) -> int:
        """Predicted bytes."""
        return self.num_samples * self.copies * self.record_bytes

    @property
    def block(self) -> int:
        """Samples a shard: few enough to spread small sets over workers, and for shards of bounded size."""
        most = max(1, _SHARD_BYTES // (self.copies * self.record_bytes))
        return min(most, max(32, -(-self.num_samples // 64)))

    @property
    def num_blocks(self) -> int:
        return -(-self.num_samples // self.block)


class _Batches(Dataset):
    """The samples of some blocks by step, in batches that do not cross blocks. Errors are returned, not raised."""

    def __init__(self, dataset: ShardDataset, shards: LatentShards, blocks: Sequence[int], batch_size: int) -> None:
        self.dataset, self.shards, self.blocks, self.batch_size = dataset, shards, blocks, batch_size
        self.steps = -(-shards.block // batch_size)  # of a whole block

    def __len__(self) -> int:
        if not self.blocks:
            return 0
        last = min(self.shards.block, self.shards.num_samples - self.blocks[-1] * self.shards.block)
        return (len(self.blocks) - 1) * self.steps + -(-last // self.batch_size)

    def block(self, step: int) -> int:
        return self.blocks[step // self.steps]

    def starts_block(self, step: int) -> bool:
        return step % self.steps == 0

    def __getitem__(self, step: int) -> Signal | ValueError:
        start = self.block(step) * self.shards.block
        end = min(start + self.shards.block, self.shards.num_samples)
        first = start + step % self.steps * self.batch_size
        try:
            found = [self.dataset.signal(number) for number in range(first, min(first + self.batch_size, end))]
        except ValueError as error:
            return error
        mask = torch.tensor([good for _, good in found])
        return dataclasses.replace(collate([signal for signal, _ in found]), mask=mask)
