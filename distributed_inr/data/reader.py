"""Reading by position: shards and an order become signals, the same for every number of ranks and loader processes."""

import contextlib
import itertools
import logging
import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pydantic
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from distributed_inr.config import config
from distributed_inr.data.cache import CACHE_FOLDER, CACHE_GIB, Cache
from distributed_inr.data.order import Order
from distributed_inr.data.shards import OpenShard, Shard, ShardDamaged, ShardIndex, load_index
from distributed_inr.domains.domain import Record, Signal, caption, collate
from distributed_inr.randomness import sample_seed
from distributed_inr.raw.arrays import read_npy

logger = logging.getLogger(__name__)

Read = Callable[[Record, int], Signal]

_OPEN_SHARDS = 256
_MAX_LOADERS = 256
_BAD_FRACTION_OF = 1000


@config
class Data:
    """Which shards to train and to evaluate on, and how they are read."""

    train: str
    """Training shards: a folder, a .tar, a pattern with * or braces; local, s3://, gs:// or http(s)://."""
    val: str | None = None
    """Held-out shards, in the same forms; none leaves evaluation out."""
    num_streams: Annotated[int, pydantic.Field(gt=0)] = 64
    """Spans of an epoch that are read side by side. Fixed for a run: it is part of the order of its samples."""
    shuffle_shards: Annotated[int, pydantic.Field(gt=0)] = 8
    """Shards whose samples are shuffled together. Fixed for a run: it is part of the order of its samples."""
    num_loaders: Annotated[int, pydantic.Field(ge=0, le=_MAX_LOADERS)] = 0
    """Loader processes of each worker; 0 reads in the worker itself. Does not change the samples."""
    cache_dir: str = CACHE_FOLDER
    """Local folder that remote shards are fetched into, shared by the processes and runs of a node."""
    cache_gib: Annotated[float, pydantic.Field(gt=0)] = CACHE_GIB
    """Largest size of that folder in GiB."""
    max_bad_fraction: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.01
    """Stop when more than this fraction of the samples read is bad; fewer are replaced and logged."""
    accept_changed: bool = False
    """Go on with a run although its shards have changed: from then on its positions mean other samples."""
    allow_pipe: bool = False
    """Allow `pipe:` addresses, which run a shell command."""

    def cache(self) -> Cache:
        return Cache(self.cache_dir, gib=self.cache_gib, allow_pipe=self.allow_pipe)

    def index(self, url: str) -> ShardIndex:
        """Find and check a set of shards: `train`, `val`, or one made from them."""
        index = load_index(url, cache=self.cache(), allow_pipe=self.allow_pipe)
        index.check()
        return index

    def dataset(self, index: ShardIndex, *, read: Read, seed: int) -> "ShardDataset":
        """The samples of `index` in this run's order."""
        order = Order(
            [shard.samples for shard in index.shards],
            seed=seed,
            shuffle_shards=self.shuffle_shards,
            num_streams=self.num_streams,
        )
        return ShardDataset(
            index, read=read, seed=seed, order=order, cache=self.cache(), max_bad_fraction=self.max_bad_fraction
        )


