"""Where shards and checkpoints lie: local paths, and object stores and web servers through fsspec."""

import contextlib
import errno
import glob
import hashlib
import ipaddress
import logging
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "hf", "http", "https", "memory")
_ATTEMPTS = 4
_METADATA = tuple(
    map(
        ipaddress.ip_network,
        ("169.254.0.0/16", "100.100.100.200/32", "192.0.0.192/32", "fe80::/10", "fd00:ec2::/32")
        + ("64:ff9b::a9fe:0/112", "2002:a9fe::/32"),  # the first of these by NAT64 and 6to4
    )
)
"""Where clouds tell a machine its own credentials."""

BUNDLED = Path(__file__).parents[2] / "examples" / "data"
"""Where a checkout keeps its example sets; they are no part of the installed package."""


class Unreachable(ValueError):
    """A store that does not answer, also when asked again: it may later."""


def resolve(url: str) -> str:
    """The address itself, or, for `bundled:NAME`, where this checkout keeps that example set."""
    if not url.startswith("bundled:"):
        return url
    path = BUNDLED / url.removeprefix("bundled:")
    if not path.is_dir():
        sets = sorted(str(index.parent.relative_to(BUNDLED)) for index in BUNDLED.glob("**/index.json"))
        known = (
            f"choose one of {', '.join(sets)}" if sets else "they come with a checkout of the repository: run from one"
        )
        raise ValueError(f"{url} is not among the bundled sets; {known}")
    return str(path)


def check_url(url: str, *, allow_pipe: bool = False) -> None:
    """Refuse addresses that would run a command, hold a password or reach a machine's metadata service."""
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise ValueError(f"{url!r} would run a command in a shell; set data.allow_pipe=true if you trust it")
        return
    if is_local(url):
        return
    scheme, _, rest = url.partition(":")
    if re.match(r"//[^/@]*:(?!\d*(/|$))[^@]*@", rest):  # a secret key may hold slashes
        raise ValueError(
            f"{scheme}://...@{rest.rpartition('@')[2]} holds a user name and a password, which would be written to "
            "logs and config.json; leave them out and give them to the store's own client (AWS_*, ~/.netrc, ...)"
        )
    if scheme.lower() not in _SCHEMES:
        raise ValueError(f"{url!r}: unknown kind of address {scheme!r}; use a local path or one of {_SCHEMES}")
    if _is_metadata(urlsplit(url).hostname or ""):
        raise ValueError(f"{url!r} is a machine's own metadata service; shards are never read from there")
    if "::" in url:
        raise ValueError(f"{url!r} is a chained address; give the place itself")


def _is_metadata(host: str) -> bool:
    """Whether a host is a metadata service, in any notation that resolvers take: 2852039166 is 169.254.169.254."""
    if host in ("metadata", "instance-data") or host.startswith("metadata.") or not host.isascii():
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))
        except OSError:
            return False
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in _METADATA)


def is_local(url: str) -> bool:
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", url) is None


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder else name


def split(url: str) -> tuple[str, str]:
    """Folder and name of an address."""
    folder, _, name = url.rpartition("/")
    return folder or ("/" if url.startswith("/") else "."), name


def list_files(folder: str) -> dict[str, int]:
    """Names and sizes in bytes of the files of a folder; empty when there is no such folder."""
    if is_local(folder):
        if not os.path.isdir(folder):
            return {}
        sizes = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another writer has just renamed it
                    if entry.is_file():
                        sizes[entry.name] = entry.stat().st_size
        return sizes
    return {name: int(entry["size"] or 0) for name, entry in _list(folder).items() if entry["type"] == "file"}


def list_folders(folder: str) -> list[str]:
    """Names of the folders in a folder; empty when there is no such folder."""
    if is_local(folder):
        return [entry.name for entry in os.scandir(folder) if entry.is_dir()] if os.path.isdir(folder) else []
    return [name for name, entry in _list(folder).items() if entry["type"] == "directory"]


