"""Layers of experts: the mixture by hand, folding, how latents are fitted, and what is refused."""

import dataclasses
import logging
import math

import pytest
import torch
from torch import Tensor, nn

from distributed_inr.config import override
from distributed_inr.domains import Image, Signal
from distributed_inr.domains.domain import pixel_centres
from distributed_inr.models.latent_fitting import RATE_RANGE, AutoDecoding, MetaLearning
from distributed_inr.models.layers_of_experts import LayersOfExperts, LayersOfExpertsModel
from distributed_inr.presets import chinr, ddmi
from distributed_inr.randomness import sample_seed

DOMAIN = Image(size=8, source_size=8, scales=(1.0,), scale_weights=(1.0,), flip=False)
TINY = LayersOfExperts(num_layers=4, num_experts=6, width=8, latent_dim=5, num_points=40)
MODULATIONS = ("layerwise", "flat", "shift")
FITTINGS = (MetaLearning(), MetaLearning(rates="learned", num_points=30), AutoDecoding(encode_steps=20))


def batch(count: int) -> Signal:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Signal(
        key=[f"picture-{i}" for i in range(count)],
        seed=torch.tensor([sample_seed(0, i) for i in range(count)]),
        position=torch.zeros(count, dtype=torch.int64),
        inputs=pixels / 127.5 - 1,
        targets=pixels,
        text=[""] * count,
    )


def build(dtype: torch.dtype = torch.float32, domain: Image = DOMAIN, **changes) -> LayersOfExpertsModel:
    """A tiny network whose weights are those of no special moment, in all digits of their type."""
    torch.manual_seed(0)
    model = dataclasses.replace(TINY, **changes).build(domain).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.rand(parameter.shape, dtype=dtype)
    return model


def latents(model: LayersOfExpertsModel, count: int, scale: float = 1.0) -> Tensor:
    example = next(model.parameters())
    return scale * torch.randn(count, *model.latent_shape, dtype=example.dtype)


def field_by_hand(model: LayersOfExpertsModel, latent: Tensor, coords: Tensor) -> Tensor:
    """CHINR, eq. 3: signal by signal, layer by layer, expert by expert."""
    found = []
    for layers_latents, hidden in zip(latent.expand(-1, model.cfg.num_layers, -1), coords, strict=True):
        for index, (layer, h) in enumerate(zip(model.layers, layers_latents, strict=True)):
            if model.cfg.modulation == "shift":
                affine = hidden @ layer.theta[:-1] + layer.theta[-1] + layer.shift.weight @ h
            else:
                affine = 0
                for k in range(model.cfg.num_experts):
                    expert = layer.experts[k].view(hidden.shape[1] + 1, -1)
                    alpha = layer.gate.weight[k] @ h + layer.gate.bias[k]
                    affine = affine + alpha * (hidden @ expert[:-1] + expert[-1])
            hidden = affine if index == model.cfg.num_layers - 1 else torch.sin(model.cfg.omega * affine)
        found.append(hidden)
    return torch.stack(found)


