"""The training loop: one function, the same for every module, engine, number of workers and launcher."""

import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import NonNegativeInt, PositiveInt
from safetensors.torch import save_file
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from distributed_inr.config import config
from distributed_inr.data import storage
from distributed_inr.data.reader import ShardDataset, evaluation_stream, training_stream
from distributed_inr.domains.domain import Signal
from distributed_inr.training import checkpoint
from distributed_inr.training.agreement import Agreement
from distributed_inr.training.bank import Bank
from distributed_inr.training.checkpoint_reader import BANK
from distributed_inr.training.engine import Engine, Optim, Scale, build_engine
from distributed_inr.training.fragments import Fragment, average, is_first, rank_and_world, sum_over_ranks
from distributed_inr.training.ledger import Ledger
from distributed_inr.training.run_state import RunState

logger = logging.getLogger(__name__)

EMA_RAMP = 0.05
"""The running average's half-life is at most this part of the samples seen, to forget the start (as EDM's)."""

PROGRESS_SECONDS = 0.5


@config
class Training:
    """How long and how one module is trained. Every length is in samples seen."""

    num_samples: PositiveInt
    """Length of the run, in samples."""
    batch_size: PositiveInt = 32
    """Samples in one step, over all workers."""
    micro_batch_size: PositiveInt | None = None
    """Samples that a worker puts through the model at once, adding up gradients. none: its whole share of a batch."""
    optim: Optim = Optim()
    """The optimizer and its schedule."""
    ema_half_life_samples: NonNegativeInt = 0
    """Half-life of the running average of weights that the run ends with; at most 5 % of the samples seen. 0: none."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What follows a step whose loss or gradient is not finite, on any worker; it is never applied. stop: end the run.
    skip: go on without it. rollback: take the weights of the newest checkpoint, and go on with the data after it."""
    max_nonfinite_steps: PositiveInt = 10
    """Such steps in the whole run after which it ends all the same."""
    log_every_samples: PositiveInt = 3_200
    """Samples between lines of metrics."""
    evaluate_every_samples: PositiveInt | None = None
    """Samples between evaluations of the losses on the validation set; also done at the end. none: only then."""
    checkpoint_every_samples: PositiveInt | None = None
    """Samples between checkpoints: the most that a kill undoes. Also written at the end. none: only then."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints to keep, besides that with the least validation loss."""
    ledger: bool = False
    """Log which worker sees which sample at which position of the run, for jobs/check_ledger.py."""

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
    checkpoints: str | None = None,
    bank: Bank | None = None,
    val_dataset: ShardDataset | None = None,
    num_loaders: int = 0,
    accept_changed: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    save: Callable[[], bool] = lambda: False,
) -> bool:
    """Train `module`, resuming from the newest checkpoint; every rank calls it with the same arguments.

    Writes metrics.jsonl, tensorboard/, checkpoints/ and at the end model.safetensors: the average, if one is kept; and
    bank.safetensors, the rows of the bank.

    Args:
        seed: of the run; a resumed run must have the same.
        config_json: the whole experiment, kept with each checkpoint.
        checkpoints: folder or object store's address for them; none: in `folder`.
        bank: latents of the training set, trained along with a module that takes `Signal.latent`.
        num_loaders: loader processes of each worker; 0 reads in the worker itself.
        accept_changed: go on from a checkpoint of other data.
        report: called on every rank after each checkpoint, on a thread of its own, with the newest metrics and
            "checkpoint", its path.
        progress: called on the first rank with (samples done, of how many, {"loss", "samples/s"}), seldom.
        stop: asked on every rank at each micro-batch, also while data are waited for and in evaluations; as soon as it
            says True on any rank, all leave the step they are in, write a checkpoint and return.
        save: asked like `stop`; when it says True on any rank, a checkpoint is written at once, of the last step.

    Returns:
        Whether the run is complete; False if `stop` ended it early.

    Raises:
        ValueError: data, checkpoints or options do not fit.
        FloatingPointError: a step is not finite, and `training` does not say to go on.
        TimeoutError: no data came for `scale.timeout_seconds`.
    """
    # --- build: this worker's share of a step, and the engine around the module
    rank, world = rank_and_world()
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
    writer = checkpoint.Writer(
        checkpoints or str(folder / "checkpoints"), keep=training.keep_checkpoints, copies=bank.copies if bank else None
    )
    path, run = checkpoint.newest(writer.folder), RunState(seed=seed, data=dataset.index.fingerprint)
    if path is not None:
        run = RunState.of(checkpoint.read_state(path))
        if run.seed != seed:
            raise ValueError(f"{path} has seed={run.seed}, this run seed={seed}; use that seed or another output")
        if run.data != dataset.index.fingerprint and bank is not None:
            raise ValueError(
                f"{path} comes from other data, and its bank has latents of those alone; restore them, or choose "
                "another --name"
            )
        if run.data != dataset.index.fingerprint and not accept_changed:
            raise ValueError(
                f"{path} comes from other data; restore them, choose another --name, or go on with these: "
                "--data.accept-changed true"
            )
        checkpoint.load(path, engine, averages=averages, bank=bank)
        run.data = dataset.index.fingerprint
    logs = _open_logs(folder, run) if is_first() else None
    ledger = Ledger(folder / "ledger", samples=run.samples) if training.ledger else None
    agreement = Agreement(
        stop=stop, save=save, has_written=lambda: writer.has_written, timeout_seconds=scale.timeout_seconds
    )
    batches = agreement.batches(
        training_stream(
            dataset,
            start=run.samples,
            global_batch=batch_size,
            micro_batch=micro_batch_size,
            rank=rank,
            world=world,
            num_loaders=num_loaders,
        )
    )
    if is_first():
        count = sum(torch.Size(f.shape).numel() for f in fragments)
        logger.info(
            "%s: %.2f M parameters, %d workers x %d micro-batches x %d samples a step, %d of %d samples done%s",
            *(type(module).__name__, count / 1e6, world, num_micro_batches, micro_batch_size),
            *(run.samples, training.num_samples, f" ({path})" if path else ""),
        )

    def begin_checkpoint() -> None:
        if writer.is_busy:
            commit_checkpoint()
        if path is not None and _samples(path) == run.samples:
            return
        run.seconds = time.monotonic() - begin
        writer.begin(engine, averages=averages, bank=bank, config_json=config_json, state=dataclasses.asdict(run))

    def commit_checkpoint(*, needed: bool = False) -> None:
        nonlocal path
        committed = writer.commit(needed=needed)
        path = committed or path
        if committed is not None and report is not None:  # which waits for the driver to collect it
            writer.report(report, {**record, "samples": _samples(committed), "checkpoint": committed})

    def attend() -> None:
        """Between micro-batches: commit what all ranks have written, and begin what was asked for."""
        if agreement.written:
            commit_checkpoint()
        if agreement.saving:
            agreement.saving = False
            begin_checkpoint()

    def before_update() -> None:
        """The gradients of the step are finite on all ranks; now its latents take theirs, and then the weights."""
        writer.wait_for_copy()
        if bank is not None:
            bank.update(seen, factor=run.lr / training.optim.lr)

    # --- loop: one pass is one step, and what follows the `continue` is done after some of them
    record, loss, seen = dict[str, Any](), math.nan, list[Signal]()
    begin, clock, clocked, shown = time.monotonic() - run.seconds, time.monotonic(), run.samples, 0.0
    while run.samples < training.num_samples or run.is_unevaluated:
        if not run.is_unevaluated:
            metrics, seen, outcome = None, [], "applied"
            run.lr = training.optim.learning_rate(run.samples, batch_size=batch_size, num_samples=training.num_samples)
            while metrics is None and (batch := next(batches, None)) is not None:
                attend()
                batch = batch if bank is None else bank.attach(batch, engine.device)
                seen.append(batch)
                try:
                    losses = engine.forward(batch.to(engine.device))
                    metrics = engine.step(losses, keys=batch.key, lr=run.lr, before_update=before_update)
                except FloatingPointError as error:
                    run.num_nonfinite += 1
                    if writer.is_busy:
                        commit_checkpoint()  # the newest is what a rollback goes back to
                    outcome, metrics = _recover(error, training, run, path, engine, averages, bank), {}
            if metrics is None:
                break  # some rank is asked to stop
            run.samples, run.score = run.samples + batch_size, None
            if half_life and metrics:
                average(averages, fragments, 0.5 ** (batch_size / min(half_life, EMA_RAMP * run.samples)))
            run.add(metrics)
            loss = metrics.get("train/total", loss)
            if ledger is not None:
                ledger.write(seen, outcome=outcome)

        complete = run.samples >= training.num_samples
        rate = (run.samples - clocked) / (time.monotonic() - clock)
        if progress is not None and is_first() and (complete or time.monotonic() - shown > PROGRESS_SECONDS):
            shown = time.monotonic()
            progress(run.samples, training.num_samples, {"loss": loss, "samples/s": rate})

        due = functools.partial(_due, samples=run.samples, batch_size=batch_size)
        run.is_unevaluated |= val_dataset is not None and (complete or due(training.evaluate_every_samples))
        saving = due(training.checkpoint_every_samples)
        if not (run.is_unevaluated or complete or saving or due(training.log_every_samples)):
            continue
        record = {"samples": run.samples, "step": engine.steps, "lr": run.lr, **run.means(), "samples_per_second": rate}
        if val_dataset is not None and run.is_unevaluated:
            validation = evaluation_stream(
                val_dataset, batch=micro_batch_size, rank=rank, world=world, num_loaders=num_loaders
            )
            losses = _validate(engine, agreement.batches(validation), run.samples, attend)
            if agreement.stopping:
                break  # it is done again when the run goes on
            run.score = losses["val/total"]
            record |= losses
        run.is_unevaluated = False
        record["seconds"] = time.monotonic() - begin
        if logs is not None:
            _log(folder, logs, record)
        run.clear()
        clock, clocked = time.monotonic(), run.samples
        if saving and not complete:
            begin_checkpoint()

    # --- end: the last checkpoint, and of a complete run its weights
    begin_checkpoint()
    if writer.is_busy:
        commit_checkpoint(needed=True)
    complete = run.samples >= training.num_samples and not run.is_unevaluated
    if complete and is_first():
        assert path is not None
        _save(checkpoint.weights(path, average=half_life > 0), folder / "model.safetensors")
        if bank is not None:
            _save({"rows": bank.rows}, folder / BANK)
    writer.close()
    for log in (logs, ledger):
        if log is not None:
            log.close()
    if dist.is_initialized():
        dist.barrier()
    return complete


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    partial = path.with_suffix(".safetensors.partial")
    save_file(tensors, partial, {"format": "pt"})
    partial.replace(path)


