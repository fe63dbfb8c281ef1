"""The table of a run's text embeddings: every distinct caption once, by its hash, with what its encoder made of it.

    text/  table.json  captions.txt  hashes.npy  starts.npy  tokens.f16

Tokens are float16, unpadded, one caption after the other, and memory-mapped: training a prior loads no text encoder.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distributed_inr import randomness
from distributed_inr.data import storage
from distributed_inr.data.reader import read_latent
from distributed_inr.domains.domain import Record, Signal, captions
from distributed_inr.models.text import TextEncoder, one_line

logger = logging.getLogger(__name__)

_VERSION = 1
_BATCH = 64
_TOKENS = "tokens.f16"
"""Rows of `width` numbers, little-endian."""
_REMARKS = 5
"""Of an encoder, on the captions of a table, that are logged one by one."""


@dataclass(frozen=True)
class TextTable:
    """A table on disk. Its arrays are opened by each process at their first use.

    Attributes:
        encoder: name of the text encoder.
        sha256: of the encoder's weights.
        width: numbers of a token.
        max_tokens: of the longest caption; what `lookup` pads to.
        fingerprint: of its captions' hashes and tokens.
    """

    folder: Path
    encoder: str
    sha256: str
    width: int
    max_tokens: int
    captions: int
    fingerprint: str
    _arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def open(folder: Path) -> "TextTable":
        """Raises ValueError where there is none, or not a whole one."""
        path = folder / "table.json"
        try:
            about = json.loads(path.read_text())
            if about.pop("version") != _VERSION:
                raise ValueError("it is of another version")
            return TextTable(folder=folder, **about)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be read: {error}; delete {folder} and run the training job again"
            ) from None

    @staticmethod
    def is_whole(folder: Path) -> bool:
        """Whether a folder holds a table that can be read."""
        try:
            table = TextTable.open(folder)
            return table.captions + 1 == len(table._hashes) + 1 == len(table._starts) and len(table._rows) > 0
        except ValueError:
            return False

    @property
    def identity(self) -> str:
        """The encoder, as messages name it."""
        return identity(self.encoder, self.sha256)

    def __contains__(self, caption: str) -> bool:
        return self._find(caption) is not None

    def lookup(self, caption: str) -> tuple[Float[Tensor, "tokens width"], Bool[Tensor, " tokens"]]:
        """Tokens of a caption, padded by zeros to `max_tokens`, and where there are some.

        Raises ValueError where the table has no such caption.
        """
        tokens, mask = torch.zeros(self.max_tokens, self.width), torch.zeros(self.max_tokens, dtype=torch.bool)
        own = self.tokens(caption)
        tokens[: len(own)], mask[: len(own)] = own, True
        return tokens, mask

    def tokens(self, caption: str) -> Float[Tensor, "_ width"]:
        """Tokens of a caption, unpadded."""
        return torch.from_numpy(self._own(caption).astype(np.float32))

    def excerpt(self, folder: Path, captions: Sequence[str]) -> "TextTable":
        """A table of some of the captions, and of the empty prompt, in another folder."""
        distinct = _distinct(captions)
        rows = map(self._own, distinct)
        return _write(folder, distinct, rows, encoder=self.encoder, sha256=self.sha256, width=self.width)

    def _own(self, caption: str) -> np.ndarray:
        """A caption's tokens, unpadded."""
        row = self._row(caption)
        start, end = self._starts[row : row + 2]
        return self._rows[start:end]

    def _row(self, caption: str) -> int:
        row = self._find(caption)
        if row is None:
            raise ValueError(f"{self.folder} has no embedding of {caption!r}; delete it to make the table again")
        return row

    def _find(self, caption: str) -> int | None:
        hashes, own = self._hashes, _hash(caption)
        row = int(np.searchsorted(hashes, own))
        return row if row < len(hashes) and hashes[row] == own else None

    @property
    def _hashes(self) -> np.ndarray:
        return self._opened("hashes.npy", _map_array)

    @property
    def _starts(self) -> np.ndarray:
        return self._opened("starts.npy", _map_array)

    @property
    def _rows(self) -> np.ndarray:
        def read(path: Path) -> np.ndarray:
            shape = (int(self._starts[-1]), self.width)
            if (size := path.stat().st_size) != 2 * shape[0] * shape[1]:
                raise ValueError(f"it has {size} bytes, not {2 * shape[0] * shape[1]}")
            return np.memmap(path, dtype="<f2", mode="r", shape=shape)

        return self._opened(_TOKENS, read)

    def _opened(self, name: str, read: Callable[[Path], np.ndarray]) -> np.ndarray:
        if name not in self._arrays:
            path = self.folder / name
            try:
                self._arrays[name] = read(path)
            except (OSError, EOFError, ValueError) as error:
                raise ValueError(f"{path} cannot be read: {error}; delete {self.folder} to make it again") from None
        return self._arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes, which open the files themselves."""
        return self.__dict__ | {"_arrays": {}}


def read_captioned_latent(record: Record, seed: int, *, texts: TextTable, dropout: float) -> Signal:
    """Decode one record of a latent set, with the embedding of one of its captions, drawn from the sample's seed.

    Args:
        dropout: how often the empty prompt is drawn instead, as it is where there are no captions.
    """
    signal = read_latent(record, seed)
    assert isinstance(signal.text, str)
    own, known = signal.seed[None], captions(signal.text) or [""]
    drawn = known[int(randomness.integers(own, "caption", (), len(known)))]
    if randomness.uniform(own, "caption dropout") < dropout:
        drawn = ""
    tokens, mask = texts.lookup(drawn)
    return replace(signal, text=drawn, text_tokens=tokens, text_mask=mask)


def write_table(
    folder: Path, prompts: Iterable[str], encoder: TextEncoder, *, progress: Callable[[int, int], None] | None = None
) -> TextTable:
    """Embed the distinct prompts, and the empty one, and write them to a folder.

    Args:
        progress: called with (prompts done, of how many).
    """
    distinct, remarks = _distinct(prompts), list[str]()

    def rows() -> Iterator[np.ndarray]:
        for number, row in enumerate(embedded(distinct, encoder, remark=remarks.append), start=1):
            if progress is not None and (number % _BATCH == 0 or number == len(distinct)):
                progress(number, len(distinct))
            yield row

    table = _write(folder, distinct, rows(), encoder=encoder.name, sha256=encoder.sha256, width=encoder.width)
    for remark in remarks[:_REMARKS]:
        logger.warning(remark)
    if len(remarks) > _REMARKS:
        logger.warning("and the like of %d captions more", len(remarks) - _REMARKS)
    return table


@torch.no_grad()
def embedded(
    prompts: Sequence[str], encoder: TextEncoder, *, remark: Callable[[str], None] = logger.warning
) -> Iterator[np.ndarray]:
    """The tokens of each prompt, float16 and unpadded, as a table has them.

    Args:
        remark: told what the encoder does not take in.
    """
    for first in range(0, len(prompts), _BATCH):
        part = list(prompts[first : first + _BATCH])
        found = encoder(part)
        for line in found.remarks:
            remark(line)
        for prompt, tokens, mask in zip(part, found.tokens, found.mask, strict=True):
            own = tokens[mask].half()
            if not own.isfinite().all():
                raise ValueError(f"{encoder.name} gives {prompt!r} numbers that float16 cannot hold; use another one")
            yield own.cpu().numpy()


def identity(encoder: str, sha256: str) -> str:
    """A text encoder, as messages name it."""
    return f"{encoder} (sha256 {sha256[:12]})"


def _distinct(prompts: Iterable[str]) -> list[str]:
    """The distinct prompts, and the empty one, in the order of a table."""
    return sorted({"", *map(one_line, prompts)}, key=_hash)


def _write(
    folder: Path,
    distinct: Sequence[str],
    rows: Iterable[np.ndarray],
    *,
    encoder: str,
    sha256: str,
    width: int,
) -> TextTable:
    """Write the tokens of each prompt; table.json last."""
    hashes = np.array([_hash(prompt) for prompt in distinct], dtype=np.uint64)
    if len(np.unique(hashes)) < len(hashes):
        raise ValueError(f"two of the {len(distinct)} captions have one hash; change either by a word")
    starts, longest = [0], 0
    digest = hashlib.sha256(sha256.encode())
    with (folder / _TOKENS).open("wb") as file:
        for tokens in rows:
            starts.append(starts[-1] + len(tokens))
            longest = max(longest, len(tokens))
            content = tokens.astype("<f2").tobytes()
            digest.update(content)
            file.write(content)
    for content in (hashes, np.array(starts, dtype=np.int64)):
        digest.update(content.tobytes())
    np.save(folder / "hashes.npy", hashes)
    np.save(folder / "starts.npy", np.array(starts, dtype=np.int64))
    (folder / "captions.txt").write_text("".join(f"{prompt}\n" for prompt in distinct), encoding="utf-8")
    about = {
        "version": _VERSION,
        "encoder": encoder,
        "sha256": sha256,
        "width": width,
        "max_tokens": longest,
        "captions": len(distinct),
        "fingerprint": digest.hexdigest(),
    }
    storage.write_atomic(str(folder / "table.json"), json.dumps(about, indent=1).encode() + b"\n")
    return TextTable.open(folder)


def _map_array(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _hash(caption: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(one_line(caption).encode(), digest_size=8).digest(), "little"))
