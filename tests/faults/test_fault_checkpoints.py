"""Checkpoints that are cut, damaged, mixed up or of another version: the last good one is used, and is never lost."""

import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import files_of, write_checkpoint

from distributed_inr.training import checkpoint

FORKS = multiprocessing.get_context("forkserver")
"""Processes forked from one without threads, which has imported everything once."""
FORKS.set_forkserver_preload(["distributed_inr.training.checkpoint", "pytest"])


def end_of(action: Callable[..., None], *args: Any) -> int | None:
    """The exit code of a process that does this."""
    process = FORKS.Process(target=action, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def newest(folder: Path) -> Path:
    found = checkpoint.newest(str(folder))
    assert found is not None
    return Path(found)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[int | str]:
    """Samples of the checkpoints in a folder, and names of what else lies there."""
    return {int(path.name) if len(path.name) == 12 else path.name for path in folder.iterdir()}


@contextlib.contextmanager
def spoilt(path: Path, content: bytes) -> Iterator[None]:
    good = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(good)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of two ranks, the older first."""
    return write_checkpoint(tmp_path / "pair", 16), write_checkpoint(tmp_path / "pair", 32)


@pytest.fixture
def check_skipped(pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> Callable[[object], None]:
    """Asserts that the older one is used and that a warning names the newer one."""

    def check(case: object) -> None:
        caplog.clear()
        assert newest(pair[0].parent) == pair[0], case
        assert f"checkpoint {pair[1]} is ignored: " in caplog.text and len(caplog.messages) == 1, case

    return check


# 5, 6: killed


COLUMNS = 2_000_000
"""So that a rank's state has 16 MB, whose writing takes a while."""


def write_until_byte(path: Path, offset: int) -> None:
    """Write a rank's files, and kill the process as soon as the file system holds that many bytes of them."""

    def watch() -> None:
        held = 0
        while held <= offset:
            time.sleep(1e-4)
            with contextlib.suppress(FileNotFoundError):  # the state is written under another name at first
                held = sum(512 * entry.stat().st_blocks for entry in os.scandir(path))
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch).start()
    os.nice(10)  # of this thread alone: the watching one comes first where both share a core
    checkpoint.write(str(path), files_of(32, ranks=2, columns=COLUMNS))


def write_until_file(path: Path, count: int) -> None:
    checkpoint.write(str(path), dict(list(files_of(32, ranks=2).items())[:count]))
    os.kill(os.getpid(), signal.SIGKILL)


def test_fault_05_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """kill -9 in the writing of a checkpoint, at 20 random bytes and after each file: the one before is used, 24/24."""
    print("seed", seed := 5)
    rng, num_partial = random.Random(seed), 0
    cuts = [(write_until_byte, rng.randrange(8 * COLUMNS)) for _ in range(20)]
    cuts += [(write_until_file, count) for count in range(4)]
    for number, (action, place) in enumerate(cuts):
        previous = write_checkpoint(tmp_path / str(number), 16)
        cut = previous.with_name(f"{32:012d}")
        assert end_of(action, cut, place) == -signal.SIGKILL
        num_partial += action is write_until_byte and not list(cut.glob("state-*"))
        assert newest(cut.parent) == previous, place
        write_checkpoint(cut.parent, 32)
        assert newest(cut.parent) == cut, place
    assert num_partial >= 10  # of 20; a busy machine may notice some late, when the state is whole


def commit_until_rename(folder: Path, moment: str) -> None:
    rename = os.replace

    def replace(*paths: Any) -> None:
        if moment == "after":
            rename(*paths)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    write_checkpoint(folder, 48, keep=1)


@pytest.mark.parametrize(("moment", "samples"), [("before", 32), ("after", 48)])
def test_fault_06_killed_while_a_checkpoint_is_committed(tmp_path: Path, moment: str, samples: int) -> None:
    """kill just before or after the manifest is renamed: the newest complete one is used, and the rest purged later."""
    for older in (16, 32):
        write_checkpoint(tmp_path, older)
    assert end_of(commit_until_rename, tmp_path, moment) == -signal.SIGKILL
    assert names(tmp_path) == {16, 32, 48} and newest(tmp_path) == tmp_path / f"{samples:012d}"
    write_checkpoint(tmp_path, 64, keep=1)
    assert names(tmp_path) == {64}


# 24-28: damaged


def test_fault_24_a_file_cut_short(pair: tuple[Path, Path], check_skipped: Callable[[object], None]) -> None:
    """any file of a checkpoint cut at a random byte: 0 of 200 accepted, a warning, the one before it is used."""
    print("seed", seed := 24)
    rng, files = random.Random(seed), sorted(pair[1].iterdir())
    assert len(files) == 5
    for _ in range(200):
        path = rng.choice(files)
        content = path.read_bytes()
        size = rng.randrange(len(content))
        with spoilt(path, content[:size]):
            check_skipped((path.name, size))
    assert newest(pair[1].parent) == pair[1]


