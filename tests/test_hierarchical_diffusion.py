"""Hierarchical diffusion: conditions, the objective by hand, sampling against closed forms, and held first layers."""

import dataclasses
import logging
import math
import shutil

import pytest
import torch
from processes import run_processes
from torch import Tensor, nn

from distributed_inr.domains import Signal
from distributed_inr.models.denoisers import MLP, UNet
from distributed_inr.models.hierarchical_diffusion import HierarchicalDiffusion, HierarchicalDiffusionModel
from distributed_inr.models.latent_diffusion import LatentDiffusion
from distributed_inr.models.layer_denoisers import ConvolutionalUNet, MLPUNet
from distributed_inr.randomness import integers, normal, sample_seed

SHAPE = (4, 12)
TINY = MLPUNet(width=32, num_blocks=1)
DENOISERS = [TINY, ConvolutionalUNet(channels=16, multipliers=(1, 2))]
SEEDS = torch.tensor([sample_seed(0, i) for i in range(6)])
SAMPLERS = ("ancestral", "ddim", "dpm-solver++")


def build(shape: tuple[int, int] = SHAPE, *, bits: int = 5, **changes) -> HierarchicalDiffusionModel:
    """A tiny prior that has left its start, where networks answer zero, with statistics unlike the standard ones."""
    torch.manual_seed(0)
    cfg = HierarchicalDiffusion(**{"denoiser": TINY, "condition_bits": bits, "num_timesteps": 100} | changes)
    model = cfg.build(shape)
    with torch.no_grad():
        for parameter in model.denoisers.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.normalise_from(torch.randn(shape), 0.5 + torch.rand(shape))
    return model


def latents(count: int = 6, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def batch(latent: Tensor) -> Signal:
    count = len(latent)
    return Signal(
        key=["k"] * count,
        seed=torch.tensor([sample_seed(0, i) for i in range(count)]),
        position=torch.zeros(count, dtype=torch.int64),
        inputs=latent[:, None],
        text=[""] * count,
    )


def codes_by_hand(model: HierarchicalDiffusionModel, latent: Tensor) -> Tensor:
    """v^l = W concat(h^1 ... h^{l-1}, 0 ...) of z-scores, and v^1 = 0 (CHINR, section 3.3)."""
    scores = (latent - model.latent_mean) / model.latent_deviation
    matrix, (num_layers, latent_dim) = model.projection.flatten(0, 1).T, latent.shape[1:]
    found = [torch.zeros(len(latent), len(matrix))]
    for layer in range(1, num_layers):
        nothing = torch.zeros(len(latent), num_layers - 1 - layer, latent_dim)
        found.append(torch.cat([scores[:, :layer], nothing], dim=1).flatten(1) @ matrix.T)
    return torch.stack(found, dim=1)


def bits_by_hand(model: HierarchicalDiffusionModel, latent: Tensor) -> Tensor:
    return (codes_by_hand(model, latent) > 0).float()


def gaussian_oracle(model: HierarchicalDiffusionModel, spread: float, seen: list) -> None:
    """Replace the network by the exact answer for z-scores of layer l distributed as N(l + first bit, spread^2)."""

    class Oracle(nn.Module):
        def forward(self, noisy, timesteps, layers, bits, text=None):
            seen.append((layers, bits))
            level = model.chain.signal_level[timesteps][:, None]
            centre = (layers + bits[:, :1].sum(1))[:, None]
            variance = level * spread**2 + 1 - level
            clean = centre + level.sqrt() * spread**2 / variance * (noisy - level.sqrt() * centre)
            noise = (noisy - level.sqrt() * clean) / (1 - level).sqrt()
            answers = {"x0": clean, "epsilon": noise, "v": level.sqrt() * noise - (1 - level).sqrt() * clean}
            return answers[model.cfg.prediction]

    model.denoisers = nn.ModuleList([Oracle()])


@pytest.mark.parametrize("projection", ["fixed", "straight-through"])
def test_bits_are_the_signs_of_a_projection_of_the_earlier_layers(projection):
    model, latent = build(projection=projection), latents(50)
    bits = model.bits(latent)
    assert torch.equal(bits, bits_by_hand(model, latent))
    assert set(bits.unique().tolist()) == {0.0, 1.0} and not bits[:, 0].any()
    assert 0.4 < bits[:, 1:].mean().item() < 0.6
    assert ("projection" in dict(model.named_buffers())) == (projection == "fixed")


@pytest.mark.parametrize("layer", range(4))
def test_the_condition_of_a_layer_does_not_move_when_it_or_later_layers_do(layer):
    model, latent = build(bits=8), latents(50)
    changed = latent.clone()
    changed[:, layer:] = 10 * torch.randn_like(changed[:, layer:])
    before, after = model.bits(latent), model.bits(changed)
    assert torch.equal(before[:, : layer + 1], after[:, : layer + 1])
    assert all((before[:, later] != after[:, later]).any() for later in range(layer + 1, 4))


@pytest.mark.parametrize("networks", ["shared", "per-layer"])
@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
@pytest.mark.parametrize("projection", ["fixed", "straight-through"])
def test_the_loss_is_that_of_every_layer_under_clean_conditions_by_hand(networks, prediction, projection):
    model = build(networks=networks, prediction=prediction, projection=projection)
    latent, count = latents(), 6
    scores, bits = (latent - model.latent_mean) / model.latent_deviation, bits_by_hand(model, latent)
    timesteps, noise = integers(SEEDS, "timestep", (4,), 100), normal(SEEDS, "noise", SHAPE)
    levels = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(101)]  # Nichol and Dhariwal, eq. 17
    levels = torch.tensor(levels[1:]).clamp(min=levels[99] * 1e-3) / levels[0]
    errors = []
    for layer in range(4):
        level = levels[timesteps[:, layer]][:, None]
        clean, added = scores[:, layer], noise[:, layer]
        noisy = level.sqrt() * clean + (1 - level).sqrt() * added
        target = {"x0": clean, "epsilon": added, "v": level.sqrt() * added - (1 - level).sqrt() * clean}[prediction]
        denoiser = model.denoisers[0 if networks == "shared" else layer]
        told = torch.full((count,), layer if networks == "shared" else 0)
        errors.append((denoiser(noisy, timesteps[:, layer], told, bits[:, layer]) - target).square().mean())
    assert len(model.denoisers) == (1 if networks == "shared" else 4)
    torch.testing.assert_close(model(batch(latent))["diffusion"], sum(errors) / 4, rtol=1e-5, atol=1e-6)


