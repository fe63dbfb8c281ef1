"""Runs that are asked to stop, at any moment, or whose driver dies: a checkpoint, a line, and on from there."""

import http.server
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import LocalRay
from fault_runs import BATCH, Job, kill_jobs, read_account, read_losses, read_starts, read_weights, train_alone
from tiny_run import write_pictures

from distributed_inr.experiment import Experiment

pytestmark = [pytest.mark.slow, pytest.mark.alone]

STEPS = 12
ALONE = {"scale__launcher": "none", "scale__num_threads": 1}
LONG = {"steps": 150, "autoencoder_training__checkpoint_every_samples": 20 * BATCH}
GRACE_SECONDS = 5.0


def expect_equal(found: Experiment, expected: Experiment) -> None:
    assert read_losses(found) == read_losses(expected)
    assert read_weights(found) == read_weights(expected)
    account = read_account(found)
    assert account.lost == account.repeated == account.other_keys == []


class Gate(http.server.SimpleHTTPRequestHandler):
    """Serves files, but holds back those that `holds` says until `opened`."""

    opened = threading.Event()
    waited_for = threading.Event()
    holds: Callable[[str], bool] = staticmethod(lambda path: False)

    def do_GET(self) -> None:
        if self.path.endswith(".tar") and type(self).holds(self.path) and not self.opened.is_set():
            self.waited_for.set()
            self.opened.wait(60)
        super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        try:
            super().copyfile(source, outputfile)
        except ConnectionError:  # the job has ended meanwhile
            pass


@pytest.fixture(scope="module", autouse=True)
def no_job_left() -> Iterator[None]:
    yield
    kill_jobs()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Pictures in shards of eight, and the address of a server that has them."""
    folder = tmp_path_factory.mktemp("served")
    write_pictures(folder / "train", 30, seed=1, shard_samples=8)
    write_pictures(folder / "val", 6, seed=2)

    class Handler(Gate):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def whole(served: tuple[Path, str]) -> Experiment:
    """The run to which nothing happens."""
    job = Job(served[0], name="whole", steps=STEPS, **ALONE)
    job.finish()
    return job.experiment


PLACES = {
    "first step": lambda path: "train" in path and "000000" not in path,
    "data wait": lambda path: "train" in path and "000002" in path,
    "evaluation": lambda path: "val" in path,
}


@pytest.mark.parametrize("place", PLACES)
def test_fault_14_sigterm_while_waiting(place: str, served: tuple[Path, str], whole: Experiment, tmp_path: Path):
    """SIGTERM in the first step, while data are waited for, in an evaluation: checkpoint within 5 s, no step lost."""
    folder, address = served
    changes = {"data__train": f"{address}/train", "data__val": f"{address}/val", "data__cache_dir": str(tmp_path)}
    name = place.replace(" ", "-")
    Gate.opened.clear()
    Gate.waited_for.clear()
    Gate.holds = staticmethod(PLACES[place])
    job = Job(folder, name=name, steps=STEPS, **changes, **ALONE)
    job.wait_until(Gate.waited_for.is_set)
    seen = -1
    while seen != job.samples_seen:  # until it stands still
        seen = job.samples_seen
        time.sleep(1)
    seconds, printed = job.stop(signal.SIGTERM)
    Gate.opened.set()
    assert job.process.returncode == 128 + signal.SIGTERM, printed
    assert "stopped with a checkpoint; to go on: python tests/fault_job.py " in printed and "Traceback" not in printed
    assert seconds < GRACE_SECONDS
    assert job.samples_kept == seen and (seen == 0) == (place == "first step") and seen < STEPS * BATCH

    job = Job(folder, name=name, steps=STEPS, **changes, **ALONE)
    job.finish()
    assert read_starts(job.experiment) == [0, seen]
    expect_equal(job.experiment, whole)


@pytest.fixture(scope="module")
def long(served: tuple[Path, str]) -> Experiment:
    """A run of some seconds to which nothing happens."""
    job = Job(served[0], name="long", **LONG, **ALONE)
    job.finish()
    return job.experiment


def stop_and_go_on(folder: Path, whole: Experiment, environment: dict[str, str], **changes: Any) -> float:
    """Send SIGTERM at a random moment of a run, and go on to the end; returns the seconds that stopping took."""
    job = Job(folder, environment, **LONG, **changes)
    line = random.Random(changes["name"]).randrange(1, LONG["steps"] - 30)
    job.wait_until(lambda: job.num_lines >= line)
    seconds, printed = job.stop(signal.SIGTERM)
    assert job.process.returncode == 128 + signal.SIGTERM and "stopped with a checkpoint" in printed, printed
    kept = job.samples_kept
    assert kept == job.samples_seen, "a step was lost"
    again = Job(folder, environment, **LONG, **changes)
    again.finish()
    assert read_starts(again.experiment) == [0, kept]
    expect_equal(again.experiment, whole)
    return seconds


def test_fault_13_sigterm(served: tuple[Path, str], long: Experiment):
    """SIGTERM at any moment: a checkpoint within 5 s, no step lost, the command that goes on is printed."""
    assert stop_and_go_on(served[0], long, {}, name="moment", **ALONE) < GRACE_SECONDS


@pytest.mark.ray
def test_fault_13_sigterm_to_the_process_group(served: tuple[Path, str], tmp_path: Path):
    """SIGTERM to the process group, the run's own Ray among it, as `timeout` does: a checkpoint, no step lost."""
    job = Job(served[0], {"HOME": str(tmp_path)}, name="group", **LONG, data__num_loaders=1)
    job.wait_until(lambda: job.num_lines >= 5)
    _, printed = job.stop(signal.SIGTERM, group=True)
    assert job.process.returncode == 128 + signal.SIGTERM and "stopped with a checkpoint" in printed, printed
    assert job.samples_kept == job.samples_seen < LONG["steps"] * BATCH


