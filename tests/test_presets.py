"""Every preset's own structure, at tiny width: it trains two steps, encodes and samples."""

from pathlib import Path

import pytest
import torch
from tiny_run import smooth_picture, write_pictures

from distributed_inr import pipeline
from distributed_inr.config import leaves, override, parse
from distributed_inr.generation import load
from distributed_inr.presets import PRESETS

TINY = {
    "domain.size": 32,
    "autoencoder_training.num_samples": 8,
    "autoencoder_training.batch_size": 4,
    "prior_training.num_samples": 8,
    "prior_training.batch_size": 4,
    "data.num_loaders": 0,
    "scale.engine": "accelerate",
    "scale.compile": False,
    "scale.launcher": "none",
    "sampling.count": 2,
    "sampling.steps": 2,
    "evaluation.num_samples": 0,
}
TINY_AUTOENCODERS = {
    "d2c-vae": {
        "autoencoder.encoder.channels": 8,
        "autoencoder.decoder_channels": 8,
        "autoencoder.latent_channels": 4,
        "autoencoder.field_channels": 8,
        "autoencoder.readout_width": 16,
    },
    "layers-of-experts": {
        "autoencoder.num_experts": 4,
        "autoencoder.width": 16,
        "autoencoder.latent_dim": 8,
        "autoencoder.num_points": 64,
        "autoencoder.fitting.rate": 0.1,
    },
}
TINY_DENOISERS = {
    "unet": {"prior.denoiser.channels": 8, "prior.denoiser.head_dim": 8},
    "mlp": {"prior.denoiser.width": 16},
    "mlp-unet": {"prior.denoiser.width": 16, "prior.denoiser.num_blocks": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [(family, name) for family in PRESETS for name in PRESETS[family]])
def test_every_preset_trains_encodes_and_samples(family: str, name: str, tmp_path: Path):
    preset = PRESETS[family][name]()
    assert (preset.family, preset.name) == (family, name)
    source_size = 32 * preset.domain.source_size // preset.domain.size
    for number, part in enumerate(("train", "val")):
        write_pictures(tmp_path / part, 6, seed=number, size=source_size)
    changes = {"output": str(tmp_path), "domain.source_size": source_size}
    changes |= {f"data.{part}": str(tmp_path / part) for part in ("train", "val")}
    changes |= TINY_AUTOENCODERS[preset.autoencoder.kind] | TINY_DENOISERS[preset.prior.denoiser.kind]
    made = pipeline.run(override(preset, TINY | changes))

    model = load(made["run"])
    samples = model.sample(2, steps=2).render(40)
    assert samples.shape == (2, 3, 40, 40) and samples.isfinite().all()
    assert not torch.equal(samples[0], samples[1])
    smooth_picture(7, 48).save(tmp_path / "mine.png")
    assert model.encode(tmp_path / "mine.png").render(32).isfinite().all()


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in PRESETS for name in PRESETS[family]])
def test_every_option_can_be_typed(family: str, name: str):
    preset, argv = PRESETS[family][name](), [name]
    for path, (_, value, _) in leaves(type(preset), preset).items():
        words = value if isinstance(value, tuple) else [value]
        argv += ["--" + path.replace("_", "-"), *("none" if word is None else str(word) for word in words)]
    assert parse(argv, PRESETS[family], default="", description="") == preset
