"""Latent diffusion: the objective, its samplers against closed forms, and that samples do not depend on their batch."""

import pytest
import torch

from distributed_inr.domains import Signal
from distributed_inr.models.denoisers import MLP, UNet
from distributed_inr.models.latent_diffusion import LatentDiffusion, LatentDiffusionModel
from distributed_inr.randomness import integers, normal, sample_seed

SHAPE = (3, 4, 4)
TINY = UNet(channels=16, multipliers=(1, 2), num_blocks=1, head_dim=8)
DENOISERS = [TINY, MLP(width=32, num_blocks=2)]
SEEDS = torch.tensor([sample_seed(0, i) for i in range(6)])


def batch(deviation: float = 0.1) -> Signal:
    mean = torch.randn(6, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Signal(
        key=["k"] * 6,
        seed=SEEDS,
        position=torch.zeros(6, dtype=torch.int64),
        inputs=torch.cat([mean, torch.full_like(mean, deviation)], dim=1),
        text=[""] * 6,
    )


def gaussian_oracle(model: LatentDiffusionModel, centre: torch.Tensor, spread: float) -> None:
    """Replace the network by the exact answer for latents distributed as N(centre, spread^2)."""

    class Oracle(torch.nn.Module):
        def forward(self, noisy, timesteps):
            level = model.chain.signal_level[timesteps].view(-1, 1, 1, 1)
            variance = level * spread**2 + 1 - level
            clean = centre + level.sqrt() * spread**2 / variance * (noisy - level.sqrt() * centre)
            noise = (noisy - level.sqrt() * clean) / (1 - level).sqrt()
            answers = {"x0": clean, "epsilon": noise, "v": level.sqrt() * noise - (1 - level).sqrt() * clean}
            return answers[model.cfg.prediction]

    model.denoiser = Oracle()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_loss_is_eq_10_by_hand(prediction):
    model = LatentDiffusion(denoiser=TINY, prediction=prediction).build(SHAPE)
    model.normalise_from(torch.tensor([0.5, 0.0, -1.0]), torch.tensor([1.0, 2.0, 0.5]))
    signal = batch()
    clean = signal.inputs[:, 0] + 0.1 * normal(SEEDS, "posterior", SHAPE)
    clean = (clean - torch.tensor([0.5, 0.0, -1.0]).view(3, 1, 1)) / torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1)
    timesteps, noise = integers(SEEDS, "timestep", (), 1000), normal(SEEDS, "noise", SHAPE)
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    level = torch.cumprod(1 - betas, 0)[timesteps].float().view(-1, 1, 1, 1)
    noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
    target = {"epsilon": noise, "x0": clean, "v": level.sqrt() * noise - (1 - level).sqrt() * clean}[prediction]
    expected = (model.denoiser(noisy, timesteps) - target).square().mean()
    torch.testing.assert_close(model(signal)["diffusion"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logit", [None, (-0.6, 0.8)])
def test_timesteps_are_uniform_or_logit_normal(logit):
    model = LatentDiffusion(denoiser=TINY, timestep_logit=logit).build((1, 2, 2))
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, noisy, timesteps, text):
            seen.append(timesteps)
            return noisy

    model.denoiser = Recorder()
    count = 4000
    seeds = torch.tensor([sample_seed(5, i) for i in range(count)])
    zeros = torch.zeros(count, dtype=torch.int64)
    model(
        Signal(key=["k"] * count, seed=seeds, position=zeros, inputs=torch.zeros(count, 2, 1, 2, 2), text=[""] * count)
    )
    part = (seen[0] + 0.5) / 1000
    if logit is None:
        assert part.mean().item() == pytest.approx(0.5, abs=0.02) and part.std().item() == pytest.approx(
            12**-0.5, abs=0.01
        )
    else:
        assert part.logit().mean().item() == pytest.approx(-0.6, abs=0.05)
        assert part.logit().std().item() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize(("sampler", "steps"), [("ancestral", 250), ("ddim", 100), ("dpm-solver++", 150)])
def test_samplers_with_the_exact_network_draw_the_gaussian_they_should(prediction, sampler, steps):
    model = LatentDiffusion(denoiser=TINY, prediction=prediction).build((1, 8, 8))
    gaussian_oracle(model, centre=torch.tensor(1.5), spread=0.5)
    seeds = torch.tensor([sample_seed(3, i) for i in range(200)])
    samples = model.sample(seeds, sampler=sampler, steps=steps)
    assert samples.mean().item() == pytest.approx(1.5, abs=0.03)
    assert samples.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm-solver++"])
def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(sampler):
    model = LatentDiffusion(denoiser=TINY).build(SHAPE).eval()
    gaussian_oracle(model, centre=torch.tensor(0.3), spread=1.0)
    together = model.sample(SEEDS, sampler=sampler, steps=10)
    alone = torch.cat([model.sample(SEEDS[i : i + 1], sampler=sampler, steps=10) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_latents_are_normalised_before_and_restored_after():
    model = LatentDiffusion(denoiser=TINY, prediction="x0").build(SHAPE)
    mean, deviation = torch.tensor([4.0, 0.0, -2.0]), torch.tensor([0.1, 1.0, 3.0])
    model.normalise_from(mean, deviation)
    gaussian_oracle(model, centre=torch.tensor(0.0), spread=1.0)
    samples = model.sample(torch.tensor([sample_seed(1, i) for i in range(400)]), sampler="ddim", steps=250)
    torch.testing.assert_close(samples.mean((0, 2, 3)), mean, atol=0.15, rtol=0)
    torch.testing.assert_close(samples.std((0, 2, 3)), deviation, atol=0, rtol=0.06)
    assert "latent_mean" in model.state_dict() and "chain.signal_level" not in model.state_dict()


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_one_set_of_latents_can_be_overfitted(denoiser):
    torch.manual_seed(0)
    model = LatentDiffusion(denoiser=denoiser, prediction="x0").build(SHAPE)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    signal, losses = batch(deviation=0.0), []
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(signal)["diffusion"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_denoisers_use_every_weight_and_keep_samples_apart(denoiser):
    torch.manual_seed(0)
    network = denoiser.build(SHAPE)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # they start with zeros, behind which nothing has a gradient
    noisy, timesteps = torch.randn(4, *SHAPE), torch.tensor([0, 300, 300, 999])
    together = network(noisy, timesteps)
    assert together.shape == noisy.shape
    torch.testing.assert_close(network(noisy[1:2], timesteps[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
    assert (network(noisy, timesteps.flip(0)) - together)[0].abs().max() > 1e-3
    together.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="latents of a multiple of 8"):
        LatentDiffusion(denoiser=UNet(channels=32, multipliers=(1, 1, 1, 1))).build(SHAPE)
    with pytest.raises(ValueError, match="channels=20 times multiplier 1 must be a multiple of"):
        UNet(channels=20, multipliers=(1,))
    with pytest.raises(ValueError, match=r"sampling.steps=2000 must lie in 1..1000"):
        LatentDiffusion(denoiser=TINY).build(SHAPE).sample(SEEDS, sampler="ddim", steps=2000)
