"""Other people's tars: indexed on first sight, damaged, hostile, and addresses that are refused."""

import io
import os
import pickle
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


HOSTILE = {
    "parent": ("../../escape.png", tarfile.REGTYPE, ""),
    "inner parent": ("a/../../escape.png", tarfile.REGTYPE, ""),
    "absolute": ("/tmp/escape.png", tarfile.REGTYPE, ""),
    "symlink": ("link.png", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": ("link.png", tarfile.LNKTYPE, "/etc/passwd"),
    "device": ("dev.png", tarfile.CHRTYPE, ""),
    "block device": ("dev.png", tarfile.BLKTYPE, ""),
    "fifo": ("fifo.png", tarfile.FIFOTYPE, ""),
    "folder": ("folder.png", tarfile.DIRTYPE, ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_passed_over_and_nothing_is_unpacked(tmp_path: Path, cache: Cache, name: str) -> None:
    member, kind, target = HOSTILE[name]
    folder = tmp_path / "deep" / "set"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        info = tarfile.TarInfo(member)
        info.type, info.linkname = kind, target
        tar.addfile(info)
        good = tarfile.TarInfo("good.bin")
        good.size = 2
        tar.addfile(good, io.BytesIO(b"ok"))
    index = load_index(str(folder), cache=cache)
    assert records(index, cache) == [{"__key__": "good", "bin": b"ok"}]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and "cache" not in p.parts) == [
        "0.tar",
        "0.tar.idx",
    ]


def test_pickles_in_shards_stay_bytes(tmp_path: Path, cache: Cache) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "owned"),)

    payload = pickle.dumps(Evil())
    write_tar(tmp_path / "set" / "0.tar", {f"0.{suffix}": payload for suffix in ("pyd", "pth", "pkl", "pickle", "npy")})
    [record] = records(load_index(str(tmp_path / "set"), cache=cache), cache)
    assert record["pkl"] == payload
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch {}/owned",
        "http://169.254.169.254/latest/meta-data/x.tar",
        "http://metadata.google.internal/x.tar",
        "http://[fe80::1]/x.tar",
        "file:///etc/x.tar",
        "simplecache::s3://bucket/x.tar",
        "ftp://host/x.tar",
    ],
)
def test_addresses_that_run_commands_or_reach_inside_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"run a command|unknown kind of address|metadata service"):
        load_index(url.format(tmp_path))
    assert not (tmp_path / "owned").exists()


def test_pipes_work_where_they_are_allowed(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"0.bin": b"0", "1.bin": b"1"})
    cache = Cache(str(tmp_path / "cache"), gib=1.0, allow_pipe=True)
    index = load_index(f"pipe:cat {tmp_path}/0.tar", cache=cache, allow_pipe=True)
    assert [record["bin"] for record in records(index, cache)] == [b"0", b"1"]
