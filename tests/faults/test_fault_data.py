"""Faults of the data, by their rows of the fault table: cut, corrupt, missing, few, uneven, replaced, doubled."""

import http.server
import io
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image as PillowImage
from tiny_sets import png, read_tiny, save_picture, write_set

from distributed_inr.data import reader
from distributed_inr.data.prepare import Plan, prepare_set, verify
from distributed_inr.data.reader import Data, Read, ShardDataset, evaluation_stream, read_latent, training_stream
from distributed_inr.data.shard_writer import ShardWriter, write_index
from distributed_inr.data.shards import ShardIndex
from distributed_inr.domains import Image

ROOT = Path(__file__).resolve().parents[2]


def dataset_of(index: ShardIndex, *, read: Read = read_tiny, max_bad_fraction: float = 0.01, **options: Any):
    data = Data(train="unused", num_streams=4, shuffle_shards=2, max_bad_fraction=max_bad_fraction, **options)
    return data.dataset(index, read=read, seed=3)


def read_steps(dataset: ShardDataset, count: int, *, batch: int, world: int = 1, loaders: int = 0) -> list[list[str]]:
    """The keys of the first training steps, over all ranks."""
    sizes = {"start": 0, "global_batch": batch, "micro_batch": batch // world, "world": world, "num_loaders": loaders}
    streams = [training_stream(dataset, rank=rank, **sizes) for rank in range(world)]
    return [[key for stream in streams for key in next(stream).key] for _ in range(count)]


def evaluated(dataset: ShardDataset, *, world: int, loaders: int) -> list[str]:
    """The keys that count in evaluation, sorted; every rank must come to the same number of steps."""
    sizes = {"batch": 4, "world": world, "num_loaders": loaders}
    ranks = [list(evaluation_stream(dataset, rank=rank, **sizes)) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1
    batches = itertools.chain(*ranks)
    return sorted(key for batch in batches for key, good in zip(batch.key, batch.mask, strict=True) if good)


def numbered(count: int) -> list[str]:
    return [f"{number:03d}" for number in range(count)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A web server of the folder `site`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "site")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


# 43: a truncated shard


@pytest.mark.parametrize("kind", ["cut", "zeros to its old size"])
def test_fault_43_a_truncated_shard_of_an_indexed_set_is_refused_at_the_start(tmp_path: Path, kind: str) -> None:
    """Indexed shard cut short: refused at the start by its size, or by its sha256 where the size was kept."""
    write_set(tmp_path / "set", 10)
    path = tmp_path / "set" / "000001.tar"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    rule = f"has {size // 2} bytes, its index says {size}"
    if kind != "cut":
        os.truncate(path, size)
        rule = r"has sha256 \w+..., its index says \w+"
    data = Data(train=str(tmp_path / "set"))
    with pytest.raises(ValueError, match=rf"^shard .*000001.tar {rule}.*: it was .*; restore it or prepare .*again$"):
        data.index(data.train)


@pytest.mark.parametrize(
    ("cut", "kept", "lost"),
    [
        (4 * 2048 + 100, 3, "003"),  # in the header of sample 4, so that nobody can tell whether sample 3 is whole
        (4 * 2048 + 600, 4, "004"),  # in its picture
        (4 * 2048 + 1024, 4, "004"),  # between its picture and its caption
        (4 * 2048 + 1540, 4, "004"),  # in its caption
    ],
)
def test_fault_43_a_truncated_foreign_shard_keeps_its_whole_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int, kept: int, lost: str
) -> None:
    """Foreign shard cut short: its whole samples are used, and the one at the cut is logged by key and left out."""
    write_set(tmp_path / "set", 14)
    for name in ("index.json", "000000.tar.idx", "000001.tar.idx"):
        (tmp_path / "set" / name).unlink()
    os.truncate(tmp_path / "set" / "000000.tar", cut)
    data = Data(train=str(tmp_path / "set"))
    dataset = dataset_of(data.index(data.train))
    signals = [dataset.signal(number)[0] for number in range(len(dataset))]
    assert [signal.key for signal in signals] == numbered(kept) + numbered(14)[7:]
    assert [signal.text for signal in signals] == [f"caption {int(signal.key)}" for signal in signals]
    assert f"sample {lost} is left out" in caplog.text and f"the {kept} before it are used" in caplog.text


# 44: corrupt samples


def jpeg(seed: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    with PillowImage.open(io.BytesIO(png(seed, size))) as picture:
        picture.save(file, "JPEG")
    return file.getvalue()


def npy(seed: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.random.default_rng(seed).normal(size=(2, 4, 2, 2)).astype(np.float16))
    return file.getvalue()


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


PICTURES = Image(size=8, source_size=8).read
CORRUPT = {
    "jpg cut": ("jpg", jpeg, PICTURES, lambda content: content[: len(content) // 2]),
    "jpg without a header": ("jpg", jpeg, PICTURES, lambda content: content[20:]),
    "png cut": ("png", png, PICTURES, lambda content: content[: len(content) // 2]),
    "png with a flipped bit": ("png", png, PICTURES, flip),
    "npy cut": ("latent.npy", npy, read_latent, lambda content: content[:-3]),
    "npy without a header": ("latent.npy", npy, read_latent, lambda content: content[20:]),
}
"""Member suffix, what makes a good one, the reader, and what is wrong with the bad ones."""


def corrupt_set(folder: Path, kind: str, *, max_bad_fraction: float) -> ShardDataset:
    """Three shards of five samples, of which 006, 013 and 014 are corrupt."""
    suffix, make, read, spoil = CORRUPT[kind]
    writer = ShardWriter(folder, domain="image", protocol={}, shard_samples=5)
    for number, key in enumerate(numbered(15)):
        writer.write({"__key__": key, suffix: spoil(make(number)) if number in (6, 13, 14) else make(number)})
    return dataset_of(writer.close(), read=read, max_bad_fraction=max_bad_fraction)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """What the reader logs, in loader processes too."""
    handler = logging.FileHandler(tmp_path / "log.txt")
    reader.logger.addHandler(handler)
    yield tmp_path / "log.txt"
    reader.logger.removeHandler(handler)
    handler.close()


@pytest.mark.parametrize("loaders", [0, 2])
@pytest.mark.parametrize("kind", CORRUPT)
def test_fault_44_a_corrupt_sample_is_replaced_by_the_next_good_one_of_its_shard(
    tmp_path: Path, log: Path, kind: str, loaders: int
) -> None:
    """Corrupt JPEG, PNG or latent: replaced by the next good sample of its shard, counted, and logged by key."""
    dataset = corrupt_set(tmp_path / "set", kind, max_bad_fraction=0.5)
    [keys] = read_steps(dataset, 1, batch=15, loaders=loaders)
    assert sorted(keys) == sorted({"006": "007", "013": "010", "014": "010"}.get(key, key) for key in numbered(15))
    logged = {line.split(" in ")[0] for line in log.read_text().splitlines()}
    assert logged == {"bad sample 006", "bad sample 013", "bad sample 014"}

    dataset = corrupt_set(tmp_path / "other", kind, max_bad_fraction=0.5)
    assert evaluated(dataset, world=1, loaders=loaders) == sorted({*numbered(15)} - {"006", "013", "014"})
    assert (dataset.num_read, dataset.num_bad) == (15, 3)


@pytest.mark.parametrize(("loaders", "limit", "found"), [(0, 0.14, "3 of 15"), (2, 0.03, r"\d of \d\d")])
def test_fault_44_more_corrupt_samples_than_the_limit_stop_the_run(
    tmp_path: Path, loaders: int, limit: float, found: str
) -> None:
    """More corrupt samples than `data.max_bad_fraction`: the run is refused, with the count and the last key."""
    dataset = corrupt_set(tmp_path / "set", "png cut", max_bad_fraction=limit)
    rule = rf"^{found} samples are bad, above data.max_bad_fraction={limit}; the last: 0\d\d.png: cannot be decoded: .*"
    with pytest.raises(ValueError, match=rule + "; mend the set or raise the limit$"):
        read_steps(dataset, 3, batch=5, loaders=loaders)


# 45: a shard missing from a numbered range


@pytest.mark.parametrize("store", ["local", "object store"])
def test_fault_45_a_shard_missing_from_a_numbered_range_is_refused_at_the_start(tmp_path: Path, store: str) -> None:
    """Shard missing from a numbered range: refused at the start, of an indexed set and of foreign tars."""
    write_set(tmp_path / "set", 30)
    url, files = str(tmp_path / "set"), fsspec.filesystem("file")
    if store == "object store":
        url, files = "memory://fault45/set", fsspec.filesystem("memory")
        files.put(f"{tmp_path}/set/", "/fault45/set/", recursive=True)
    path = url.removeprefix("memory:/")
    data = Data(train=url, cache_dir=str(tmp_path / "cache"))
    files.rm(f"{path}/000002.tar")

    indexed = f"^{url}: 1 of {{}} shards are missing, first 000002.tar; restore them or prepare the set again$"
    with pytest.raises(ValueError, match=indexed.format(5)):
        data.index(url)
    with pytest.raises(ValueError, match=indexed.format(3)):
        data.index(f"{url}/{{000001..000003}}.tar")

    for name in ("index.json", *(f"{number:06d}.tar.idx" for number in range(5))):
        files.rm(f"{path}/{name}")
    with pytest.raises(ValueError, match=f"^{url}: 1 of 5 .*first 000002.tar; restore them or correct the address$"):
        data.index(f"{url}/{{000000..000004}}.tar")
    assert not files.glob(f"{path}/*.idx") and not (tmp_path / "cache").exists()
    if store == "object store":
        files.rm("/fault45", recursive=True)


def test_fault_45_a_foreign_shard_that_a_web_server_lacks_is_refused_at_the_start(tmp_path: Path, site: str) -> None:
    """Shard missing from a web server, which lists no files: refused at the start, when its turn to be indexed is."""
    write_set(tmp_path / "site" / "set", 21)
    for name in ("index.json", "000001.tar"):
        (tmp_path / "site" / "set" / name).unlink()
    data = Data(train=f"{site}/set/{{000000..000002}}.tar", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="^shard http.*/000001.tar is missing; restore it or correct the address$"):
        data.index(data.train)


# 46 and 47: few and uneven shards


def uneven_set(folder: Path, sizes: list[int]) -> ShardIndex:
    numbers = itertools.count()
    for shard, size in enumerate(sizes):
        writer = ShardWriter(folder, domain="image", protocol={}, prefix=f"{shard:02d}-")
        for number in itertools.islice(numbers, size):
            writer.write({"__key__": f"{number:03d}", "png": png(number), "txt": b"a chair"})
        writer.close(write_index=False)
    return write_index(folder, domain="image", protocol={})


@pytest.mark.parametrize("world", [2, 4])
def test_fault_46_one_shard_serves_many_ranks_and_loaders(tmp_path: Path, world: int) -> None:
    """Fewer shards than ranks x loader processes: samples are split instead, and each is read exactly once an epoch."""
    dataset = dataset_of(uneven_set(tmp_path / "set", [40]))
    steps = read_steps(dataset, 10, batch=8, world=world, loaders=2)
    for epoch in (steps[:5], steps[5:]):
        assert sorted(itertools.chain(*epoch)) == numbered(40)
    assert evaluated(dataset, world=world, loaders=2) == numbered(40)


UNEVEN = [1, 17, 2, 24, 1]


@pytest.mark.parametrize(("world", "loaders"), [(1, 0), (2, 0), (3, 0), (4, 0), (2, 2)])
def test_fault_47_uneven_shards_give_every_rank_the_same_steps(tmp_path: Path, world: int, loaders: int) -> None:
    """Uneven shards: every rank has the same number of steps, none waits, and each sample is read once an epoch."""
    index = uneven_set(tmp_path / "set", UNEVEN)
    assert [shard.samples for shard in index.shards] == UNEVEN
    dataset = dataset_of(index)
    steps = read_steps(dataset, 15, batch=12, world=world, loaders=loaders)
    expected = [[dataset[position].key for position in range(12 * step, 12 * step + 12)] for step in range(15)]
    assert [sorted(step) for step in steps] == [sorted(step) for step in expected]
    keys = list(itertools.chain(*expected))
    assert all(sorted(keys[45 * epoch : 45 * epoch + 45]) == numbered(45) for epoch in range(4))

    assert evaluated(dataset, world=world, loaders=loaders) == numbered(45)


# 50: a shard that is replaced while the run goes on


def replacement(folder: Path, path: Path, *, same_size: bool) -> bytes:
    """The tar of another set, as long as the one at `path` or longer."""
    writer = ShardWriter(folder, domain="image", protocol={})
    for number in range(7 if same_size else 12):
        writer.write({"__key__": f"{number:03d}", "png": png(100 + number), "txt": b"another"})
    writer.close()
    content = (folder / "000000.tar").read_bytes()
    assert (len(content) == path.stat().st_size) is same_size
    return content


DAMAGED = r"^shard .*000001.tar: 0\d\d.(png|txt) differs from its index \(crc32\): the shard was .*; restore it"


@pytest.mark.parametrize("loaders", [0, 2])
@pytest.mark.parametrize("same_size", [True, False])
def test_fault_50_a_shard_overwritten_while_it_is_open_stops_the_run(
    tmp_path: Path, same_size: bool, loaders: int
) -> None:
    """Shard overwritten while it is read: the run is refused at the first sample that differs, and none is replaced."""
    dataset = dataset_of(write_set(tmp_path / "set", 21))
    stream = training_stream(dataset, start=0, global_batch=7, micro_batch=7, num_loaders=loaders)
    for _ in range(3):
        next(stream)
    path = tmp_path / "set" / "000001.tar"
    path.write_bytes(replacement(tmp_path / "other", path, same_size=same_size))
    with pytest.raises(ValueError, match=DAMAGED) as refused:
        for _ in range(9):
            assert "another" not in next(stream).text
    assert "\n" not in str(refused.value)
    assert dataset.num_bad == 0


@pytest.mark.parametrize("loaders", [0, 2])
@pytest.mark.parametrize("same_size", [True, False])
def test_fault_50_a_shard_replaced_before_it_is_opened_again_stops_the_run(
    tmp_path: Path, same_size: bool, loaders: int
) -> None:
    """Shard replaced by another file: the run is refused when it opens it, by size, or when it reads it, by crc32."""
    index = write_set(tmp_path / "set", 21)
    path = tmp_path / "set" / "000001.tar"
    (tmp_path / "new.tar").write_bytes(replacement(tmp_path / "other", path, same_size=same_size))
    os.replace(tmp_path / "new.tar", path)
    larger = r"^shard .*000001.tar has \d+ bytes, its index says \d+: it was changed or cut short; restore it"
    with pytest.raises(ValueError, match=DAMAGED if same_size else larger) as refused:
        read_steps(dataset_of(index), 3, batch=7, loaders=loaders)
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # the server's threads
@pytest.mark.parametrize("loaders", [0, 2])
def test_fault_50_a_remote_shard_that_changed_since_it_was_indexed_stops_the_run(
    tmp_path: Path, site: str, loaders: int
) -> None:
    """Remote shard changed since its index was made: refused by its sha256 when it is fetched, and not cached."""
    write_set(tmp_path / "site" / "set", 21)
    cache = tmp_path / "cache"
    index = Data(train=f"{site}/set", cache_dir=str(cache)).index(f"{site}/set")
    path = tmp_path / "site" / "set" / "000001.tar"
    path.write_bytes(replacement(tmp_path / "other", path, same_size=True))
    changed = r"^shard http.*000001.tar has sha256 \w+..., its index says \w+...: it was changed or damaged; restore it"
    with pytest.raises(ValueError, match=changed) as refused:
        read_steps(dataset_of(index, cache_dir=str(cache)), 3, batch=7, loaders=loaders)
    assert "\n" not in str(refused.value)
    assert index.shards[1].sha256 not in {file.stem for file in cache.glob("*.tar")}


# 51: keys that occur twice


@pytest.mark.parametrize("place", ["within a shard", "across shards"])
def test_fault_51_keys_that_occur_twice_are_found_by_verify(tmp_path: Path, place: str) -> None:
    """Sample keys that occur twice: `verify` refuses the set, naming a key and the shards that hold it."""
    if place == "within a shard":
        writer = ShardWriter(tmp_path / "set", domain="image", protocol={})
        for key in ("a", "b", "a"):
            writer.write({"__key__": key, "png": png(0)})
        writer.close()
        url, key, shards = str(tmp_path / "set"), "a", ["set/000000.tar", "set/000000.tar"]
    else:
        write_set(tmp_path / "one", 5)
        write_set(tmp_path / "two", 1)
        url, key, shards = f"{tmp_path}/{{one,two}}", "000", ["one/000000.tar", "two/000000.tar"]
    [problem] = verify(url)
    places = " and ".join(f"in {tmp_path}/{shard}" for shard in shards)
    assert problem.startswith(f"1 keys occur more than once, such as {key!r} {places}; pack one of the samples again")


def test_fault_51_the_job_that_verifies_a_set_fails_on_keys_that_occur_twice(tmp_path: Path) -> None:
    """Sample keys that occur twice, in the job: `prepare_data.py verify` ends with one error line and exit code 2."""
    for name in ("one", "two"):
        write_set(tmp_path / name, 3)
    url = f"{tmp_path}/{{one,two}}"
    command = [sys.executable, str(ROOT / "jobs" / "prepare_data.py"), "verify", url]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert found.returncode == 2 and found.stdout == ""
    assert errors == [f"error: {url}: 1 problems; restore those shards or prepare the set again"]
    assert re.search(r"^3 keys occur more than once, such as '00\d' in ", found.stderr, re.MULTILINE)
    assert "Traceback" not in found.stderr


def test_fault_51_pictures_that_would_have_one_key_are_refused_before_any_is_written(tmp_path: Path) -> None:
    """Raw pictures that would have one key: refused before a shard is written, naming both files."""
    for name in ("0.png", "0.jpg"):
        save_picture(tmp_path / "raw" / "chair" / name)
    frames = {"frames": [{"file_path": "0.png"}, {"file_path": "0.jpg"}]}
    (tmp_path / "raw" / "chair" / "transforms.json").write_text(json.dumps(frames))
    with pytest.raises(ValueError, match="raw: chair/0.png and chair/0.jpg would have one key; rename one$"):
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(layout="views", split="none"))
    assert not (tmp_path / "out").exists()
