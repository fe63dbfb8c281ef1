"""Text in the priors: guidance against the paper's formula, cross-attention, and what does not influence what."""

import dataclasses

import pytest
import torch

from distributed_inr.domains import Signal
from distributed_inr.models import HierarchicalDiffusion, LatentDiffusion, LatentPrior
from distributed_inr.models.denoisers import MLP, UNet
from distributed_inr.models.layer_denoisers import ConvolutionalUNet, MLPUNet
from distributed_inr.models.text_conditioning import Guidance, TextCondition, guided
from distributed_inr.randomness import sample_seed

WIDTH = 6
SEEDS = torch.tensor([sample_seed(0, i) for i in range(4)])
PLANES, VECTORS = (3, 4, 4), (3, 24)
PRIORS = {
    "unet": (LatentDiffusion(denoiser=UNet(channels=16, multipliers=(1, 2), num_blocks=1, head_dim=8)), PLANES),
    "mlp": (LatentDiffusion(denoiser=MLP(width=32, num_blocks=2)), PLANES),
    "mlp-unet": (HierarchicalDiffusion(denoiser=MLPUNet(width=16, num_blocks=1)), VECTORS),
    "per-layer": (HierarchicalDiffusion(denoiser=MLPUNet(width=16, num_blocks=1), networks="per-layer"), VECTORS),
    "conv-unet": (HierarchicalDiffusion(denoiser=ConvolutionalUNet(channels=32, multipliers=(1, 1))), VECTORS),
}


def condition(count: int = 4, *, length: int = 5, seed: int = 0) -> TextCondition:
    """Prompts of 1, 2, ... tokens."""
    tokens = torch.randn(count, length, WIDTH, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(length) < torch.arange(1, count + 1).clamp(max=length)[:, None]
    return TextCondition(tokens * mask[..., None], mask)


def trained(kind: str) -> LatentPrior:
    """A prior all of whose weights matter."""
    cfg, shape = PRIORS[kind]
    torch.manual_seed(0)
    prior = cfg.settle(64, WIDTH).build(shape)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return prior.eval()


def batch(shape: tuple[int, ...], text: TextCondition) -> Signal:
    mean = torch.randn(4, 1, *shape, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(4, dtype=torch.int64)
    signal = Signal(key=["k"] * 4, seed=SEEDS, position=zeros, inputs=mean, text=[""] * 4)
    return dataclasses.replace(signal, text_tokens=text.tokens, text_mask=text.mask)


# --- the formula


def predict(noisy: torch.Tensor, timesteps: torch.Tensor, text: TextCondition) -> torch.Tensor:
    return noisy * 2 + text.tokens.sum((1, 2))[:, None] + timesteps[:, None] / 1000


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 0.5])
def test_guidance_is_the_papers_formula(scale: float):
    text, negative = condition(seed=1), condition(seed=2)
    noisy, timesteps = torch.randn(4, 7, generator=torch.Generator().manual_seed(3)), torch.full((4,), 500)
    denoise = guided(predict, Guidance(text, negative, scale=scale), count=4, num_timesteps=1000)
    conditional, empty = predict(noisy, timesteps, text), predict(noisy, timesteps, negative)
    by_hand = empty + scale * (conditional - empty)
    found = denoise(noisy, timesteps)
    assert torch.equal(found, {0.0: empty, 1.0: conditional}.get(scale, by_hand))


def test_guidance_takes_one_pass_over_both():
    calls = []

    def counting(noisy: torch.Tensor, timesteps: torch.Tensor, text: TextCondition) -> torch.Tensor:
        calls.append(len(noisy))
        return predict(noisy, timesteps, text)

    for scale in (0.0, 1.0, 3.0):
        guided(counting, Guidance(condition(), condition(length=9), scale), count=4, num_timesteps=9)(
            torch.zeros(4, 7), torch.zeros(4, dtype=torch.int64)
        )
    assert calls == [4, 4, 8]


def test_guidance_acts_inside_its_interval_alone():
    text, negative = condition(seed=1), condition(seed=2)
    denoise = guided(predict, Guidance(text, negative, 3.0, interval=(0.2, 0.6)), count=4, num_timesteps=1000)
    noisy = torch.zeros(4, 7)
    for t, inside in ((100, False), (200, True), (600, True), (601, False)):
        timesteps = torch.full((4,), t)
        conditional, empty = predict(noisy, timesteps, text), predict(noisy, timesteps, negative)
        expected = empty + 3 * (conditional - empty) if inside else conditional
        assert torch.equal(denoise(noisy, timesteps), expected)


