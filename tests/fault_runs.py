"""A small but real training run to be killed, stopped and moved: the tiny autoencoder on tiny pictures."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_run import tiny_experiment, write_pictures

from distributed_inr import pipeline
from distributed_inr.config import override, to_json
from distributed_inr.experiment import Experiment
from distributed_inr.launch import Worker
from distributed_inr.run_folder import Stage
from distributed_inr.training.ledger import Account

BATCH = 4


def make_experiment(folder: Path, *, steps: int, **changes: Any) -> Experiment:
    """The tiny autoencoder on 30 pictures, every step logged; `changes` are dotted paths with __ for the dots."""
    if not (folder / "train").exists():
        write_pictures(folder / "train", 30, seed=1)
        write_pictures(folder / "val", 6, seed=2)
    values = {
        "data.num_streams": 4,
        "autoencoder_training.num_samples": steps * BATCH,
        "autoencoder_training.batch_size": BATCH,
        "autoencoder_training.micro_batch_size": 1,
        "autoencoder_training.log_every_samples": BATCH,
        "autoencoder_training.checkpoint_every_samples": 3 * BATCH,
        "autoencoder_training.evaluate_every_samples": 4 * BATCH,
        "autoencoder_training.ema_half_life_samples": 8,
        "autoencoder_training.ledger": True,
    }
    return override(
        tiny_experiment(folder), values | {name.replace("__", "."): value for name, value in changes.items()}
    )


def stage_of(experiment: Experiment) -> Stage:
    """The autoencoder's stage in the run folder, begun."""
    stage = Stage(experiment.folder / "autoencoder", {})
    if not stage.folder.exists():
        stage.folder.mkdir(parents=True)
        (experiment.folder / "config.json").write_text(to_json(experiment))
        stage.begin({})
    return stage


def fit(worker: Worker, experiment: Experiment, *, at_micro_batch: Callable[[int], bool | None] | None = None) -> None:
    """Train on, calling `at_micro_batch` with its number (from 1) before each; where that says True, the run stops."""
    number = 0

    def stop() -> bool:
        nonlocal number
        number += 1
        return worker.stop() or bool(at_micro_batch and at_micro_batch(number))

    pipeline.fit_autoencoder(
        dataclasses.replace(worker, stop=stop),
        experiment=experiment,
        stage=Stage(experiment.folder / "autoencoder", {}),
    )


def read_losses(experiment: Experiment) -> list[dict[str, Any]]:
    """The lines of the log, without what depends on the clock."""
    lines = (experiment.folder / "autoencoder" / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if "second" not in name} for line in lines]


def read_weights(experiment: Experiment) -> bytes:
    return (experiment.folder / "autoencoder" / "model.safetensors").read_bytes()


def read_account(experiment: Experiment) -> Account:
    """What the ledger shows of the run that has just ended."""
    Stage(experiment.folder / "autoencoder", {}).finish({})
    return pipeline.check_ledgers(experiment.folder)["autoencoder"]


def read_starts(experiment: Experiment) -> list[int]:
    """The samples at which the run was started and restarted."""
    folders = sorted((experiment.folder / "autoencoder" / "ledger").iterdir())
    return [int(folder.name.rpartition("-")[2]) for folder in folders]
