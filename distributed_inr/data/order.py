"""The order of a run's samples: a pure function of (seed, position), the same for every number of ranks and loaders.

A run is one infinite sequence of positions P. With N samples, epoch P div N is a permutation of all of them:

1. the shards are permuted;
2. the samples are permuted within windows of `shuffle_shards` consecutive shards, and the windows follow one another;
3. that sequence is cut into `num_streams` spans whose lengths differ by at most one, the longer first;
4. position p = P mod N of the epoch is item p div S of span p mod S.

So a rank that takes the positions P = r mod W reads S/W spans (when W divides S), each from one window at a time.
Permutations sort hashes rather than use numpy's generators, whose streams may change between versions.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int, UInt64

K = TypeVar("K")
V = TypeVar("V")


class Place(NamedTuple):
    """Where a position of the run leads."""

    epoch: int
    shard: int
    sample: int


@dataclass(frozen=True)
class _Epoch:
    """The shards of one epoch in their order, and where windows begin in its sequence of samples."""

    shards: Int[np.ndarray, " shards"]
    shard_starts: Int[np.ndarray, " shard_edges"]
    window_starts: Int[np.ndarray, " window_edges"]


class Order:
    """Maps run positions to samples; `len` is the number of samples of an epoch.

    Only the tables of two epochs and the permutations of the windows in use are kept: start-up and memory do not depend
    on the position.

    Args:
        shard_samples: number of samples of each shard.
        shuffle_shards: shards per window; larger mixes better and needs more shards at hand.
        num_streams: spans read side by side; a multiple of the number of ranks keeps each rank to its own shards.
    """

    def __init__(self, shard_samples: Sequence[int], *, seed: int, shuffle_shards: int, num_streams: int) -> None:
        self._samples = np.asarray(shard_samples, dtype=np.int64)
        self._num_samples = int(self._samples.sum())
        if self._num_samples == 0:
            raise ValueError("the shards hold no samples, so there is nothing to order; prepare the set again")
        self.seed, self.shuffle_shards, self.num_streams = seed, shuffle_shards, num_streams
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return self._num_samples

    def locate(self, position: int) -> Place:
        """The sample at a position of the run."""
        epoch, item = self._item(position)
        table = self._epoch(epoch)
        window = int(np.searchsorted(table.window_starts, item, side="right")) - 1
        start = int(table.window_starts[window])
        shuffled = start + int(self._window(epoch, window)[item - start])
        slot = int(np.searchsorted(table.shard_starts, shuffled, side="right")) - 1
        return Place(epoch, int(table.shards[slot]), shuffled - int(table.shard_starts[slot]))

    def windows_ahead(self, position: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shards of the window that a position reads from, and of the window that its stream reads next."""
        epoch, item = self._item(position)
        table = self._epoch(epoch)
        window = int(np.searchsorted(table.window_starts, item, side="right")) - 1
        now = self._shards_of(table, window)
        if window + 1 < len(table.window_starts) - 1:
            return now, self._shards_of(table, window + 1)
        return now, self._shards_of(self._epoch(epoch + 1), 0)

    def window_number(self, position: int) -> tuple[int, int]:
        """Epoch and window that a position reads from: a change means other shards."""
        epoch, item = self._item(position)
        return epoch, int(np.searchsorted(self._epoch(epoch).window_starts, item, side="right")) - 1

    def _item(self, position: int) -> tuple[int, int]:
        """Epoch, and place in the epoch's sequence of samples before it is cut into spans."""
        epoch, p = divmod(position, self._num_samples)
        length, longer = divmod(self._num_samples, self.num_streams)
        span, item = p % self.num_streams, p // self.num_streams
        return epoch, span * length + min(span, longer) + item

    def _shards_of(self, table: _Epoch, window: int) -> tuple[int, ...]:
        return tuple(table.shards[window * self.shuffle_shards : (window + 1) * self.shuffle_shards].tolist())

    def _epoch(self, epoch: int) -> _Epoch:
        def make() -> _Epoch:
            shards = _permutation(len(self._samples), f"{self.seed}/shards/{epoch}")
            starts = np.concatenate([[0], np.cumsum(self._samples[shards])])
            windows = np.append(starts[:-1][:: self.shuffle_shards], starts[-1])
            return _Epoch(shards, starts, windows)

        return _remember(self._epochs, epoch, make, limit=2)

    def _window(self, epoch: int, window: int) -> np.ndarray:
        def make() -> np.ndarray:
            starts = self._epoch(epoch).window_starts
            return _permutation(int(starts[window + 1] - starts[window]), f"{self.seed}/samples/{epoch}/{window}")

        # One per stream, and some for the streams that have already turned to their next window.
        return _remember(self._windows, (epoch, window), make, limit=2 * self.num_streams + 2)

    def __getstate__(self) -> dict:
        """Loader processes start with empty tables."""
        return {**self.__dict__, "_epochs": OrderedDict(), "_windows": OrderedDict()}


def _remember(table: OrderedDict[K, V], key: K, make: Callable[[], V], *, limit: int) -> V:
    if key not in table:
        table[key] = make()
        if len(table) > limit:
            table.popitem(last=False)
    table.move_to_end(key)
    return table[key]


def _permutation(count: int, purpose: str) -> Int[np.ndarray, " count"]:
    """A random order of 0..count-1: the order of their hashes (SplitMix64)."""
    salt = np.uint64(int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little"))
    hashes = _mix(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt)
    return np.argsort(hashes, kind="stable").astype(np.int32 if count < 2**31 else np.int64)


def _mix(z: UInt64[np.ndarray, " count"]) -> UInt64[np.ndarray, " count"]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
