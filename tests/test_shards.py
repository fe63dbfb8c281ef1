"""The shard format: plain webdataset tars, their indexes, and what happens when they are damaged or hostile."""

import gc
import http.server
import json
import os
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fsspec
import pytest
import webdataset
from tiny_sets import records, write_set

from distributed_inr.data import storage
from distributed_inr.data.cache import Cache
from distributed_inr.data.shard_writer import ShardWriter, write_index
from distributed_inr.data.shards import OpenShard, ShardDamaged, load_index, read_index
from distributed_inr.data.side_index import SideIndex


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"), gib=1.0)


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_what_was_written_is_read_back_by_offset(tmp_path: Path, cache: Cache) -> None:
    writer = ShardWriter(tmp_path / "set", domain="image", protocol={"size": 8}, shard_samples=3)
    written = [
        {"__key__": f"object-{i}/{i:03d}", "png": bytes([i] * i), "txt": f"na\u00efve {i}".encode()} for i in range(8)
    ]
    for record in written:
        writer.write(record)
    made = writer.close()
    index = load_index(str(tmp_path / "set"))
    assert index == made
    assert [shard.samples for shard in index.shards] == [3, 3, 2]
    assert index.domain == "image" and index.protocol == {"size": 8}
    assert records(index, cache) == written


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_plain_webdataset_reads_our_shards(tmp_path: Path, cache: Cache) -> None:
    index = write_set(tmp_path / "set", 10)
    urls = [shard.url for shard in index.shards]
    theirs = [
        {k: v for k, v in sample.items() if k not in ("__url__", "__local_path__")}
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]
    gc.collect()
    assert theirs == records(index, cache)


def test_shards_stay_below_the_given_size(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "set", domain="image", protocol={}, shard_bytes=40_000)
    for i in range(50):
        writer.write({"__key__": f"{'long' * 30}-\u00e9-{i}", "bin": bytes(100 * i), "txt": b"x"})
    index = writer.close()
    assert len(index.shards) > 3
    assert all(shard.bytes <= 40_000 for shard in index.shards)


def test_an_interrupted_writer_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    def run(folder: Path, stop_after: int | None) -> None:
        writer = ShardWriter(folder, domain="image", protocol={}, shard_samples=4)
        todo = [i for i in range(15) if f"{i}" not in writer.done]
        for count, i in enumerate(todo):
            if count == stop_after:
                writer.abandon()
                (folder / ".000009.tar.part").write_bytes(b"what a killed process leaves")
                return
            writer.write({"__key__": f"{i}", "bin": bytes(i)})
        writer.close()

    run(tmp_path / "whole", None)
    run(tmp_path / "parts", 6)
    assert not (tmp_path / "parts" / "index.json").exists()
    run(tmp_path / "parts", 7)
    run(tmp_path / "parts", None)
    for file in sorted(p.name for p in (tmp_path / "whole").iterdir()):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert len(list((tmp_path / "parts").iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_a_writer_writes_torn_shards_again(tmp_path: Path) -> None:
    for attempt in range(2):
        writer = ShardWriter(tmp_path / "set", domain="image", protocol={}, shard_samples=2)
        for i in range(6):
            if f"{i}" not in writer.done:
                writer.write({"__key__": f"{i}", "bin": bytes(3000)})
        writer.close(write_index=attempt == 1)
        if attempt == 0:
            os.truncate(tmp_path / "set" / "000001.tar", 5000)
    load_index(str(tmp_path / "set")).check()


def test_no_space_is_one_clear_line_and_leaves_complete_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path / "set", domain="image", protocol={}, shard_samples=2)
    for i in range(4):
        writer.write({"__key__": f"{i}", "bin": b"x"})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"^no space left in .*set; free some and run the same command again"):
        writer.write({"__key__": "4", "bin": b"x"})
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["000000.tar", "000000.tar.idx"]


def test_a_folder_that_cannot_be_written_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"^cannot write to /proc/nowhere: "):
        ShardWriter("/proc/nowhere", domain="image", protocol={})


@pytest.mark.parametrize("key", ["a/../b", "/etc/x", "a.b", ""])
def test_keys_that_cannot_name_a_member_are_refused(tmp_path: Path, key: str) -> None:
    writer = ShardWriter(tmp_path / "set", domain="image", protocol={})
    with pytest.raises(ValueError, match="cannot name a member"):
        writer.write({"__key__": key, "bin": b"x"})


def test_fingerprint_names_contents_and_not_the_place(tmp_path: Path) -> None:
    one, same = write_set(tmp_path / "a", 5), write_set(tmp_path / "b", 5)
    assert one.fingerprint == same.fingerprint != write_set(tmp_path / "c", 6).fingerprint


