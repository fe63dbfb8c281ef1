"""Preparing a set: raw pictures -> train and val shards; verifying and describing finished sets."""

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
from distributed_inr.data import pictures, storage
from distributed_inr.data.cache import Cache
from distributed_inr.data.layouts import LAYOUTS, Part, Picture, select
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.data.shards import OpenShard, Shard, ShardIndex, load_index, read_index
from distributed_inr.domains.domain import Record, caption

logger = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

Split = Literal["auto", "given", "text", "object", "fraction", "none"]

_PLAN_NAME = "prepare.json"
_SKIPPED_NAME = "skipped.txt"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to make of a source of pictures; recorded with the set.

    Attributes:
        only: keep pictures whose field (class, text, object, or any of the metadata) has one of these values.
        split: given takes the layout's own train and val; text and object keep equal captions, or an object's pictures,
            on one side; fraction splits single pictures; none makes one part; auto takes given if the layout has it,
            object for views, text where there are captions, else fraction.
        val_fraction: held-out fraction of captions, objects or pictures, chosen by hash.
        val_per_class: instead, this many of each class.
        split_seed: another number holds out others.
    """

    layout: str = "folder"
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    split: Split = "auto"
    val_fraction: float = 0.05
    val_per_class: int | None = None
    split_seed: int = 0
    shape: pictures.Shape = field(default_factory=pictures.Shape)
    shard_bytes: int = 256 * 2**20
    shard_samples: int = 10_000

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"--layout {self.layout} is unknown; choose one of {', '.join(LAYOUTS)}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction} must lie in [0, 1); try 0.05")
        if self.shape.size is not None and self.shape.size < 1:
            raise ValueError(f"--size {self.shape.size} must be at least 1 pixel")


@dataclass(frozen=True)
class Prepared:
    """The finished sets by part, and the pictures left out with the reasons."""

    parts: dict[str, ShardIndex]
    skipped: list[tuple[str, str]]


def prepare_images(source: Path, out: str, plan: Plan, *, metadata: Path | None = None, workers: int = 2) -> Prepared:
    """Write `out`/train and `out`/val. Run again after an interruption it goes on, and ends with the same bytes."""
    source = source.absolute()
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give the folder that holds the pictures")
    found = select(LAYOUTS[plan.layout](source, metadata), plan.only)
    if not found:
        wanted = " ".join(f"--only {name}={','.join(values)}" for name, values in plan.only.items())
        raise ValueError(
            f"{source}: no pictures for --layout {plan.layout} {wanted}".rstrip()
            + f"; check the path, the layout and the filters (files: {' '.join(pictures.FILE_SUFFIXES)})"
        )
    names: dict[str, str] = {}
    for picture in found:
        if picture.key in names:
            raise ValueError(f"{source}: {names[picture.key]} and {picture.name} would have one key; rename one")
        names[picture.key] = picture.name
    split, sides = _split(found, plan)
    protocol = _protocol(plan, split, found, sides)
    _begin(out, protocol)

    parts: dict[str, ShardIndex] = {}
    skipped: list[tuple[str, str]] = []
    for part in sorted(set(sides)):
        folder = storage.join(out, part)
        chosen = [picture for picture, side in zip(found, sides, strict=True) if side == part]
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
            texts[caption(record)] += 1
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
    chosen: list[Picture],
    plan: Plan,
    protocol: Mapping[str, Any],
    skipped: list[tuple[str, str]],
    workers: int,
) -> ShardIndex:
    def convert(picture: Picture) -> Record | ValueError:
        try:
            suffix, content = pictures.encode(picture.load(), plan.shape)
        except ValueError as error:
            return error
        record: Record = {"__key__": picture.key, suffix: content}
        if picture.text:
            record["txt"] = picture.text.encode()
        if picture.about:
            record["json"] = json.dumps(picture.about, ensure_ascii=False).encode()
        return record

    complete = read_index(folder)
    writer = ShardWriter(
        folder, domain="image", protocol=protocol, shard_bytes=plan.shard_bytes, shard_samples=plan.shard_samples
    )
    todo = [picture for picture in chosen if picture.key not in writer.done]
    if complete is not None:  # only the list of left-out pictures is made again
        skipped += [(p.name, str(r)) for p, r in _in_order(convert, todo, workers) if isinstance(r, ValueError)]
        return complete
    before = len(skipped)
    if writer.done:
        logger.info("%s: going on after %d samples", folder, len(writer.done))
    try:
        for picture, record in tqdm(
            _in_order(convert, todo, workers), total=len(todo), desc=folder, unit="picture", disable=None
        ):
            if isinstance(record, ValueError):
                skipped.append((picture.name, str(record)))
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


def _split(found: list[Picture], plan: Plan) -> tuple[str, list[Part]]:
    """The kind of split that is used, and a part for every picture."""
    split = plan.split
    if split == "auto":
        if any(p.part for p in found):
            split = "given"
        elif plan.layout == "views":
            split = "object"
        elif plan.layout == "folder" and all(p.text and p.text != p.about.get("class") for p in found):
            split = "text"
        else:
            split = "fraction"
    if split == "none" or (plan.val_fraction == 0 and plan.val_per_class is None):
        return "none", ["train"] * len(found)
    if split == "given":
        if not all(p.part for p in found):
            raise ValueError("--split given needs every picture under train/ and val/ (or test/); use another --split")
        return split, [p.part or "train" for p in found]
    if split == "text" and not all(p.text for p in found):
        raise ValueError("--split text needs a caption for every picture; give --metadata or use --split fraction")

    unit: dict[str, Callable[[Picture], str]] = {
        "text": lambda p: " ".join(p.text.lower().split()),
        "object": lambda p: p.unit,
        "fraction": lambda p: p.key,
    }
    ranks = {name: _rank(name, plan.split_seed) for name in map(unit[split], found)}
    if plan.val_per_class is None:
        held_out = {name for name, rank in ranks.items() if rank < plan.val_fraction}
    else:
        classes: dict[str, set[str]] = collections.defaultdict(set)
        for picture in found:
            classes[str(picture.about.get("class"))].add(unit[split](picture))
        held_out = {n for names in classes.values() for n in sorted(names, key=ranks.__getitem__)[: plan.val_per_class]}
    if not held_out or len(held_out) == len(ranks):
        side = "val" if not held_out else "train"
        raise ValueError(
            f"--split {split} over {len(ranks)} of them leaves {side} empty; change --val-fraction {plan.val_fraction} "
            "or use --val-per-class or --split none"
        )
    return split, ["val" if unit[split](picture) in held_out else "train" for picture in found]


def _rank(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the name, so that a growing set keeps its split."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) / 2**64


def _protocol(plan: Plan, split: str, found: list[Picture], sides: list[Part]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for picture, side in zip(found, sides, strict=True):
        digest.update(json.dumps([picture.key, picture.name, picture.size, picture.text, side]).encode())
    values = dataclasses.asdict(plan) | {"split": split, "source": digest.hexdigest()[:16]}
    return json.loads(json.dumps(values))


def _begin(out: str, protocol: Mapping[str, Any]) -> None:
    """Note what is being made, or refuse a folder in which something else was begun."""
    place = storage.join(out, _PLAN_NAME)
    content = storage.read_bytes(place)
    if content is not None:
        changed = config.differences(json.loads(content), protocol)
        if changed:
            path, (old, new) = next(iter(changed.items()))
            raise ValueError(
                f"{out} holds a set made with {path}={old!r}, now {new!r} ({len(changed)} differ: "
                f"{', '.join(changed)}); choose another --out, or remove that folder first"
            )
        return
    names = storage.list_files(out).keys() | {
        f"{part}/{name}" for part in ("train", "val") for name in storage.list_files(storage.join(out, part))
    }
    if taken := sorted(name for name in names if name.endswith((".tar", "index.json"))):
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
