"""Shards: ordinary webdataset tars, an `index.json` of the set, and per shard a side index for reading by offset.

    set/  000000.tar  000000.tar.idx  000001.tar  000001.tar.idx ...  index.json

The side index holds offset, size and crc32 of every member, so that any sample of any shard is read with one seek and
checked, without unpacking anything. Sets made by others (tars only) are indexed when they are first seen.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import weakref
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from distributed_inr.data import storage
from distributed_inr.data.cache import Cache, changed
from distributed_inr.domains.domain import Record

logger = logging.getLogger(__name__)

INDEX_NAME = "index.json"
FORMAT_VERSION = 1

# Local sets up to this size are hashed when a run starts; larger ones are checked by size, and by crc32 as read.
_HASH_AT_START_BYTES = 256 * 2**20
_MAX_SAMPLE_BYTES = 128 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a set."""

    name: str
    samples: int
    bytes: int
    sha256: str
    folder: str

    @property
    def url(self) -> str:
        return self.name if self.name.startswith("pipe:") else storage.join(self.folder, self.name)

    @property
    def is_local(self) -> bool:
        return storage.is_local(self.url)


@dataclass(frozen=True)
class ShardIndex:
    """A set of shards: what `index.json` says."""

    shards: tuple[Shard, ...]
    domain: str | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Names the contents and their order, not the place: runs refuse to resume on another set."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.samples} {shard.sha256}\n".encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        names = ("name", "samples", "bytes", "sha256")
        lines = ",\n".join("  " + json.dumps({name: getattr(s, name) for name in names}) for s in self.shards)
        head = {
            "version": FORMAT_VERSION,
            "domain": self.domain,
            "protocol": dict(self.protocol),
            "fingerprint": self.fingerprint,
            "samples": self.num_samples,
        }
        return json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n{lines}\n ]\n}}\n'

    def check(self) -> None:
        """Refuse a set whose shards are missing or changed; contents of large sets are checked as they are read."""
        for folder in sorted({shard.folder for shard in self.shards}):
            if folder.startswith(("http:", "https:")):
                continue  # servers need not list; a missing shard shows when it is fetched
            shards = [shard for shard in self.shards if shard.folder == folder and not shard.name.startswith("pipe:")]
            files = storage.list_files(folder)
            missing = [shard.name for shard in shards if shard.name not in files]
            if missing:
                raise ValueError(
                    f"{folder}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}; "
                    "restore them or prepare the set again"
                )
            for shard in shards:
                _check_size(shard, files[shard.name])
        if self.num_bytes <= _HASH_AT_START_BYTES:
            for shard in self.shards:
                if shard.is_local:
                    check_sha256(shard)


def check_sha256(shard: Shard) -> None:
    found = storage.sha256_of(Path(shard.url))
    if found != shard.sha256:
        raise ValueError(changed(shard.url, found, shard.sha256))


def _check_size(shard: Shard, found: int) -> None:
    if found != shard.bytes:
        raise ValueError(
            f"shard {shard.url} has {found} bytes, its index says {shard.bytes}: it was changed or cut short; "
            "restore it or prepare the set again"
        )


class OpenShard:
    """One shard on the local disk, open for reading by sample number."""

    def __init__(self, shard: Shard, cache: Cache) -> None:
        self.shard = shard
        path, self._descriptor = cache.open(shard.url, shard.sha256)
        self.close = weakref.finalize(self, os.close, self._descriptor)
        _check_size(shard, os.fstat(self._descriptor).st_size)
        self.side = cache.side_index(path, wanted=lambda side: side.sha256 == shard.sha256)
        if self.side.sha256 != shard.sha256 or len(self.side) != shard.samples:
            raise ValueError(changed(shard.url, self.side.sha256, shard.sha256))

    def __len__(self) -> int:
        return len(self.side)

    def record(self, sample: int, *, only: Collection[str] | None = None) -> Record:
        """The sample's members, or those of some suffixes alone, each checked by crc32."""
        side = self.side
        record: Record = {"__key__": side.key(sample)}
        members = side.members[side.first[sample] : side.first[sample + 1]].tolist()
        if only is not None:
            members = [member for member in members if side.suffixes[member[3]] in only]
        if (total := sum(size for _, size, _, _ in members)) > _MAX_SAMPLE_BYTES:
            raise ValueError(f"{record['__key__']}: {total} bytes, more than a sample may have ({_MAX_SAMPLE_BYTES})")
        for offset, size, crc32, suffix in members:
            content = os.pread(self._descriptor, size, offset)
            if zlib.crc32(content) != crc32:
                raise ShardDamaged(
                    f"shard {self.shard.url}: {record['__key__']}.{side.suffixes[suffix]} differs from its index "
                    "(crc32): the shard was changed or damaged; restore it or prepare the set again"
                )
            record[side.suffixes[suffix]] = content
        return record


class ShardDamaged(ValueError):
    """The bytes of a shard are not those that were indexed: the run stops, since any other sample may be wrong too."""


def records(index: ShardIndex, cache: Cache, *, only: Collection[str]) -> Iterator[tuple[int, Record]]:
    """Samples by number, with members of some suffixes alone; what cannot be read is logged and passed over."""
    first = 0
    for shard in index.shards:
        with contextlib.closing(OpenShard(shard, cache)) as opened:
            for sample in range(shard.samples):
                try:
                    record = opened.record(sample, only=only)
                except ShardDamaged:
                    raise
                except ValueError as error:
                    logger.warning("%s", error)
                else:
                    yield first + sample, record
        first += shard.samples