class ShardDataset(Dataset):
    """Signals by run position (`dataset[position]`), or by number in the set's own order (`dataset.signal(number)`).

    A bad sample is replaced by the next good one of its shard, counted and logged by key. Each process keeps its own
    files open, so the data set may be handed to loader processes at any time.

    Args:
        read: decodes a record, with the sample's seed; raises ValueError when it is bad.
        order: None reads the set in its own order, epoch after epoch.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        read: Read,
        seed: int,
        order: Order | None = None,
        cache: Cache | None = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.index, self.order, self.seed = index, order, seed
        self.cache = cache or Cache()
        self.max_bad_fraction = max_bad_fraction
        self._read = read
        self._starts = np.concatenate([[0], np.cumsum([shard.samples for shard in index.shards])])
        # One row a process, [read, bad], in memory shared with the loader processes: nobody writes another's row.
        self._counts = torch.zeros(1 + _MAX_LOADERS, 2, dtype=torch.int64).share_memory_()
        self._remote = any(not shard.is_local for shard in index.shards)
        self._drop_handles()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, position: int) -> Signal:
        """The signal at a position of the run."""
        if self.order is None:
            signal, _ = self.signal(position % len(self), position)
            return signal
        if self._remote:
            self._fetch_ahead(position)
        place = self.order.locate(position)
        signal, _ = self._signal(place.shard, place.sample, position)
        return signal

    def key(self, position: int) -> str:
        """The key of the sample that the order has at a position of the run; that of a bad one too."""
        assert self.order is not None
        place = self.order.locate(position)
        return self._open(place.shard).side.key(place.sample)

    def signal(self, number: int, position: int | None = None) -> tuple[Signal, bool]:
        """The signal at a number of the set's own order, and False if that one is bad and this its replacement."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._signal(shard, number - int(self._starts[shard]), number if position is None else position)

    @property
    def num_read(self) -> int:
        """Samples read by this rank's processes."""
        return int(self._counts[:, 0].sum())

    @property
    def num_bad(self) -> int:
        """How many of them were bad."""
        return int(self._counts[:, 1].sum())

    def _signal(self, shard: int, sample: int, position: int) -> tuple[Signal, bool]:
        source = self._open(shard)
        seed = sample_seed(self.seed, position)
        worker = get_worker_info()
        counts = self._counts.numpy()[0 if worker is None else 1 + worker.id]
        counts[0] += 1
        for attempt in range(len(source)):
            current = (sample + attempt) % len(source)
            try:
                signal = self._read(source.record(current), seed)
                # One sum instead of a test of each value: it is finite only if all of them are.
                if signal.inputs.is_floating_point() and not math.isfinite(signal.inputs.sum().item()):
                    raise ValueError(f"{signal.key}: values that are not finite")
            except ShardDamaged:
                raise
            except (ValueError, KeyError, OSError, SyntaxError) as error:  # decoders raise all of these on bad bytes
                self._log_bad(source, current, error)
                if attempt == 0:
                    counts[1] += 1
                    self._stop_above_limit(error)
                continue
            number = torch.tensor(int(self._starts[shard]) + current)
            return replace(signal, position=torch.tensor(position), number=number), attempt == 0
        raise ValueError(f"shard {source.shard.url}: none of its {len(source)} samples is good; prepare the set again")

    def _log_bad(self, source: OpenShard, sample: int, error: Exception) -> None:
        key = source.side.key(sample)
        if key not in self._logged:
            self._logged.add(key)
            logger.warning("bad sample %s in %s replaced by the next of its shard: %s", key, source.shard.url, error)

    def _stop_above_limit(self, last: Exception) -> None:
        bad, read = self.num_bad, max(self.num_read, min(len(self), _BAD_FRACTION_OF))
        if bad > self.max_bad_fraction * read:
            raise TooManyBad(
                f"{bad} of {read} samples are bad, above data.max_bad_fraction={self.max_bad_fraction}; "
                f"the last: {last}; mend the set or raise the limit"
            )

    def _open(self, shard: int) -> OpenShard:
        if shard not in self._handles:
            if len(self._handles) >= _OPEN_SHARDS:
                _, oldest = self._handles.popitem(last=False)
                oldest.close()
            self._handles[shard] = OpenShard(self.index.shards[shard], self.cache)
        self._handles.move_to_end(shard)
        return self._handles[shard]

    def _fetch_ahead(self, position: int) -> None:
        """When a stream turns to another window, have its shards and the next one's fetched in the background."""
        assert self.order is not None
        window = self.order.window_number(position)
        if window in self._windows_asked:
            return
        self._windows_asked[window] = None
        if len(self._windows_asked) > 4 * self.order.num_streams:
            self._windows_asked.popitem(last=False)
        if self._wishes is None:
            self._wishes = queue.SimpleQueue()
            for _ in range(2):
                threading.Thread(target=_fetch_wishes, args=(self._wishes, self.cache), daemon=True).start()
        for number in itertools.chain(*self.order.windows_ahead(position)):
            if not self.index.shards[number].is_local:
                self._wishes.put(self.index.shards[number])

    def _drop_handles(self) -> None:
        self._handles: OrderedDict[int, OpenShard] = OrderedDict()
        self._windows_asked: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._wishes: queue.SimpleQueue[Shard] | None = None
        self._logged: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one process; the counts stay shared."""
        own = ("_handles", "_windows_asked", "_wishes", "_logged")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._drop_handles()


def _fetch_wishes(wishes: "queue.SimpleQueue[Shard]", cache: Cache) -> None:
    while True:
        shard = wishes.get()
        with contextlib.suppress(ValueError):  # it shows when the shard is read, which tries again
            cache.fetch(shard.url, shard.sha256)


class TooManyBad(ValueError):
    """More bad samples than the run accepts."""


def read_latent(record: Record, seed: int) -> Signal:
    """Decode one record of a latent set: mean and perhaps deviation, [1 or 2, *latent_shape], and the caption."""
    key = record["__key__"]
    try:
        latent = read_npy(record["latent.npy"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{key}.latent.npy cannot be decoded: {error}") from None
    if latent.ndim < 2 or latent.shape[0] not in (1, 2) or latent.dtype.kind != "f":
        raise ValueError(
            f"{key}.latent.npy has shape {latent.shape} {latent.dtype}, expected floats [1 or 2, *latent_shape]"
        )
    return Signal(
        key=key,
        seed=torch.tensor(seed),
        position=torch.tensor(0),
        inputs=torch.from_numpy(latent.astype(np.float32)),
        text=caption(record),
    )


def training_stream(
    dataset: ShardDataset,
    *,
    start: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    num_loaders: int = 0,
) -> Iterator[Signal]:
    """Endless micro-batches of one rank, in order: the positions from `start` on that equal `rank` modulo `world`.

    The `global_batch` samples of a step are the same for every `world` and `num_loaders`.

    Args:
        start: samples that the run has seen.
        micro_batch: samples a micro-batch; must divide the rank's share, `global_batch` / `world`.
    """
    if global_batch % world:
        raise ValueError(
            f"batch_size={global_batch} must be a multiple of the {world} workers; "
            f"try {max(1, round(global_batch / world)) * world}"
        )
    share = global_batch // world
    if share % micro_batch:
        raise ValueError(
            f"micro_batch_size={micro_batch} must divide a worker's share of the batch, {global_batch} / {world} = "
            f"{share}; try {max(size for size in range(1, micro_batch + 1) if share % size == 0)}"
        )
    check_cache(dataset, world)
    batches = _TrainingBatches(dataset, start, global_batch, micro_batch, rank, world)
    return stream(batches, itertools.count(), num_loaders)


def evaluation_stream(
    dataset: ShardDataset, *, batch: int, rank: int = 0, world: int = 1, num_loaders: int = 0
) -> Iterator[Signal]:
    """Every sample exactly once over all ranks, in the set's own order; equally many steps of `batch` on each rank.

    `Signal.mask` is False, so that it does not count, where a ragged last step repeats a sample and where a bad one was
    replaced.
    """
    num_steps = -(-len(dataset) // (batch * world))
    return stream(_EvaluationBatches(dataset, batch, rank, world), range(num_steps), num_loaders)


@dataclass(frozen=True)
class _TrainingBatches(Dataset):
    """Micro-batches by number. Errors are returned: a loader process would wrap them in its own traceback."""

    dataset: ShardDataset
    start: int
    global_batch: int
    micro_batch: int
    rank: int
    world: int

    def positions(self, number: int) -> Sequence[int]:
        step, part = divmod(number, self.global_batch // self.world // self.micro_batch)
        base = self.start + step * self.global_batch
        first = base + (self.rank - base) % self.world + part * self.micro_batch * self.world
        return range(first, first + self.micro_batch * self.world, self.world)

    def __getitem__(self, number: int) -> Signal | ValueError:
        try:
            return collate([self.dataset[position] for position in self.positions(number)])
        except ValueError as error:
            return error


@dataclass(frozen=True)
class _EvaluationBatches(Dataset):
    """Evaluation batches by step."""

    dataset: ShardDataset
    batch: int
    rank: int
    world: int

    def __getitem__(self, step: int) -> Signal | ValueError:
        first, last = step * self.batch * self.world + self.rank, len(self.dataset) - 1
        numbers = range(first, first + self.batch * self.world, self.world)
        wanted = [min(number, last) for number in numbers]
        try:  # the sample that fills up a last step is read once, lest a bad one be counted as many
            found = {number: self.dataset.signal(number) for number in dict.fromkeys(wanted)}
        except ValueError as error:
            return error
        mask = [number <= last and found[number][1] for number in numbers]
        return replace(collate([found[number][0] for number in wanted]), mask=torch.tensor(mask))


def stream(batches: Dataset, numbers: Iterable[int], num_loaders: int) -> Iterator[Signal]:
    """`batches[number]` for each of `numbers`, read ahead by loader processes; an error that it returns is raised."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=num_loaders,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # its own, so that reading draws nothing from the global one
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch


def _unchanged(batch: Any) -> Any:
    return batch


def check_cache(dataset: ShardDataset, world: int) -> None:
    """Refuse a cache that cannot hold a window for each span that this rank reads."""
    remote = [shard.bytes for shard in dataset.index.shards if not shard.is_local]
    if not remote or dataset.order is None:
        return
    streams = dataset.order.num_streams
    spans = streams // world if streams % world == 0 else streams
    needed = min(sum(remote), spans * dataset.order.shuffle_shards * max(remote))
    if needed > dataset.cache.max_bytes:
        raise ValueError(
            f"data.cache_gib={dataset.cache.max_bytes / 2**30:g} cannot hold the {spans} windows of "
            f"{dataset.order.shuffle_shards} shards that each worker of a node reads from ({needed / 2**30:.3g} GiB); "
            "raise it, or lower data.num_streams or data.shuffle_shards"
        )