def test_fault_25_a_flipped_bit(pair: tuple[Path, Path], check_skipped: Callable[[object], None]) -> None:
    """one flipped bit in any file of a checkpoint: 0 of 100 accepted, nor one in each byte of its manifest; warned."""
    print("seed", seed := 25)
    rng, files = random.Random(seed), sorted(pair[1].iterdir())
    manifest = pair[1] / "manifest.json"
    flips = [(path, rng.randrange(8 * path.stat().st_size)) for path in rng.choices(files, k=100)]
    flips += [(manifest, 8 * byte + rng.randrange(8)) for byte in range(manifest.stat().st_size)]
    for path, bit in flips:
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        with spoilt(path, content):
            check_skipped((path.name, bit))
    assert newest(pair[1].parent) == pair[1]


def test_fault_26_a_missing_file(pair: tuple[Path, Path], check_skipped: Callable[[object], None]) -> None:
    """a rank's or any other file of a checkpoint missing: a warning, the one before it is used."""
    for path in sorted(pair[1].iterdir()):
        content = path.read_bytes()
        path.unlink()
        check_skipped(path.name)
        path.write_bytes(content)
    assert newest(pair[1].parent) == pair[1]


def test_fault_27_what_lies_beside_the_checkpoints(pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """`latest` empty, garbage or dangling, stray files and folders: not read, not purged; manifests alone count."""
    folder = pair[0].parent
    (folder / "latest").touch()
    assert newest(folder) == pair[1]
    (folder / "latest").write_bytes(os.urandom(100))
    assert newest(folder) == pair[1]
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(folder / f"{99:012d}")
    (folder / f"{64:012d}").write_text("a file")
    for name in ("0", "99", "\N{SUPERSCRIPT TWO}", "000000000099.partial", "copy of 000000000032", "000000000099 (1)"):
        shutil.copytree(pair[0], folder / name)
    before = names(folder)
    assert newest(folder) == pair[1] and caplog.text == ""
    write_checkpoint(folder, 48, keep=1)
    assert newest(folder).name == f"{48:012d}" and caplog.text == ""
    assert names(folder) == {*before, 48} - {16, 32}


def test_fault_28_all_checkpoints_are_bad(pair: tuple[Path, Path]) -> None:
    """all checkpoints damaged: refused in one line instead of a silent start from 0; nothing is overwritten."""
    folder = pair[0].parent
    os.truncate(pair[1] / "state.json", 5)
    (pair[0] / "manifest.json").write_bytes(b"")
    (folder / f"{48:012d}").mkdir()
    before = contents(folder)
    rule = f"^every checkpoint in {folder} is damaged; restore one, or delete the folder to start again$"
    with pytest.raises(ValueError, match=rule):
        checkpoint.newest(str(folder))
    assert contents(folder) == before


# 38-40: other versions, the best, the oldest


@pytest.mark.parametrize("version", [1, 99])
@pytest.mark.parametrize("layout", ["files", "parts"])
def test_fault_38_another_version_of_the_format(pair: tuple[Path, Path], version: int, layout: str) -> None:
    """checkpoint of another format version: refused in one line, not skipped for an older one that can be read."""
    changed = {"state.json": {"format": version}, "manifest.json": {"format": version, layout: {}}}
    for name, tree in changed.items():
        (pair[1] / name).write_text(json.dumps(tree))
    before = contents(pair[0].parent)
    rule = f"^{pair[1]} has format {version}, this version reads {checkpoint.FORMAT}; use the version that wrote it$"
    with pytest.raises(ValueError, match=rule):
        checkpoint.read_state(str(newest(pair[0].parent)))
    assert contents(pair[0].parent) == before


def test_fault_39_which_checkpoint_is_the_best(tmp_path: Path) -> None:
    """validation loss NaN, infinite or none is never the best, nor a later one of ties: the best is never purged."""
    steps: list[tuple[float | None, list[int]]] = [
        (math.nan, [16]),
        (math.inf, [16, 32]),
        (None, [32, 48]),
        (0.5, [48, 64]),
        (-math.inf, [64, 80]),
        (0.25, [80, 96]),
        (0.25, [96, 112]),
        (math.nan, [96, 112, 128]),
        (0.75, [96, 128, 144]),
        (None, [96, 144, 160]),
        (0.125, [160, 176]),
        (0.5, [176, 192]),
        (0.5, [176, 192, 208]),
    ]
    for number, (score, kept) in enumerate(steps, 1):
        write_checkpoint(tmp_path, 16 * number, keep=2, score=score)
        assert names(tmp_path) == set(kept), number


def test_fault_40_an_old_checkpoint_that_cannot_be_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """deleting an old checkpoint fails: a warning each time, the others are deleted, the newest never is."""
    folder = tmp_path / "checkpoints"
    for samples in (16, 32):
        write_checkpoint(folder, samples)
    stuck = folder / f"{16:012d}"
    stuck.rename(tmp_path / "elsewhere")
    stuck.symlink_to(tmp_path / "elsewhere")  # which the system refuses to delete as a folder, also for root
    for samples in (48, 64, 80):
        caplog.clear()
        last = write_checkpoint(folder, samples, keep=1)
        [line] = caplog.messages
        assert line.startswith(f"checkpoint {stuck} cannot be deleted: ") and line.endswith("; training goes on")
        assert names(folder) == {16, samples} and newest(folder) == last
