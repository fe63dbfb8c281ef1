"""Places for checkpoints that are full, gone, out of order or in use: retried, then refused; nothing is lost."""

import collections
import json
import logging
import multiprocessing
import os
import resource
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.registry import _registry
from processes import run_processes
from safetensors.torch import load_file
from test_loop import TRAINING, Small, StopAfter, call_train, make_set, open_set, without_clock
from test_pipeline import FAST
from tiny_run import tiny_experiment, write_pictures
from torch import Tensor

from distributed_inr import pipeline
from distributed_inr.config import override
from distributed_inr.data import storage
from distributed_inr.experiment import Experiment
from distributed_inr.run_folder import locked, settle_checkpoints
from distributed_inr.training import checkpoint
from distributed_inr.training.engine import Scale
from distributed_inr.training.loop import train

# 28-30: a place that can no longer be written


class Large(Small):
    """Its checkpoints have 200 kB, more than any other file that its run writes meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(50_000))


def train_large(data: Path, folder: Path, report: Callable[[dict[str, Any]], None] | None = None) -> str:
    """Train in `folder`; returns why it ended early."""
    torch.manual_seed(1)
    try:
        train(
            Large(),
            open_set(data),
            training=override(TRAINING, {"num_samples": 96}),
            scale=Scale(engine="accelerate"),
            seed=3,
            folder=folder,
            config_json="{}",
            val_dataset=open_set(data),
            report=report,
        )
    except ValueError as error:
        return str(error)
    return ""


class Relief(logging.Handler):
    """Lifts the limit on the sizes of files as soon as a warning says that a checkpoint failed."""

    def __init__(self, checkpoints: Path) -> None:
        super().__init__(logging.WARNING)
        self.checkpoints, self.lines, self.left = checkpoints, list[str](), []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if "cannot be written" in record.getMessage():
            self.left = os.listdir(self.checkpoints), checkpoint.newest(str(self.checkpoints))
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def train_with_faults(data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """A run that nothing happens to, one on a full disk, one whose folder vanishes, one with bad checkpoints."""
    train_large(data, folder / "whole")

    relief, written = Relief(folder / "full" / "checkpoints"), []

    def fill(report: dict[str, Any]) -> None:
        written.append(report["samples"])
        if report["samples"] == 16:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    logging.getLogger("distributed_inr.training.checkpoint").addHandler(relief)
    message = train_large(data, folder / "full", fill)
    logging.getLogger("distributed_inr.training.checkpoint").removeHandler(relief)
    full = {"message": message, "warnings": relief.lines, "left": relief.left, "written": written}

    checkpoints, away, pauses = folder / "vanished" / "checkpoints", folder / "away", []

    def vanish(report: dict[str, Any]) -> None:
        if report["samples"] == 32:
            checkpoints.rename(away)
            checkpoints.write_text("in the way")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", pauses.append)
        vanished = {"message": train_large(data, folder / "vanished", vanish), "pauses": pauses}
    checkpoints.unlink()
    away.rename(checkpoints)
    train_large(data, folder / "vanished")

    shutil.copytree(folder / "whole", folder / "damaged")
    for path in (folder / "damaged" / "checkpoints").iterdir():
        os.truncate(path / "state-00000-of-00001.safetensors", 1000)
    before = contents(folder / "damaged")
    damaged: dict[str, Any] = {"message": train_large(data, folder / "damaged")}
    damaged["is_untouched"] = contents(folder / "damaged") == before
    return {"full": full, "vanished": vanished, "damaged": damaged}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_lines(folder: Path) -> list[dict[str, float]]:
    return without_clock([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])


class Runs:
    def __init__(self, root: Path) -> None:
        make_set(root / "data")
        self.folder = root / "runs"
        self.results: dict[str, dict[str, Any]] = run_processes(train_with_faults, 1, root / "data", self.folder)[0]

    def check(self, name: str) -> None:
        """The run has come to the losses and weights of the undisturbed one."""
        lines = [read_lines(self.folder / run) for run in ("whole", name)]
        assert len(lines[0]) == 12 and lines[0] == lines[1]
        models = [(self.folder / run / "model.safetensors").read_bytes() for run in ("whole", name)]
        assert models[0] == models[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_fault_28_a_run_with_bad_checkpoints_only(runs: Runs) -> None:
    """all checkpoints of a run damaged: it is refused in one line, and none of its files is touched."""
    folder, damaged = runs.folder / "damaged" / "checkpoints", runs.results["damaged"]
    rule = f"every checkpoint in {folder} is damaged; restore one, or delete the folder to start again"
    assert damaged == {"message": rule, "is_untouched": True}


@pytest.mark.slow
def test_fault_29_a_full_disk(runs: Runs) -> None:
    """disk full while a checkpoint is written: a warning, earlier ones stay, training goes on, a later one succeeds."""
    full, folder = runs.results["full"], runs.folder / "full" / "checkpoints"
    assert full["message"] == "" and full["written"] == [16, 48, 64, 80, 96]
    [line] = full["warnings"]
    assert line.startswith(f"checkpoint {folder}/{32:012d} cannot be written: ") and "File too large" in line
    assert "; mend that, or choose another place. Earlier ones are intact; training goes on" in line
    assert full["left"] == ([f"{16:012d}"], str(folder / f"{16:012d}"))
    runs.check("full")


@pytest.mark.slow
def test_fault_30_a_folder_that_vanishes_in_mid_run(runs: Runs) -> None:
    """folder of checkpoints gone in mid-run: three checkpoints are tried thrice each, then the run stops."""
    vanished, folder = runs.results["vanished"], runs.folder / "vanished" / "checkpoints"
    assert vanished["pauses"] == [0.5, 1] * 3
    line = vanished["message"]
    assert line.startswith(f"checkpoint {folder}/{80:012d} cannot be written: ") and "\n" not in line
    assert "; mend that, or choose another place. Earlier checkpoints are intact" in line
    runs.check("vanished")


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    write_pictures(tmp_path / "train", 4, seed=1)
    write_pictures(tmp_path / "val", 2, seed=2)
    return override(tiny_experiment(tmp_path), FAST)


@pytest.mark.parametrize("place", ["file/below", "/proc/below"])
def test_fault_30_a_place_that_cannot_be_written_at_the_start(experiment: Experiment, place: str) -> None:
    """place for checkpoints that cannot be written at the start: refused in one line before anything is made."""
    folder = Path(experiment.output).parent
    (folder / "file").write_text("in the way")
    changed = override(experiment, {"checkpoints": str(folder / place)})
    rule = f"^cannot write to {folder / place}: (Not a|No such file or) directory; choose another place$"
    with pytest.raises(ValueError, match=rule):
        settle_checkpoints(changed, shared=False)
    with pytest.raises(ValueError, match=rule):
        pipeline.run(changed)
    assert not Path(experiment.output).exists()


# 31: object stores


class Store(fsspec.AbstractFileSystem):
    """An object store in a folder, without renaming, which fails at the first calls of each kind, as if busy."""

    root, num_failures = Path(), 0
    calls: collections.Counter[str] = collections.Counter()

    def _call(self, kind: str, path: str) -> Path:
        self.calls[kind] += 1
        if self.calls[kind] <= self.num_failures:
            raise (TimeoutError("timed out"), OSError("500 Internal Server Error"))[self.calls[kind] % 2]
        return self.root / path

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[dict[str, Any]]:
        kinds = {True: "directory", False: "file"}
        found = self._call("ls", path).iterdir()
        return [{"name": f"{path}/{p.name}", "size": p.stat().st_size, "type": kinds[p.is_dir()]} for p in found]

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        target, partial = self._call("put", rpath), self.root / uuid.uuid4().hex
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(lpath, partial)
        partial.rename(target)

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        shutil.copy(self._call("get", rpath), lpath)

    def cat_file(self, path: str, **_: Any) -> bytes:
        return self._call("cat", path).read_bytes()

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return self._call("open", path).open(mode)

    def rm_file(self, path: str) -> None:
        self._call("rm_file", path).unlink()

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        shutil.rmtree(self._call("rm", path))


def read_states(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Every tensor of every checkpoint, by file and name."""
    files = {str(path.relative_to(folder)): load_file(path) for path in folder.rglob("*.safetensors")}
    return {(file, name): tensor for file, tensors in files.items() for name, tensor in tensors.items()}


