"""Checkpoints of one small parameter, written by any number of pretended ranks: the files alone, without an engine."""

import json
from pathlib import Path
from typing import Any

import torch

from distributed_inr.training import checkpoint
from distributed_inr.training.checkpoint import Tensors


def files_of(
    samples: int, *, rank: int = 0, ranks: int = 1, score: float | None = None, columns: int = 5
) -> checkpoint.Files:
    """One rank's files of the checkpoint at `samples`: a parameter "w" [2, columns] that counts up from there."""
    length = 2 * columns
    whole = torch.arange(samples, samples + length, dtype=torch.float32)
    start, stop = rank * length // ranks, (rank + 1) * length // ranks
    metadata = {"format": "2", "fragments": json.dumps({"w": [start, stop - start, [2, columns]]})}
    tensors = {"weight/w": whole[start:stop].clone(), "exp_avg/w": whole[start:stop] / 2}
    files: checkpoint.Files = {f"state-{rank:05d}-of-{ranks:05d}.safetensors": Tensors(tensors, metadata)}
    if rank == 0:
        files["state.json"] = json.dumps({"format": checkpoint.FORMAT, "samples": samples, "score": score})
        files["config.json"] = "{}"
    return files


def write_checkpoint(folder: Path, samples: int, *, keep: int = 10, ranks: int = 2, **contents: Any) -> Path:
    """A committed checkpoint, after which old ones are purged."""
    path = folder / f"{samples:012d}"
    written = [checkpoint.write(str(path), files_of(samples, rank=r, ranks=ranks, **contents)) for r in range(ranks)]
    checkpoint.commit(str(path), written)
    checkpoint.purge(str(path), keep=keep)
    return path
