"""What the loop, DeepSpeed and Ray add to a bare PyTorch loop: step times, rung by rung, in turns on one machine.

    python benchmarks/overhead.py [--steps 40] [--rounds 3] [--batch-size 12] [--workers 2]

Every rung trains the quick start's autoencoder on the same samples with the same number of processes and threads:

    bare        DistributedDataParallel, AdamW and clipping around the reader's stream
    + loop      `train` with the Accelerate engine: metrics, finite checks, running average, asking whether to stop
    + deepspeed `train` with DeepSpeed, ZeRO stage 1
    + ray       the same in Ray Train's workers, with progress and reports

The goal is at most 5 % for the last over the first, at steps of about 100 ms.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distributed_inr.allocator import keep_freed_memory
from distributed_inr.config import override, to_json
from distributed_inr.data.reader import ShardDataset, training_stream
from distributed_inr.experiment import Experiment
from distributed_inr.launch import Worker, launcher
from distributed_inr.presets.ddmi import PRESETS
from distributed_inr.training.engine import Scale
from distributed_inr.training.loop import train

WARMUP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=40, help=f"steps timed of each rung and round, after {WARMUP} more"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that all rungs are measured, in turns")
    parser.add_argument("--batch-size", type=int, default=12, help="samples a step, for steps of about 100 ms")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    given = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # every rung on the CPU
    samples = (WARMUP + given.steps) * given.batch_size
    training = {"num_samples": samples, "batch_size": given.batch_size, "log_every_samples": 10 * samples}
    changes = {f"autoencoder_training.{name}": value for name, value in training.items()}
    experiment = override(PRESETS["furniture-image"](), changes | {"scale.num_workers": given.workers})

    times: dict[str, list[float]] = defaultdict(list)
    with launcher(experiment.scale) as place:
        for turn in range(given.rounds):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                mp.spawn(spawned, (given.workers, experiment, folder), nprocs=given.workers)
                work = functools.partial(measure, experiment=experiment, folder=folder, rungs=["+ ray"])
                place.run(work, title=f"round {turn + 1}", folder=folder)
                for path in folder.glob("*.json"):
                    times[path.stem] += json.loads(path.read_text())

    print(
        f"{given.workers} processes, batches of {given.batch_size}, {given.rounds} x {given.steps} steps, torch "
        f"{torch.__version__}"
    )
    bare = statistics.median(times["bare"])
    for rung in RUNGS:
        median, spread = statistics.median(times[rung]), statistics.quantiles(times[rung], n=4)
        print(
            f"{rung:12} {1e3 * median:8.1f} ms a step (quartiles {1e3 * spread[0]:.1f} to {1e3 * spread[2]:.1f})  "
            f"{median / bare:6.3f} of bare"
        )


def spawned(rank: int, world: int, experiment: Experiment, folder: Path) -> None:
    """A process as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    threads = max(1, (os.cpu_count() or 1) // world)
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": str(threads)}
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the launcher does: not the difference that is asked for
    warnings.simplefilter("ignore")
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    worker = Worker(rank, world, lambda metrics: None, lambda *state: None, lambda: False)
    measure(worker, experiment=experiment, folder=folder, rungs=["bare", "+ loop", "+ deepspeed"])
    dist.barrier()
    dist.destroy_process_group()


def measure(worker: Worker, *, experiment: Experiment, folder: Path, rungs: list[str]) -> None:
    for rung in rungs:
        torch.manual_seed(experiment.seed)
        module = experiment.autoencoder.build(experiment.domain)
        dataset = experiment.dataset(experiment.data.index(experiment.data.train))
        ends: list[float] = []

        def stop(ends: list[float] = ends) -> bool:  # asked in every step
            ends.append(time.perf_counter())
            return worker.stop()

        RUNGS[rung](module, dataset, worker, experiment, folder / rung.strip("+ "), stop)
        if worker.rank == 0:
            steps = [after - before for before, after in zip(ends, ends[1:], strict=False)]
            (folder / f"{rung}.json").write_text(json.dumps(steps[WARMUP - 1 :]))


def bare(
    module: torch.nn.Module,
    dataset: ShardDataset,
    worker: Worker,
    experiment: Experiment,
    folder: Path,
    stop: Callable[[], bool],
) -> None:
    training = experiment.autoencoder_training
    wrapped = torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    adamw = torch.optim.AdamW(wrapped.parameters(), lr=training.optim.lr, fused=True)
    share = training.batch_size // worker.world
    stream = training_stream(
        dataset, start=0, global_batch=training.batch_size, micro_batch=share, rank=worker.rank, world=worker.world
    )
    for _ in range(training.num_samples // training.batch_size):
        torch.stack(list(wrapped(next(stream)).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        stop()


def looped(
    module: torch.nn.Module,
    dataset: ShardDataset,
    worker: Worker,
    experiment: Experiment,
    folder: Path,
    stop: Callable[[], bool],
    *,
    scale: Scale,
) -> None:
    train(
        module,
        dataset,
        training=experiment.autoencoder_training,
        scale=scale,
        seed=experiment.seed,
        folder=folder,
        config_json=to_json(experiment),
        report=worker.report,
        progress=worker.progress,
        stop=stop,
    )


RUNGS = {
    "bare": bare,
    "+ loop": functools.partial(looped, scale=Scale(engine="accelerate")),
    "+ deepspeed": functools.partial(looped, scale=Scale(zero_stage=1)),
    "+ ray": functools.partial(looped, scale=Scale(zero_stage=1)),
}


if __name__ == "__main__":
    main()