def train_in_store(data: Path, folder: Path, stop_after: int | None) -> tuple[bool, dict[str, int]]:
    """Train with checkpoints in a store whose first two calls of each kind fail; the pauses are a tenth as long."""
    Store.root, Store.num_failures, sleep = folder / "store", 2, time.sleep
    fsspec.register_implementation("s3", Store, clobber=True)
    time.sleep = lambda seconds: sleep(seconds / 10)
    more = {} if stop_after is None else {"stop": StopAfter(stop_after)}
    scale = Scale(engine="accelerate")
    if stop_after is not None:
        call_train(data, folder / "local", scale)
    complete = call_train(data, folder / "remote", scale, checkpoints="s3://bucket/run", **more)["complete"]
    return complete, dict(Store.calls)


@pytest.mark.slow
def test_fault_31_an_object_store_with_errors(tmp_path: Path) -> None:
    """object store whose first calls of each kind fail: retried; stopped and resumed, as a local run in every bit."""
    make_set(tmp_path / "data")
    stopped = run_processes(train_in_store, 2, tmp_path / "data", tmp_path, 8)
    resumed = run_processes(train_in_store, 2, tmp_path / "data", tmp_path, None)
    assert [complete for complete, _ in stopped + resumed] == [False, False, True, True]
    assert set(resumed[0][1]) == {"ls", "put", "get", "cat", "open", "rm_file", "rm"}
    assert all(count > Store.num_failures for _, calls in stopped + resumed for count in calls.values())
    local, remote, store = tmp_path / "local", tmp_path / "remote", tmp_path / "store" / "bucket" / "run"
    assert (remote / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
    assert read_lines(remote) == read_lines(local) and not (remote / "checkpoints").exists()
    found, expected = (read_states(folder) for folder in (store, local / "checkpoints"))
    assert found.keys() == expected.keys() and len({Path(file).name for file, _ in found}) == 2
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_fault_31_an_object_store_that_always_fails(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """object store that always fails: given up in one line after four attempts with growing pauses."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    monkeypatch.setattr(Store, "num_failures", 1000)
    monkeypatch.setattr(Store, "calls", collections.Counter())
    monkeypatch.setitem(_registry, "s3", Store)
    place = "s3://bucket/run"
    actions: list[Callable[[], object]] = [
        lambda: checkpoint.newest(place),
        lambda: storage.read_bytes(place),
        lambda: storage.size_and_sha256(place),
        lambda: storage.download(place, tmp_path / "file"),
        lambda: storage.remove_file(place),
        lambda: storage.remove_folder(place),
        lambda: pipeline.run(override(experiment, {"checkpoints": place})),
    ]
    for action in actions:
        pauses.clear()
        with pytest.raises(ValueError, match=rf"^{place}\S* cannot be reached: .*; tried 4 times. See whether it is"):
            action()
        assert pauses == [0.5, 1, 2]
    assert set(Store.calls.values()) == {4} and not Path(experiment.output).exists()


# 32: two jobs


def hold(folder: Path, is_held: Any) -> None:
    with locked(folder):
        is_held.set()
        time.sleep(600)


def test_fault_32_two_jobs_with_one_run_folder(experiment: Experiment) -> None:
    """two jobs with one run folder: the second is refused by the first one's process id, until that ends or dies."""
    spawn = multiprocessing.get_context("spawn")
    is_held = spawn.Event()
    holder = spawn.Process(target=hold, args=(experiment.folder, is_held))
    holder.start()
    try:
        assert is_held.wait(60)
        rule = rf"is in use by process {holder.pid} on .*; wait for it, or choose another --name or --output$"
        with pytest.raises(ValueError, match=rule):
            pipeline.run(experiment)
        assert os.listdir(experiment.folder) == [".lock"]
    finally:
        holder.kill()
        holder.join()
    with locked(experiment.folder):  # the system has let go of the dead job's lock
        pass