def test_a_learned_projection_gets_the_gradient_of_a_sigmoid_and_keeps_its_bits():
    fixed, learned, signal = build(), build(projection="straight-through"), batch(latents())
    assert torch.equal(fixed.projection, learned.projection)
    loss = learned(signal)["diffusion"]
    torch.testing.assert_close(loss, fixed(signal)["diffusion"], rtol=1e-6, atol=0)
    loss.backward()
    assert (learned.projection.grad.abs().amax((1, 2)) > 0).all()

    codes = codes_by_hand(learned, latents())
    bits, soft = (codes > 0).float().requires_grad_(), torch.sigmoid(codes.detach())
    timesteps, noise = integers(SEEDS, "timestep", (4,), 100).flatten(), normal(SEEDS, "noise", SHAPE).flatten(0, 1)
    noisy, target = learned.chain.add_noise(learned.normalise(latents()).flatten(0, 1), timesteps, noise)
    predicted = learned.denoisers[0](noisy, timesteps, torch.arange(4).repeat(6), bits.flatten(0, 1))
    (slope,) = torch.autograd.grad((predicted - target).square().mean(), bits)
    (expected,) = torch.autograd.grad(codes, learned.projection, slope * soft * (1 - soft))
    torch.testing.assert_close(learned.projection.grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
@pytest.mark.parametrize(("sampler", "steps"), [("ancestral", 100), ("ddim", 50), ("dpm-solver++", 50)])
def test_samplers_with_the_exact_network_draw_the_gaussians_they_should(prediction, sampler, steps):
    model, seen = build((3, 16), prediction=prediction), []
    mean, deviation = model.latent_mean.clone(), model.latent_deviation.clone()
    gaussian_oracle(model, 0.5, seen)
    samples = model.sample(torch.tensor([sample_seed(3, i) for i in range(300)]), sampler=sampler, steps=steps)
    scores, bits = (samples - mean) / deviation, bits_by_hand(model, samples)
    for layer in range(3):
        centre = layer + bits[:, layer, :1]
        assert (scores[:, layer] - centre).mean().item() == pytest.approx(0.0, abs=0.03)
        assert (scores[:, layer] - centre).std().item() == pytest.approx(0.5, abs=0.03)
        told = [bits for layers, bits in seen if (layers == layer).all()]
        assert len(told) == steps and all(torch.equal(one, bits[:, layer]) for one in told)
    assert len(seen) == 3 * steps and bits[:, 1:, 0].std() > 0.3


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("networks", ["shared", "per-layer"])
def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(sampler, networks):
    model = build(networks=networks).eval()
    with torch.no_grad():
        together = model.sample(SEEDS, sampler=sampler, steps=10)
        alone = torch.cat([model.sample(SEEDS[i : i + 1], sampler=sampler, steps=10) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_layers_of_one_seed_get_noise_of_their_own(sampler):
    model = build(bits=0)
    gaussian_oracle(model, 1.0, [])
    drawn = [model.sample_layer(layer, torch.zeros(6, 0), SEEDS, sampler=sampler, steps=10) for layer in range(4)]
    centred = [one - layer for layer, one in enumerate(drawn)]
    assert all((a - b).abs().max() > 1 for i, a in enumerate(centred) for b in centred[:i])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("fixed", [1, 3, 4])
def test_held_first_layers_come_back_and_the_others_are_drawn_from_the_seed(sampler, fixed):
    model, held = build().eval(), 3 * latents()[:1, :fixed].expand(6, -1, -1)
    with torch.no_grad():
        first = model.sample(SEEDS, sampler=sampler, steps=10, prefix=held)
        assert torch.equal(first[:, :fixed], held)
        assert torch.equal(model.sample(SEEDS, sampler=sampler, steps=10, prefix=held), first)
        scores, bits = model.normalise(first), model.bits(first)
        for layer in range(fixed, 4):  # each under the conditions that the result itself gives
            drawn = model.sample_layer(layer, bits[:, layer], SEEDS, sampler=sampler, steps=10)
            torch.testing.assert_close(scores[:, layer], drawn, rtol=1e-4, atol=1e-4)
            assert all((first[i, layer] - first[0, layer]).abs().max() > 0.05 for i in range(1, 6))

        whole = model.sample(SEEDS, sampler=sampler, steps=10)
        branch = model.sample(SEEDS, sampler=sampler, steps=10, prefix=whole[:, :fixed])
        torch.testing.assert_close(branch, whole, rtol=1e-3, atol=1e-3)


def test_without_conditions_the_layers_are_independent():
    model, latent = build(bits=0).eval(), latents()
    assert model.bits(latent).shape == (6, 4, 0) and model(batch(latent))["diffusion"] > 0
    with torch.no_grad():
        free = model.sample(SEEDS, steps=10)
        held = model.sample(SEEDS, steps=10, prefix=10 * latent[:, :2])
    assert torch.equal(held[:, 2:], free[:, 2:]) and not torch.equal(held[:, :2], free[:, :2])


@pytest.mark.parametrize(
    ("num_signals", "bits"), [(8, 1), (16, 1), (140, 4), (816, 6), (30_000, 11), (10**6, 12), (1, 1), (10**9, 12)]
)
def test_the_number_of_bits_fits_the_number_of_signals(num_signals, bits, caplog):
    assert HierarchicalDiffusion().settle(num_signals).condition_bits == bits
    for given in {0, bits}:
        assert HierarchicalDiffusion(condition_bits=given).settle(num_signals).condition_bits == given
    assert not caplog.records
    assert HierarchicalDiffusion(condition_bits=bits + 1).settle(num_signals).condition_bits == bits + 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"prior.condition_bits={bits + 1} is much for {num_signals} signals" in record.getMessage()
    assert f"{bits} is the default" in record.getMessage()


@pytest.mark.parametrize(("shape", "most", "remedy"), [((4, 8), 24, 8), ((2, 20), 20, 12)])
def test_more_bits_than_numbers_to_make_them_from_are_refused(shape, most, remedy):
    with pytest.raises(ValueError) as problem:
        HierarchicalDiffusion(denoiser=TINY, condition_bits=most + 1).build(shape)
    assert f"prior.condition_bits={most + 1} must be at most {most}, " in str(problem.value)
    assert str(problem.value).endswith(f"try {remedy}") and "\n" not in str(problem.value)
    for bits in (most, remedy):
        HierarchicalDiffusion(denoiser=TINY, condition_bits=bits).build(shape)


def test_one_latent_for_all_layers_has_no_layers_to_condition():
    with pytest.raises(ValueError, match="needs latents of several layers, .* use prior.kind latent-diffusion"):
        HierarchicalDiffusion(denoiser=TINY, condition_bits=1).build((1, 16))
    HierarchicalDiffusion(denoiser=TINY, condition_bits=0).build((1, 16))


@pytest.mark.parametrize(("denoiser", "networks"), [(TINY, "shared"), (TINY, "per-layer"), (DENOISERS[1], "shared")])
def test_a_set_of_latents_can_be_learned(denoiser, networks):
    torch.manual_seed(0)
    model = HierarchicalDiffusion(denoiser=denoiser, condition_bits=5, networks=networks).build(SHAPE)
    optimizer, signal, losses = torch.optim.Adam(model.parameters(), lr=3e-3), batch(latents(3)), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(signal)["diffusion"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("networks", ["shared", "per-layer"])
@pytest.mark.parametrize("projection", ["fixed", "straight-through"])
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_every_parameter_gets_a_gradient(denoiser, networks, projection):
    model = build(denoiser=denoiser, networks=networks, projection=projection)
    model(batch(latents()))["diffusion"].backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    unheard = ["denoisers.0.condition.bits.weight"]  # the first layer's own network is told c^1, which is zero
    assert without == (unheard if networks == "per-layer" else [])


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_denoisers_heed_all_they_are_told_and_keep_samples_apart(denoiser):
    network = build(denoiser=denoiser).denoisers[0]
    noisy, timesteps, layers = torch.randn(4, 12), torch.tensor([0, 30, 30, 99]), torch.tensor([0, 1, 2, 3])
    bits = torch.randint(0, 2, (4, 5)).float()
    with torch.no_grad():
        together = network(noisy, timesteps, layers, bits)
        alone = network(noisy[1:2], timesteps[1:2], layers[1:2], bits[1:2])
        torch.testing.assert_close(alone, together[1:2], rtol=1e-4, atol=1e-5)
        others = [(99 - timesteps, layers, bits), (timesteps, 3 - layers, bits), (timesteps, layers, 1 - bits)]
        assert all((network(noisy, *told) - together).abs().amax(1).min() > 1e-3 for told in others)


def test_statistics_and_a_fixed_projection_are_part_of_the_checkpoint():
    model = build()
    other = dataclasses.replace(model.cfg).build(SHAPE)
    assert not torch.equal(other.projection, model.projection)
    other.load_state_dict(model.state_dict())
    for name in ("projection", "latent_mean", "latent_deviation"):
        assert torch.equal(getattr(other, name), getattr(model, name))
    torch.testing.assert_close(model.restore(model.normalise(latents())), latents())
    assert "chain.signal_level" not in model.state_dict()


def test_planes_and_vectors_go_to_the_priors_that_take_them():
    with pytest.raises(
        ValueError, match="one latent vector a layer, but this autoencoder's latent has shape"
    ) as problem:
        HierarchicalDiffusion(condition_bits=1).build((3, 4, 4))
    assert str(problem.value).endswith("use prior.kind latent-diffusion") and "\n" not in str(problem.value)
    with pytest.raises(
        ValueError, match="denoiser.kind=unet needs planes, but this autoencoder's latents are 4 vectors"
    ):
        LatentDiffusion(denoiser=UNet(channels=16, head_dim=8)).build(SHAPE)
    for latent_dim in (16, 28):
        words = f"3 levels, which need latents of a multiple of 8 numbers, 24 at least; this one has {latent_dim}: use"
        with pytest.raises(ValueError, match=words):
            HierarchicalDiffusion(denoiser=ConvolutionalUNet(), condition_bits=1).build((4, latent_dim))
    with pytest.raises(ValueError, match="channels=8 times the last multiplier 2 must be a multiple of 32"):
        ConvolutionalUNet(channels=8, multipliers=(1, 2))


def test_a_learned_projection_without_conditions_is_refused():
    with pytest.raises(ValueError, match="prior.projection=straight-through has nothing to learn"):
        HierarchicalDiffusion(denoiser=TINY, condition_bits=0, projection="straight-through").build(SHAPE)


def test_a_convolutional_network_without_levels_is_refused():
    with pytest.raises(ValueError, match="multipliers"):
        ConvolutionalUNet(multipliers=())


def compare_compiled() -> dict[str, float]:
    """Differences of the compiled losses; in a process of its own, because type checks do not compile."""
    found, signal = {}, batch(latents())
    latent = LatentDiffusion(denoiser=MLP(width=32, num_blocks=1)).build(SHAPE)
    for name, model in (("hierarchical", build()), ("latent", latent)):
        (expected,) = model(signal).values()
        model.compile()
        for enabled in (True, False):  # training, and evaluation
            with torch.set_grad_enabled(enabled):
                (loss,) = model(signal).values()
            found[f"{name} {enabled}"] = abs(loss.item() / expected.item() - 1)
    assert not torch._dynamo.utils.counters["graph_break"] and not torch._dynamo.utils.counters["unimplemented"]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
def test_the_compiled_losses_are_the_same_without_falling_back():
    (differences,) = run_processes(compare_compiled, 1)
    assert max(differences.values()) <= 1e-5