def load_index(url: str, *, cache: Cache | None = None, allow_pipe: bool = False) -> ShardIndex:
    """Find a set of shards: a folder, a tar, a pattern with * or ?, or braces; local, s3://, gs:// or http(s)://.

    A folder's `index.json` is believed (see `ShardIndex.check`); tars without one are indexed now, which reads them
    whole: the side indexes are kept beside them, or in the cache where the folder cannot be written.
    """
    cache = cache or Cache(allow_pipe=allow_pipe)
    url = storage.resolve(url)
    storage.check_url(url, allow_pipe=allow_pipe)
    urls = [url] if url.startswith("pipe:") else list(braceexpand(url)) if "{" in url else [url]
    if any(c in url for c in "*?") and not url.startswith("pipe:"):
        urls = [match for pattern in urls for match in storage.expand_glob(pattern)]
    parts: list[ShardIndex] = []
    tars: dict[str, list[str]] = {}
    for address in urls:
        if address.startswith("pipe:"):
            parts.append(ShardIndex((_foreign_shard("", address, cache),)))
        elif address.endswith(".tar"):
            folder, name = storage.split(address)
            tars.setdefault(folder, []).append(name)
        elif re.search(r"\.(tgz|tar\.\w+)$", address):
            raise ValueError(f"{address} is compressed, so it cannot be read by offset; decompress it to a .tar")
        else:
            parts.append(_load_folder(address, cache))
    parts += [_load_tars(folder, names, cache) for folder, names in tars.items()]
    shards = tuple(shard for part in parts for shard in part.shards)
    if not shards:
        raise ValueError(
            f"{url}: no shards there; give a folder with {INDEX_NAME} or .tar files (see jobs/prepare_data.py)"
        )
    domains = {part.domain for part in parts if part.domain is not None}
    if len(domains) > 1:
        raise ValueError(
            f"{url} mixes sets of different domains: {', '.join(sorted(domains))}; give them to separate runs"
        )
    return ShardIndex(shards, domain=next(iter(domains), None), protocol=parts[0].protocol if len(parts) == 1 else {})


def read_index(folder: str) -> ShardIndex | None:
    """What a folder's `index.json` says, or None without one."""
    url = storage.join(folder, INDEX_NAME)
    content = storage.read_bytes(url)
    if content is None:
        return None
    try:
        tree = json.loads(content)
        if tree["version"] != FORMAT_VERSION:
            raise ValueError(f"version {tree['version']}, this program reads {FORMAT_VERSION}")
        shards = tuple(_listed_shard(item, folder) for item in tree["shards"])
        domain, protocol = tree.get("domain"), tree.get("protocol", {})
        if not isinstance(domain, str | None) or not isinstance(protocol, dict):
            raise ValueError(f"domain {domain!r} must be a name, and protocol an object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{url} cannot be read: {error}; prepare the set again") from None
    index = ShardIndex(shards, domain=domain, protocol=protocol)
    if index.fingerprint != tree.get("fingerprint"):
        raise ValueError(
            f"{url} was edited or cut short: its fingerprint does not fit its shards; prepare the set again"
        )
    if index.num_samples == 0:
        raise ValueError(f"{folder} holds no samples; prepare the set again")
    return index


def _listed_shard(item: Mapping[str, Any], folder: str) -> Shard:
    """A shard as `index.json` lists it. Others may have written that: names and sums become names of local files."""
    name, samples, size, sha256 = (item[field] for field in ("name", "samples", "bytes", "sha256"))
    if "/" in name or storage.split(name)[1] in ("", "..") or not storage.is_local(name):
        raise ValueError(f"shard name {name!r} is not a plain file name")
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"shard {name} has sha256 {sha256!r}, not 64 hexadecimal digits")
    if type(samples) is not int or type(size) is not int or not 0 < 512 * samples <= size:
        raise ValueError(f"shard {name} has {samples!r} samples in {size!r} bytes; each takes 512 bytes or more")
    return Shard(name, samples, size, sha256, folder)


def _load_folder(folder: str, cache: Cache) -> ShardIndex:
    index = read_index(folder)
    if index is not None:
        return index
    names = sorted(name for name in storage.list_files(folder) if name.endswith(".tar") and not name.startswith("."))
    if not names:
        raise ValueError(
            f"{folder}: no {INDEX_NAME} and no .tar files there; check the path, or make shards by jobs/prepare_data.py"
        )
    return ShardIndex(tuple(_foreign_shard(folder, name, cache) for name in names))


def _load_tars(folder: str, names: Sequence[str], cache: Cache) -> ShardIndex:
    """Some tars of a folder, by name: from its `index.json` where that lists them."""
    index = read_index(folder)
    listed = {shard.name: shard for shard in index.shards} if index else {}
    unlisted = [name for name in names if name not in listed]
    if unlisted and not folder.startswith(("http:", "https:")):  # before any is indexed, which takes long
        files = storage.list_files(folder)
        missing = [name for name in unlisted if name not in files]
        if missing:
            raise ValueError(
                f"{folder}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}; "
                "restore them or correct the address"
            )
    shards = tuple(listed.get(name) or _foreign_shard(folder, name, cache) for name in names)
    return ShardIndex(shards, domain=index.domain if index else None, protocol=index.protocol if index else {})


def _foreign_shard(folder: str, name: str, cache: Cache) -> Shard:
    """A tar that no `index.json` lists: its own side index tells, and is made now where there is none."""
    url = name if name.startswith("pipe:") else storage.join(folder, name)
    if storage.is_local(url):
        path = Path(url)
        size = path.stat().st_size
        side = cache.side_index(path, wanted=lambda side: side.num_bytes == size)
    else:
        side = cache.foreign_side_index(url)
    return Shard(name, len(side), side.num_bytes, side.sha256, folder)