def test_some_shards_of_a_set_are_named_by_braces_and_patterns(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set", 30)
    assert len(index.shards) == 5
    assert load_index(f"{tmp_path}/set/00000{{1..3}}.tar").shards == index.shards[1:4]
    assert load_index(f"{tmp_path}/set/*.tar").shards == index.shards
    assert load_index(f"{tmp_path}/set/000002.tar").shards == index.shards[2:3]
    write_set(tmp_path / "other", 8)
    assert load_index(f"{tmp_path}/{{set,other}}").num_samples == 38


# Damage


def test_a_changed_byte_is_found_at_the_start_of_a_small_set(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set", 10)
    flip(tmp_path / "set" / "000001.tar", 600)
    with pytest.raises(ValueError, match=r"000001.tar has sha256 \w+..., its index says \w+...: it was changed"):
        index.check()


def test_every_changed_byte_of_a_sample_is_found_when_it_is_read(tmp_path: Path, cache: Cache) -> None:
    index = write_set(tmp_path / "set", 1)
    opened = OpenShard(index.shards[0], cache)
    path = tmp_path / "set" / "000000.tar"
    members = opened.side.members.tolist()
    for start, size, _, _ in members:
        for offset in range(start, start + size, 7):
            flip(path, offset)
            with pytest.raises(ShardDamaged, match=r"000.(png|txt) differs from its index"):
                opened.record(0)
            flip(path, offset)
    assert opened.record(0)["__key__"] == "000"


def test_a_torn_or_stale_side_index_is_made_again(tmp_path: Path, cache: Cache) -> None:
    index = write_set(tmp_path / "set", 10)
    side = tmp_path / "set" / "000000.tar.idx"
    good, expected = side.read_bytes(), records(index, cache)
    flipped = bytearray(good)
    flipped[100] ^= 1
    other = (tmp_path / "set" / "000001.tar.idx").read_bytes()
    for content in (b"", good[:10], good[:-1], good + b"x", bytes(flipped), other, os.urandom(200)):
        side.write_bytes(content)
        assert records(index, cache) == expected
        assert side.read_bytes() == good
    side.unlink()
    assert records(index, cache) == expected


def test_a_side_index_that_cannot_be_kept_beside_the_tar_goes_to_the_cache(tmp_path: Path, cache: Cache) -> None:
    index = write_set(tmp_path / "set", 5)
    (tmp_path / "set" / "000000.tar.idx").unlink()
    expected = len(records(index, cache))
    (tmp_path / "set" / "000000.tar.idx").unlink()
    real = os.access
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False if str(path).endswith("set") else real(path, mode))
        assert len(records(index, cache)) == expected
    assert not (tmp_path / "set" / "000000.tar.idx").exists()
    assert len(list(cache.folder.glob("*.idx"))) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "0" * 64},
        {"shards": []},
        {"version": 99},
        {"shards": [{"name": "../x.tar", "samples": 1, "bytes": 1, "sha256": "0"}]},
        {"shards": [{"name": "http://169.254.169.254/x.tar", "samples": 1, "bytes": 1, "sha256": "0"}]},
        {"shards": [{"name": "pipe:touch x", "samples": 1, "bytes": 1, "sha256": "0"}]},
        {"shards": 3},
    ],
)
def test_an_index_that_was_edited_is_refused(tmp_path: Path, change: dict) -> None:
    write_set(tmp_path / "set", 5)
    path = tmp_path / "set" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="prepare the set again"):
        load_index(str(tmp_path / "set"))


def test_a_cut_index_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 5)
    path = tmp_path / "set" / "index.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        load_index(str(tmp_path / "set"))


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no index.json and no .tar files there; check the path"):
        load_index(str(tmp_path))
    with pytest.raises(ValueError, match="no index.json and no .tar"):
        load_index(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no shards there"):
        load_index(f"{tmp_path}/*.tar")


# Remote sets


@pytest.fixture
def remote(tmp_path: Path) -> str:
    """A set in fsspec's in-memory object store."""
    write_set(tmp_path / "local", 35)
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path}/local/", "/bucket/set/", recursive=True)
    yield "memory://bucket/set"
    store.rm("/bucket", recursive=True)


def test_a_remote_set_is_fetched_whole_and_read_like_a_local_one(tmp_path: Path, cache: Cache, remote: str) -> None:
    index = load_index(remote, cache=cache)
    index.check()
    local = load_index(str(tmp_path / "local"))
    assert index.fingerprint == local.fingerprint
    assert records(index, cache) == records(local, cache)
    assert sorted(p.stem for p in cache.folder.glob("*.tar")) == sorted(shard.sha256 for shard in index.shards)