@pytest.mark.faults
def test_fault_13_sigterm_at_twenty_moments(served: tuple[Path, str], long: Experiment, capsys):
    """SIGTERM at 20 random moments: 20 of 20 commit within 5 s and lose no step."""
    seconds = [stop_and_go_on(served[0], long, {}, name=f"twenty-{number}", **ALONE) for number in range(20)]
    with capsys.disabled():
        print(f"\nSIGTERM to the end, 20 moments: median {sorted(seconds)[10]:.2f} s, worst {max(seconds):.2f} s")
    assert max(seconds) < GRACE_SECONDS


@pytest.fixture(scope="module")
def driven(served: tuple[Path, str], local_ray: LocalRay) -> dict[str, Any]:
    """A run of two Ray workers whose driver gets SIGTERM and, when it goes on, kill -9; and one left alone."""
    folder, environment = served[0], local_ray.environment
    whole = train_alone(folder, name="two", **LONG)
    first = Job(folder, environment, name="driven", **LONG)
    first.wait_until(lambda: first.num_lines >= 33)
    begin = time.time()
    _, printed = first.stop(signal.SIGTERM)
    seconds = first.committed_at - begin  # Ray itself takes seconds more to end
    stopped = {"seconds": seconds, "printed": printed, "kept": first.samples_kept, "seen": first.samples_seen}
    second = Job(folder, environment, name="driven", **LONG)
    second.wait_until(lambda: second.num_lines >= 77)
    second.process.kill()
    second.process.communicate()
    last = Job(folder, environment, name="driven", **LONG)
    last.finish()
    return stopped | {"code": first.process.returncode, "run": last.experiment, "whole": whole}


@pytest.mark.ray
def test_fault_13_sigterm_to_the_driver_of_ray_workers(driven: dict[str, Any]):
    """SIGTERM to the driver of two Ray workers: a checkpoint within 5 s, no step lost."""
    assert driven["code"] == 128 + signal.SIGTERM and "stopped with a checkpoint; to go on: " in driven["printed"]
    assert driven["kept"] == driven["seen"] == read_starts(driven["run"])[1]
    assert 0 < driven["seconds"] < GRACE_SECONDS
    expect_equal(driven["run"], driven["whole"])


@pytest.mark.ray
def test_fault_07_kill_the_driver(driven: dict[str, Any]):
    """kill -9 of the driver: Ray ends its workers, and the same command goes on; equal in every bit."""
    _, stopped, killed = read_starts(driven["run"])
    assert stopped < killed and killed >= (77 - 2 * 20) * BATCH
    expect_equal(driven["run"], driven["whole"])


def test_fault_15_sigterm_twice_then_sigkill(served: tuple[Path, str], long: Experiment):
    """SIGTERM twice and SIGKILL: on from the last good checkpoint; equal in every bit."""
    job = Job(served[0], name="impatient", **LONG, **ALONE)
    job.wait_until(lambda: job.num_lines >= 40)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        job.process.send_signal(number)
    job.process.communicate()
    assert job.process.returncode != 0 and job.samples_kept <= job.samples_seen
    again = Job(served[0], name="impatient", **LONG, **ALONE)
    again.finish()
    expect_equal(again.experiment, long)


def test_fault_15_a_second_signal_stops_at_once(served: tuple[Path, str]):
    """two signals while no checkpoint can be written: the second ends the process at once, with the line to go on."""
    Gate.opened.clear()
    Gate.waited_for.clear()
    Gate.holds = staticmethod(PLACES["first step"])
    job = Job(served[0], name="second", steps=STEPS, data__train=f"{served[1]}/train", data__val=None, **ALONE)
    job.wait_until(Gate.waited_for.is_set)
    job.process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    seconds, printed = job.stop(signal.SIGINT)
    Gate.opened.set()
    assert (
        job.process.returncode == 128 + signal.SIGINT and "; to go on: python " in printed and seconds < GRACE_SECONDS
    )
