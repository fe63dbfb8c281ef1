"""How close a training step comes to the machine's rate: the D2C-VAE of the AFHQ preset, and on a GPU its U-Net too.

python benchmarks/model_step.py [--rounds 5]

On a CPU: pictures of 64 x 64 pixels, batch 4, float32; eager and compiled, channels-last or not. On a GPU: 256 pixels,
bfloat16. The step's operations are counted by torch; the rates of a matrix product and of 3x3 convolutions (forward and
backward) are measured in the same rounds, so the ratio holds when the clock drifts.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distributed_inr.domains import Image, Signal
from distributed_inr.models.d2c_vae import D2CVAE
from distributed_inr.presets.ddmi import afhqv2_cat_256

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each times every row once (default: 5)")
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    rows = {"matrix product": matrix_product()} | {f"convolution {c} -> {c}": convolution(c) for c in (128, 256, 512)}
    size, batch = (256, 8) if GPU else (64, 4)
    for channels_last in (False, True):
        for compiled in (False, True):
            name = f"D2C-VAE {size} px, batch {batch}, {'compiled' if compiled else 'eager'}"
            rows[name + (", channels-last" if channels_last else "")] = autoencoder_step(
                size, batch, channels_last, compiled
            )
    if GPU:
        rows["U-Net 519 M, 64 x 64 x 64, batch 8"] = denoiser_step(8)

    times: dict[str, list[float]] = {name: [] for name in rows}
    for step, _ in rows.values():  # warm-up: kernels are chosen and compiled
        step()
        step()
    for _ in range(rounds):
        for name, (step, _) in rows.items():
            times[name].append(timed(step))
    rates = {name: operations / statistics.median(times[name]) / 1e9 for name, (_, operations) in rows.items()}
    peak = max(rate for name, rate in rates.items() if name.startswith("convolution"))
    print(f"{DEVICE.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of {rounds} rounds")
    print(f"{'':52}{'GFLOP':>9}{'ms':>9}{'GFLOP/s':>9}{'of convolution':>16}{'of matrix':>11}")
    for name, (_, operations) in rows.items():
        shares = f"{rates[name] / peak:15.0%}{rates[name] / rates['matrix product']:11.0%}"
        print(f"{name:52}{operations / 1e9:9.1f}{statistics.median(times[name]) * 1e3:9.1f}{rates[name]:9.0f} {shares}")
    if GPU:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


Row = tuple[Callable[[], object], float]


def timed(step: Callable[[], object]) -> float:
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_product() -> Row:
    size, dtype = (8192, torch.bfloat16) if GPU else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * size**3


def convolution(channels: int) -> Row:
    """Forward and backward of one 3x3 convolution, channels-last, on as many cells as the model gives that width."""
    side, batch = (8192 // channels, 4) if not GPU else (32768 // channels, 8)
    layer = nn.Conv2d(channels, channels, 3, padding=1).to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(batch, channels, side, side, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            out = layer(x)
        out.backward(out.detach())

    return step, 3.0 * 2 * batch * side**2 * channels**2 * 9


def autoencoder_step(size: int, batch: int, channels_last: bool, compiled: bool) -> Row:
    preset = afhqv2_cat_256()
    config = D2CVAE(encoder=preset.autoencoder.encoder, num_points=size * size)
    model = config.build(Image(size=size, source_size=size, likelihood="laplace")).to(DEVICE)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    signal = Signal(
        key=[str(i) for i in range(batch)],
        seed=torch.arange(batch),
        position=torch.zeros(batch, dtype=torch.int64),
        inputs=torch.rand(batch, 3, size, size) * 2 - 1,
        targets=torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8),
        text=[""] * batch,
    ).to(DEVICE)
    return training_step(model, signal, compiled)


def denoiser_step(batch: int) -> Row:
    model = afhqv2_cat_256().prior.build((64, 64, 64)).to(DEVICE)
    signal = Signal(
        key=[str(i) for i in range(batch)],
        seed=torch.arange(batch),
        position=torch.zeros(batch, dtype=torch.int64),
        inputs=torch.randn(batch, 2, 64, 64, 64),
        text=[""] * batch,
    ).to(DEVICE)
    return training_step(model, signal, False)


def training_step(model: nn.Module, signal: Signal, compiled: bool) -> Row:
    """Losses and gradients (the optimizer is left out: it is another kernel, bound by memory)."""
    with FlopCounterMode(display=False) as counter:
        sum(model(signal).values()).backward()  # type: ignore[union-attr]
    model.zero_grad()
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            loss = sum(forward(signal).values())
        loss.backward()  # type: ignore[union-attr]

    return step, float(counter.get_total_flops())


if __name__ == "__main__":
    main()