def remove_file(url: str) -> None:
    """Delete a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if is_local(url):
            os.unlink(url)
        else:
            filesystem, path = _filesystem(url)
            _retry(url, lambda: filesystem.rm_file(path))


def remove_folder(folder: str) -> None:
    """Delete a folder and all in it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if is_local(folder):
            shutil.rmtree(folder)
        else:
            filesystem, path = _filesystem(folder)
            _retry(folder, lambda: filesystem.rm(path, recursive=True))


def size_and_sha256(url: str) -> tuple[int, str] | None:
    """Of a file of any size, or None when there is none."""
    try:
        if is_local(url):
            return os.path.getsize(url), sha256_of(Path(url))
        filesystem, path = _filesystem(url)
        return _retry(url, lambda: _stream_sha256(filesystem, path))
    except FileNotFoundError:
        return None


def read_bytes(url: str) -> bytes | None:
    """The contents of a small file, or None when there is none."""
    try:
        if is_local(url):
            return Path(url).read_bytes()
        filesystem, path = _filesystem(url)
        return _retry(url, lambda: filesystem.cat_file(path))
    except FileNotFoundError:
        return None


def expand_glob(url: str) -> list[str]:
    """The addresses that a pattern with * or ? stands for, sorted."""
    if is_local(url):
        return sorted(glob.glob(url))
    filesystem, path = _filesystem(url)
    scheme = urlsplit(url).scheme
    return sorted(p if "://" in p else f"{scheme}://{p.lstrip('/')}" for p in filesystem.glob(path))


def publish(source: Path, url: str) -> None:
    """Move a finished local file to its place: at once or not at all."""
    if is_local(url):
        os.replace(source, url)
    else:
        filesystem, path = _filesystem(url)
        _retry(url, lambda: filesystem.put_file(str(source), path))
        source.unlink()


def write_atomic(url: str, content: bytes) -> None:
    """Write a small file at once or not at all."""
    folder = split(url)[0] if is_local(url) else None
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".part", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            publish(Path(file.name), url)
        except (OSError, ValueError):
            os.unlink(file.name)
            raise


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(error: OSError, folder: str) -> ValueError:
    """One line for a user from an error of the file system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ValueError(f"no space left in {folder}; free some and run the same command again, which continues")
    return ValueError(f"cannot write to {folder}: {error.strerror or error}; choose another place")


def download(url: str, path: Path) -> None:
    """Write the whole contents of `url` to a local file. Raises FileNotFoundError when there is none."""
    _retry(url, lambda: _copy(url, path))


def _list(folder: str) -> dict[str, dict[str, Any]]:
    """What fsspec says of the files and folders in a remote folder, by name."""
    filesystem, path = _filesystem(folder)
    filesystem.invalidate_cache()  # others write there too
    try:
        entries = _retry(folder, lambda: filesystem.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    return {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries}


def _stream_sha256(filesystem: Any, path: str) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with filesystem.open(path, "rb") as file:
        while piece := file.read(2**24):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def _copy(url: str, path: Path) -> None:
    if url.startswith("pipe:"):
        with open(path, "wb") as file:
            subprocess.run(url.removeprefix("pipe:"), shell=True, stdout=file, check=True)
    else:
        filesystem, source = _filesystem(url)
        filesystem.get_file(source, str(path))


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    check_url(url)
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: {error}; on every node: pip install s3fs (s3://) or gcsfs (gs://)") from None


def _retry(url: str, action: Any) -> Any:
    """Object stores fail now and then: try again after 0.5, 1 and 2 s. A missing file or a full disk is final."""
    for attempt in range(_ATTEMPTS):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:  # each fsspec implementation has its own errors
            if attempt == _ATTEMPTS - 1 or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise
                raise Unreachable(
                    f"{url} cannot be reached: {error}; tried {_ATTEMPTS} times. See whether it is there and this "
                    "machine may use it"
                ) from error
            logger.warning("%s: %s; trying again", url, error)
            time.sleep(0.5 * 2**attempt)
