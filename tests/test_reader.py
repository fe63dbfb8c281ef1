"""Reading by position: the same samples for every number of ranks and loader processes, and bad samples contained."""

import io
import itertools
import os
import pickle
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from tiny_sets import png, read_tiny, write_set

from distributed_inr.data.cache import Cache
from distributed_inr.data.reader import (
    Data,
    ShardDataset,
    evaluation_stream,
    read_latent,
    training_stream,
)
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.data.shards import load_index
from distributed_inr.domains import Image
from distributed_inr.domains.domain import Signal
from distributed_inr.randomness import sample_seed


def make(folder: Path, count: int, *, bad: tuple[int, ...] = (), max_bad_fraction: float = 0.01) -> ShardDataset:
    data = Data(train=str(folder), num_streams=4, shuffle_shards=2, max_bad_fraction=max_bad_fraction)
    if not folder.exists():
        write_set(folder, count, bad=bad)
    return data.dataset(data.index(data.train), read=read_tiny, seed=3)


def steps(
    dataset: ShardDataset, *, start: int, count: int, global_batch: int, micro_batch: int, world: int, loaders: int
) -> list[list[tuple[int, str, int]]]:
    """(position, key, seed) of the samples of each step, over all ranks, in the order of positions."""
    streams = [
        training_stream(
            dataset,
            start=start,
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            world=world,
            num_loaders=loaders,
        )
        for rank in range(world)
    ]
    found = []
    for _ in range(count):
        batches = [next(s) for s in streams for _ in range(global_batch // world // micro_batch)]
        assert all(len(batch) == micro_batch for batch in batches)
        samples = [s for b in batches for s in zip(b.position.tolist(), b.key, b.seed.tolist(), strict=True)]
        found.append(sorted(samples))
    return found


@pytest.mark.parametrize("count", [48, 45])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("loaders", [0, 2])
def test_a_step_has_the_same_samples_for_every_number_of_ranks_and_loaders(
    tmp_path: Path, count: int, world: int, loaders: int
) -> None:
    dataset = make(tmp_path / "set", count)
    found = steps(dataset, start=0, count=12, global_batch=8, micro_batch=2, world=world, loaders=loaders)
    expected = []
    for step in range(12):
        signals = [dataset[position] for position in range(step * 8, step * 8 + 8)]
        expected.append([(int(s.position), s.key, int(s.seed)) for s in signals])
    assert found == expected
    keys = [key for step in found for _, key, _ in step]
    everything = sorted(f"{i:03d}" for i in range(count))
    assert sorted(keys[:count]) == everything
    assert sorted(keys[count : 2 * count]) == everything[: len(keys) - count] or 2 * count > len(keys)


def test_each_sample_comes_exactly_once_an_epoch_and_epochs_differ(tmp_path: Path) -> None:
    dataset = make(tmp_path / "set", 45)
    epochs = [[dataset[p].key for p in range(e * 45, (e + 1) * 45)] for e in range(3)]
    assert all(sorted(epoch) == [f"{i:03d}" for i in range(45)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("start", [1, 8, 44, 45, 1_000_003])
@pytest.mark.parametrize(("world", "loaders"), [(1, 0), (2, 0), (2, 2)])
def test_reading_starts_at_any_sample(tmp_path: Path, start: int, world: int, loaders: int) -> None:
    dataset = make(tmp_path / "set", 45)
    found = steps(dataset, start=start, count=2, global_batch=6, micro_batch=3, world=world, loaders=loaders)
    assert [p for step in found for p, _, _ in step] == list(range(start, start + 12))
    assert [key for step in found for _, key, _ in step] == [dataset[p].key for p in range(start, start + 12)]


def test_a_ranks_batches_are_in_the_order_of_positions(tmp_path: Path) -> None:
    stream = training_stream(make(tmp_path / "set", 45), start=5, global_batch=8, micro_batch=2, rank=1, world=2)
    assert [next(stream).position.tolist() for _ in range(4)] == [[5, 7], [9, 11], [13, 15], [17, 19]]


def test_seeds_belong_to_the_position_of_the_run(tmp_path: Path) -> None:
    dataset = make(tmp_path / "set", 10)
    assert int(dataset[123].seed) == sample_seed(3, 123)
    assert int(dataset[123].seed) != int(dataset[133].seed)
    assert dataset[123].text == f"caption {int(dataset[123].key)}"


def test_a_signal_has_its_own_number_in_the_set_and_a_replacement_the_replacements(tmp_path: Path) -> None:
    dataset = make(tmp_path / "set", 45, bad=(3, 20), max_bad_fraction=1.0)  # in shards of seven
    found = {dataset[position].key: dataset[position].number for position in range(45)}
    assert all(number is not None and int(number) == int(key) for key, number in found.items()) and len(found) == 43
    replaced, is_itself = dataset.signal(20)  # the last of its shard, whose first comes next
    assert not is_itself and replaced.key == "014" and replaced.number == 14
    batch = next(training_stream(dataset, start=0, global_batch=8, micro_batch=8, num_loaders=1))
    assert batch.number is not None and batch.number.tolist() == [int(key) for key in batch.key]


def test_a_rank_reads_only_its_own_spans(tmp_path: Path) -> None:
    """With S a multiple of W, rank r reads S / W spans of an epoch: a part of the shards."""
    write_set(tmp_path / "set", 128, shard_samples=4)
    data = Data(train=str(tmp_path / "set"), num_streams=4, shuffle_shards=1)
    dataset = data.dataset(data.index(data.train), read=read_tiny, seed=0)
    assert dataset.order is not None
    touched = [{dataset.order.locate(p).shard for p in range(rank, 128, 4)} for rank in range(4)]
    assert [len(shards) for shards in touched] == [8, 8, 8, 8]
    assert len(set.union(*touched)) == 32


@pytest.mark.parametrize("count", [48, 45, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("loaders", [0, 2])
def test_evaluation_counts_every_sample_once_in_equally_many_steps(
    tmp_path: Path, count: int, world: int, loaders: int
) -> None:
    dataset = make(tmp_path / "set", count)
    ranks = [
        list(evaluation_stream(dataset, batch=4, rank=rank, world=world, num_loaders=loaders)) for rank in range(world)
    ]
    assert {len(batches) for batches in ranks} == {-(-count // (4 * world))}
    counted = [key for batches in ranks for b in batches for key, good in zip(b.key, b.mask, strict=True) if good]
    assert sorted(counted) == [f"{i:03d}" for i in range(count)]
    assert all(len(b) == 4 for batches in ranks for b in batches)


def test_evaluation_is_in_the_sets_own_order(tmp_path: Path) -> None:
    batches = evaluation_stream(make(tmp_path / "set", 45), batch=45)
    assert next(batches).key == [f"{i:03d}" for i in range(45)]


# Bad samples


def test_a_shard_without_any_good_sample_is_one_clear_line(tmp_path: Path) -> None:
    dataset = make(tmp_path / "set", 7, bad=tuple(range(7)), max_bad_fraction=1.0)
    with pytest.raises(ValueError, match="none of its 7 samples is good"):
        dataset[0]


def bomb() -> bytes:
    """A PNG whose header claims a billion pixels."""
    header = struct.pack(">IIBBBBB", 40_000, 25_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


BAD_PICTURES = {
    "empty": b"",
    "garbage": bytes(range(256)) * 4,
    "truncated": png(0, 32)[:-200],
    "wrong size": png(0, 16),
    "too many pixels": bomb(),
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_contained_by_the_image_domain(tmp_path: Path, name: str) -> None:
    writer = ShardWriter(tmp_path / "set", domain="image", protocol={})
    for key, content in (("0", png(0, 32)), ("1", BAD_PICTURES[name]), ("2", png(2, 32))):
        writer.write({"__key__": key, "png": content})
    writer.close()
    data = Data(train=str(tmp_path / "set"), max_bad_fraction=0.5)
    domain = Image(size=16, source_size=32)
    dataset = data.dataset(data.index(data.train), read=domain.read, seed=0)
    assert sorted(dataset[p].key for p in range(3)) == ["0", "2", "2"]
    assert dataset.num_bad == 1


def test_a_record_without_a_picture_is_contained(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "set", domain="image", protocol={})
    writer.write({"__key__": "0", "png": png(0, 32)})
    writer.write({"__key__": "1", "txt": b"only words"})
    writer.close()
    dataset = ShardDataset(
        load_index(str(tmp_path / "set")),
        read=Image(size=16, source_size=32).read,
        seed=0,
        max_bad_fraction=1.0,
    )
    assert [dataset[p].key for p in range(2)] == ["0", "0"]


def test_values_that_are_not_finite_are_contained(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set", 3)

    def read(record: dict, seed: int) -> Signal:
        signal = read_tiny(record, seed)
        if record["__key__"] == "001":
            signal.inputs[0, 0, 0] = float("nan")
        return signal

    dataset = ShardDataset(index, read=read, seed=0, max_bad_fraction=1.0)
    assert [dataset[p].key for p in range(3)] == ["000", "002", "002"]


# Arguments, configs, latents


def test_batches_that_do_not_divide_are_refused_with_a_remedy(tmp_path: Path) -> None:
    dataset = make(tmp_path / "set", 10)
    with pytest.raises(ValueError, match=r"batch_size=10 must be a multiple of the 4 workers; try 8"):
        training_stream(dataset, start=0, global_batch=10, micro_batch=1, world=4)
    with pytest.raises(ValueError, match=r"micro_batch_size=5 must divide .* 16 / 2 = 8; try 4"):
        training_stream(dataset, start=0, global_batch=16, micro_batch=5, world=2)


def test_reading_draws_nothing_from_the_global_generator(tmp_path: Path) -> None:
    dataset = make(tmp_path / "set", 10)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(training_stream(dataset, start=0, global_batch=4, micro_batch=4))
    assert torch.equal(torch.rand(3), expected)


def test_a_dataset_can_be_pickled_for_loader_processes(tmp_path: Path) -> None:
    dataset = make(tmp_path / "set", 10)
    before = dataset[7].key
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_counts", torch.zeros(257, 2, dtype=torch.int64))
        copy = pickle.loads(pickle.dumps(dataset))
    assert copy[7].key == before


def latent_record(array: np.ndarray) -> dict:
    file = io.BytesIO()
    np.save(file, array)
    return {"__key__": "a", "latent.npy": file.getvalue(), "txt": b"a chair"}


def test_latents_are_read_back() -> None:
    latent = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float16)
    signal = read_latent(latent_record(latent), seed=5)
    assert signal.inputs.dtype == torch.float32 and signal.text == "a chair"
    assert np.array_equal(signal.inputs.numpy(), latent.astype(np.float32))


HEADERS = {"unclosed": b"(2, [4), }", "negative": b"(2, -1), }", "not a size": b"(2, x), }", "one axis": b"(8,), }"}
"""Ends of a .npy header that numpy's own reader stumbles over, or accepts."""


@pytest.mark.parametrize(
    "kind", ["objects", "shape", "integers", "truncated", "empty", "lying header", "missing", *HEADERS]
)
def test_bad_latents_are_refused(tmp_path: Path, kind: str) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "owned"),)

    good = latent_record(np.zeros((2, 4), np.float16))
    if kind == "objects":
        record = latent_record(np.array([Evil(), Evil()], dtype=object))
    elif kind == "shape":
        record = latent_record(np.zeros((3, 4), np.float16))
    elif kind == "integers":
        record = latent_record(np.zeros((2, 4), np.int64))
    elif kind == "missing":
        record = {"__key__": "a"}
    elif kind in HEADERS:
        content = good["latent.npy"]
        record = good | {"latent.npy": content.replace(b"(2, 4), }", HEADERS[kind].ljust(9))}
        assert record != good
    elif kind == "lying header":
        record = good | {"latent.npy": good["latent.npy"].replace(b"(2, 4), }      ", b"(2, 9999999), }")}
        assert record != good
    else:
        record = good | {"latent.npy": good["latent.npy"][:-3] if kind == "truncated" else b""}
    with pytest.raises(ValueError, match=r"a.latent.npy"):
        read_latent(record, seed=0)
    assert not (tmp_path / "owned").exists()


# Remote sets


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[str]:
    write_set(tmp_path / "local", 64, shard_samples=4)
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path}/local/", "/bucket/set/", recursive=True)
    yield "memory://bucket/set"
    store.rm("/bucket", recursive=True)


def remote_dataset(url: str, folder: Path, *, gib: float = 1.0) -> ShardDataset:
    data = Data(train=url, num_streams=2, shuffle_shards=2, cache_dir=str(folder), cache_gib=gib)
    return data.dataset(data.index(url), read=read_tiny, seed=0)


def test_a_remote_set_has_the_same_samples_in_the_same_order(tmp_path: Path, remote: str) -> None:
    dataset = remote_dataset(remote, tmp_path / "cache")
    data = Data(train=str(tmp_path / "local"), num_streams=2, shuffle_shards=2)
    expected = data.dataset(data.index(data.train), read=read_tiny, seed=0)
    assert [dataset[p].key for p in range(100)] == [expected[p].key for p in range(100)]


def test_shards_of_the_next_window_are_fetched_ahead_of_use(tmp_path: Path, remote: str) -> None:
    dataset = remote_dataset(remote, tmp_path / "cache")
    assert dataset.order is not None
    dataset[0]
    wanted = {dataset.index.shards[s].sha256 for s in itertools.chain(*dataset.order.windows_ahead(0))}
    assert len(wanted) == 4
    for _ in range(100):
        present = {p.stem for p in (tmp_path / "cache").glob("*.tar")}
        if wanted <= present:
            break
        time.sleep(0.05)
    assert wanted == present


def test_a_small_cache_still_serves_every_sample(tmp_path: Path, remote: str) -> None:
    size = max(p.stat().st_size for p in (tmp_path / "local").glob("*.tar"))
    dataset = remote_dataset(remote, tmp_path / "cache", gib=4.5 * size / 2**30)
    stream = training_stream(dataset, start=0, global_batch=8, micro_batch=8)
    keys = [key for batch in itertools.islice(stream, 8) for key in batch.key]
    assert sorted(keys) == [f"{i:03d}" for i in range(64)]


def test_a_cache_that_cannot_hold_the_windows_is_refused_at_the_start(tmp_path: Path, remote: str) -> None:
    size = max(p.stat().st_size for p in (tmp_path / "local").glob("*.tar"))
    dataset = remote_dataset(remote, tmp_path / "cache", gib=3 * size / 2**30)
    with pytest.raises(ValueError, match=r"data.cache_gib=.* cannot hold the 2 windows of 2 shards"):
        training_stream(dataset, start=0, global_batch=8, micro_batch=8)
    training_stream(dataset, start=0, global_batch=8, micro_batch=4, world=2)


def test_the_default_cache_is_not_touched_by_local_sets(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 5)
    cache = Cache(str(tmp_path / "cache"), gib=1.0)
    dataset = ShardDataset(load_index(str(tmp_path / "set")), read=read_tiny, seed=0, cache=cache)
    dataset[0]
    assert not (tmp_path / "cache").exists()
