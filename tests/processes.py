"""Real worker processes for tests: gloo on the CPU, one thread each, results through files."""

import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from distributed_inr.training.fragments import Fragment, gather_objects


def run_processes(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call `function(*args)` in `world` new processes that form a process group; returns each rank's result."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (world, folder, function, args), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _work(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = f"file://{folder}/store"  # a port found free could be another's a moment later
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def whole(fragments: Sequence[Fragment]) -> dict[str, Tensor]:
    """Whole parameters by name, put together from the fragments of all ranks."""
    found = {f.name: torch.full((math.prod(f.shape),), math.nan, dtype=f.weight.dtype) for f in fragments}
    for parts in gather_objects([(f.name, f.offset, f.weight) for f in fragments]):
        for name, offset, weight in parts:
            found[name][offset : offset + weight.numel()] = weight
    return {f.name: found[f.name].view(f.shape) for f in fragments}
