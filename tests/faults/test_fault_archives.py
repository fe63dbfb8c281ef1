"""Hostile archives, addresses and bombs: nothing is unpacked, and what a file claims is checked, not believed."""

import gzip
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from tiny_sets import png, records, write_set

from distributed_inr.data.cache import Cache
from distributed_inr.data.shards import load_index
from distributed_inr.data.side_index import SideIndex

MEMORY_MB = 200
BOMB_BYTES = 400_000_000

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"), gib=1.0)


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def plain(name: str, content: bytes = b"ok", kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    """One member: header and contents."""
    header = member(name, content, kind, linkname=target).tobuf(tarfile.GNU_FORMAT)
    return header + content + bytes(-len(content) % 512)


def extended(kind: bytes, content: bytes, *, claims: int | None = None) -> bytes:
    """A PAX or GNU header for the member that follows, which may lie about its own length."""
    header = member("extended", content, kind)
    header.size = len(content) if claims is None else claims
    return header.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def pax(**fields: str | bytes) -> bytes:
    lines = b""
    for name, value in fields.items():
        body = b" " + name.replace("__", ".").encode() + b"=" + (value if isinstance(value, bytes) else value.encode())
        length = len(body) + 1
        while length != len(str(length)) + len(body) + 1:
            length += 1
        lines += str(length).encode() + body + b"\n"
    return extended(tarfile.XHDTYPE, lines)


BEFORE, AFTER = plain("first.bin") + plain("good.bin"), plain("after.bin")
BOTH, CUT = ["first", "good", "after"], []
HOSTILE: dict[str, tuple[Callable[[str], bytes], list[str] | str]] = {
    "parent": (lambda out: plain("../../escape.png"), BOTH),
    "inner parent": (lambda out: plain("a/../../escape.png"), BOTH),
    "absolute": (lambda out: plain(f"{out}/escape.png"), BOTH),
    "symlink": (lambda out: plain("link.png", b"", tarfile.SYMTYPE, "/etc/passwd"), BOTH),
    "below a symlink": (
        lambda out: plain("to", b"", tarfile.SYMTYPE, "../..") + plain("to/e.bin"),
        ["first", "good", "to/e", "after"],
    ),
    "hard link": (lambda out: plain("link.png", b"", tarfile.LNKTYPE, "/etc/passwd"), BOTH),
    "character device": (lambda out: plain("device.png", b"", tarfile.CHRTYPE), BOTH),
    "block device": (lambda out: plain("device.png", b"", tarfile.BLKTYPE), BOTH),
    "fifo": (lambda out: plain("fifo.png", b"", tarfile.FIFOTYPE), BOTH),
    "folder": (lambda out: plain("folder.png", b"", tarfile.DIRTYPE), BOTH),
    "duplicate": (lambda out: plain("a.png") + plain("a.png"), "two members 'a.png'"),
    "line break in the name": (lambda out: pax(path="a\nerror: b.png") + plain("a.png"), BOTH),
    "NUL in the name": (lambda out: pax(path="a\0b.png") + plain("a.png"), BOTH),
    "bytes that are not UTF-8": (lambda out: pax(path=b"\xff\xfe.png", hdrcharset="BINARY") + plain("a.png"), BOTH),
    "very long name": (lambda out: pax(path="a/" * 5000 + "b") + plain("a.png"), BOTH),
    "longer than any name": (lambda out: pax(path="a/" * 500_000 + "b") + plain("a.png"), CUT),
    "PAX path": (lambda out: pax(path="../../escape.png") + plain("a.png"), BOTH),
    "PAX size beyond the file": (lambda out: pax(size="99999999999") + plain("a.png"), CUT),
    "PAX size below zero": (lambda out: pax(size="-1536") + plain("a.png"), CUT),
    "PAX size that is no number": (lambda out: pax(GNU__sparse__size="x", GNU__sparse__map="y") + plain("a.png"), CUT),
    "PAX of digits alone": (lambda out: extended(tarfile.XHDTYPE, b"1" * 1_000_000) + plain("a.png"), CUT),
    "PAX that claims 2^60 bytes": (lambda out: extended(tarfile.XHDTYPE, b"", claims=2**60) + plain("a.png"), CUT),
    "GNU long name": (lambda out: extended(tarfile.GNUTYPE_LONGNAME, b"../../escape.png\0") + plain("a.png"), BOTH),
    "GNU long link": (
        lambda out: extended(tarfile.GNUTYPE_LONGLINK, b"/etc/passwd\0") + plain("a.png", b"", tarfile.SYMTYPE),
        BOTH,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_fault_58_hostile_tar_members_are_passed_over_or_refused_and_nothing_is_unpacked(
    tmp_path: Path, cache: Cache, name: str
) -> None:
    """tar members with hostile names, kinds, lengths: passed over or refused in one line; nothing is ever unpacked."""
    make, expected = HOSTILE[name]
    path = tmp_path / "deep" / "set" / "0.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(BEFORE + make(str(tmp_path)) + AFTER + bytes(1024))
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}

    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected) as refused:
            load_index(str(path.parent), cache=cache)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    else:
        found = records(load_index(str(path.parent), cache=cache), cache)
        keys = [record["__key__"] for record in found]
        assert keys == expected or (expected is CUT and keys in (["first"], ["first", "good"])), keys
        assert all(record["bin"] == b"ok" for record in found)
    after = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    assert after - before <= {path.with_name("0.tar.idx")}


def listed(**changes: object) -> dict[str, object]:
    """An index.json whose fingerprint fits, as its maker would write it."""
    shard = {"name": "000000.tar", "samples": 3, "bytes": 10240, "sha256": "0" * 64} | changes
    fingerprint = hashlib.sha256(f"{shard['samples']} {shard['sha256']}\n".encode()).hexdigest()
    return {"version": 1, "domain": "image", "protocol": {}, "fingerprint": fingerprint, "shards": [shard]}


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "../../escape"},
        {"sha256": ["0"]},
        {"name": "../escape.tar"},
        {"name": "/etc/escape.tar"},
        {"name": 3},
        {"samples": 10**12},
        {"samples": -3},
        {"samples": "3"},
        {"bytes": 2**63},
    ],
    ids=str,
)
def test_fault_58_an_index_that_points_outside_the_cache_is_refused(tmp_path: Path, cache: Cache, change: dict) -> None:
    """names, sums and counts in an index.json that cannot be: refused before a file is named by them."""
    write_set(tmp_path / "set", 3)
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path}/set/", "/hostile/", recursive=True)
    try:
        store.pipe_file("/hostile/index.json", json.dumps(listed(**change)).encode())
        before = set(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=r"memory://hostile.*(prepare the set again|changed or cut short)"):
            load_index("memory://hostile", cache=cache).check()
        assert set(tmp_path.rglob("*")) == before
    finally:
        store.rm("/hostile", recursive=True)


