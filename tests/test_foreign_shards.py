"""Other people's tars: indexed on first sight, damaged, or no tars at all."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from tiny_sets import records

from distributed_inr.data.cache import Cache
from distributed_inr.data.shards import load_index


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"), gib=1.0)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """A tar as other people's programs make it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_foreign_tars_are_indexed_on_first_sight(tmp_path: Path, cache: Cache) -> None:
    write_tar(
        tmp_path / "set" / "b-1.tar", {"./x/1.png": b"1", "./x/1.TXT": b"one", "./x/2.png": b"2", "__meta__": b"m"}
    )
    write_tar(tmp_path / "set" / "a-0.tar", {"0.left.png": b"0", "0.cls": b"7", "README": b"no suffix"})
    index = load_index(str(tmp_path / "set"), cache=cache)
    index.check()
    assert [shard.name for shard in index.shards] == ["a-0.tar", "b-1.tar"]
    assert records(index, cache) == [
        {"__key__": "0", "left.png": b"0", "cls": b"7"},
        {"__key__": "./x/1", "png": b"1", "txt": b"one"},
        {"__key__": "./x/2", "png": b"2"},
    ]
    assert (tmp_path / "set" / "a-0.tar.idx").exists()
    assert not (tmp_path / "set" / "index.json").exists()
    assert load_index(str(tmp_path / "set"), cache=cache) == index


def test_a_foreign_tar_that_was_replaced_is_another_set(tmp_path: Path, cache: Cache) -> None:
    write_tar(tmp_path / "set" / "0.tar", {"0.bin": b"0"})
    before = load_index(str(tmp_path / "set"), cache=cache)
    write_tar(tmp_path / "set" / "0.tar", {"0.bin": b"0" * 9999, "1.bin": b"1" * 9999})
    after = load_index(str(tmp_path / "set"), cache=cache)
    assert after.num_samples == 2
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("kind", ["gz", "garbage", "empty", "no samples", "doubled member"])
def test_what_is_no_tar_of_samples_is_one_clear_line(tmp_path: Path, cache: Cache, kind: str) -> None:
    path = tmp_path / "0.tar"
    if kind == "gz":
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.bin"))
    elif kind == "no samples":
        write_tar(path, {"README": b"x"})
    elif kind == "doubled member":
        with tarfile.open(path, "w") as tar:
            tar.addfile(tarfile.TarInfo("a.bin"))
            tar.addfile(tarfile.TarInfo("a.bin"))
    else:
        path.write_bytes(b"" if kind == "empty" else os.urandom(5000))
    with pytest.raises(ValueError, match=r"0\.tar.*(again|decompress it)"):
        load_index(str(tmp_path), cache=cache)


def test_compressed_tars_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is compressed, so it cannot be read by offset; decompress it"):
        load_index(f"{tmp_path}/a.tar.gz")


def test_pipes_work_where_they_are_allowed(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"0.bin": b"0", "1.bin": b"1"})
    cache = Cache(str(tmp_path / "cache"), gib=1.0, allow_pipe=True)
    index = load_index(f"pipe:cat {tmp_path}/0.tar", cache=cache, allow_pipe=True)
    assert [record["bin"] for record in records(index, cache)] == [b"0", b"1"]
