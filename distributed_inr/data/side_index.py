"""The side index of a shard: where each member of a tar lies, and its crc32, for reading samples by offset."""

import collections
import hashlib
import io
import json
import logging
import os
import re
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

SIDE_SUFFIX = ".idx"
MEMBER_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
"""webdataset's rule: the key, then the suffix after the first dot of the last part."""

_MAGIC = b"DINRIDX1"
_HEADER = struct.Struct("<8s32sQQQQI")  # magic, sha256 and bytes of the tar, samples, members, bytes of names, crc32
_MEMBER = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc32", "<u4"), ("suffix", "<u4")])
_MAX_HEADER = 16 * 2**10  # bytes of a tar's extended headers; the names that file systems can hold have at most 4096
_MAX_NAME = 4096
_META = re.compile(r"__[^/]*__($|/)")  # of whole shards, as webdataset has them
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8
_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class SideIndex:
    """Where the members of one tar lie.

    Attributes:
        sha256, num_bytes: of the tar.
        first: [samples + 1] number of each sample's first member.
        members: [members] offset, size, crc32 and number of the suffix.
        key_ends: [samples] where each key ends in `keys`.
    """

    sha256: str
    num_bytes: int
    first: np.ndarray
    members: np.ndarray
    key_ends: np.ndarray
    keys: bytes
    suffixes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, sample: int) -> str:
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_ends[sample])].decode()

    @staticmethod
    def build(path: Path) -> "SideIndex":
        """Index a tar: links, devices and names that point outside are passed over.

        A tar that is cut short or damaged keeps the samples before that, less the last, which may lack members.
        """
        keys: list[str] = []
        first: list[int] = [0]
        members: list[tuple[int, int, int, int]] = []
        suffixes: dict[str, int] = {}
        seen: set[str] = set()
        ignored: collections.Counter[str] = collections.Counter()
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            found, cut = _members(path, size, ignored)
            for name, offset, length in found:
                match = MEMBER_NAME.match(name)
                if match is None or match.group(2).lower() == "__key__":
                    ignored["name without a suffix"] += 1
                    continue
                key, suffix = match.group(1), match.group(2).lower()
                if not keys or key != keys[-1]:
                    if keys:
                        first.append(len(members))
                    keys.append(key)
                    seen.clear()
                if suffix in seen:
                    raise ValueError(
                        f"shard {path}: two members {name!r}; a sample's suffixes must differ, pack it again"
                    )
                seen.add(suffix)
                crc32 = 0
                for start in range(offset, offset + length, _CHUNK):
                    crc32 = zlib.crc32(os.pread(file.fileno(), min(_CHUNK, offset + length - start), start), crc32)
                members.append((offset, length, crc32, suffixes.setdefault(suffix, len(suffixes))))
        if cut is not None:
            lost = keys.pop() if keys else "none"
            del members[first.pop() :]
            logger.warning(
                "shard %s is cut short or damaged after byte %d: sample %s is left out with all that followed it, "
                "the %d before it are used",
                *(path, cut, lost, len(keys)),
            )
        first.append(len(members))
        for reason, count in ignored.items():
            logger.warning("shard %s: %d members passed over: %s", path, count, reason)
        if not keys:
            raise ValueError(f"shard {path} holds no samples; remove it or pack it again as <key>.<suffix> members")
        encoded = [key.encode() for key in keys]
        return SideIndex(
            sha256=sha256,
            num_bytes=size,
            first=np.array(first, dtype="<u4"),
            members=np.array(members, dtype=_MEMBER),
            key_ends=np.cumsum([len(key) for key in encoded]).astype("<u4"),
            keys=b"".join(encoded),
            suffixes=tuple(suffixes),
        )

    def to_bytes(self) -> bytes:
        names = json.dumps(self.suffixes).encode() + b"\0" + self.keys
        body = self.first.tobytes() + self.members.tobytes() + self.key_ends.tobytes() + names
        sizes = (self.num_bytes, len(self), len(self.members), len(names))
        return _HEADER.pack(_MAGIC, bytes.fromhex(self.sha256), *sizes, zlib.crc32(body)) + body

    @staticmethod
    def from_bytes(content: bytes) -> "SideIndex | None":
        """The side index, or None when it is torn, damaged or of another version."""
        if len(content) < _HEADER.size:
            return None
        magic, sha256, size, samples, count, num_names, crc32 = _HEADER.unpack_from(content)
        body = memoryview(content)[_HEADER.size :]
        lengths = [4 * (samples + 1), _MEMBER.itemsize * count, 4 * samples, num_names]
        if magic != _MAGIC or len(body) != sum(lengths) or zlib.crc32(body) != crc32:
            return None
        ends = np.cumsum(lengths)
        names = bytes(body[ends[2] :])
        suffixes, _, keys = names.partition(b"\0")
        try:
            side = SideIndex(
                sha256=sha256.hex(),
                num_bytes=size,
                first=np.frombuffer(body[: ends[0]], dtype="<u4"),
                members=np.frombuffer(body[ends[0] : ends[1]], dtype=_MEMBER),
                key_ends=np.frombuffer(body[ends[1] : ends[2]], dtype="<u4"),
                keys=keys,
                suffixes=tuple(json.loads(suffixes)),
            )
            keys.decode()
        except (ValueError, TypeError, RecursionError):
            return None
        return side if side._is_sound() else None

    def _is_sound(self) -> bool:
        """Whether its numbers fit each other: anybody can write a crc32 that fits."""
        ends = np.concatenate([[0], self.key_ends, [len(self.keys)]]).astype(np.int64)
        return bool(
            all(isinstance(suffix, str) and suffix != "__key__" for suffix in self.suffixes)
            and (self.members["suffix"] < len(self.suffixes)).all()
            and self.first[0] == 0
            and self.first[-1] == len(self.members)
            and (self.first[1:] >= self.first[:-1]).all()
            and (ends[1:] >= ends[:-1]).all()
        )


