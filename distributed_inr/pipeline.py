"""A run from data to evaluation: fit the autoencoder -> write latents -> fit the prior -> evaluate.

Each stage keeps a `stage.json`: the options and inputs that its output depends on, marked complete last. A complete
stage is skipped; a stage begun with other options is refused. How fast and how often things are done (`scale`, batch
sizes, checkpoints, logging) may change between two calls.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import io
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from distributed_inr.config import differences, override, to_dict, to_json
from distributed_inr.data import storage
from distributed_inr.data.reader import ShardDataset, read_latent
from distributed_inr.data.shards import ShardIndex, ShardWriter, write_index
from distributed_inr.domains.domain import Signal, collate
from distributed_inr.experiment import Experiment
from distributed_inr.generation import load_weights
from distributed_inr.launch import Worker, in_ray_job, launcher
from distributed_inr.training.fragments import is_first, sum_over_ranks
from distributed_inr.training.loop import Training, train

logger = logging.getLogger(__name__)

SHARED_OUTPUT = "~/distributed_inr/runs"
"""Where runs go inside a Ray job, or on several nodes, when nobody says where."""

_MAY_CHANGE = frozenset(
    ("batch_size", "micro_batch_size", "keep_checkpoints")
    + ("log_every_samples", "evaluate_every_samples", "checkpoint_every_samples")
)
_ORDER = ("num_streams", "shuffle_shards")
_MODEL = "model.safetensors"
_LATENT_SHARD_BYTES = 64 * 2**20


def run(experiment: Experiment) -> dict[str, Path]:
    """Make a run complete, or go on with one that was interrupted. Returns what it made, by name.

    Raises ValueError, before any work, where the options do not fit each other, the data or the run folder.
    """
    experiment = _settle_output(experiment, shared=in_ray_job())
    with torch.device("meta"):  # shapes only: what does not fit is found before anything is trained
        autoencoder = experiment.autoencoder.build(experiment.domain)
        prior = experiment.prior.build(autoencoder.latent_shape)
    train_index, val_index = _indexes(experiment)
    latents_bytes = _Latents.of(experiment, train_index, autoencoder.latent_shape)

    with contextlib.ExitStack() as stack:
        place = stack.enter_context(launcher(experiment.scale))
        experiment = _settle_output(experiment, shared=place.num_nodes > 1 or in_ray_job())
        folder = experiment.folder
        stack.enter_context(_locked(folder))
        tree = to_dict(experiment)
        order = {name: tree["data"][name] for name in _ORDER}
        fit = Stage(
            folder / "autoencoder",
            {name: tree[name] for name in ("seed", "domain", "autoencoder")}
            | {"data": order, "autoencoder_training": _lasting(tree["autoencoder_training"])},
        )
        encode = Stage(folder / "latents", {"domain": tree["domain"]})
        fit_prior = Stage(
            folder / "prior",
            {"seed": tree["seed"], "prior": tree["prior"]}
            | {"data": order, "prior_training": _lasting(tree["prior_training"])},
        )
        evaluation = Stage(
            folder / "evaluation",
            {name: _lasting(tree[name]) for name in ("sampling", "evaluation")} | {"seed": tree["seed"]},
        )
        for stage in (fit, encode, fit_prior):
            stage.refuse_other_options()
        _check_space(
            folder,
            {
                fit.folder: _training_bytes(autoencoder, experiment.autoencoder_training),
                encode.folder: latents_bytes.total,
                fit_prior.folder: _training_bytes(prior, experiment.prior_training),
            },
        )
        _write(folder / "config.json", to_json(experiment) + "\n")

        inputs = {"train": train_index.fingerprint}
        if not fit.is_complete(inputs):
            fit.begin(inputs)
            work = functools.partial(fit_autoencoder, experiment=experiment, stage=fit)
            place.run(work, title="autoencoder", folder=fit.folder, stoppable=True)
            fit.finish(inputs)

        inputs = {"autoencoder": storage.sha256_of(fit.folder / _MODEL), "train": train_index.fingerprint}
        if not encode.is_complete(inputs):
            encode.begin(inputs)
            work = functools.partial(write_latents, experiment=experiment, stage=encode, latents=latents_bytes)
            place.run(work, title="latents", folder=encode.folder)
            encode.finish(inputs)

        inputs = {"latents": experiment.data.index(str(encode.folder)).fingerprint}
        if not fit_prior.is_complete(inputs):
            fit_prior.begin(inputs)
            work = functools.partial(fit_latent_prior, experiment=experiment, stage=fit_prior, latents=encode.folder)
            place.run(work, title="prior", folder=fit_prior.folder, stoppable=True)
            fit_prior.finish(inputs)

        inputs = {name: storage.sha256_of(folder / name / _MODEL) for name in ("autoencoder", "prior")}
        inputs["val"] = val_index.fingerprint if val_index else ""
        if not evaluation.is_current(inputs):
            evaluation.begin(inputs)
            work = functools.partial(evaluate_run, experiment=experiment, stage=evaluation)
            place.run(work, title="evaluation", folder=evaluation.folder, num_workers=1)
            evaluation.finish(inputs)

    names = ["config.json", "evaluation.json", "report.md", *sorted(path.name for path in folder.glob("*.png"))]
    models = {name: folder / name / _MODEL for name in ("autoencoder", "prior")}
    return {"run": folder} | models | {name: folder / name for name in names if (folder / name).exists()}


# --- stages: each runs on the workers


def fit_autoencoder(worker: Worker, *, experiment: Experiment, stage: "Stage") -> None:
    """Train the autoencoder on the training shards."""
    stage.check_shared()
    torch.manual_seed(experiment.seed)  # the same initial weights on every rank
    module = experiment.autoencoder.build(experiment.domain)
    train_index, val_index = _indexes(experiment)
    _train(
        module,
        _dataset(experiment, train_index),
        worker,
        experiment=experiment,
        training=experiment.autoencoder_training,
        folder=stage.folder,
        val_dataset=None if val_index is None else _dataset(experiment, val_index),
    )


def fit_latent_prior(worker: Worker, *, experiment: Experiment, stage: "Stage", latents: Path) -> None:
    """Train the prior on the written latents; neither the autoencoder nor its data are read."""
    stage.check_shared()
    statistics = json.loads((latents / "statistics.json").read_text())
    torch.manual_seed(experiment.seed)
    module = experiment.prior.build(tuple(statistics["latent_shape"]))
    module.normalise_from(torch.tensor(statistics["mean"]), torch.tensor(statistics["deviation"]))
    dataset = experiment.data.dataset(experiment.data.index(str(latents)), read=read_latent, seed=experiment.seed)
    _train(module, dataset, worker, experiment=experiment, training=experiment.prior_training, folder=stage.folder)


@torch.no_grad()
def write_latents(worker: Worker, *, experiment: Experiment, stage: "Stage", latents: "_Latents") -> None:
    """Write mean and deviation of every training signal's latent, and of its copies, as shards; and their statistics.

    Shard k holds the same block of samples for every number of workers.
    """
    stage.check_shared()
    if is_first():
        stage.clear()  # what an interrupted attempt has left
    if dist.is_initialized():
        dist.barrier()
    domain, folder = experiment.domain, stage.folder
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = experiment.autoencoder.build(domain)
    load_weights(module, experiment.folder / "autoencoder" / _MODEL)
    module.to(device)
    dataset = _dataset(experiment, experiment.data.index(experiment.data.train))
    about = {"from": dataset.index.fingerprint, "copies": latents.copies}

    blocks = range(worker.rank, latents.num_blocks, worker.world)
    batches = _Batches(dataset, latents, blocks, experiment.evaluation.batch_size)
    loader = DataLoader(batches, batch_size=None, num_workers=experiment.data.num_loaders, collate_fn=_unchanged)
    sums = torch.zeros(4, latents.shape[0], dtype=torch.float64, device=device)
    writer: ShardWriter | None = None
    for step, batch in enumerate(loader):
        if isinstance(batch, ValueError):
            raise batch
        if batches.starts_block(step):
            if writer is not None:
                writer.close(write_index=False)
            prefix = f"{batches.block(step):06d}-"
            writer = ShardWriter(folder, domain="latent", protocol=about, prefix=prefix)
        assert writer is not None
        for copy, signal in enumerate(domain.copies(batch.to(device))):
            found = torch.stack(module.posterior(signal), dim=1).half()  # [batch, 2, *latent_shape]
            found = found[batch.mask.to(device)]
            mean, deviation = found.double().flatten(3).unbind(1)  # [batch, channels, cells]
            sums += torch.stack([torch.ones_like(mean), mean, mean.square(), deviation.square()]).sum((1, 3))
            names = [(key, text) for key, text, good in zip(batch.key, batch.text, batch.mask, strict=True) if good]
            for (key, text), latent in zip(names, found.cpu().numpy(), strict=True):
                file = io.BytesIO()
                np.save(file, latent, allow_pickle=False)
                record = {"__key__": f"{key}#{copy}" if copy else key, "latent.npy": file.getvalue()}
                writer.write(record | ({"txt": text.encode()} if text else {}))
        if is_first():
            done = (step + 1) / len(batches)
            worker.progress(round(done * len(dataset)), len(dataset), {})
    if writer is not None:
        writer.close(write_index=False)

    count, mean, square, variance = sum_over_ranks(sums)
    if is_first():  # after the sum, to which every rank came with its shards written
        mean, square, variance = mean / count, square / count, variance / count
        deviation = (square - mean.square() + variance).sqrt()
        statistics = {"mean": mean.tolist(), "deviation": deviation.tolist(), "latent_shape": latents.shape}
        _write(folder / "statistics.json", json.dumps(statistics, indent=1) + "\n")
        write_index(folder, domain="latent", protocol=about)


def evaluate_run(worker: Worker, *, experiment: Experiment, stage: "Stage") -> None:
    """Sample from the run and measure it."""
    from distributed_inr.evaluation.evaluate import evaluate

    stage.check_shared()
    evaluate(experiment.folder, progress=worker.progress)


def _train(
    module: nn.Module,
    dataset: ShardDataset,
    worker: Worker,
    *,
    experiment: Experiment,
    training: Training,
    folder: Path,
    val_dataset: ShardDataset | None = None,
) -> None:
    train(
        module,
        dataset,
        training=training,
        scale=experiment.scale,
        seed=experiment.seed,
        folder=folder,
        config_json=to_json(experiment),
        val_dataset=val_dataset,
        num_loaders=experiment.data.num_loaders,
        report=worker.report,
        progress=worker.progress,
        stop=worker.stop,
    )


@dataclass(frozen=True)
class _Latents:
    """How the latents of a set lie in shards: blocks of samples that depend on the set alone, not on the workers."""

    shape: tuple[int, ...]
    num_samples: int
    copies: int
    record_bytes: int

    @staticmethod
    def of(experiment: Experiment, index: ShardIndex, shape: tuple[int, ...]) -> "_Latents":
        """Reads one sample, which also shows whether the data are what the domain expects."""
        signal, _ = _dataset(experiment, index).signal(0)
        members = [128 + 4 * math.prod(shape)] + ([1] if signal.text else [])
        size = sum(512 + -(-member // 512) * 512 for member in members)
        return _Latents(shape, index.num_samples, len(experiment.domain.copies(collate([signal]))), size)

    @property
    def total(self) -> int:
        """Predicted bytes."""
        return self.num_samples * self.copies * self.record_bytes

    @property
    def block(self) -> int:
        """Samples a shard: few enough to spread small sets over workers, and for shards of bounded size."""
        most = max(1, _LATENT_SHARD_BYTES // (self.copies * self.record_bytes))
        return min(most, max(32, -(-self.num_samples // 64)))

    @property
    def num_blocks(self) -> int:
        return -(-self.num_samples // self.block)


class _Batches(Dataset):
    """The samples of some blocks by step, in batches that do not cross blocks. Errors are returned, not raised."""

    def __init__(self, dataset: ShardDataset, latents: _Latents, blocks: Sequence[int], batch_size: int) -> None:
        self.dataset, self.latents, self.blocks, self.batch_size = dataset, latents, blocks, batch_size
        self.steps = -(-latents.block // batch_size)  # of a whole block

    def __len__(self) -> int:
        if not self.blocks:
            return 0
        last = min(self.latents.block, self.latents.num_samples - self.blocks[-1] * self.latents.block)
        return (len(self.blocks) - 1) * self.steps + -(-last // self.batch_size)

    def block(self, step: int) -> int:
        return self.blocks[step // self.steps]

    def starts_block(self, step: int) -> bool:
        return step % self.steps == 0

    def __getitem__(self, step: int) -> Signal | ValueError:
        start = self.block(step) * self.latents.block
        end = min(start + self.latents.block, self.latents.num_samples)
        first = start + step % self.steps * self.batch_size
        try:
            found = [self.dataset.signal(number) for number in range(first, min(first + self.batch_size, end))]
        except ValueError as error:
            return error
        mask = torch.tensor([good for _, good in found])
        return dataclasses.replace(collate([signal for signal, _ in found]), mask=mask)


def _unchanged(batch: Any) -> Any:
    return batch


# --- the run folder


@dataclass(frozen=True)
class Stage:
    """One stage's folder, and the options that what it holds depends on."""

    folder: Path
    options: Mapping[str, Any]

    @property
    def _record(self) -> Mapping[str, Any] | None:
        """What `stage.json` says; none when the stage was never begun."""
        path = self.folder / "stage.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}; delete {self.folder} to make it again") from None

    def refuse_other_options(self) -> None:
        record = self._record
        changed = differences(record["options"], self.options) if record else {}
        if changed:
            shown = "; ".join(f"{path} is {old} there and {new} here" for path, (old, new) in changed.items())
            raise ValueError(
                f"{self.folder} was made with other options: {shown}. Set them back, choose another --name or "
                f"--output, or delete {self.folder} to make it again"
            )

    def is_complete(self, inputs: Mapping[str, str]) -> bool:
        """Whether it can be skipped. Raises ValueError if it was made from other inputs."""
        record = self._record
        if record is None:
            return False
        changed = sorted(differences(record["inputs"], inputs))
        if changed:
            raise ValueError(
                f"{self.folder} was made from other inputs ({', '.join(changed)}). Restore them, choose another --name "
                f"or --output, or delete {self.folder} to make it again"
            )
        return record["complete"]

    def is_current(self, inputs: Mapping[str, str]) -> bool:
        """Whether it can be skipped, where what changed is simply made again."""
        return self._record == self._as_record(inputs, complete=True)

    def begin(self, inputs: Mapping[str, str]) -> None:
        self.folder.mkdir(exist_ok=True)
        _write(self.folder / "stage.json", json.dumps(self._as_record(inputs, complete=False), indent=1) + "\n")

    def finish(self, inputs: Mapping[str, str]) -> None:
        """Written last: what the folder holds is whole."""
        _write(self.folder / "stage.json", json.dumps(self._as_record(inputs, complete=True), indent=1) + "\n")

    def clear(self) -> None:
        """Delete the shards of an earlier attempt."""
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in ("stage.json", "log.txt"):
                path.unlink()

    def check_shared(self) -> None:
        """On a worker: is this the folder that the driver sees?"""
        if self._record is None:
            raise ValueError(
                f"{self.folder} on node {socket.gethostname()} is not the driver's folder; set --output to a folder "
                "that all nodes share"
            )

    def _as_record(self, inputs: Mapping[str, str], *, complete: bool) -> dict[str, Any]:
        return {"complete": complete, "options": self.options, "inputs": inputs}


