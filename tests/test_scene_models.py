"""Both models on tiny scenes: overfitting, gradients, compiling."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from tiny_scenes import make_record
from torch import Tensor

from distributed_inr.domains.domain import Record, Signal, collate
from distributed_inr.domains.scene import Scene
from distributed_inr.field import Field
from distributed_inr.models import D2CVAE, LayersOfExperts
from distributed_inr.models.encoders import PointEncoder
from distributed_inr.models.latent_fitting import AutoDecoding
from distributed_inr.randomness import sample_seed

DOMAIN = Scene(
    size=16,
    cells=16,
    view_size=32,
    num_views=12,
    hold_out_every=4,
    num_points=256,
    samples_per_ray=12,
    render_samples=24,
    fit_rays=128,
)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return make_record(tmp_path_factory.mktemp("raw") / "arms")


def signals(record: Record, count: int = 1) -> Signal:
    return collate([DOMAIN.read(record, sample_seed(0, i)) for i in range(count)])


def fit(module: torch.nn.Module, batch: Signal, steps: int, lr: float, latent: Tensor | None = None) -> list[float]:
    groups: list[dict[str, Any]] = [{"params": list(module.parameters()), "lr": lr}]
    if latent is not None:
        groups.append({"params": [latent], "lr": 1e-2})
    optimiser, losses = torch.optim.AdamW(groups, weight_decay=0.0), []
    for step in range(steps):
        seeds = torch.tensor([sample_seed(step, i) for i in range(len(batch))])
        own = dataclasses.replace(batch, seed=seeds, latent=latent)
        loss = torch.stack(list(module(own).values())).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def error(domain: Scene, field: Field, batch: Signal) -> float:
    with torch.no_grad():
        return float((domain.reproduce(field, batch) - domain.truth(batch)).square().mean())


EXPERTS = LayersOfExperts(
    num_layers=4,
    num_experts=4,
    width=32,
    latent_dim=8,
    num_points=64,
    omega=8.0,
    expert_scale="sqrt",
    fitting=AutoDecoding(encode_steps=3),
)
VAE = D2CVAE(
    encoder=PointEncoder(width=8, num_layers=2, channels=8, multipliers=(1, 2), num_blocks=1),
    latent_channels=4,
    decoder_channels=8,
    decoder_multipliers=(1, 2),
    decoder_blocks=0,
    num_fields=2,
    field_channels=8,
    readout_width=32,
    readout_blocks=2,
    num_points=64,
    kl_weight=0.0,
)


@pytest.mark.slow
def test_layers_of_experts_overfit_a_scene(record: Record):
    torch.manual_seed(0)
    batch, model = signals(record), EXPERTS.build(DOMAIN)
    latent = torch.zeros(1, *model.latent_shape, requires_grad=True)
    before = error(DOMAIN, model.decode(latent), batch)
    fit(model, batch, 100, 5e-3, latent)
    assert error(DOMAIN, model.decode(latent), batch) < 0.3 * before
    encoded = model.encode(batch)
    assert encoded.shape == (1, 4, 8) and encoded.abs().sum() > 0


@pytest.mark.slow
def test_the_d2c_vae_overfits_a_scene(record: Record):
    torch.manual_seed(0)
    batch, model = signals(record), VAE.build(DOMAIN)
    with torch.no_grad():
        before = error(DOMAIN, model.decode(model.encode(batch)), batch)
    fit(model, batch, 100, 5e-3)
    with torch.no_grad():
        assert error(DOMAIN, model.decode(model.encode(batch)), batch) < 0.3 * before


def test_every_parameter_gets_a_gradient_and_two_steps_lower_the_loss_of_three_objects(record: Record):
    batch = signals(record, 3)
    for config in (VAE, EXPERTS):
        torch.manual_seed(0)
        model = config.build(DOMAIN)
        latent = torch.zeros(3, *model.latent_shape, requires_grad=True) if config is EXPERTS else None
        same = fit(model, batch, 1, 0.0, latent)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        fit(model, batch, 2, 2e-3, latent)
        assert fit(model, batch, 1, 0.0, latent)[0] < same[0]


def test_the_density_does_not_depend_on_the_direction(record: Record):
    torch.manual_seed(0)
    model = VAE.build(DOMAIN)
    field = model.decode(torch.randn(1, *model.latent_shape))
    coords = torch.rand(1, 50, 3) * 2 - 1
    views = torch.nn.functional.normalize(torch.randn(2, 1, 50, 3), dim=-1)
    first, second = field(coords, views[0]), field(coords, views[1])
    assert torch.equal(first[..., 0], second[..., 0]) and not torch.equal(first[..., 1:], second[..., 1:])


def test_measuring_can_be_differentiated_twice_by_functions(record: Record):
    torch.manual_seed(0)
    batch, model = signals(record), EXPERTS.build(DOMAIN)
    loss = loss_of(model, batch)
    latent = 0.1 * torch.randn(1, *model.latent_shape)
    slope = torch.func.grad(loss)(latent)
    own = latent.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(own), [own])
    torch.testing.assert_close(slope, expected)
    along = torch.func.grad(lambda h: (torch.func.grad(loss)(h) * slope).sum())(latent)  # the Hessian times the slope
    step = 1e-2 / slope.norm()
    change = (torch.func.grad(loss)(latent + step * slope) - torch.func.grad(loss)(latent - step * slope)) / (2 * step)
    torch.testing.assert_close(along, change, atol=1e-4, rtol=0.05)


def loss_of(model: torch.nn.Module, batch: Signal) -> Callable[[Tensor], Tensor]:
    queries, colours = DOMAIN.supervise(batch, 16)

    def loss(latent: Tensor) -> Tensor:
        return DOMAIN.nll(DOMAIN.observe(model.decode(latent), queries), colours).sum()  # type: ignore[operator]

    return loss


def compare_compiled(folder: Path) -> float:
    """The difference that one compiled graph makes; in a process of its own, because type checks do not compile."""
    torch.manual_seed(0)
    model = EXPERTS.build(DOMAIN)
    loss, latent = loss_of(model, signals(make_record(folder))), 0.1 * torch.randn(1, *model.latent_shape)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    return float((compiled(latent) - loss(latent)).abs())


@pytest.mark.slow
def test_measuring_compiles_as_one_graph(tmp_path: Path):
    (difference,) = run_processes(compare_compiled, 1, tmp_path / "arms")
    assert difference < 1e-6