def gradients(model: nn.Module, signal: Signal) -> dict[str, Tensor]:
    model.zero_grad()
    sum(model(signal).values()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest, over parameters, of the norm of the difference over the norm."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - g).norm() / g.norm()) for name, g in expected.items())


@pytest.mark.parametrize(
    ("coord_dim", "value_dim", "sizes", "millions"),
    [
        (2, 3, (7, 384, 128, 128), "32.346"),
        (3, 1, (5, 256, 64, 256), "3.606"),
        (3, 4, (6, 256, 64, 64), "4.492"),
        (2, 1, (5, 64, 64, 64), "0.836"),
    ],
)
def test_the_papers_networks_have_the_papers_numbers_of_parameters(coord_dim, value_dim, sizes, millions):
    domain = type("Signals", (Image,), {"coord_dim": coord_dim, "value_dim": value_dim})()
    names = ("num_layers", "num_experts", "width", "latent_dim")
    with torch.device("meta"):
        model = LayersOfExperts(**dict(zip(names, sizes, strict=True))).build(domain)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == millions
    assert model.latent_shape == (sizes[0], sizes[3])


@pytest.mark.parametrize(("name", "num_layers", "millions"), [("celebahq-64", 7, 32.346), ("celebahq-64-l5", 5, None)])
def test_the_papers_presets_have_the_papers_sizes_and_training(name, num_layers, millions):
    experiment, images = chinr.PRESETS[name](), 28_000
    with torch.device("meta"):
        model = experiment.autoencoder.build(experiment.domain)
    assert experiment.name == name and (experiment.domain.size, experiment.domain.source_size) == (64, 128)
    cfg = model.cfg
    assert (cfg.num_layers, cfg.num_experts, cfg.width, cfg.latent_dim, cfg.omega) == (num_layers, 384, 128, 128, 30)
    assert (cfg.fitting.steps, cfg.fitting.order, cfg.fitting.rates) == (3, "second", "fixed")
    if millions:
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
        assert f"{millions} M" in chinr.PRESETS[name].__doc__
    for training, epochs in ((experiment.autoencoder_training, 800), (experiment.prior_training, 1000)):
        assert (training.num_samples, training.batch_size) == (epochs * images, 32)
        assert (training.optim.lr, training.optim.weight_decay, training.optim.schedule) == (1e-4, 0.0, "cosine")


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_a_layer_is_the_sum_over_its_experts_and_shifts_move_biases_alone(modulation):
    model = build(torch.float64, modulation=modulation)
    layer, h = model.layers[1], latents(model, 3)[:, 0]
    if modulation == "shift":
        expected = torch.stack([torch.cat([layer.theta[:-1], (layer.theta[-1] + layer.shift(v))[None]]) for v in h])
    else:
        experts = layer.experts.view(6, 9, 8)
        expected = torch.stack([sum(alpha * e for alpha, e in zip(layer.gate(v), experts, strict=True)) for v in h])
    torch.testing.assert_close(layer(h), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_a_field_is_sines_of_mixtures_and_linear_at_its_end(modulation):
    model = build(torch.float64, modulation=modulation)
    h, coords = latents(model, 3), torch.rand(3, 11, 2) * 2 - 1
    expected = field_by_hand(model, h, coords.double())
    torch.testing.assert_close(model.decode(h)(coords), expected, rtol=0, atol=1e-10)
    assert model.latent_shape == ((4, 5) if modulation == "layerwise" else (1, 5))


@pytest.mark.parametrize(("scale", "factor"), [("one", 1.0), ("sqrt", 8.0)])
def test_experts_start_as_siren_layers_and_gates_as_equal_shares(scale, factor):
    torch.manual_seed(0)
    cfg = dataclasses.replace(TINY, num_experts=64, width=32, expert_scale=scale)
    for index, layer in enumerate(cfg.build(DOMAIN).layers):
        weights = layer.experts.unflatten(1, layer.shape)[:, :-1]
        fan_in = weights.shape[1]
        bound = factor * (1 / fan_in if index == 0 else math.sqrt(6 / fan_in) / 30)
        assert 0.99 * bound < weights.abs().max() <= bound
        assert weights.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert layer.gate(torch.zeros(1, 5)).tolist() == [[1 / 64] * 64]


@pytest.mark.parametrize("modulation", ["layerwise", "flat"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_folded_network_is_the_same_functions(modulation, dtype, limit):
    model = build(dtype, modulation=modulation, fitting=MetaLearning(rates="learned"), omega=10.0)
    folded = model.for_sampling()
    assert folded.cfg.folded and not any(p.requires_grad for p in folded.parameters())
    coords, fitted = torch.rand(3, 50, 2) * 2 - 1, model.encode(batch(3))
    for h in (fitted, latents(model, 3, 0.1)):
        found, expected = folded.decode(h)(coords), model.decode(h)(coords)
        assert (found - expected).norm() <= limit * expected.norm()
    assert (folded.encode(batch(3)) - fitted).norm() <= limit * fitted.norm() > 0
    assert folded.for_sampling() is folded


@pytest.mark.parametrize(
    "changes", [{"modulation": "shift"}, {"latent_dim": 7}, {"modulation": "flat", "latent_dim": 7}]
)
def test_a_network_is_not_folded_where_that_would_be_larger(changes):
    model = build(**changes)
    assert model.for_sampling() is model


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_a_field_at_some_coordinates_equals_the_same_points_of_the_grid(modulation):
    model = build(modulation=modulation)
    with torch.no_grad():
        field = model.decode(latents(model, 2))
        grid = field.render(40)
    x, y = torch.randint(0, 40, (2, 500))
    coords = torch.stack([pixel_centres(40)[x], pixel_centres(40)[y]], dim=-1).expand(2, -1, -1)
    values = field(coords).add(1).mul(0.5).clamp(0, 1)
    torch.testing.assert_close(values, grid[:, :, y, x].transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_one_picture_can_be_overfitted(modulation):
    model = build(modulation=modulation, width=16, omega=10.0, num_points=64, fitting=MetaLearning(rates="learned"))
    y, x = torch.meshgrid(pixel_centres(8), pixel_centres(8), indexing="ij")
    picture = torch.stack([x, y, (3 * x * y).sin()])[None]
    pixels = ((picture + 1) * 127.5).round().to(torch.uint8)
    signal = dataclasses.replace(batch(1), inputs=picture, targets=pixels)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(signal)["reconstruction"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    error = (model.decode(model.encode(signal)).render(8) - (signal.inputs + 1) / 2).square().mean().item()
    assert error < 0.02 * (signal.inputs / 2).var().item()


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("fitting", FITTINGS)
def test_every_parameter_gets_a_gradient(modulation, fitting):
    model, signal = build(modulation=modulation, fitting=fitting), batch(3)
    if isinstance(fitting, AutoDecoding):
        signal = dataclasses.replace(signal, latent=latents(model, 3, 0.1).requires_grad_())
    assert all(g.abs().max() > 0 for g in gradients(model, signal).values())
    assert (model.rates is not None) == ("learned" in str(fitting))


def test_learned_rates_start_in_their_range_and_are_held_between_0_and_1():
    torch.manual_seed(0)
    model = dataclasses.replace(TINY, latent_dim=100, fitting=MetaLearning(rates="learned")).build(DOMAIN)
    assert RATE_RANGE[0] <= model.rates.min() < 0.006 and 0.099 < model.rates.max() <= RATE_RANGE[1]
    signal, found = batch(2), {}
    for rate in (-1.0, 0.0, 1.0, 2.0):
        torch.nn.init.constant_(model.rates, rate)
        found[rate] = model.encode(signal)
    assert torch.equal(found[-1.0], found[0.0]) and not found[0.0].any()
    assert torch.equal(found[2.0], found[1.0]) and found[1.0].any()


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("fitting", FITTINGS)
def test_a_latent_is_fitted_to_its_own_signal_alone(modulation, fitting):
    model, signal = build(modulation=modulation, fitting=fitting), batch(4)
    together = model.encode(signal)
    alone = torch.cat([model.encode(signal[i : i + 1]) for i in range(4)])
    assert (together - alone).abs().max() <= 1e-5 * together.abs().max()
    assert (together[0] - together[1]).abs().max() > 0.1 * together.abs().max()


@pytest.mark.parametrize("fitting", FITTINGS)
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(fitting):
    model, signal = build(fitting=fitting), batch(6)
    parts = [model(signal[i : i + 2])["reconstruction"].item() for i in range(0, 6, 2)]
    assert model(signal)["reconstruction"].item() == pytest.approx(sum(parts) / 3, rel=1e-6)


def test_training_starts_from_small_latents_of_the_seeds_and_evaluation_from_zero():
    model, signal = build(fitting=MetaLearning(deviation=0.5)), batch(4)
    reseeded = dataclasses.replace(signal, seed=signal.seed + 1)
    all_points = dataclasses.replace(model.cfg, num_points=64)
    model.cfg = all_points  # so that nothing but the start depends on the seeds
    train, other = model(signal)["reconstruction"].item(), model(reseeded)["reconstruction"].item()
    assert train == model(signal)["reconstruction"].item() != other
    model.eval()
    fitted = model.decode(model.encode(signal))
    expected = DOMAIN.nll(DOMAIN.observe(fitted, DOMAIN.measurements(signal)[0]), DOMAIN.measurements(signal)[1])
    for one in (signal, reseeded):
        assert model(one)["reconstruction"].item() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_measurements_of_a_picture_are_its_pixels_and_drawn_ones_are_some_of_them():
    signal = batch(2)
    queries, values = DOMAIN.measurements(signal)
    for y in range(8):
        for x in range(8):
            place = torch.tensor([(2 * x + 1) / 8 - 1, (2 * y + 1) / 8 - 1])
            assert torch.equal(queries.coords[:, 8 * y + x], place.expand(2, 2))
            assert torch.equal(values[:, 8 * y + x], signal.inputs[:, :, y, x])
    assert values.shape == (2, 64, 3) and not queries.view.any()
    for count in (64, 100):
        assert torch.equal(DOMAIN.measurements(signal, count)[1], values)

    drawn, found = DOMAIN.measurements(signal, 20)
    x, y = ((drawn.coords + 1) * 4 - 0.5).round().long().unbind(-1)
    assert found.shape == (2, 20, 3) and len(set((8 * y + x)[0].tolist())) > 10
    for one in range(2):
        assert torch.equal(found[one], signal.inputs[one, :, y[one], x[one]].T)
    again, _ = DOMAIN.measurements(dataclasses.replace(signal, inputs=-signal.inputs), 20)
    other, _ = DOMAIN.measurements(dataclasses.replace(signal, seed=signal.seed.flip(0)), 20)
    assert torch.equal(again.coords, drawn.coords) and torch.equal(other.coords, drawn.coords.flip(0))
    assert not torch.equal(other.coords, drawn.coords)


@pytest.mark.parametrize("fitting", FITTINGS)
@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_chunks_bound_the_signals_held_at_once_and_change_nothing(fitting, chunk):
    signal, sizes, found = batch(5), [], {}
    for size in (None, chunk):
        model = build(torch.float64, fitting=dataclasses.replace(fitting, chunk=size))
        if isinstance(fitting, AutoDecoding):
            model.register_parameter("latent", nn.Parameter(latents(model, 5, 0.1)))
            signal = dataclasses.replace(signal, latent=model.latent)
        model.layers[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        with torch.no_grad():
            evaluated = model(signal)["reconstruction"]
        found[size], whole = (model(signal)["reconstruction"], gradients(model, signal)), max(sizes)
        torch.testing.assert_close(evaluated, found[size][0].detach(), rtol=1e-12, atol=0)
        assert whole == (5 if size is None else min(5, size))
        sizes.clear()
    torch.testing.assert_close(found[chunk][0], found[None][0], rtol=1e-12, atol=0)
    assert difference(found[chunk][1], found[None][1]) <= 1e-10


def test_a_fit_that_is_not_finite_is_reported_with_its_signals_key(caplog):
    model, signal = build(), batch(4)
    signal.inputs[2] = 1e30
    with caplog.at_level(logging.WARNING):
        loss = model(signal)["reconstruction"]
    assert not loss.isfinite()
    assert [r.getMessage() for r in caplog.records] == [
        "picture-2: its loss is not finite; try a smaller autoencoder.fitting.rate"
    ]
    with pytest.raises(FloatingPointError, match=r"^picture-2: the latent's fit is not finite; train with a smaller"):
        model.encode(signal)
    assert model.encode(signal.rows([0, 1, 3])).isfinite().all()


@pytest.mark.parametrize(
    ("preset", "changes", "words"),
    [
        (
            chinr,
            {"scale.zero_stage": 3, "scale.compile": False},
            "scale.zero_stage=3 does not work with autoencoder.kind=layers-of-experts",
        ),
        (
            chinr,
            {"scale.precision": "bfloat16"},
            "scale.precision=bfloat16 does not work with autoencoder.kind=layers-of-experts",
        ),
        (
            chinr,
            {"scale.activation_checkpointing": True},
            "scale.activation_checkpointing=True does not work with autoencoder.kind=layers-of-experts",
        ),
        (chinr, {"family": "ddmi"}, "family=ddmi does not train autoencoder.kind=layers-of-experts; use jobs/train_ch"),
        (chinr, {"name": "../other"}, "name='../other' must be that of one folder; --output says"),
        (chinr, {"sampling.steps": 5000}, "sampling.steps=5000 must be at most prior.num_timesteps=1000"),
        (ddmi, {"family": "chinr"}, "family=chinr does not train autoencoder.kind=d2c-vae; use jobs/train_ddmi.py"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(preset, changes, words):
    with pytest.raises(ValueError, match=words) as problem:
        override(preset.furniture_image(), changes)
    assert "\n" not in str(problem.value)


def test_what_can_work_is_not_refused():
    override(chinr.furniture_image(), {"scale.engine": "accelerate", "scale.zero_stage": 3})
    override(chinr.furniture_image(), {"scale.precision": "auto", "scale.compile": True})


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_auto_decoding_gives_latents_and_weights_the_gradient_of_the_penalised_error(modulation):
    model = build(torch.float64, modulation=modulation, fitting=AutoDecoding(penalty=0.3), omega=5.0)
    latent = latents(model, 3).requires_grad_()
    signal = dataclasses.replace(batch(3), latent=latent)
    found = gradients(model, signal) | {"latent": latent.grad}

    queries, values = DOMAIN.supervise(signal, 40)
    error = 0.5 * (field_by_hand(model, latent, queries.coords.double()) - values).square().mean()
    expected = error + 0.3 * latent.square().sum() / 3
    torch.testing.assert_close(sum(model(signal).values()), expected, rtol=1e-12, atol=0)
    tensors = dict(model.named_parameters()) | {"latent": latent}
    by_hand = dict(zip(tensors, torch.autograd.grad(expected, list(tensors.values())), strict=True))
    assert difference(found, by_hand) <= 1e-10


def test_a_penalty_draws_the_latents_of_new_signals_to_zero():
    lengths = []
    for penalty in (0.0, 0.01, 1e4):
        model = build(fitting=AutoDecoding(penalty=penalty), omega=5.0)
        lengths.append(model.encode(batch(3)).norm().item())
    assert lengths[0] > 1.2 * lengths[1] > 2.4 * lengths[2]


def test_auto_decoding_finds_the_latents_of_new_signals_each_for_itself():
    model = build(fitting=AutoDecoding(), omega=5.0)
    queries, _ = DOMAIN.measurements(batch(3))
    true = model.decode(latents(model, 3, 0.3))(queries.coords).detach()
    signal = dataclasses.replace(batch(3), inputs=true.transpose(1, 2).unflatten(2, (8, 8)).contiguous())

    def error(latent: Tensor) -> Tensor:
        return DOMAIN.nll(model.decode(latent)(queries.coords), true)

    with torch.no_grad():
        found = model.encode(signal)
        assert (error(found) < 0.02 * error(torch.zeros_like(found))).all()
        for i in range(3):
            torch.testing.assert_close(model.encode(signal[i : i + 1])[0], found[i], rtol=1e-4, atol=1e-4)
