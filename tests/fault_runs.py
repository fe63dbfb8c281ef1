"""A small but real training run to be killed, stopped and moved: the tiny autoencoder on tiny pictures."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import run_processes
from tiny_run import tiny_experiment, write_pictures

from distributed_inr import pipeline
from distributed_inr.config import override, to_json
from distributed_inr.experiment import Experiment
from distributed_inr.launch import Worker
from distributed_inr.run_folder import Stage
from distributed_inr.training.fragments import rank_and_world
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


def train_alone(folder: Path, **changes: Any) -> Experiment:
    """The run to which nothing happens, in two processes without Ray."""
    experiment = make_experiment(folder, **changes)
    stage_of(experiment)
    run_processes(_train_alone, 2, experiment)
    return experiment


def _train_alone(experiment: Experiment) -> None:
    rank, world = rank_and_world()
    fit(Worker(rank, world, lambda metrics: None, lambda *progress: None, lambda: False), experiment)


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


class Job:
    """A training process; `changes` as those of `make_experiment`."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None, **changes: Any) -> None:
        self.experiment: Experiment = make_experiment(folder, **changes)
        command = [sys.executable, "tests/fault_job.py", str(folder), json.dumps(changes)]
        _jobs.append(self)
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def num_lines(self) -> int:
        metrics = self.experiment.folder / "autoencoder" / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "waited 120 s"
            time.sleep(0.02)

    def stop(self, number: signal.Signals, *, group: bool = False) -> tuple[float, str]:
        """Send a signal and wait for the end; returns the seconds that took and what was printed.

        Args:
            group: send it to the whole process group too, as `timeout` does.
        """
        begin = time.monotonic()
        self.process.send_signal(number)
        if group:
            os.killpg(self.process.pid, number)
        _, printed = self.process.communicate(timeout=60)
        return time.monotonic() - begin, printed

    def finish(self) -> None:
        _, printed = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, printed

    @property
    def samples_kept(self) -> int:
        """Of the newest committed checkpoint."""
        checkpoints = self.experiment.folder / "autoencoder" / "checkpoints"
        return max(int(path.parent.name) for path in checkpoints.glob("*/manifest.json"))

    @property
    def committed_at(self) -> float:
        """Unix time at which the newest checkpoint was committed."""
        manifests = (self.experiment.folder / "autoencoder" / "checkpoints").glob("*/manifest.json")
        return max(path.stat().st_mtime for path in manifests)

    @property
    def samples_seen(self) -> int:
        ledger = self.experiment.folder / "autoencoder" / "ledger"
        lines = [line for path in ledger.glob("*/*.tsv") for line in path.read_text().splitlines()]
        return max((1 + int(line.split("\t")[0]) for line in lines), default=0)


_jobs: list[Job] = []


def kill_jobs() -> None:
    """Those that a failed test has left."""
    for job in _jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.process.communicate()
    _jobs.clear()
