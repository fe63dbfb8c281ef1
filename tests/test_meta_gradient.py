"""The gradient of meta-learning: against finite differences, an implementation by hand, a compiled one, and engines."""

import dataclasses
import logging
import shutil

import pytest
import torch
from processes import run_processes, whole
from test_engine import ENGINES, shares
from test_gradients import difference
from torch import Tensor

from distributed_inr import randomness
from distributed_inr.domains import Image
from distributed_inr.domains.domain import Signal
from distributed_inr.models.latent_fitting import MetaLearning
from distributed_inr.models.layers_of_experts import LayersOfExperts, LayersOfExpertsModel
from distributed_inr.randomness import sample_seed
from distributed_inr.training.engine import Optim, Scale, build_engine

DOMAIN = Image(size=8, source_size=12, scales=(1.0, 1.5), scale_weights=(0.5, 0.5))
MODULATIONS = ("layerwise", "flat", "shift")
FIXED = MetaLearning(rate=1.0, deviation=0.3, num_points=30)
LEARNED = MetaLearning(rates="learned", deviation=0.3, num_points=30)
BATCH, MICRO = 8, 2


def build(
    dtype: torch.dtype, *, modulation: str = "layerwise", fitting: MetaLearning = LEARNED
) -> LayersOfExpertsModel:
    """A tiny network whose inner steps are long, so that it matters how they depend on the weights."""
    cfg = LayersOfExperts(
        num_layers=3,
        num_experts=4,
        width=8,
        latent_dim=4,
        omega=3.0,
        num_points=40,
        modulation=modulation,
        fitting=fitting,
    )
    torch.manual_seed(0)
    model = cfg.build(DOMAIN).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            added = torch.rand(parameter.shape, dtype=dtype)
            parameter += 0.8 * added if name == "rates" else 0.1 * (added - 0.5)
    return model


def batch(positions: range) -> Signal:
    """Signals that depend on their run position only."""
    seeds = torch.tensor([sample_seed(0, position) for position in positions])
    pixels = randomness.integers(seeds, "pixels of the picture", (3, 12, 12), 256).to(torch.uint8)
    return Signal(
        key=[f"picture-{position}" for position in positions],
        seed=seeds,
        position=torch.tensor(list(positions)),
        inputs=torch.nn.functional.avg_pool2d(pixels / 127.5 - 1, 5, stride=1),
        targets=pixels,
        text=[""] * len(positions),
    )