def _settle_output(experiment: Experiment, *, shared: bool) -> Experiment:
    """The experiment with its output where it can stay: absolute if nodes share it, or Ray runs a copy of the code."""
    output = experiment.output
    if not storage.is_local(output):
        raise ValueError(f"output={output!r} is an object store, which cannot hold a running run; use a shared folder")
    if not shared or Path(output).expanduser().is_absolute():
        return experiment
    if output != Experiment.__dataclass_fields__["output"].default:
        raise ValueError(
            f"output={output!r} is relative: inside a Ray job, and on several nodes, it must be an absolute folder "
            f"that all nodes share; leave it out for {SHARED_OUTPUT}"
        )
    logger.info("output: %s", Path(SHARED_OUTPUT).expanduser())
    return override(experiment, {"output": str(Path(SHARED_OUTPUT).expanduser())})


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run folder, made if need be, against other jobs. The system lets go of it when this process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115  held open as long as the lock
    except OSError as error:
        raise storage.explain(error, str(folder)) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by {file.read().strip() or 'another job'}; wait for it, or choose another --name "
                "or --output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            logger.warning("%s: this file system has no locks; do not run two jobs of this name at once", folder)
        file.truncate(0)
        since = datetime.datetime.now().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        yield


def _write(path: Path, text: str) -> None:
    try:
        storage.write_atomic(str(path), text.encode())
    except OSError as error:
        raise storage.explain(error, str(path.parent)) from None


