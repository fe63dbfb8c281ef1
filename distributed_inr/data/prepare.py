"""Preparing a set: raw data -> train and val shards; verifying and describing finished sets."""

import collections
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from distributed_inr import config
from distributed_inr.data import storage
from distributed_inr.data.cache import Cache
from distributed_inr.data.layouts import SOURCES, Item, Part, Source, select
from distributed_inr.data.layouts.captions import parse, templated
from distributed_inr.data.layouts.item import Unusable
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.data.shards import OpenShard, Shard, ShardIndex, load_index, read_index
from distributed_inr.data.side_index import is_key
from distributed_inr.domains.domain import Record, caption, captions

logger = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

Split = Literal["auto", "given", "text", "object", "time", "fraction", "none"]

_PLAN_NAME = "prepare.json"
_SKIPPED_NAME = "skipped.txt"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to make of a source of raw data; recorded with the set.

    Attributes:
        layout: None takes the domain's first.
        only: keep items whose field (class, text, object, or any of the metadata) has one of these values.
        split: given takes the layout's own train and val; text and object keep equal captions, or an object's items,
            on one side; time holds out the end of each object (of a recording, or of files in their order), without
            `val_gap` items before it; fraction splits single items; none makes one part; auto takes given if the layout
            has it, the layout's own kind, text where there are captions, else fraction.
        val_fraction: held-out fraction of captions, objects, time or items; by time the last, else chosen by hash.
        val_per_class: instead, this many of each class.
        val_gap: items left out before those held out by time; more, if more overlap them.
        split_seed: another number holds out others.
        captions: templates that captions are made by once the split is known; none keeps the items' own.
        form: how items are brought to one kind of record; None takes the domain's defaults.
    """

    domain: str = "image"
    layout: str | None = None
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    split: Split = "auto"
    val_fraction: float = 0.05
    val_per_class: int | None = None
    val_gap: int = 1
    split_seed: int = 0
    captions: tuple[str, ...] = ()
    form: Any = None
    shard_bytes: int = 256 * 2**20
    shard_samples: int = 10_000

    def __post_init__(self) -> None:
        layouts = self.source.layouts
        if self.layout is None:
            object.__setattr__(self, "layout", next(iter(layouts)))
        if self.form is None:
            object.__setattr__(self, "form", self.source.form())
        if self.layout not in layouts:
            raise ValueError(f"--layout {self.layout} is unknown; choose one of {', '.join(layouts)}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction} must lie in [0, 1); try 0.05")
        if self.val_gap < 0:
            raise ValueError(f"--val-gap {self.val_gap} must be at least 0")
        for template in self.captions:
            parse(template)

    @property
    def source(self) -> Source:
        return SOURCES[self.domain]


@dataclass(frozen=True)
class Prepared:
    """The finished sets by part, and the items left out with the reasons."""

    parts: dict[str, ShardIndex]
    skipped: list[tuple[str, str]]


def prepare_set(source: Path, out: str, plan: Plan, *, metadata: Path | None = None, workers: int = 2) -> Prepared:
    """Write `out`/train and `out`/val. Run again after an interruption it goes on, and ends with the same bytes."""
    source = source.absolute()
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give the folder that holds the {plan.source.noun}s")
    assert plan.layout is not None
    found = [
        item if is_key(item.key) else _nameless(item)
        for item in select(plan.source.layouts[plan.layout](source, metadata, plan.form), plan.only)
    ]
    if not found:
        wanted = " ".join(f"--only {name}={','.join(values)}" for name, values in plan.only.items())
        raise ValueError(
            f"{source}: no {plan.source.noun}s for --layout {plan.layout} {wanted}".rstrip()
            + f"; check the path, the layout and the filters (files: {' '.join(plan.source.files)})"
        )
    names: dict[str, str] = {}
    for item in found:
        if item.key in names:
            raise ValueError(f"{source}: {names[item.key]} and {item.name} would have one key; rename one")
        names[item.key] = item.name
    split, sides = _split(found, plan)
    found = templated(found, plan.captions) if plan.captions else found
    protocol = _protocol(plan, split, found, sides)
    _begin(out, protocol)

    parts: dict[str, ShardIndex] = {}
    skipped: list[tuple[str, str]] = []
    training = [item for item, side in zip(found, sides, strict=True) if side == "train"]
    protocol |= plan.source.statistics(training, plan.form)
    for part in sorted({side for side in sides if side}):
        folder = storage.join(out, part)
        chosen = [item for item, side in zip(found, sides, strict=True) if side == part]
        parts[part] = _write_part(folder, chosen, plan, {**protocol, "part": part}, skipped, workers)
    lines = "".join(f"{name}\t{reason}\n" for name, reason in skipped)
    storage.write_atomic(storage.join(out, _SKIPPED_NAME), lines.encode())
    return Prepared(parts, skipped)


def verify(url: str, *, cache: Cache | None = None) -> list[str]:
    """Read a whole set and list what is wrong: sizes, sha256, crc32 of every member, keys that occur twice."""
    cache = cache or Cache()
    index = load_index(url, cache=cache)
    problems: list[str] = []
    hashes: list[tuple[Shard, np.ndarray]] = []
    for shard in tqdm(index.shards, desc="verify", unit="shard", disable=None):
        try:
            opened = OpenShard(shard, cache)
        except ValueError as error:
            problems.append(str(error))
            continue
        path = Path(shard.url) if shard.is_local else cache.fetch(shard.url, shard.sha256)
        if (found := storage.sha256_of(path)) != shard.sha256:
            problems.append(f"shard {shard.url} has sha256 {found[:12]}..., its index says {shard.sha256[:12]}...")
        for sample in range(len(opened)):
            try:
                opened.record(sample)
            except ValueError as error:
                problems.append(str(error))
        keys = (hashlib.blake2b(opened.side.key(i).encode(), digest_size=8).digest() for i in range(len(opened)))
        hashes.append((shard, np.frombuffer(b"".join(keys), dtype="<u8")))
        opened.close()
    values, counts = np.unique(np.concatenate([np.empty(0, "<u8"), *(own for _, own in hashes)]), return_counts=True)
    if len(doubled := values[counts > 1]):
        places = [(shard, int(sample)) for shard, own in hashes for sample in np.flatnonzero(own == doubled[0])]
        (first, sample), (second, _) = places[:2]
        key = OpenShard(first, cache).side.key(sample)
        problems.append(
            f"{len(doubled)} keys occur more than once, such as {key!r} in {first.url} and in {second.url}; "
            "pack one of the samples again under another key"
        )
    return problems


def describe(url: str, *, cache: Cache | None = None, max_samples: int = 10_000) -> dict[str, Any]:
    """What a set holds; captions and classes are counted over its first `max_samples` samples."""
    cache = cache or Cache()
    index = load_index(url, cache=cache)
    texts: collections.Counter[str] = collections.Counter()
    classes: collections.Counter[str] = collections.Counter()
    suffixes: collections.Counter[str] = collections.Counter()
    for record in _records(index, cache, max_samples):
        suffixes.update(name for name in record if name != "__key__")
        try:
            texts.update(captions(caption(record)))
        except ValueError:
            texts["(unreadable)"] += 1
        classes[_class_of(record)] += 1
    return {
        "samples": index.num_samples,
        "shards": len(index.shards),
        "bytes": index.num_bytes,
        "fingerprint": index.fingerprint,
        "domain": index.domain,
        "protocol": dict(index.protocol),
        "members": dict(suffixes.most_common()),
        "classes": dict(classes.most_common(20)),
        "captions": len(texts),
        "most frequent captions": dict(texts.most_common(10)),
    }


def _class_of(record: Record) -> str:
    try:
        return str(json.loads(record.get("json", b"{}")).get("class") or "none")
    except (ValueError, AttributeError, RecursionError):
        return "(unreadable)"


def _write_part(
    folder: str,
    chosen: list[Item],
    plan: Plan,
    protocol: Mapping[str, Any],
    skipped: list[tuple[str, str]],
    workers: int,
) -> ShardIndex:
    def convert(item: Item) -> Record | ValueError:
        try:
            members = plan.source.convert(item.load(), plan.form)
        except ValueError as error:
            return error
        record: Record = {"__key__": item.key, **members}
        if item.captions:
            record["txt"] = "\n".join(item.captions).encode()
        if item.about:
            record["json"] = json.dumps(item.about, ensure_ascii=False).encode()
        return record

    complete = read_index(folder)
    writer = ShardWriter(
        folder, domain=plan.domain, protocol=protocol, shard_bytes=plan.shard_bytes, shard_samples=plan.shard_samples
    )
    todo = [item for item in chosen if item.key not in writer.done]
    if complete is not None:  # only the list of left-out items is made again
        skipped += [(item.name, str(r)) for item, r in _in_order(convert, todo, workers) if isinstance(r, ValueError)]
        return complete
    before = len(skipped)
    if writer.done:
        logger.info("%s: going on after %d samples", folder, len(writer.done))
    try:
        for item, record in tqdm(
            _in_order(convert, todo, workers), total=len(todo), desc=folder, unit=plan.source.noun, disable=None
        ):
            if isinstance(record, ValueError):
                skipped.append((item.name, str(record)))
            else:
                writer.write(record)
        if not writer.done and len(skipped) - before == len(chosen):
            name, reason = skipped[-1]
            raise ValueError(
                f"{folder}: no samples were written, so there is no set: {name} and all others were left out: {reason}"
            )
        return writer.close()
    finally:
        writer.abandon()


def _nameless(item: Item) -> Item:
    """What no shard can name is left out, under a name that messages can hold."""
    reason = "its name is empty, has control characters, __x__ or '..', is not UTF-8, or is too long; rename it"
    key, name, unit, *texts = (ascii(own)[1:-1] for own in (item.key, item.name, item.unit, *item.captions))
    return dataclasses.replace(item, key=key, name=name, unit=unit, captions=tuple(texts), load=Unusable(reason))


def _split(found: list[Item], plan: Plan) -> tuple[str, list[Part | None]]:
    """The kind of split that is used, and a part for every item; None leaves it out."""
    split = plan.split
    if split == "auto":
        if any(p.part for p in found):
            split = "given"
        elif (own := plan.source.splits.get(plan.layout or "")) is not None:
            split = own
        elif all(p.text and p.text != p.about.get("class") for p in found):
            split = "text"
        else:
            split = "fraction"
    if split == "none" or (plan.val_fraction == 0 and plan.val_per_class is None):
        return "none", ["train"] * len(found)
    if split == "given":
        if not all(p.part for p in found):
            raise ValueError("--split given needs every item under train/ and val/ (or test/); use another --split")
        return split, [p.part or "train" for p in found]
    if split == "text" and not all(p.text for p in found):
        raise ValueError("--split text needs a caption for every item; give --metadata or use --split fraction")

    if split == "time":
        return split, _split_time(found, plan)

    unit: dict[str, Callable[[Item], str]] = {
        "text": lambda p: " ".join(p.text.lower().split()),
        "object": lambda p: p.unit,
        "fraction": lambda p: p.key,
    }
    ranks = {name: _rank(name, plan.split_seed) for name in map(unit[split], found)}
    if plan.val_per_class is None:
        held_out = {name for name, rank in ranks.items() if rank < plan.val_fraction}
    else:
        classes: dict[str, set[str]] = collections.defaultdict(set)
        for item in found:
            classes[str(item.about.get("class"))].add(unit[split](item))
        held_out = {n for names in classes.values() for n in sorted(names, key=ranks.__getitem__)[: plan.val_per_class]}
    if not held_out or len(held_out) == len(ranks):
        side, remedy = "train", "lower --val-fraction or --val-per-class"
        if not held_out:
            side, remedy = "val", f"raise --val-fraction {plan.val_fraction} (one of them is {1 / len(ranks):.2g})"
        raise ValueError(f"--split {split} over {len(ranks)} of them leaves {side} empty; {remedy}, or --split none")
    return split, ["val" if unit[split](item) in held_out else "train" for item in found]


def _split_time(found: list[Item], plan: Plan) -> list[Part | None]:
    """The last of each object's items are held out, and the `val_gap` before them left out.

    Where every object has one item, as where each file is a clip of one recording, the items in their order are one.
    """
    units: dict[str, list[int]] = collections.defaultdict(list)
    single = len({item.unit for item in found}) == len(found)
    for number, item in enumerate(found):
        units["" if single else item.unit].append(number)
    sides: list[Part | None] = ["train"] * len(found)
    gap = max(plan.val_gap, plan.source.overlap(plan.form))
    for numbers in units.values():
        held_out = round(len(numbers) * plan.val_fraction)
        for place, number in enumerate(reversed(numbers)):
            if place < held_out + gap and held_out:
                sides[number] = "val" if place < held_out else None
    if "val" not in sides or "train" not in sides:
        side = "train" if "val" in sides else "val"
        raise ValueError(
            f"--split time over {len(found)} of them leaves {side} empty; change --val-fraction {plan.val_fraction} "
            f"(one of them is {1 / len(found):.2g}) or --val-gap {gap}, or --split none"
        )
    return sides


def _rank(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the name, so that a growing set keeps its split."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) / 2**64


def _protocol(plan: Plan, split: str, found: list[Item], sides: list[Part | None]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for item, side in zip(found, sides, strict=True):
        texts = item.text if len(item.captions) <= 1 else item.captions
        digest.update(json.dumps([item.key, item.name, item.size, texts, side]).encode())
    values = dataclasses.asdict(plan) | {"split": split, "source": digest.hexdigest()[:16]}
    if not plan.captions:  # as it was when there were no templates
        del values["captions"]
    return json.loads(json.dumps(values))


def _begin(out: str, protocol: Mapping[str, Any]) -> None:
    """Note what is being made, or refuse a folder in which something else was begun."""
    place = storage.join(out, _PLAN_NAME)
    content = storage.read_bytes(place)
    changed = {} if content is None else config.differences(json.loads(content), protocol)
    if content is not None and not changed:
        return
    names = storage.list_files(out).keys() | {
        f"{part}/{name}" for part in ("train", "val") for name in storage.list_files(storage.join(out, part))
    }
    taken = sorted(name for name in names if name.endswith((".tar", "index.json")))
    if taken and changed:
        path, (old, new) = next(iter(changed.items()))
        raise ValueError(
            f"{out} holds a set made with {path}={old!r}, now {new!r} ({len(changed)} differ: "
            f"{', '.join(changed)}); choose another --out, or remove that folder first"
        )
    if taken:
        raise ValueError(f"{out} already holds {taken[0]}, not made by this command; choose another --out")
    try:
        if storage.is_local(out):
            Path(out).mkdir(parents=True, exist_ok=True)
        storage.write_atomic(place, json.dumps(protocol, indent=1).encode() + b"\n")
    except OSError as error:
        raise storage.explain(error, out) from error


def _in_order(function: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[tuple[A, B]]:
    """`function` of each item, in order, computed by threads a little ahead."""
    with ThreadPoolExecutor(max_workers=workers) as pool:
        pending: collections.deque[tuple[A, Any]] = collections.deque()
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) >= 8 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()


def _records(index: ShardIndex, cache: Cache, limit: int) -> Iterator[Record]:
    for shard in index.shards:
        opened = OpenShard(shard, cache)
        for sample in range(min(len(opened), limit)):
            yield opened.record(sample)
        limit -= len(opened)
        opened.close()
        if limit <= 0:
            return
