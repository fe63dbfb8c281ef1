"""Workers under Ray Train: progress, mistakes, crashes, kills and stops. The cluster is the fixture's."""

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import LocalRay

from distributed_inr.launch import Launcher, Worker, launcher
from distributed_inr.training.engine import Scale

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def place(local_ray: LocalRay) -> Iterator[Launcher]:
    """Two workers on the fixture's cluster, found by RAY_ADDRESS as anyone's."""
    before = dict(os.environ)
    os.environ |= local_ray.environment
    try:
        ours = signal.getsignal(signal.SIGTERM)
        with launcher(Scale(max_failures=1)) as place:
            assert signal.getsignal(signal.SIGTERM) == ours
            yield place
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_a_sigterm_while_ray_starts_is_answered_by_us(place: Launcher, monkeypatch: pytest.MonkeyPatch):
    """Ray's own answer, as it sets it when it starts, ends the process without a word."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))

    def init(**settings) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    try:
        with pytest.raises(SystemExit), launcher(Scale()):
            pass
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_two_workers_share_two_cores_and_the_driver_takes_none(
    place: Launcher, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    directory = os.getcwd()

    def page_faults_of_a_step() -> float:
        """Pages faulted in for 128 MiB of tensors that are made and freed over and over."""
        before = 0
        for step in range(8):
            tensors = [torch.ones(2**22) for _ in range(8)]
            del tensors
            if step == 2:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5

    def work(worker: Worker) -> None:
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        assert total == worker.world == 2
        found = {"rank": worker.rank, "threads": torch.get_num_threads(), "directory": os.getcwd()}
        assert page_faults_of_a_step() < 500  # 32768 where the C library returns freed memory
        (tmp_path / f"{worker.rank}.json").write_text(json.dumps(found))
        worker.report({"loss": 1.0})
        if worker.rank == 0:
            worker.progress(3, 8, {"loss": 0.25, "samples/s": 12.0})
            time.sleep(1.5)

    assert place.num_workers == 2 and place.num_nodes == 1
    place.run(work, title="probe", folder=tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [{"rank": rank, "threads": 1, "directory": directory} for rank in range(2)]
    shown = capfd.readouterr().err
    assert "probe:  38%" in shown and "3/8" in shown and "12.00 samples/s, loss 0.25" in shown
    assert "pid=" not in shown  # nothing of Ray's own
    assert not (tmp_path / "ray").exists()


def test_a_mistake_on_one_worker_is_one_line_and_is_not_tried_again(place: Launcher, tmp_path: Path):
    def work(worker: Worker) -> None:
        (tmp_path / f"ran-{worker.rank}-{time.time_ns()}").touch()
        if worker.rank == 1:
            raise ValueError("data.train='x' holds nothing; give another")
        torch.distributed.barrier()

    with pytest.raises(ValueError, match=r"^data.train='x' holds nothing; give another$"):
        place.run(work, title="mistaken", folder=tmp_path)
    assert len(list(tmp_path.glob("ran-1-*"))) == 1


@pytest.mark.parametrize("poll_seconds", [0.5, 60])
def test_fault_23_crash_loop(
    place: Launcher,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    poll_seconds: float,
):
    """the same exception at each restart: stops after scale.max_failures, and shows the first cause.

    The restart is told of also where all of it falls between two looks.
    """
    monkeypatch.setattr("distributed_inr.launch.POLL_SECONDS", poll_seconds)

    def work(worker: Worker) -> None:
        if worker.rank == 0:
            attempt = len(list(tmp_path.glob("ran-*")))
            (tmp_path / f"ran-{attempt}").touch()
            raise RuntimeError(f"out of luck, attempt {attempt}")
        torch.distributed.barrier()

    with pytest.raises(RuntimeError, match=r"(?s)max_failures=1 restarts.*First cause: .*out of luck, attempt 0"):
        place.run(work, title="crashing", folder=tmp_path)
    assert len(list(tmp_path.glob("ran-*"))) == 2
    assert "workers restarted, 1 of at most 1 times: RuntimeError: out of luck, attempt 0" in capfd.readouterr().err


def test_an_interrupt_stops_the_workers_after_their_step(place: Launcher, tmp_path: Path):
    def work(worker: Worker) -> None:
        if worker.rank == 0:
            (tmp_path / "running").touch()
            deadline = time.monotonic() + 60
            while not worker.stop() and time.monotonic() < deadline:
                time.sleep(0.05)
            (tmp_path / "checkpoint").touch()

    def interrupt() -> None:
        while not (tmp_path / "running").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as ended:
        place.run(work, title="interrupted", folder=tmp_path, stoppable=True)
    assert ended.value.code == 130
    assert (tmp_path / "checkpoint").exists()


def test_a_warning_in_a_loader_process_does_not_wait_for_ray(place: Launcher, tmp_path: Path):
    def work(worker: Worker) -> None:
        import logging

        child = os.fork()
        if child == 0:
            logging.getLogger("distributed_inr").warning("bad sample")
            os._exit(7)
        deadline = time.monotonic() + 20
        while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.1)
        if found == (0, 0):
            os.kill(child, signal.SIGKILL)
        (tmp_path / f"{worker.rank}").write_text(str(os.waitstatus_to_exitcode(found[1]) if found[0] else "hangs"))

    place.run(work, title="forks", folder=tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["7", "7"]