def test_rescaling_brings_back_the_deviation_of_the_conditional_prediction():
    def scaled(noisy: torch.Tensor, timesteps: torch.Tensor, text: TextCondition) -> torch.Tensor:
        return noisy * text.tokens.sum((1, 2))[:, None]

    text, negative = condition(seed=1), condition(seed=2)
    noisy, timesteps = torch.randn(4, 7, generator=torch.Generator().manual_seed(3)), torch.zeros(4, dtype=torch.int64)
    parts = {
        rescale: guided(scaled, Guidance(text, negative, 4.0, rescale=rescale), count=4, num_timesteps=9)(
            noisy, timesteps
        )
        for rescale in (0.0, 0.5, 1.0)
    }
    conditional = scaled(noisy, timesteps, text)
    torch.testing.assert_close(parts[1.0].std(1), conditional.std(1))
    assert (parts[0.0].std(1) / conditional.std(1) - 1).abs().max() > 0.1
    torch.testing.assert_close(parts[0.5], (parts[0.0] + parts[1.0]) / 2)


# --- the networks


@pytest.mark.parametrize("kind", PRIORS)
def test_samples_follow_their_prompt_and_nothing_else(kind: str):
    prior, text, empty = trained(kind), condition(seed=1), condition(1, seed=2)
    negative = empty.rows(torch.zeros(4, dtype=torch.int64))

    def draw(guidance: Guidance, rows: slice = slice(None)) -> torch.Tensor:
        return prior.sample(SEEDS[rows], sampler="ddim", steps=4, guidance=guidance)

    with torch.no_grad():
        together = draw(Guidance(text, negative, scale=3.0))
        for index in range(4):
            one = slice(index, index + 1)
            alone = draw(Guidance(text.rows(one), negative.rows(one), scale=3.0), one)
            torch.testing.assert_close(alone, together[one], rtol=1e-4, atol=1e-4)
        # What lies where there is no token has no influence, nor how long the padding is.
        filled = TextCondition(torch.where(text.mask[..., None], text.tokens, 7.0), text.mask)
        longer = text.with_others(condition(length=9)).rows(slice(4))
        for other in (filled, longer):
            torch.testing.assert_close(draw(Guidance(other, negative, 3.0)), together, rtol=1e-4, atol=1e-4)
        # Other prompts draw other samples, of the same seeds; one row of guidance is for all.
        changed = draw(Guidance(condition(seed=5), negative, scale=3.0))
        assert (changed - together).abs().flatten(1).amax(1).min() > 1e-2
        torch.testing.assert_close(
            draw(Guidance(empty, empty, 1.0)), draw(Guidance(negative, negative, 1.0)), rtol=1e-4, atol=1e-4
        )
        # w = 0 leaves the prompt out, and w = 1 the negative one.
        torch.testing.assert_close(
            draw(Guidance(text, negative, 0.0)), draw(Guidance(negative, text, 1.0)), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", PRIORS)
def test_every_weight_of_a_prior_with_text_gets_a_gradient(kind: str):
    prior = trained(kind)
    sum(prior(batch(prior.latent_shape, condition())).values()).backward()
    without = [name for name, parameter in prior.named_parameters() if parameter.grad is None]
    assert not without
    text = [name for name in dict(prior.named_parameters()) if "text" in name or "attn2" in name]
    assert text and all(
        dict(prior.named_parameters())[name].grad.abs().sum() > 0 for name in text if "k_proj" not in name
    )


@pytest.mark.parametrize("kind", PRIORS)
def test_a_prior_without_text_has_the_weights_it_always_had(kind: str):
    cfg, shape = PRIORS[kind]
    plain, with_text = cfg.settle(64, None).build(shape), cfg.settle(64, WIDTH).build(shape)
    assert not [name for name in plain.state_dict() if "text" in name or "attn2" in name]
    assert sum(p.numel() for p in with_text.parameters()) > sum(p.numel() for p in plain.parameters())


def test_the_first_layers_do_not_depend_on_the_prompt_of_the_later_ones():
    prior, text, empty = trained("mlp-unet"), condition(seed=1), condition(seed=2)
    with torch.no_grad():
        first = prior.sample(SEEDS, sampler="ddim", steps=3, guidance=Guidance(text, empty, 3.0))
        varied = prior.sample(
            SEEDS + 1, sampler="ddim", steps=3, guidance=Guidance(empty, empty, 1.0), prefix=first[:, :1]
        )
    assert torch.equal(varied[:, :1], first[:, :1])
    assert (varied[:, 1:] - first[:, 1:]).abs().amax((1, 2)).min() > 1e-2
