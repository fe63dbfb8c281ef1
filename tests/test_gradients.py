"""The D2C-VAE's gradient, encoder included, does not depend on how a batch is split over processes and passes."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from processes import run_processes, whole
from test_engine import ENGINES, shares
from torch import Tensor, nn

from distributed_inr.domains.domain import Signal, collate
from distributed_inr.domains.image import Image
from distributed_inr.models.d2c_vae import D2CVAE
from distributed_inr.models.encoders import PixelEncoder
from distributed_inr.randomness import sample_seed
from distributed_inr.training.engine import Optim, Scale, build_engine

BATCH = 16
DOMAIN = Image(size=16, source_size=32)
AUTOENCODER = D2CVAE(
    encoder=PixelEncoder(channels=16, multipliers=(1, 2), num_blocks=1),
    latent_channels=2,
    decoder_channels=16,
    decoder_multipliers=(1, 2),
    decoder_blocks=0,
    num_fields=2,
    field_channels=8,
    readout_width=16,
    readout_blocks=2,
    num_points=64,
    kl_weight=0.1,
)


def make_module(dtype: torch.dtype) -> nn.Module:
    """A D2C-VAE whose every parameter gets a gradient: some layers start at zero and would pass none on."""
    torch.manual_seed(0)
    module = AUTOENCODER.build(DOMAIN)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return module.to(dtype)


def make_batch(positions: range, dtype: torch.dtype) -> Signal:
    signals = []
    for position in positions:
        rng = np.random.default_rng(position)
        small = Picture.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        png = io.BytesIO()
        small.resize((32, 32), Picture.Resampling.BICUBIC).save(png, "png")
        signals.append(DOMAIN.read({"__key__": f"picture-{position}", "png": png.getvalue()}, sample_seed(0, position)))
    seeds = torch.tensor([sample_seed(0, position) for position in positions])
    batch = collate(signals).map(lambda t: t.to(dtype) if t.is_floating_point() else t)
    return Signal(**{**batch.__dict__, "seed": seeds, "position": torch.tensor(list(positions))})


def plain_gradient(dtype: torch.dtype) -> dict[str, Tensor]:
    module = make_module(dtype)
    sum(module(make_batch(range(BATCH), dtype)).values()).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def engine_gradient(scale: Scale, micro: int, dtype: torch.dtype, *, unwrapped: bool) -> dict[str, Tensor]:
    """What the optimizer was given: after one step from nothing, AdamW's first moment is a tenth of the gradient."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine = build_engine(
        make_module(dtype),
        scale=scale,
        optim=Optim(max_grad_norm=None, betas=(0.9, 0.999)),
        micro_batch_size=micro,
        num_micro_batches=BATCH // world // micro,
    )
    forward = engine.unwrap() if unwrapped else engine.forward
    for positions in shares(0, rank, world, micro=micro, batch=BATCH):
        batch = make_batch(positions, dtype)
        engine.step(forward(batch), keys=batch.key, lr=1e-3)
    fragments = engine.state()
    first_moments = [type(f)(f.name, f.shape, f.offset, f.moments["exp_avg"] / (1 - 0.9)) for f in fragments]
    return whole(first_moments)


def difference(found: dict[str, Tensor], expected: dict[str, Tensor], part: str) -> float:
    """Norm of the difference over the norm, of the parameters whose names start with `part`."""
    names = [name for name in expected if name.startswith(part)]
    assert names and found.keys() == expected.keys()
    error = sum((found[name] - expected[name]).double().square().sum() for name in names)
    return float((error / sum(expected[name].double().square().sum() for name in names)).sqrt())


def measure(
    cases: list[tuple[str, int, torch.dtype]], unwrapped: bool = False, recompute: bool = False
) -> list[dict[str, float]]:
    references = {dtype: plain_gradient(dtype) for dtype in (torch.float32, torch.float64)}
    results = []
    for name, micro, dtype in cases:
        scale = replace(ENGINES[name], activation_checkpointing=recompute)
        found = engine_gradient(scale, micro, dtype, unwrapped=unwrapped)
        if torch.distributed.get_rank() == 0:
            parts = ("", "encoder", "decoder", "readout")
            results.append({part: difference(found, references[dtype], part) for part in parts})
    return results


SINGLE = [(name, micro, torch.float32) for name in ("deepspeed-1", "accelerate") for micro in (16, 8, 4)]
SINGLE += [("accelerate", micro, torch.float64) for micro in (16, 8, 4)]
DOUBLE = [(name, micro, torch.float32) for name in ENGINES for micro in (8, 4)]
DOUBLE += [("accelerate", micro, torch.float64) for micro in (8, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "cases"), [(1, SINGLE), (2, DOUBLE)])
def test_gradient_does_not_depend_on_how_the_batch_is_split(world, cases):
    results = run_processes(measure, world, cases)[0]
    for (name, micro, dtype), errors in zip(cases, results, strict=True):
        limit = 1e-5 if dtype == torch.float32 else 1e-10
        assert max(errors.values()) <= limit, (name, micro, dtype, errors)


@pytest.mark.slow
def test_calling_the_module_past_its_engine_gives_another_gradient():
    """The mistake that the tests above are for: the other rank's samples are lost."""
    (errors,) = run_processes(measure, 2, [("accelerate", 8, torch.float32)], True)[0]
    assert min(errors.values()) > 0.01


@pytest.mark.slow
def test_recomputing_activations_gives_the_same_gradient():
    cases = [(name, 4, torch.float32) for name in ("deepspeed-1", "deepspeed-3", "accelerate")]
    for errors in run_processes(measure, 2, cases, False, True)[0]:
        assert max(errors.values()) <= 1e-5


def test_losses_of_a_sample_do_not_depend_on_its_batch():
    module = make_module(torch.float32)
    whole = module(make_batch(range(BATCH), torch.float32))
    parts = [module(make_batch(range(i, i + 4), torch.float32)) for i in range(0, BATCH, 4)]
    for name, loss in whole.items():
        assert loss.item() == pytest.approx(sum(part[name].item() for part in parts) / 4, rel=1e-5)
