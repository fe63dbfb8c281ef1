"""The bounded local cache of remote shards, and of side indexes that have no other place."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import filelock

from distributed_inr.data import storage
from distributed_inr.data.side_index import SIDE_SUFFIX, SideIndex

logger = logging.getLogger(__name__)

CACHE_FOLDER = "~/.cache/distributed_inr/shards"
CACHE_GIB = 64.0


class Cache:
    """Whole remote shards in a local folder, fetched once a node and checked by sha256; the longest unused leave first.

    Files are named by their sha256, so that runs share them and a changed shard is another file. Removing a file that
    another process has open is harmless: it keeps its handle.
    """

    def __init__(self, folder: str = CACHE_FOLDER, *, gib: float = CACHE_GIB, allow_pipe: bool = False) -> None:
        self.folder = Path(folder).expanduser()
        self.max_bytes = int(gib * 2**30)
        self.allow_pipe = allow_pipe

    def open(self, url: str, sha256: str) -> tuple[Path, int]:
        """A shard on the local disk, with an open file descriptor: a remote one is fetched first if need be."""
        for _ in range(10):  # another process may remove the file between fetching and opening
            path = Path(url) if storage.is_local(url) else self.fetch(url, sha256)
            try:
                return path, os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                if storage.is_local(url):
                    raise ValueError(f"shard {url} {_MISSING}") from None
        raise ValueError(f"shard {url} leaves the cache before it is read; raise data.cache_gib")

    def fetch(self, url: str, sha256: str) -> Path:
        """The local file with the contents of `url`; waits for the process of this node that is fetching it."""
        path = self.folder / f"{sha256}.tar"
        if not _touch(path):
            with self._lock(sha256):
                if not _touch(path):
                    self._download(url, path, sha256)
        return path

    def side_index(self, path: Path, *, wanted: Callable[[SideIndex], bool]) -> SideIndex:
        """The stored side index of a local tar if it is the wanted one; otherwise it is made, once a node.

        It lies beside the tar or, in a folder that cannot be written, in the cache.
        """
        places = (Path(f"{path}{SIDE_SUFFIX}"), self._side_path(str(path.absolute())))
        if (side := _read_side_index(places, wanted)) is not None:
            return side
        target = places[0] if os.access(path.parent, os.W_OK) else places[1]
        with self._lock(str(target)):
            if (side := _read_side_index(places, wanted)) is None:
                logger.info("indexing %s", path)
                side = SideIndex.build(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                storage.write_atomic(str(target), side.to_bytes())
        return side

    def foreign_side_index(self, url: str) -> SideIndex:
        """The side index of a remote tar that no `index.json` lists: remembered by its address, made on first sight."""
        storage.check_url(url, allow_pipe=self.allow_pipe)
        target = self._side_path(url)
        with self._lock(str(target)):
            if (side := _read_side_index([target], lambda side: True)) is None:
                logger.info("fetching and indexing %s", url)
                path = target.with_suffix(".tar")
                self._download(url, path, None)
                side = SideIndex.build(path)
                os.replace(path, self.folder / f"{side.sha256}.tar")
                storage.write_atomic(str(target), side.to_bytes())
        return side

    def _download(self, url: str, path: Path, sha256: str | None) -> None:
        storage.check_url(url, allow_pipe=self.allow_pipe)
        part = path.with_suffix(".part")
        try:
            storage.download(url, part)
            if sha256 is not None and (found := storage.sha256_of(part)) != sha256:
                raise ValueError(changed(url, found, sha256))
            os.replace(part, path)
        except FileNotFoundError:
            what = _MISSING if sha256 is not None else "is missing; restore it or correct the address"
            raise ValueError(f"shard {url} {what}") from None
        except OSError as error:
            raise storage.explain(error, str(self.folder)) from error
        finally:
            part.unlink(missing_ok=True)
        self._evict(keep=path)

    def _evict(self, keep: Path) -> None:
        with self._lock("evict"):
            own = self.folder.glob("[0-9a-f]" * 64 + ".tar")  # others' files may lie there too
            files = sorted(((s.st_mtime, s.st_size, p) for p, s in _stats(own)), key=lambda f: f[0])
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total <= self.max_bytes:
                    return
                if path != keep:
                    path.unlink(missing_ok=True)
                    Path(f"{path}{SIDE_SUFFIX}").unlink(missing_ok=True)
                    total -= size

    def _lock(self, name: str) -> filelock.FileLock:
        """One of 256 files, so that locks do not pile up; "evict", taken inside others, has its own."""
        number = name if name == "evict" else hashlib.sha256(name.encode()).hexdigest()[:2]
        folder = self.folder / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"data.cache_dir={self.folder} cannot be made ({error.strerror}); choose another"
            ) from None
        return filelock.FileLock(folder / number)

    def _side_path(self, address: str) -> Path:
        return self.folder / f"{hashlib.sha256(address.encode()).hexdigest()}{SIDE_SUFFIX}"


_MISSING = "is missing but its index lists it; restore it or prepare the set again"


def changed(url: str, found: str, expected: str) -> str:
    return (
        f"shard {url} has sha256 {found[:12]}..., its index says {expected[:12]}...: it was changed or damaged; "
        "restore it or prepare the set again"
    )


def _read_side_index(places: Iterable[Path], wanted: Callable[[SideIndex], bool]) -> SideIndex | None:
    for place in places:
        side = SideIndex.from_bytes(storage.read_bytes(str(place)) or b"")
        if side is not None and wanted(side):
            return side
    return None


def _touch(path: Path) -> bool:
    """Mark as used now; False when there is no such file."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _stats(paths: Iterable[Path]) -> Iterable[tuple[Path, os.stat_result]]:
    for path in paths:
        try:
            yield path, path.stat()
        except FileNotFoundError:  # another process has just removed it
            continue
