"""The training loop: one function, the same for every module, engine, number of workers and launcher."""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import NonNegativeInt, PositiveInt
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from distributed_inr.config import config
from distributed_inr.data.reader import ShardDataset, evaluation_stream, training_stream
from distributed_inr.domains.domain import Signal
from distributed_inr.training import checkpoint
from distributed_inr.training.engine import Engine, Optim, Scale, build_engine
from distributed_inr.training.fragments import average, is_first, sum_over_ranks

logger = logging.getLogger(__name__)

EMA_RAMP = 0.05
"""The running average's half-life is at most this part of the samples seen, to forget the start (as EDM's)."""

PROGRESS_SECONDS = 0.5


@config
class Training:
    """How long and how one module is trained. Every length is in samples seen."""

    num_samples: PositiveInt
    """Length of the run."""
    batch_size: PositiveInt = 32
    """Samples in one step, over all workers."""
    micro_batch_size: PositiveInt | None = None
    """Samples that a worker puts through the model at once, adding up gradients. none: its whole share of a batch."""
    optim: Optim = Optim()
    """The optimizer and its schedule."""
    ema_half_life_samples: NonNegativeInt = 0
    """Half-life of the running average of weights that the run ends with; at most 5 % of the samples seen. 0: none."""
    log_every_samples: PositiveInt = 3_200
    """Samples between lines of metrics."""
    evaluate_every_samples: PositiveInt | None = None
    """Samples between evaluations of the losses on the validation set; also done at the end. none: only then."""
    checkpoint_every_samples: PositiveInt | None = None
    """Samples between checkpoints; also written at the end. none: only then."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints to keep."""

    def num_micro_batches(self, num_workers: int, *, path: str = "training") -> int:
        """Micro-batches of a step on each worker. Raises ValueError, naming `path`, where they do not fit."""
        micro_batch_size = self.micro_batch_size or max(1, self.batch_size // num_workers)
        unit = num_workers * micro_batch_size
        if self.batch_size % unit:
            raise ValueError(
                f"{path}.batch_size={self.batch_size} must be a multiple of scale.num_workers * "
                f"{path}.micro_batch_size = {num_workers} * {micro_batch_size} = {unit}; "
                f"try {-(-self.batch_size // unit) * unit}"
            )
        return self.batch_size // unit


def train(
    module: nn.Module,
    dataset: ShardDataset,
    *,
    training: Training,
    scale: Scale,
    seed: int,
    folder: Path,
    config_json: str,
    val_dataset: ShardDataset | None = None,
    num_loaders: int = 0,
    report: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> bool:
    """Train `module`, resuming from the newest checkpoint in `folder`; every rank calls it with the same arguments.

    Writes metrics.jsonl, tensorboard/, checkpoints/ and at the end model.safetensors: the average, if one is kept.

    Args:
        seed: of the run; a resumed run must have the same.
        config_json: the whole experiment, kept with each checkpoint.
        num_loaders: loader processes of each worker; 0 reads in the worker itself.
        report: called on every rank after each checkpoint with the newest metrics and "checkpoint", its path.
        progress: called on the first rank with (samples done, of how many, {"loss", "samples/s"}), seldom.
        stop: asked on every rank at each micro-batch, until it says True; on any rank that makes all finish the step,
            write a checkpoint and return.

    Returns:
        Whether the run is complete; False if `stop` ended it early.
    """
    # --- build: this worker's share of a step, and the engine around the module
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batch_size, num_micro_batches = training.batch_size, training.num_micro_batches(world)
    micro_batch_size = batch_size // world // num_micro_batches
    torch.manual_seed(seed)
    engine = build_engine(
        module,
        scale=scale,
        optim=training.optim,
        micro_batch_size=micro_batch_size,
        num_micro_batches=num_micro_batches,
    )

    # --- prepare: the running average of the weights, on the fragments that this rank owns
    fragments, half_life = engine.state(), training.ema_half_life_samples
    averages = [dataclasses.replace(f, weight=f.weight.clone(), moments={}) for f in fragments] if half_life else []

    # --- resume: exactly at the sample
    samples, seconds = 0, 0.0
    path = checkpoint.newest(folder / "checkpoints")
    if path is not None:
        state = checkpoint.load(path, engine, averages=averages)
        samples, seconds = state["samples"], state["seconds"]
        if state["seed"] != seed:
            raise ValueError(f"{path} has seed={state['seed']}, this run seed={seed}; use that seed or another output")
    writer = _open_logs(folder, samples) if is_first() else None
    if is_first():
        count = sum(torch.Size(f.shape).numel() for f in fragments)
        logger.info(
            "%s: %.2f M parameters, %d workers x %d micro-batches x %d samples a step, %d of %d samples done%s",
            *(type(module).__name__, count / 1e6, world, num_micro_batches, micro_batch_size),
            *(samples, training.num_samples, f" ({path})" if path else ""),
        )
    batches = training_stream(
        dataset,
        start=samples,
        global_batch=batch_size,
        micro_batch=micro_batch_size,
        rank=rank,
        world=world,
        num_loaders=num_loaders,
    )

    # --- loop: one pass is one micro-batch, and what follows the first `continue` is done once a step
    complete, asked, stopping = samples >= training.num_samples, False, False
    window: list[dict[str, float]] = []  # metrics of the steps since the last line of the log
    begin, clock, shown = time.monotonic() - seconds, time.monotonic(), 0.0
    while not complete and not stopping:
        batch = next(batches)
        lr = training.optim.learning_rate(samples, batch_size=batch_size, num_samples=training.num_samples)
        losses = engine.forward(batch.to(engine.device))
        asked = asked or (stop is not None and stop())
        metrics = engine.step(losses, keys=batch.key, lr=lr, stop=asked)
        if metrics is None:
            continue
        samples, stopping = samples + batch_size, metrics.pop("stop") > 0
        if half_life:
            average(averages, fragments, 0.5 ** (batch_size / min(half_life, EMA_RAMP * samples)))
        window.append(metrics)

        complete = samples >= training.num_samples
        rate = len(window) * batch_size / (time.monotonic() - clock)
        if progress is not None and is_first() and (complete or time.monotonic() - shown > PROGRESS_SECONDS):
            shown = time.monotonic()
            progress(samples, training.num_samples, {"loss": metrics["train/total"], "samples/s": rate})

        evaluating = complete or _due(training.evaluate_every_samples, samples, batch_size)
        saving = complete or stopping or _due(training.checkpoint_every_samples, samples, batch_size)
        if not (evaluating or saving or _due(training.log_every_samples, samples, batch_size)):
            continue
        record: dict[str, float] = {name: sum(m[name] for m in window) / len(window) for name in metrics}
        record["samples_per_second"] = rate
        if val_dataset is not None and evaluating:
            validation = evaluation_stream(
                val_dataset, batch=micro_batch_size, rank=rank, world=world, num_loaders=num_loaders
            )
            record |= _validate(engine, validation, samples)
        seconds = time.monotonic() - begin
        record = {"samples": samples, "step": engine.steps, "seconds": seconds, "lr": lr, **record}
        if writer is not None:
            _log(folder, writer, record)
        if saving:
            path = checkpoint.save(
                folder / "checkpoints",
                engine,
                averages=averages,
                config_json=config_json,
                state={"samples": samples, "seconds": seconds, "seed": seed},
                keep=training.keep_checkpoints,
            )
            if report is not None:
                report({**record, "checkpoint": str(path)})
        window, clock = [], time.monotonic()

    if complete and is_first():
        assert path is not None
        partial = folder / "model.safetensors.partial"
        shutil.copyfile(path / ("ema.safetensors" if half_life else "model.safetensors"), partial)
        partial.replace(folder / "model.safetensors")
    if writer is not None:
        writer.close()
    if dist.is_initialized():
        dist.barrier()
    return complete


def _due(every: int | None, samples: int, batch_size: int) -> bool:
    """Whether the step that ended at `samples` seen crossed a multiple of `every`."""
    return every is not None and samples // every != (samples - batch_size) // every


@torch.no_grad()
def _validate(engine: Engine, batches: Iterable[Signal], samples: int) -> dict[str, float]:
    """Means of the losses over all samples of a set, each counted once; all ranks make equally many forward passes."""
    engine.unwrap().eval()
    sums: dict[str, torch.Tensor] = {}
    count = 0
    for batch in batches:
        rows = range(len(batch)) if batch.mask is None else batch.mask.nonzero().flatten().tolist()
        # A batch without any sample that counts is passed through all the same: the other ranks wait for it at stage 3.
        part = _rows(batch, rows or [0]).to(engine.device)
        # Schedules that depend on the position are where training is.
        part = dataclasses.replace(part, position=torch.full_like(part.position, samples))
        for name, loss in engine.forward(part).items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=engine.device)) + loss * len(rows)
        count += len(rows)
    engine.unwrap().train()
    totals = sum_over_ranks(
        torch.stack([*sums.values(), torch.tensor(count, dtype=torch.float64, device=engine.device)])
    )
    *values, number = totals.tolist()
    losses = {f"val/{name}": value / number for name, value in zip(sums, values, strict=True)}
    return {**losses, "val/total": sum(losses.values())}


def _rows(batch: Signal, rows: Sequence[int]) -> Signal:
    part = batch.map(lambda tensor: tensor[list(rows)])
    return dataclasses.replace(part, key=[batch.key[i] for i in rows], text=[batch.text[i] for i in rows])


def _open_logs(folder: Path, samples: int) -> SummaryWriter:
    """Open the logs to continue after `samples`, without what an interrupted run logged beyond its checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["samples"] <= samples]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(path)
    return SummaryWriter(str(folder / "tensorboard"), purge_step=samples + 1)


def _log(folder: Path, writer: SummaryWriter, record: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    for name, value in record.items():
        writer.add_scalar(name, value, int(record["samples"]))
    writer.flush()
    shown = "  ".join(f"{name} {value:9.4g}" for name, value in record.items() if "/" in name)
    logger.info(
        "%12d samples  %8.1f samples/s  lr %.2e  %s",
        record["samples"],
        record["samples_per_second"],
        record["lr"],
        shown,
    )
