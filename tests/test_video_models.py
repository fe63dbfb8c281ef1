"""Both families of models fit a clip, and an encoder's planes lie where it changes."""

import pytest
import torch
from tiny_clips import moving, record

from distributed_inr.domains import Signal, collate
from distributed_inr.domains.video import Video
from distributed_inr.evaluation.metrics import METRICS
from distributed_inr.models import D2CVAE, LayersOfExperts
from distributed_inr.models.encoders import ClipEncoder
from distributed_inr.models.latent_fitting import MetaLearning


def fit(model: torch.nn.Module, signal: Signal, *, steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(signal).values()).backward()
        optimizer.step()


def batch_of_one(domain: Video) -> Signal:
    return collate([domain.read(record(moving(domain.frames, domain.size)), 0)])


def error_of_baselines(domain: Video, signal: Signal) -> float:
    truth = domain.truth(signal)
    return max(METRICS["clip_psnr"](own, truth).item() for own in domain.naive(signal, numbers=0).values())


@pytest.mark.slow
def test_a_d2c_vae_fits_a_clip_that_is_asymmetric_in_x_y_and_t() -> None:
    torch.manual_seed(0)
    domain = Video(size=16, frames=8, flip=False)
    signal = batch_of_one(domain)
    model = D2CVAE(
        encoder=ClipEncoder(dim=16, depth=1, head_dim=8, patch=4),
        latent_channels=4,
        decoder_channels=16,
        decoder_multipliers=(1, 2),
        decoder_blocks=0,
        num_fields=2,
        field_channels=8,
        plane_mixing="concatenate",
        readout_width=32,
        readout_blocks=2,
        num_points=3000,
    ).build(domain)
    assert model.latent_shape == (4, 4 + 8 + 8, 4)
    fit(model, signal, steps=150, lr=5e-3)
    with torch.no_grad():
        found = model.decode(model.posterior(signal)[0]).render(16)
    assert METRICS["clip_psnr"](found, domain.truth(signal)).item() > error_of_baselines(domain, signal) + 3


@pytest.mark.slow
def test_layers_of_experts_fit_a_clip_that_is_asymmetric_in_x_y_and_t() -> None:
    torch.manual_seed(0)
    domain = Video(size=16, frames=8, flip=False)
    signal = batch_of_one(domain)
    model = LayersOfExperts(
        num_layers=4, num_experts=8, width=48, latent_dim=8, num_points=1000, omega=10.0, fitting=MetaLearning(rate=0.1)
    ).build(domain)
    fit(model, signal, steps=100, lr=2e-3)
    found = model.decode(model.posterior(signal)[0]).render(16).detach()
    assert METRICS["clip_psnr"](found, domain.truth(signal)).item() > error_of_baselines(domain, signal) + 3


def test_the_encoders_planes_lie_where_the_clip_changes() -> None:
    """A change at one place and time moves the latents' statistics most where it is, on all three planes."""
    torch.manual_seed(0)
    domain = Video(size=16, frames=8)
    model = D2CVAE(
        encoder=ClipEncoder(dim=16, depth=1, head_dim=8, patch=4), latent_channels=4, decoder_channels=16
    ).build(domain)
    plain, changed = torch.zeros(1, 3, 8, 16, 16), torch.zeros(1, 3, 8, 16, 16)
    changed[:, :, 6, 0:4, 8:12] = 3.0  # t = 6, the first row of patches, the third column
    stacks = [model.encoder(clip) for clip in (plain, changed)]
    before, after = (model.layout.planes(own, 1) for own in stacks)
    places = [(after[i] - before[i]).square().sum(1)[0].flatten().argmax().item() for i in range(3)]
    assert places == [0 * 4 + 2, 6 * 4 + 2, 6 * 4 + 0]  # (y, x), (t, x), (t, y)