LYING_INDEXES: dict[str, Callable[[SideIndex], SideIndex]] = {
    "suffixes that are not there": lambda side: replace(side, suffixes=()),
    "a suffix that is the key's name": lambda side: replace(side, suffixes=("__key__", *side.suffixes[1:])),
    "samples beyond the members": lambda side: replace(side, first=side.first + np.uint32(1)),
    "keys that end before they start": lambda side: replace(side, key_ends=side.key_ends[::-1].copy()),
    "keys that are not UTF-8": lambda side: replace(side, keys=b"\xff" * len(side.keys)),
}


@pytest.mark.parametrize("name", LYING_INDEXES)
def test_fault_58_a_side_index_whose_numbers_lie_is_made_again(tmp_path: Path, cache: Cache, name: str) -> None:
    """side index from a stranger whose crc32 fits and whose numbers do not: made again from the tar."""
    expected = records(write_set(tmp_path / "set", 3), cache)
    path = tmp_path / "set" / "000000.tar.idx"
    good = SideIndex.from_bytes(path.read_bytes())
    assert good is not None
    path.write_bytes(LYING_INDEXES[name](good).to_bytes())
    assert records(load_index(str(tmp_path / "set"), cache=cache), cache) == expected
    assert path.read_bytes() == good.to_bytes()


def test_fault_58_the_cache_evicts_no_file_of_others(tmp_path: Path) -> None:
    """a cache folder that holds other tars: they stay, whatever size the cache may have."""
    index = write_set(tmp_path / "set", 3)
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path}/set/", "/evicting/", recursive=True)
    (tmp_path / "backups").mkdir()
    (tmp_path / "backups" / "home.tar").write_bytes(bytes(100))
    cache = Cache(str(tmp_path / "backups"), gib=1e-9)
    try:
        assert records(load_index("memory://evicting", cache=cache), cache) == records(index, cache)
    finally:
        store.rm("/evicting", recursive=True)
    assert (tmp_path / "backups" / "home.tar").exists()