def gradient(model: LayersOfExpertsModel, signal: Signal) -> dict[str, Tensor]:
    model.zero_grad()
    sum(model(signal).values()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of one parameter's gradient, in its norm."""
    return max(difference(found, expected, name) for name in expected)


def plain_field(model: LayersOfExpertsModel, latent: Tensor, coords: Tensor) -> Tensor:
    """Eq. 3 with every expert's weights multiplied by its gate, in one large product."""
    hidden = coords.to(latent)
    for index, (layer, h) in enumerate(zip(model.layers, latent.expand(-1, 3, -1).unbind(1), strict=True)):
        if model.cfg.modulation == "shift":
            hidden = hidden @ layer.theta[:-1] + (layer.theta[-1] + h @ layer.shift.weight.T)[:, None]
        else:
            gates = h @ layer.gate.weight.T + layer.gate.bias
            mixed = (gates[:, :, None, None] * layer.experts.view(1, 4, hidden.shape[2] + 1, -1)).sum(1)
            hidden = torch.einsum("bpi,bio->bpo", hidden, mixed[:, :-1]) + mixed[:, None, -1]
        hidden = hidden if index == 2 else torch.sin(3.0 * hidden)
    return hidden


def plain_loss(model: LayersOfExpertsModel, signal: Signal, *, order: str = "second") -> Tensor:
    """CAVIA, as it is usually written: `autograd.grad` with a graph, signal by signal."""
    signal, rates, losses = DOMAIN.augment(signal), 1.0 if model.rates is None else model.rates, []
    for i in range(len(signal)):
        one = signal[i : i + 1]
        (seen, seen_values), (drawn, drawn_values) = DOMAIN.measurements(one, 30), DOMAIN.supervise(one, 40)
        noise = randomness.normal(one.seed, "latent", model.latent_shape)
        latent = (0.3 * noise.to(next(model.parameters()))).requires_grad_()
        for _ in range(3):
            error = (plain_field(model, latent, seen.coords) - seen_values).square().mean() / 2
            (step,) = torch.autograd.grad(error, latent, create_graph=True)
            latent = latent - rates * (step if order == "second" else step.detach())
        losses.append((plain_field(model, latent, drawn.coords) - drawn_values).square().mean() / 2)
    return sum(losses) / len(losses)


def plain_gradient(model: LayersOfExpertsModel, signal: Signal, *, order: str = "second") -> dict[str, Tensor]:
    model.zero_grad()
    plain_loss(model, signal, order=order).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def finite_difference_error(model: LayersOfExpertsModel, signal: Signal) -> float:
    """The largest, over random directions, of the gradient's relative error against central differences.

    Directions go through all parameters, and through those of one name alone, whose part in the whole may be small.
    """
    found, errors = gradient(model, signal), []
    parameters = dict(model.named_parameters())
    for names in [list(parameters)] * 4 + [[name] for name in parameters]:
        direction = {name: torch.randn_like(parameters[name]) for name in names}
        values = []
        for distance in (1e-5, -1e-5):
            with torch.no_grad():
                for name, d in direction.items():
                    parameters[name] += distance * d
            values.append(model(signal)["reconstruction"].item())
            with torch.no_grad():
                for name, d in direction.items():
                    parameters[name] -= distance * d
        expected = (values[0] - values[1]) / 2e-5
        slope = sum((found[name] * d).sum().item() for name, d in direction.items())
        errors.append(abs(slope - expected) / abs(expected))
    return max(errors)


CASES = [(modulation, fitting) for modulation in MODULATIONS for fitting in (FIXED, LEARNED)]


@pytest.mark.parametrize(("modulation", "fitting"), CASES)
def test_the_meta_gradient_agrees_with_finite_differences(modulation, fitting):
    model = build(torch.float64, modulation=modulation, fitting=fitting)
    assert finite_difference_error(model, batch(range(4))) <= 1e-5


@pytest.mark.parametrize(("modulation", "fitting"), CASES)
def test_the_meta_gradient_is_that_of_plain_autograd(modulation, fitting):
    model, signal = build(torch.float64, modulation=modulation, fitting=fitting), batch(range(4))
    torch.testing.assert_close(model(signal)["reconstruction"], plain_loss(model, signal), rtol=1e-12, atol=0)
    assert worst(gradient(model, signal), plain_gradient(model, signal)) <= 1e-10
    model = build(torch.float32, modulation=modulation, fitting=fitting)
    assert worst(gradient(model, signal), plain_gradient(model, signal)) <= 1e-6


@pytest.mark.parametrize(("modulation", "fitting"), CASES)
def test_first_order_takes_the_steps_for_constants_and_is_another_gradient(modulation, fitting):
    signal = batch(range(4))
    second = gradient(build(torch.float64, modulation=modulation, fitting=fitting), signal)
    model = build(torch.float64, modulation=modulation, fitting=dataclasses.replace(fitting, order="first"))
    first = gradient(model, signal)
    assert worst(first, plain_gradient(model, signal, order="first")) <= 1e-10
    assert difference(first, second, "") > 0.05
    torch.testing.assert_close(model(signal)["reconstruction"], plain_loss(model, signal), rtol=1e-12, atol=0)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_encoding_is_the_same_steps_from_zero_on_all_pixels(modulation):
    model, signal = build(torch.float64, modulation=modulation), batch(range(3))
    queries, values = DOMAIN.measurements(signal)
    expected = torch.zeros(3, *model.latent_shape, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        errors = (plain_field(model, expected, queries.coords) - values).square().mean((1, 2)) / 2
        expected = expected - model.rates * torch.autograd.grad(errors.sum(), expected)[0]
    torch.testing.assert_close(model.encode(signal), expected.detach(), rtol=1e-12, atol=1e-14)


def compare_compiled() -> list[dict[str, float]]:
    """Errors of compiled gradients; in a process of its own, because type checks do not compile.

    Code is generated for one model alone, which takes a minute; of the other, the graph as compiled is run as it is.
    """
    found, signal = [], batch(range(4))
    in_chunks = build(torch.float64, modulation="flat", fitting=dataclasses.replace(LEARNED, chunk=2))
    for model, backend in ((build(torch.float32), "aot_eager"), (in_chunks, "inductor")):
        eager = gradient(model, signal)
        loss = model(signal)["reconstruction"].item()
        model.compile(backend=backend)
        errors = {"gradient": worst(gradient(model, signal), eager)}
        errors["loss"] = abs(model(signal)["reconstruction"].item() - loss) / loss
        if model is in_chunks:
            errors["finite differences"] = finite_difference_error(model, signal)
        found.append(errors)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(found)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
def test_the_compiled_meta_gradient_is_that_of_second_order():
    ((single, double),) = run_processes(compare_compiled, 1)
    assert max(single.values()) <= 1e-5
    assert double.pop("finite differences") <= 1e-5 and max(double.values()) <= 1e-10


def engine_of(model: LayersOfExpertsModel, scale: Scale, *, micro: int = MICRO, num_micro_batches: int = 1):
    optim = Optim(max_grad_norm=None, betas=(0.9, 0.999))
    return build_engine(model, scale=scale, optim=optim, micro_batch_size=micro, num_micro_batches=num_micro_batches)


def test_an_engine_compiles_the_step_with_its_inner_loop():
    model = build(torch.float32)
    assert model._losses == model._losses_uncompiled
    engine_of(model, Scale(engine="accelerate", compile=True))
    assert model._losses != model._losses_uncompiled
    assert model._losses._torchdynamo_orig_callable == model._losses_uncompiled


def test_without_a_compiler_an_engine_warns_once_and_runs_uncompiled(monkeypatch, caplog):
    model, signal = build(torch.float32), batch(range(2))
    expected = model(signal)["reconstruction"]
    monkeypatch.setattr("distributed_inr.training.engine.shutil.which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        engine = engine_of(model, Scale(engine="accelerate", compile=True))
    (record,) = caplog.records
    assert "scale.compile=True is ignored: no C++ compiler" in record.getMessage()
    assert torch.equal(engine.forward(signal)["reconstruction"], expected)
    assert model._losses == model._losses_uncompiled


def engine_gradient(scale: Scale, fitting: MetaLearning, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the optimizer was given: after one step from nothing, AdamW's first moment is a tenth of the gradient."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine = engine_of(build(dtype, fitting=fitting), scale, num_micro_batches=BATCH // world // MICRO)
    for positions in shares(0, rank, world, micro=MICRO, batch=BATCH):
        signal = batch(positions)
        engine.step(engine.forward(signal), keys=signal.key, lr=1e-3)
    fragments = engine.state()
    return whole([type(f)(f.name, f.shape, f.offset, f.moments["exp_avg"] / (1 - 0.9)) for f in fragments])


def measure(cases: list[tuple[str, MetaLearning, torch.dtype]]) -> list[dict[str, float]]:
    results = []
    for name, fitting, dtype in cases:
        found = engine_gradient(ENGINES[name], fitting, dtype)
        expected = plain_gradient(build(dtype, fitting=fitting), batch(range(BATCH)))
        parts = ("", "layers.0", "layers.1", "layers.2", *(["rates"] if fitting.rates == "learned" else []))
        results.append({part: difference(found, expected, part) for part in parts})
    return results


SPLIT = [(name, LEARNED, torch.float32) for name in ENGINES if name != "deepspeed-3"]
SPLIT += [(name, dataclasses.replace(FIXED, chunk=1), torch.float32) for name in ("deepspeed-2", "accelerate")]
SPLIT += [("accelerate", LEARNED, torch.float64)]


@pytest.mark.slow
def test_the_meta_gradient_of_two_processes_is_that_of_the_whole_batch():
    """Two processes of two micro-batches each, against plain autograd in one process."""
    for errors_of_rank in run_processes(measure, 2, SPLIT):
        for (name, fitting, dtype), errors in zip(SPLIT, errors_of_rank, strict=True):
            limit = 1e-5 if dtype == torch.float32 else 1e-10
            assert max(errors.values()) <= limit, (name, fitting, dtype, errors)
