"""How much of a bare decode loop's speed the loader keeps: the same pictures, in one process, in turns.

    python benchmarks/loader.py [--data examples/data/furniture/train] [--repeats 7]

"bare" iterates the tars with tarfile and decodes each picture with Pillow to a tensor; "loader" gives the same pictures
as collated batches in the run's shuffled order, checked by crc32. Both are also timed with the image domain's `read`.
"""

import argparse
import io
import statistics
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PillowImage

from distributed_inr.data.reader import Data, Read, training_stream
from distributed_inr.data.shards import load_index
from distributed_inr.domains import Image, Signal
from distributed_inr.domains.domain import Record

SUFFIXES = ("png", "jpg", "webp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = Path(__file__).resolve().parents[1] / "examples" / "data" / "furniture" / "train"
    parser.add_argument("--data", default=str(bundled), help="a local set of shards")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each, of which the median counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    domain, samples = Image(), load_index(arguments.data).num_samples
    for name, read in (("decode only", decode_only), ("image domain's read", domain.read)):
        runs: dict[str, Callable[[], None]] = {
            "bare": lambda read=read: bare(arguments.data, read),
            "loader": lambda read=read: loader(arguments.data, read),
        }
        speeds: dict[str, list[float]] = {kind: [] for kind in runs}
        for _ in range(arguments.repeats):
            for kind, run in runs.items():
                start = time.process_time()
                run()
                speeds[kind].append(samples / (time.process_time() - start))
        bare_speed, loader_speed = (statistics.median(speeds[kind]) for kind in ("bare", "loader"))
        print(
            f"{name:20s}  bare {bare_speed:7.0f}/s  loader {loader_speed:7.0f}/s  ratio {loader_speed / bare_speed:.3f}"
        )


def decode_only(record: Record, seed: int) -> Signal:
    suffix = next(s for s in SUFFIXES if s in record)
    with PillowImage.open(io.BytesIO(record[suffix])) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return Signal(key=record["__key__"], seed=torch.tensor(seed), position=torch.tensor(0), inputs=pixels)


def bare(folder: str, read: Read) -> None:
    """One pass over the tars, as short as it can be written."""
    for shard in load_index(folder).shards:
        record: Record = {}
        with tarfile.open(shard.url) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                record = (
                    {**record, suffix: file.read()}
                    if record.get("__key__") == key
                    else {"__key__": key, suffix: file.read()}
                )
                if suffix in SUFFIXES:
                    read(record, 0)


def loader(folder: str, read: Read) -> None:
    """One epoch in batches of 32 or less that divide it."""
    data = Data(train=folder)
    dataset = data.dataset(load_index(folder), read=read, seed=0)
    batch = max(size for size in range(1, 33) if len(dataset) % size == 0)
    stream = training_stream(dataset, start=0, global_batch=batch, micro_batch=batch)
    for _ in range(len(dataset) // batch):
        next(stream)


if __name__ == "__main__":
    main()
