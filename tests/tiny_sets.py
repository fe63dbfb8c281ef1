"""Small real shards and pictures for the tests of the data's way."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distributed_inr.data.cache import Cache
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.data.shards import OpenShard, ShardIndex, load_index
from distributed_inr.domains.domain import Record, Signal


def png(seed: int, size: int = 8) -> bytes:
    """A random picture as PNG bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def save_picture(path: Path, seed: int = 0, size: int = 16) -> None:
    """A random picture as a file of the kind that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def records(index: ShardIndex, cache: Cache) -> list[Record]:
    """Every record of a set, in the order of the shards."""
    opened = [OpenShard(shard, cache) for shard in index.shards]
    return [shard.record(i) for shard in opened for i in range(len(shard))]


def by_key(index: ShardIndex) -> dict[str, Record]:
    """Every record of a local set."""
    return {record["__key__"]: record for record in records(index, Cache("/nonexistent", gib=1.0))}


def write_set(folder: Path, count: int, *, shard_samples: int = 7, bad: tuple[int, ...] = ()) -> ShardIndex:
    """Shards of `count` tiny pictures with keys "000".. and captions; `bad` ones hold no picture at all."""
    writer = ShardWriter(folder, domain="image", protocol={"made": "for tests"}, shard_samples=shard_samples)
    for number in range(count):
        content = b"not a picture" if number in bad else png(number)
        writer.write({"__key__": f"{number:03d}", "png": content, "txt": f"caption {number}".encode()})
    writer.close()
    return load_index(str(folder))


def read_tiny(record: Record, seed: int) -> Signal:
    """Decode a tiny picture; OSError and ValueError are the decoder's own."""
    with Image.open(io.BytesIO(record["png"])) as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return Signal(
        key=record["__key__"],
        seed=torch.tensor(seed),
        position=torch.tensor(0),
        inputs=pixels / 255,
        text=record["txt"].decode(),
    )