# 61: addresses

ADDRESSES = [
    "pipe:touch {}/owned",
    "file:///etc/x.tar",
    "local:///etc/x.tar",
    "simplecache::s3://bucket/x.tar",
    "ftp://host/x.tar",
    "http://169.254.169.254/latest/meta-data/x.tar",
    "https://user@169.254.169.254:443/{{0..3}}.tar",
    "s3://169.254.169.254/x.tar",
    "http://metadata.google.internal/x.tar",
    "http://METADATA.google.internal./x.tar",
    "http://[fe80::1]/x.tar",
    "http://2852039166/x.tar",
    "http://0xa9fea9fe/x.tar",
    "http://0251.0376.0251.0376/x.tar",
    "http://169.254.43518/x.tar",
    "http://[::ffff:169.254.169.254]/x.tar",
    "http://[::ffff:a9fe:a9fe]/x.tar",
    "http://[fd00:ec2::254]/x.tar",
    "http://[64:ff9b::a9fe:a9fe]/x.tar",
    "http://\u2460\u2465\u2468.254.169.254/x.tar",
    "http://metadata/x.tar",
    "http://100.100.100.200/x.tar",
    "HTTP://169.254.169.254/x.tar",
    "http://host/x.tar::http://169.254.169.254/x.tar",
    "http://host/x::file:///etc/x.tar",
]


@pytest.mark.parametrize("url", ADDRESSES)
def test_fault_61_addresses_that_run_commands_or_reach_inside_are_refused(tmp_path: Path, url: str) -> None:
    """shard address that runs a command, names a file or a metadata service: refused before anything is opened."""
    url = url.format(tmp_path)
    cache = Cache(str(tmp_path / "cache"), gib=1.0)
    words = r"run a command|unknown kind of address|metadata service|chained"
    for action in (lambda: load_index(url, cache=cache), lambda: cache.fetch(url, "0" * 64)):
        with pytest.raises(ValueError, match=words):
            action()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", [*ADDRESSES, "../x.tar", "/etc/x.tar"])
def test_fault_61_an_index_cannot_name_other_places(tmp_path: Path, name: str) -> None:
    """index.json whose shards are addresses or paths: refused, also where pipes are allowed."""
    name = name.format(tmp_path)
    write_set(tmp_path / "set", 3)
    path = tmp_path / "set" / "index.json"
    tree = json.loads(path.read_text())
    tree["shards"][0]["name"] = name  # the fingerprint is of contents, not of names, and still fits
    path.write_text(json.dumps(tree))
    cache = Cache(str(tmp_path / "cache"), gib=1.0, allow_pipe=True)
    with pytest.raises(ValueError, match=r"shard name '.*' is not a plain file name; prepare the set again"):
        load_index(str(tmp_path / "set"), cache=cache, allow_pipe=True)
    assert not (tmp_path / "owned").exists()