def _check_space(folder: Path, needed: Mapping[Path, int]) -> None:
    """Refuse a run whose checkpoints and latents will not fit the disk."""
    total = 0
    for place, size in needed.items():
        held = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        total += max(0, size - held)
    free = shutil.disk_usage(folder).free
    if total > free:
        parts = ", ".join(f"{place.name} {size / 1e9:.3g}" for place, size in needed.items())
        raise ValueError(
            f"no space in {folder}: {total / 1e9:.3g} GB are needed ({parts}) and {free / 1e9:.3g} GB are free; free "
            "some, choose another --output, or lower keep_checkpoints"
        )


def _training_bytes(module: nn.Module, training: Training) -> int:
    """What a fit's kept checkpoints, the one being written and the final model take: float32 weights and moments."""
    weights = 4 * sum(tensor.numel() for tensor in module.state_dict().values())
    copies = 3 + (training.ema_half_life_samples > 0)
    return weights * (copies * (training.keep_checkpoints + 1) + 1)


def _lasting(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name not in _MAY_CHANGE}


# --- data


def _indexes(experiment: Experiment) -> tuple[ShardIndex, ShardIndex | None]:
    """The training and the held-out set, checked."""
    data, kind = experiment.data, experiment.domain.kind
    found = {name: data.index(url) for name, url in (("train", data.train), ("val", data.val)) if url is not None}
    for name, index in found.items():
        if index.domain not in (None, kind):
            raise ValueError(
                f"data.{name}={getattr(data, name)!r} holds a set of {index.domain}, domain.kind={kind}; "
                "give a set of that domain"
            )
    return found["train"], found.get("val")


def _dataset(experiment: Experiment, index: ShardIndex) -> ShardDataset:
    return experiment.data.dataset(index, read=experiment.domain.read, seed=experiment.seed)