def is_key(key: str) -> bool:
    """Whether members of a shard can be named after it: those of other names are passed over when the shard is read."""
    match = MEMBER_NAME.match(f"{key}.x")
    is_whole = match is not None and match.group(1) == key
    return is_whole and not (_is_outside(key) or _is_unfit(key) or _META.match(key))


def _is_outside(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


def _is_unfit(name: str) -> bool:
    return len(name) > _MAX_NAME or _UNPRINTABLE.search(name) is not None


def _members(path: Path, size: int, ignored: collections.Counter[str]) -> tuple[list[tuple[str, int, int]], int | None]:
    """Name, offset and length of the regular members of a tar, in order, and where it is cut short or damaged, if so.

    Nothing is unpacked. A member that is cut is the last one, so that the sample it belongs to is known.
    """
    found: list[tuple[str, int, int]] = []
    end, last = 0, -1
    try:
        with _Headers(open(path, "rb", buffering=0)) as headers, tarfile.open(fileobj=headers, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                if member.size < 0 or member.offset <= last:
                    break
                length, last = min(member.size, size - member.offset_data), member.offset
                if length == member.size:
                    end = member.offset_data + -(-member.size // 512) * 512
                if not member.isreg() or member.issparse():
                    ignored["not a regular file"] += 1
                elif _is_outside(member.name):
                    ignored["name that points outside"] += 1
                elif _is_unfit(member.name):
                    ignored["name with control characters, not in UTF-8, or too long"] += 1
                elif not _META.match(member.name):
                    found.append((member.name, member.offset_data, length))
                if length < member.size:
                    break
    except (tarfile.TarError, ValueError, OverflowError) as error:  # tarfile parses numbers that others wrote
        if end == 0:
            raise ValueError(f"{path} is not an uncompressed tar ({error}); decompress it or pack it again") from None
    with open(path, "rb") as file:
        file.seek(end)
        whole = size >= end + 512 and not file.read(512).strip(b"\0")
    return found, None if whole else end


class _Headers(io.BufferedReader):
    """What tarfile reads of a tar: headers only. It would take any length that they claim, and compute for minutes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"an extended header of {size} bytes")
        return super().read(size)
