"""Arrays in .npy and .npz files, read without running or believing what they say: no pickles, bounded sizes."""

import io
import math
import re
import zipfile
from collections.abc import Sequence

import numpy as np

FLOATS = ("<f2", "<f4", "<f8")
INTEGERS = ("|u1", "<i4", "<i8")
BITS = ("|b1", "|u1")
TEXT = ("<U",)
"""Strings of any length."""
MAX_BYTES = 2**30
"""Largest array that is read by default."""
MAX_ROWS = 1_000_000

_HEADER = re.compile(
    rb"\{'descr': '([<|][fiubU]\d{1,4})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,9},|\d{1,9}(?:, \d{1,9})+)?)\), \} *\n"
)


def read_npy(content: bytes, dtypes: Sequence[str] = FLOATS, *, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """A .npy array of version 1.0 as numpy writes it. Raises ValueError for anything else.

    numpy's own reader evaluates the header as Python: slow, and it raises anything.
    """
    start, dtype, order, shape = _header(content, dtypes)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > max_bytes:
        raise ValueError(f"an array of {size} bytes, above the limit of {max_bytes}")
    if len(content) - start != size:
        raise ValueError(f"{len(content) - start} bytes of values where its header promises {size}")
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order=order)  # type: ignore[call-overload]


def read_rows(content: bytes, dim: int, *, max_rows: int = MAX_ROWS) -> np.ndarray:
    """A .npy of finite floats [rows, dim], at least one row, as float32. Raises ValueError for anything else."""
    found = read_npy(content, max_bytes=8 * max_rows * dim)
    if found.ndim != 2 or found.shape[1] != dim or len(found) < 1 or not np.isfinite(found).all():
        raise ValueError(f"an array of shape {found.shape}, expected finite numbers [rows, {dim}]")
    return found.astype(np.float32)


def write_npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file, in C order."""
    file = io.BytesIO()
    np.save(file, np.asarray(array, order="C"), allow_pickle=False)
    return file.getvalue()


class Archive:
    """The arrays of an .npz file, by name; one is unpacked only when it is asked for, and only up to `max_bytes`."""

    def __init__(self, content: bytes, *, max_bytes: int = MAX_BYTES) -> None:
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(content))
            members = self._zip.infolist()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise ValueError(f"not an .npz file: {error}") from None
        self._members = {info.filename.removesuffix(".npy"): info for info in members}
        self._max_bytes = max_bytes

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str, dtypes: Sequence[str] = FLOATS) -> np.ndarray:
        """One array. Raises ValueError where it is damaged, or larger, as its header says, than the limit."""
        info = self._members[name]
        if info.file_size > self._max_bytes + 4096:
            raise ValueError(f"{name}: {info.file_size} bytes unpacked, above the limit of {self._max_bytes}")
        try:
            with self._zip.open(info) as member:
                content = member.read()  # never more than the header's file_size
        except Exception as error:  # decompressors of damaged members raise nearly anything
            raise ValueError(f"{name} cannot be unpacked: {error}") from None
        try:
            return read_npy(content, dtypes, max_bytes=self._max_bytes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _header(content: bytes, dtypes: Sequence[str]) -> tuple[int, str, str, tuple[int, ...]]:
    """Where the values start, their type and order, and the shape."""
    start = 10 + int.from_bytes(content[8:10], "little")
    header = _HEADER.fullmatch(content[10:start])
    if content[:8] != b"\x93NUMPY\x01\x00" or header is None or not _is_one_of(header[1].decode(), dtypes):
        found = re.search(rb"'descr': '([^']{1,20})'", content[:start])
        kind = f" but {found[1].decode(errors='replace')}" if found and content[:6] == b"\x93NUMPY" else ""
        raise ValueError(f"not a .npy of version 1.0 that holds one of {' '.join(dtypes)}{kind}")
    shape = tuple(int(extent) for extent in header[3].split(b",") if extent.strip())
    return start, header[1].decode(), "F" if header[2] == b"True" else "C", shape


def _is_one_of(dtype: str, dtypes: Sequence[str]) -> bool:
    return dtype in dtypes or (dtype[:2] in dtypes and dtype[:2] == "<U")
