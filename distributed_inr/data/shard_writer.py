"""Writing shards: records become tars with side indexes, and index.json at the end."""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distributed_inr.data import storage
from distributed_inr.data.shards import INDEX_NAME, Shard, ShardIndex
from distributed_inr.data.side_index import SIDE_SUFFIX, SideIndex, is_key
from distributed_inr.domains.domain import Record


class ShardWriter:
    """Writes records as shards of at most `shard_bytes` bytes and `shard_samples` samples.

    A shard appears when it is complete, `index.json` last. Opened again on an unfinished folder it goes on after the
    last complete shard: skip the records whose keys are in `done`. Equal records give equal bytes.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        domain: str,
        protocol: Mapping[str, Any],
        shard_bytes: int = 256 * 2**20,
        shard_samples: int = 10_000,
        prefix: str = "",
    ) -> None:
        self.folder, self.prefix = str(folder), prefix
        self._domain, self._protocol = domain, dict(protocol)
        self._shard_bytes, self._shard_samples = shard_bytes, shard_samples
        self._staging: tempfile.TemporaryDirectory[str] | None = None
        self._tar: Any = None
        self._bytes = self._samples = 0
        try:
            if storage.is_local(self.folder):
                os.makedirs(self.folder, exist_ok=True)
                for leftover in Path(self.folder).glob(f".{prefix}*.part"):
                    leftover.unlink()
            else:
                self._staging = tempfile.TemporaryDirectory()
            self.shards, sides = self._complete_shards()
            self.done = frozenset(side.key(i) for side in sides for i in range(len(side)))
        except OSError as error:
            raise storage.explain(error, self.folder) from error

    def write(self, record: Record) -> None:
        """Append one record: "__key__" and the members' bytes by suffix."""
        key = record["__key__"]
        if not is_key(key):
            raise ValueError(
                f"key {key!r} cannot name a member: printable, no dot in its last part, not absolute, no '..', no __x__"
            )
        header = 512 if key.isascii() and len(key) < 90 else 2560  # other names need an extended header
        size = sum(header + -(-len(value) // 512) * 512 for name, value in record.items() if name != "__key__")
        if self._tar is not None and (
            self._samples >= self._shard_samples or self._bytes + size + 10240 > self._shard_bytes
        ):
            self._finish_shard()
        try:
            tar = self._tar or self._open_shard()
            tar.write({name: value for name, value in record.items() if name == "__key__" or name[0] != "_"})
        except OSError as error:
            self.abandon()
            raise storage.explain(error, self.folder) from error
        self._bytes += size
        self._samples += 1

    def close(self, *, write_index: bool = True) -> ShardIndex:
        """Finish the last shard and, unless several writers share the folder, write `index.json`."""
        if self._tar is not None:
            self._finish_shard()
        index = ShardIndex(tuple(self.shards), domain=self._domain, protocol=self._protocol)
        if write_index:
            if not self.shards:
                raise ValueError(
                    f"{self.folder}: no samples were written, so there is no set; check the source and filters"
                )
            try:
                storage.write_atomic(storage.join(self.folder, INDEX_NAME), index.to_json().encode())
            except OSError as error:
                raise storage.explain(error, self.folder) from error
        if self._staging is not None:
            self._staging.cleanup()
        return index

    def abandon(self) -> None:
        """Drop the unfinished shard and stop; the complete ones stay for the next writer."""
        if self._tar is not None:
            with contextlib.suppress(OSError):  # such as the one that made the caller give up
                self._tar.close()
            self._tar = None
            with contextlib.suppress(OSError):
                self._file.close()
            self._part.unlink(missing_ok=True)
        if self._staging is not None:
            self._staging.cleanup()

    def _open_shard(self) -> Any:
        from webdataset.writer import TarWriter

        self._name = f"{self.prefix}{len(self.shards):06d}.tar"
        self._part = Path(self._staging.name if self._staging else self.folder) / f".{self._name}.part"
        self._file = open(self._part, "wb")  # noqa: SIM115  closed when the shard is finished
        self._tar = TarWriter(self._file, encoder=False, mtime=0)
        self._bytes = self._samples = 0
        return self._tar

    def _finish_shard(self) -> None:
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            side = SideIndex.build(self._part)
            assert len(side) == self._samples, "records with equal keys followed one another"
            url = storage.join(self.folder, self._name)
            storage.publish(self._part, url)
            storage.write_atomic(url + SIDE_SUFFIX, side.to_bytes())
            self._tar = None
        except OSError as error:
            self.abandon()
            raise storage.explain(error, self.folder) from error
        self.shards.append(Shard(self._name, len(side), side.num_bytes, side.sha256, self.folder))

    def _complete_shards(self) -> tuple[list[Shard], list[SideIndex]]:
        """The run of complete shards that an earlier, interrupted writer has left."""
        files, shards, sides = storage.list_files(self.folder), [], []
        while (name := f"{self.prefix}{len(shards):06d}.tar") in files and name + SIDE_SUFFIX in files:
            side = SideIndex.from_bytes(storage.read_bytes(storage.join(self.folder, name + SIDE_SUFFIX)) or b"")
            if side is None or side.num_bytes != files[name]:
                break
            shards.append(Shard(name, len(side), side.num_bytes, side.sha256, self.folder))
            sides.append(side)
        return shards, sides


def write_index(folder: str | Path, *, domain: str, protocol: Mapping[str, Any]) -> ShardIndex:
    """Write `index.json` over all complete shards of a folder, by name: after several writers with own prefixes."""
    files, shards = storage.list_files(str(folder)), []
    for name in sorted(files):
        if name.endswith(".tar") and name + SIDE_SUFFIX in files:
            side = SideIndex.from_bytes(storage.read_bytes(storage.join(str(folder), name + SIDE_SUFFIX)) or b"")
            assert side is not None and side.num_bytes == files[name], f"{name} is not complete"
            shards.append(Shard(name, len(side), side.num_bytes, side.sha256, str(folder)))
    index = ShardIndex(tuple(shards), domain=domain, protocol=dict(protocol))
    storage.write_atomic(storage.join(str(folder), INDEX_NAME), index.to_json().encode())
    return index
