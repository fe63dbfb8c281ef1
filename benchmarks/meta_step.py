"""How fast an outer step of meta-learning is: losses and gradients through three inner steps, on one thread.

python benchmarks/meta_step.py [--rounds 5]

Against the plain form, which multiplies every expert by its gate for each signal (an array of signals x experts x
weights) and differentiates through the inner loop with `torch.autograd.grad(create_graph=True)`. Ours mixes by one
matrix product a layer, eager and compiled. Two sizes: mNIF-S (6 layers, 256 experts, width 64, one latent of 1024,
learned rates, batch 4) and CHINR's CelebA-HQ (7, 384, 128, 128; batch 2), both on 64 x 64 pixels in float32.
Operations are counted by torch; a matrix product's rate is measured in the same rounds. Peak memory is of a process of
its own that makes two steps, less what it takes before the first; where it compiles, that counts too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distributed_inr.domains import Image, Signal
from distributed_inr.models.latent_fitting import MetaLearning
from distributed_inr.models.layers_of_experts import ExpertLayer, LayersOfExperts, LayersOfExpertsModel

DOMAIN = Image(size=64, source_size=64, scales=(1.0,), scale_weights=(1.0,), flip=False)
SIZES = {
    "mNIF-S": (
        LayersOfExperts(
            num_layers=6,
            num_experts=256,
            width=64,
            latent_dim=1024,
            modulation="flat",
            fitting=MetaLearning(rates="learned"),
        ),
        4,
    ),
    "CelebA-HQ": (LayersOfExperts(num_layers=7, num_experts=384, width=128, latent_dim=128), 2),
}
FORMS = ("broadcast", "eager", "compiled")

Step = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each times every row once (default: 5)")
    parser.add_argument("--memory", nargs=2, metavar=("SIZE", "FORM"), help="print one row's peak memory in bytes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory is not None:
        print(json.dumps(peak_memory(*given.memory)))
        return
    a, b = torch.randn(2, 2048, 2048)
    for size in SIZES:
        steps = {form: make_step(size, form) for form in FORMS}
        with FlopCounterMode(display=False) as counter:
            steps["eager"]()
        losses = {form: step().item() for form, step in steps.items()}  # warm-up; compiles
        assert max(losses.values()) - min(losses.values()) < 1e-5, losses
        times: dict[str, list[float]] = {form: [] for form in (*FORMS, "product")}
        for _ in range(given.rounds):
            times["product"].append(timed(lambda: a @ b))
            for form, step in steps.items():
                times[form].append(timed(step))
        medians = {form: statistics.median(values) for form, values in times.items()}
        peak = 2.0 * 2048**3 / medians["product"] / 1e9
        operations = counter.get_total_flops() / 1e9
        print(f"{size}, one thread, torch {torch.__version__}, medians of {given.rounds} rounds")
        print(f"  {operations:.1f} GFLOP a step (one matrix product a layer); matrix products reach {peak:.0f} GFLOP/s")
        print(f"  {'':12}{'ms':>9}{'times as fast':>16}{'GFLOP/s':>10}{'of peak':>9}{'peak MiB':>10}")
        for form in FORMS:
            rate = operations / medians[form]
            ours = f"{rate:10.0f}{rate / peak:9.0%}" if form != "broadcast" else f"{'':19}"  # it makes more operations
            print(
                f"  {form:12}{medians[form] * 1e3:9.0f}{medians['broadcast'] / medians[form]:16.2f}{ours}"
                f"{memory_of(size, form) / 2**20:10.0f}"
            )


def make_step(size: str, form: str) -> Step:
    config, batch = SIZES[size]
    torch.manual_seed(0)
    model = config.build(DOMAIN)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, 64, 64), generator=generator, dtype=torch.uint8)
    signal = Signal(
        key=[str(i) for i in range(batch)],
        seed=torch.arange(batch),
        position=torch.zeros(batch, dtype=torch.int64),
        inputs=pixels / 127.5 - 1,
        targets=pixels,
        text=[""] * batch,
    )
    if form == "compiled":
        model.compile()

    def step() -> Tensor:
        model.zero_grad()
        loss = broadcast_loss(model, signal) if form == "broadcast" else model(signal)["reconstruction"]
        loss.backward()
        return loss.detach()

    return step


def broadcast_loss(model: LayersOfExpertsModel, signal: Signal) -> Tensor:
    """The plain form of the same loss."""
    queries, values = model.domain.measurements(signal)
    fitting = model.cfg.fitting
    assert isinstance(fitting, MetaLearning)
    rates = fitting.rate if model.rates is None else model.rates.clamp(0, 1)

    def error(latent: Tensor) -> Tensor:
        hidden = queries.coords
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, ExpertLayer)
            gates = layer.gate(latent[:, index if latent.shape[1] > 1 else 0])
            mixed = (gates[:, :, None] * layer.experts[None]).sum(1).unflatten(1, layer.shape)
            hidden = hidden @ mixed[:, :-1] + mixed[:, -1:]
            if index + 1 < len(model.layers):
                hidden = torch.sin(model.cfg.omega * hidden)
        return model.domain.nll(hidden, values)

    latent = torch.zeros(len(signal), *model.latent_shape, requires_grad=True)
    for _ in range(fitting.steps):
        (gradient,) = torch.autograd.grad(error(latent).sum(), latent, create_graph=True)
        latent = latent - rates * gradient
    return error(latent).mean()


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def memory_of(size: str, form: str) -> int:
    done = subprocess.run(
        [sys.executable, __file__, "--memory", size, form], capture_output=True, text=True, check=True
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def peak_memory(size: str, form: str) -> int:
    step = make_step(size, form)
    before = kibibytes("VmRSS")
    step()
    step()
    return (kibibytes("VmHWM") - before) * 1024


def kibibytes(name: str) -> int:
    """Of this process: VmRSS, its memory, or VmHWM, the most that it was (getrusage's counts the parent's too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