def test_a_remote_shard_that_goes_missing_is_one_clear_line(cache: Cache, remote: str) -> None:
    index = load_index(remote, cache=cache)
    fsspec.filesystem("memory").rm("/bucket/set/000003.tar")
    with pytest.raises(ValueError, match=r"000003.tar is missing but its index lists it"):
        OpenShard(index.shards[3], cache)


def test_foreign_remote_tars_are_fetched_once_and_remembered(cache: Cache, remote: str) -> None:
    fsspec.filesystem("memory").rm("/bucket/set/index.json")
    index = load_index(remote, cache=cache)
    fsspec.filesystem("memory").pipe_file("/bucket/set/000000.tar", b"fetched again")
    again = load_index(f"{remote}/{{000000..000004}}.tar", cache=cache)
    assert again.fingerprint == index.fingerprint
    assert len(records(index, cache)) == 35


def test_a_set_is_read_from_a_web_server(tmp_path: Path, cache: Cache) -> None:
    """A plain one, which neither lists folders nor serves ranges."""
    write_set(tmp_path / "site" / "set", 10)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "site")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/set"
            index = load_index(address, cache=cache)
            index.check()
            assert len(records(index, cache)) == 10
            assert load_index(f"{address}/{{000000..000001}}.tar", cache=cache).fingerprint == index.fingerprint
            with pytest.raises(ValueError, match="nowhere.*: no index.json and no .tar files there"):
                load_index(f"{address}/nowhere", cache=cache)
        finally:
            server.shutdown()
            thread.join()


def test_the_cache_stays_bounded(tmp_path: Path, remote: str) -> None:
    index = load_index(remote, cache=Cache(str(tmp_path / "other"), gib=1.0))
    cache = Cache(str(tmp_path / "small"), gib=2.5 * index.shards[0].bytes / 2**30)
    assert len(records(index, cache)) == 35
    assert {p.stem for p in cache.folder.glob("*.tar")} == {shard.sha256 for shard in index.shards[3:]}


def test_a_failing_store_is_tried_again(
    tmp_path: Path, cache: Cache, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = load_index(remote, cache=cache)
    real, failures = storage._copy, iter([ConnectionError("reset by peer"), TimeoutError("slow")])

    def flaky(url: str, path: Path) -> None:
        path.write_bytes(b"half a shard" * 100_000)
        if (error := next(failures, None)) is not None:
            raise error
        real(url, path)

    monkeypatch.setattr(storage, "_copy", flaky)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    assert len(OpenShard(index.shards[0], cache)) == 7


def test_a_set_is_written_to_an_object_store_and_goes_on_there(cache: Cache) -> None:
    store = fsspec.filesystem("memory")
    for stop in (5, None):
        writer = ShardWriter("memory://bucket/out", domain="image", protocol={}, shard_samples=3)
        for i in range(10):
            if i == stop:
                writer.abandon()
                break
            if f"{i}" not in writer.done:
                writer.write({"__key__": f"{i}", "bin": bytes([i])})
        else:
            writer.close()
        assert store.exists("/bucket/out/index.json") == (stop is None)
    assert [r["bin"][0] for r in records(load_index("memory://bucket/out", cache=cache), cache)] == list(range(10))
    store.rm("/bucket", recursive=True)


def test_a_file_that_another_writer_renames_meanwhile_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.tar").write_bytes(b"1")
    (tmp_path / ".b.part").write_bytes(b"22")
    scandir = os.scandir

    @contextmanager
    def scan_and_rename(folder: str):
        with scandir(folder) as entries:
            found = list(entries)
        (tmp_path / ".b.part").rename(tmp_path / "b.tar")
        yield found

    monkeypatch.setattr(os, "scandir", scan_and_rename)
    assert storage.list_files(str(tmp_path)) == {"a.tar": 1}


def test_several_writers_make_one_set(tmp_path: Path, cache: Cache) -> None:
    for rank in range(2):
        writer = ShardWriter(tmp_path / "set", domain="latent", protocol={}, shard_samples=2, prefix=f"{rank}-")
        for i in range(3):
            writer.write({"__key__": f"{rank}-{i}", "bin": b"x"})
        writer.close(write_index=False)
    write_index(tmp_path / "set", domain="latent", protocol={"from": "two"})
    index = read_index(str(tmp_path / "set"))
    assert index is not None and index.domain == "latent"
    assert [r["__key__"] for r in records(index, cache)] == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]


def test_a_side_index_of_another_version_is_not_read() -> None:
    assert SideIndex.from_bytes(b"DINRIDX9" + bytes(100)) is None
