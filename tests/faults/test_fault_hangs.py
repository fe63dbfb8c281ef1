"""Workers that hang: found within the time-out, named with where they are, killed, and the run restarted."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import LocalRay, in_environment
from fault_runs import (
    BATCH,
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
from distributed_inr.launch import Launcher, Worker, launcher
from distributed_inr.training.engine import Scale

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STEPS, TIMEOUT = 8, 8


@pytest.fixture(scope="module")
def place(local_ray: LocalRay) -> Iterator[Launcher]:
    with in_environment(local_ray.environment), launcher(Scale(max_failures=1, timeout_seconds=TIMEOUT)) as place:
        yield place


@pytest.fixture(scope="module")
def run(place: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Experiment]:
    """Trains, with a fault injected on rank 1 in the fifth step of the first attempt: "stop" or "skip"."""
    folder = tmp_path_factory.mktemp("hangs")

    def run(fault: str) -> Experiment:
        experiment = make_experiment(folder, steps=STEPS, name=fault, scale__timeout_seconds=TIMEOUT)
        stage = stage_of(experiment)

        def work(worker: Worker) -> None:
            from distributed_inr.training import agreement, engine

            take_step, count = engine.DeepSpeedEngine.step, agreement.Agreement._count
            mark, skipping = experiment.folder / "injected", False

            def step(self, *args, **kwargs):
                nonlocal skipping
                if worker.rank == 1 and self.steps == 4 and not mark.exists():
                    mark.write_text(str(time.time()))
                    if fault == "stop":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    skipping = True
                return take_step(self, *args, **kwargs)

            def count_or_skip(self, *answers):
                nonlocal skipping
                if skipping:
                    skipping = False
                    return [2, 0, 0, 0]
                return count(self, *answers)

            engine.DeepSpeedEngine.step, agreement.Agreement._count = step, count_or_skip
            try:
                fit(worker, experiment)
            finally:
                engine.DeepSpeedEngine.step, agreement.Agreement._count = take_step, count

        place.run(work, title=fault, folder=stage.folder, stoppable=True)
        return experiment

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return train_alone(tmp_path_factory.mktemp("whole"), steps=STEPS, name="whole")


def check(experiment: Experiment, whole: Experiment) -> None:
    assert (experiment.folder / "injected").exists() and len(read_starts(experiment)) == 2
    assert read_starts(experiment)[1] in (0, 3 * BATCH)
    assert read_losses(experiment) == read_losses(whole) and read_weights(experiment) == read_weights(whole)
    assert read_account(experiment).lost == []


def stacks(experiment: Experiment) -> str:
    return (experiment.folder / "autoencoder" / "hang.txt").read_text()


def check_time_to_stacks(experiment: Experiment, capfd: pytest.CaptureFixture[str]) -> None:
    """From the fault to its report."""
    found = (experiment.folder / "autoencoder" / "hang.txt").stat().st_mtime
    seconds = found - float((experiment.folder / "injected").read_text())
    with capfd.disabled():
        print(f"\nfault {experiment.name}: reported after {seconds:.1f} s, the time-out is {TIMEOUT} s")
    assert seconds < 3 * TIMEOUT


def test_fault_18_a_stopped_worker(
    run: Callable[..., Experiment], whole: Experiment, capfd: pytest.CaptureFixture[str]
):
    """SIGSTOP of one rank: found within the time-out, named with its last stack, killed and restarted; equal."""
    experiment = run("stop")
    shown = capfd.readouterr().err
    assert re.search(r"was not heard of for \d+ s: it is killed", shown) and "stop: rank 1 (process " in shown
    assert "workers restarted, 1 of at most 1 times: " in shown
    assert "rank 1 (process " in stacks(experiment) and "test_fault_hangs.py" in stacks(experiment)
    check_time_to_stacks(experiment, capfd)
    check(experiment, whole)


def test_fault_20_a_skipped_collective(
    run: Callable[..., Experiment], whole: Experiment, capfd: pytest.CaptureFixture[str]
):
    """one rank skips a collective: found at the time-out, all ranks named with places, restarted; equal."""
    experiment = run("skip")
    shown = capfd.readouterr().err
    assert "workers restarted, 1 of at most 1 times: rank" in shown
    assert f"waited {TIMEOUT} s for the others: rank " in shown and "hang.txt" in shown
    assert "rank 0 (process " in stacks(experiment) and "rank 1 (process " in stacks(experiment)
    assert "agreement.py" in stacks(experiment)
    check_time_to_stacks(experiment, capfd)
    check(experiment, whole)