# 59: bombs


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def zeros(count: int, *, wbits: int = 15) -> bytes:
    """`count` zeros, compressed piece by piece."""
    packer = zlib.compressobj(1, zlib.DEFLATED, wbits)
    return b"".join(packer.compress(bytes(10**7)) for _ in range(count // 10**7)) + packer.flush()


def picture(kind: str, size: int = 16) -> bytearray:
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, kind)
    return bytearray(file.getvalue())


def bombs() -> dict[str, tuple[str, bytes]]:
    """Files that claim or unpack to far more than they are, and what reads them: a member's suffix, or weights."""
    packed = zeros(BOMB_BYTES)
    jpeg = picture("JPEG")
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    webp = picture("WEBP")
    frame = webp.index(b"\x9d\x01\x2a")
    webp[frame + 3 : frame + 7] = struct.pack("<HH", 16_383, 16_383)
    small = chunk(b"IDAT", zlib.compress(bytes(33 * 97)))
    npy, npz = io.BytesIO(), io.BytesIO()
    np.save(npy, np.zeros((2, 4), np.float16))
    with (
        zipfile.ZipFile(npz, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w") as file,
    ):
        for _ in range(BOMB_BYTES // 10**7):
            file.write(bytes(10**7))
    shape = npy.getvalue().replace(b"(2, 4), }        ", b"(2, 999999999), }")
    assert shape != npy.getvalue()
    return {
        "png of 10^9 pixels": ("png", png_of(40_000, 25_000, small)),
        "png of 85 million zeros": ("png", png_of(9_000, 9_444, chunk(b"IDAT", packed))),
        "jpg of 4 10^9 pixels": ("jpg", bytes(jpeg)),
        "webp of 268 million pixels": ("webp", bytes(webp)),
        "png with a zTXt bomb": ("png", png_of(32, 32, chunk(b"zTXt", b"a\0\0" + packed), small)),
        "png with an iTXt bomb": ("png", png_of(32, 32, chunk(b"iTXt", b"a\0\1\0\0\0" + packed), small)),
        "png with an iCCP bomb": ("png", png_of(32, 32, chunk(b"iCCP", b"a\0\0" + packed), small)),
        "png that is a gzip bomb": ("png", zeros(BOMB_BYTES, wbits=31)),
        "npz bomb": ("latent.npy", npz.getvalue()),
        "npy of 2 10^9 numbers": ("latent.npy", shape),
        "npy that is a gzip bomb": ("latent.npy", gzip.compress(npy.getvalue()) + packed),
        "shard that is a gzip bomb": ("tar", zeros(BOMB_BYTES, wbits=31)),
        "weights with a header of 2^63 bytes": ("safetensors", struct.pack("<Q", 2**63) + b"{}"),
        "weights of 2^62 bytes": ("safetensors", lying_weights(2**60)),
    }


def lying_weights(count: int) -> bytes:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    return struct.pack("<Q", len(header)) + header


def measure(folder: Path) -> None:
    """In a process of its own: print what each file of a folder leads to, and the memory and time it took."""
    import resource
    import time

    from torch import nn

    from distributed_inr.data.reader import ShardDataset, read_latent
    from distributed_inr.domains import Image as Domain
    from distributed_inr.generation import load_weights
    from distributed_inr.raw import pictures

    domain, cache = Domain(size=16, source_size=32), Cache(str(folder / "cache"), gib=1.0)

    def read(path: Path) -> None:
        if path.suffix == ".safetensors":
            return load_weights(nn.Linear(1, 1), path)
        if path.suffix == ".tar":
            index = load_index(str(path), cache=cache)
            ShardDataset(index, read=domain.read, seed=0, max_bad_fraction=1.0, cache=cache)[0]
        elif path.suffix == ".npy":
            read_latent({"__key__": "k", "latent.npy": path.read_bytes()}, 0)
        else:
            domain.read({"__key__": "k", path.suffix[1:]: path.read_bytes()}, 0)

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    for path in (folder / "good.png", *sorted(folder.glob("*.*"))):  # the first loads the decoders
        before, start, line = peak(), time.perf_counter(), "read"
        try:
            read(path)
        except ValueError as error:
            line = str(error)
        seconds = time.perf_counter() - start
        if path.suffix == ".png" and path.stem != "png of 85 million zeros":  # preparing a set takes all sizes
            try:
                pictures.decode(path.read_bytes())
            except ValueError:
                pass
        print(json.dumps([path.name, line, peak() - before, round(seconds, 4)]))


def test_fault_59_bombs_are_refused_without_the_memory_they_ask_for(tmp_path: Path) -> None:
    """decompression bombs and headers that claim 10^9 pixels or numbers: refused in one line, in little memory."""
    for name, (suffix, content) in bombs().items():
        (tmp_path / f"{name}.{suffix}").write_bytes(content)
    (tmp_path / "good.png").write_bytes(png(0, 32))
    (tmp_path / "good.jpg").write_bytes(picture("JPEG", 32))
    (tmp_path / "good.webp").write_bytes(picture("WEBP", 32))
    for length in (100_000_000, BOMB_BYTES):  # holes in the file: nobody writes so many zeros
        with (tmp_path / f"text of {length} bytes.tar").open("wb") as file:
            file.write(plain("a.png", png(0, 32)) + member("a.txt", size=length).tobuf(tarfile.GNU_FORMAT))
            file.truncate(file.tell() + length + 1024 + -length % 512)
    program = f"from pathlib import Path; from {__name__} import measure; measure(Path({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    print(done.stdout)
    found = {name: (line, memory) for name, line, memory, _ in map(json.loads, done.stdout.splitlines())}
    assert len(found) == len(bombs()) + 5
    for name, (line, memory) in found.items():
        assert memory < MEMORY_MB, (name, line, memory)
        assert "\n" not in line and (line == "read") == name.startswith("good"), (name, line)
