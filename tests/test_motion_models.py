"""Both families of models fit a motion."""

import dataclasses

import pytest
import torch
from tiny_motions import CHANNELS, DOMAIN, FRAMES, motion_between, signals

from distributed_inr.evaluation.metrics import METRICS
from distributed_inr.models import D2CVAE, LayersOfExperts
from distributed_inr.models.encoders import PixelEncoder
from distributed_inr.models.latent_fitting import MetaLearning

VAE = D2CVAE(
    encoder=PixelEncoder(channels=8, multipliers=(1, 2, 2, 2), num_blocks=1),
    latent_channels=4,
    decoder_channels=8,
    decoder_multipliers=(1, 2, 2),
    decoder_blocks=0,
    field_channels=8,
    readout_width=16,
    num_points=120,
    kl_weight=0.0,
)
EXPERTS = LayersOfExperts(
    num_layers=3, num_experts=4, width=32, latent_dim=8, num_points=120, omega=10.0, fitting=MetaLearning(rate=1e-3)
)


@pytest.mark.parametrize("cfg", [VAE, EXPERTS], ids=["d2c-vae", "layers-of-experts"])
def test_a_model_fits_a_motion(cfg):
    torch.manual_seed(0)
    domain = dataclasses.replace(DOMAIN, mean=(0.0,) * CHANNELS, deviation=(0.7,) * CHANNELS, order=None)
    model, signal = cfg.build(domain), signals(1, domain)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = sum(model(signal).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        field = model.decode(model.posterior(signal)[0])
        found, finer = domain.render(field, FRAMES), domain.render(field, 2 * FRAMES)
    truth = domain.truth(signal)
    assert METRICS["rms_error"](found, truth).item() < 0.3 * truth.std().item()
    between = torch.from_numpy(motion_between(2 * FRAMES))[None]
    assert METRICS["rms_error"](finer, between).item() < 0.35 * truth.std().item()
