"""How long a checkpoint holds training up: written while training goes on, against written while training waits.

python benchmarks/checkpoint.py [--megabytes 1000] [--rounds 5]

One process, a state of that size: weights, two moments and the running average in float32. The goal is at most 10 %.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distributed_inr.allocator import keep_freed_memory
from distributed_inr.domains.domain import Signal
from distributed_inr.training.checkpoint import Writer
from distributed_inr.training.engine import Optim, Scale, build_engine


class Wide(nn.Module):
    """Layers of a megabyte each."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(megabytes))

    def forward(self, batch: Signal) -> dict[str, Tensor]:
        hidden = batch.inputs
        for layer in self.layers:
            hidden = hidden + 0.01 * layer(hidden)
        return {"error": hidden.square().mean()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the state (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="checkpoints of each kind (default: 5)")
    given = parser.parse_args()
    keep_freed_memory()
    module = Wide(given.megabytes // 4)
    engine = build_engine(
        module, scale=Scale(engine="accelerate"), optim=Optim(), micro_batch_size=64, num_micro_batches=1
    )
    batch = Signal(
        key=["a"], seed=torch.zeros(1, dtype=torch.int64), position=torch.zeros(1, dtype=torch.int64),
        inputs=torch.randn(64, 512),
    )  # fmt: skip
    averages = [dataclasses.replace(f, weight=f.weight.clone(), moments={}) for f in engine.state()]

    stalls: list[float] = []  # of the checkpoint that is being written

    def step(wait: Callable[[], None] = lambda: None) -> float:
        def wait_and_time() -> None:
            begin = time.perf_counter()
            wait()
            stalls.append(time.perf_counter() - begin)

        begin = time.perf_counter()
        engine.step(engine.forward(batch), keys=batch.key, lr=1e-4, before_update=wait_and_time)
        return time.perf_counter() - begin

    steps = [step() for _ in range(10)][2:]
    waited, held, beside = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(folder, keep=1)
        for number in range(2 * given.rounds):
            begin = time.perf_counter()
            writer.begin(engine, averages=averages, config_json="{}", state={"samples": number})
            if number % 2 == 0:
                writer.commit(needed=True)
                waited.append(time.perf_counter() - begin)
                continue
            stalls = [time.perf_counter() - begin]
            while not writer.has_written:
                beside.append(step(writer.wait_for_copy))
            begin = time.perf_counter()
            writer.commit(needed=True)
            held.append(sum(stalls) + time.perf_counter() - begin)
        writer.close()
    waited, held = waited[1:], held  # the first one makes the buffers
    sync, asynchronous = statistics.median(waited), statistics.median(held)
    print(f"waiting for the disk: {sync:.2f} s; beside training: {asynchronous:.3f} s, {asynchronous / sync:.1%} of it")
    ratio = statistics.median(beside) / statistics.median(steps)
    print(f"a step beside the writing takes {ratio:.2f} of one alone ({statistics.median(steps):.3f} s)")


if __name__ == "__main__":
    main()
