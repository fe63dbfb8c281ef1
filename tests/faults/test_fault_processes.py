"""Processes that are killed in training: Ray Train restarts the workers, and nothing shows in what the run makes."""

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import LocalRay, in_environment
from fault_runs import (
    fit,
    make_experiment,
    read_account,
    read_losses,
    read_starts,
    read_weights,
    stage_of,
    train_alone,
)

from distributed_inr.experiment import Experiment
from distributed_inr.launch import Worker, launcher
from distributed_inr.training.engine import Scale

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STEPS, BATCH, INTERVAL = 20, 4, 12
KILLS = {1: 5, 2: 7, 3: 9, 4: 11, 10: 13, 41: 16}
"""The step in which something is killed, by row of the fault table."""


@dataclass(frozen=True)
class Runs:
    whole: Experiment
    killed: Experiment

    def check(self, row: int) -> None:
        """The kill of this row happened, the run went on from a checkpoint before it, and nothing shows in the end."""
        assert list((self.killed.folder / "killed").glob(f"{row}-*"))
        start = read_starts(self.killed)[1 + list(KILLS).index(row)]
        done = (KILLS[row] - 1) * BATCH
        assert done - 2 * INTERVAL <= start <= done and start % INTERVAL == 0
        assert len(read_losses(self.whole)) == STEPS and read_losses(self.killed) == read_losses(self.whole)
        assert read_weights(self.killed) == read_weights(self.whole)
        account = read_account(self.killed)
        assert account.lost == account.repeated == account.other_keys == []
        assert account.num_samples == STEPS * BATCH and account.num_redone > 0


@pytest.fixture(scope="module")
def runs(local_ray: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run that nothing happens to, and one that goes through all KILLS."""
    folder = tmp_path_factory.mktemp("kills")
    whole = train_alone(folder, steps=STEPS, name="whole", data__num_loaders=1)
    killed = make_experiment(folder, steps=STEPS, name="killed", data__num_loaders=1)
    kills, stage = KILLS, stage_of(killed)

    def work(worker: Worker) -> None:
        import torch

        from distributed_inr.training.engine import DeepSpeedEngine

        marks = killed.folder / "killed"
        marks.mkdir(exist_ok=True)
        take_step, update = DeepSpeedEngine.step, torch.optim.AdamW.step

        def is_due(row: int, engine: DeepSpeedEngine) -> bool:
            mark = marks / f"{row}-{worker.rank}"
            if engine.steps + 1 != kills[row] or mark.exists():
                return False
            mark.touch()
            return True

        def step(engine: DeepSpeedEngine, *args, **kwargs):
            between = len(engine._pending) == 1  # the first of two micro-batches is done
            if not between and (
                (worker.rank == 1 and is_due(1, engine))
                or (worker.rank == 0 and is_due(2, engine))
                or is_due(3, engine)
            ):
                os.kill(os.getpid(), signal.SIGKILL)
            if between and worker.rank == 1 and is_due(41, engine):
                os.kill(os.getpid(), signal.SIGKILL)
            if worker.rank == 1 and not between and is_due(10, engine):
                psutil.Process().children()[0].kill()
            if worker.rank == 1 and between and is_due(4, engine):
                torch.optim.AdamW.step = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
            return take_step(engine, *args, **kwargs)

        DeepSpeedEngine.step = step
        fit(worker, killed)
        DeepSpeedEngine.step, torch.optim.AdamW.step = take_step, update

    with in_environment(local_ray.environment), launcher(Scale(max_failures=len(KILLS))) as place:
        place.run(work, title=killed.name, folder=stage.folder, stoppable=True)
    return Runs(whole, killed)


def test_fault_01_kill_one_worker_in_mid_step(runs: Runs):
    """kill -9 of one worker in a step: Ray restarts all; losses, weights and ledger as of an undisturbed run."""
    runs.check(1)


def test_fault_02_kill_rank_0(runs: Runs):
    """kill -9 of rank 0, which writes the logs: Ray restarts all; equal in every bit."""
    runs.check(2)


def test_fault_03_kill_all_workers(runs: Runs):
    """kill -9 of all workers at once: Ray restarts all; equal in every bit."""
    runs.check(3)


def test_fault_04_kill_during_the_optimizer_step(runs: Runs):
    """kill -9 of one worker while the others update their weights: back to the checkpoint; equal in every bit."""
    runs.check(4)


def test_fault_10_kill_a_loader_process(runs: Runs):
    """kill -9 of a data-loader process: its worker fails within seconds and Ray restarts all; equal in every bit."""
    runs.check(10)


def test_fault_41_kill_between_two_micro_batches(runs: Runs):
    """kill -9 in mid gradient accumulation: the step is taken again from its first micro-batch; equal in every bit."""
    runs.check(41)


@pytest.mark.faults
def test_fault_11_ten_kills_at_random_steps(local_ray: LocalRay, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """ten kills at random steps of one run, of a random rank or of all: 10 of 10 survived, equal in every bit."""
    rng = random.Random(11)
    steps = sorted(rng.sample(range(2, 58), 10))
    victims = [rng.choice([(0,), (1,), (0, 1)]) for _ in steps]
    whole = train_alone(tmp_path, steps=60, name="whole")
    killed = make_experiment(tmp_path, steps=60, name="killed")
    stage, times = stage_of(killed), tmp_path / "times"
    times.mkdir()

    def work(worker: Worker) -> None:
        from distributed_inr.training.engine import DeepSpeedEngine

        take_step = DeepSpeedEngine.step
        start = max((int(path.name.split("-")[1]) + 1 for path in times.glob("kill-*")), default=0)

        def step(engine: DeepSpeedEngine, *args, **kwargs):
            if start < len(steps) and engine.steps + 1 == steps[start] and worker.rank in victims[start]:
                (times / f"kill-{start}-{worker.rank}").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            metrics = take_step(engine, *args, **kwargs)
            if worker.rank == 0 and start and not (times / f"step-{start - 1}").exists():
                (times / f"step-{start - 1}").write_text(str(time.time()))
            return metrics

        DeepSpeedEngine.step = step
        fit(worker, killed)
        DeepSpeedEngine.step = take_step

    with in_environment(local_ray.environment), launcher(Scale(max_failures=10)) as place:
        place.run(work, title=killed.name, folder=stage.folder, stoppable=True)
    assert read_losses(killed) == read_losses(whole) and read_weights(killed) == read_weights(whole)
    account = read_account(killed)
    assert account.num_attempts == 11 and account.lost == account.repeated == account.other_keys == []
    seconds = sorted(
        float((times / f"step-{k}").read_text()) - max(float(p.read_text()) for p in times.glob(f"kill-{k}-*"))
        for k in range(10)
    )
    with capsys.disabled():
        print(f"\nten kills at steps {steps}: {account}")
        print(f"kill to the next step: median {seconds[5]:.1f} s, worst {seconds[-1]:.1f} s")