def _samples(path: str) -> int:
    """That a checkpoint has seen."""
    return int(storage.split(path)[1])


def _recover(
    error: FloatingPointError,
    training: Training,
    run: RunState,
    path: str | None,
    engine: Engine,
    averages: Sequence[Fragment],
    bank: Bank | None,
) -> str:
    """Do what is to follow a step that is not finite; returns its outcome for the ledger."""
    if training.on_nonfinite == "stop":
        raise error
    if run.num_nonfinite > training.max_nonfinite_steps:
        limit = training.max_nonfinite_steps
        raise FloatingPointError(f"{error}; after max_nonfinite_steps={limit} such steps the run ends")
    if training.on_nonfinite == "rollback":
        if path is None:
            raise FloatingPointError(f"{error}; there is no checkpoint to roll back to") from error
        checkpoint.load(path, engine, averages=averages, bank=bank)
        outcome = f"rolled back to {_samples(path)}"
    else:
        outcome = "skipped"
    if is_first():
        logger.warning("%s; %s", error, outcome)
    return outcome


def _due(every: int | None, *, samples: int, batch_size: int) -> bool:
    """Whether the step that ended at `samples` seen crossed a multiple of `every`."""
    return every is not None and samples // every != (samples - batch_size) // every


@torch.no_grad()
def _validate(engine: Engine, batches: Iterable[Signal], samples: int, attend: Callable[[], None]) -> dict[str, float]:
    """Means of the losses over all samples of a set, each counted once; all ranks make equally many forward passes.

    Of no use where the batches ended early because the run is to stop.
    """
    engine.unwrap().eval()
    sums: dict[str, torch.Tensor] = {}
    count = 0
    for batch in batches:
        attend()
        rows = range(len(batch)) if batch.mask is None else batch.mask.nonzero().flatten().tolist()
        # A batch without any sample that counts is passed through all the same: the other ranks wait for it at stage 3.
        part = batch.rows(rows or [0]).to(engine.device)
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
    losses = {f"val/{name}": value / max(1.0, number) for name, value in zip(sums, values, strict=True)}
    return {**losses, "val/total": sum(losses.values())}


def _open_logs(folder: Path, run: RunState) -> SummaryWriter:
    """Open the logs to continue, without what an interrupted run logged beyond its checkpoint."""
    logged = run.samples - 1 if run.is_unevaluated else run.samples  # an evaluation cut short was not logged yet
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["samples"] <= logged]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(path)
    return SummaryWriter(str(folder / "tensorboard"), purge_step=logged + 1)


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
