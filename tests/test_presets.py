"""Every preset's own structure, at tiny width: it trains two steps, encodes and samples."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import NAME, register
from tiny_domains import own_file, write_sets

from distributed_inr import pipeline
from distributed_inr.config import leaves, override, parse
from distributed_inr.domains import Image
from distributed_inr.generation import load
from distributed_inr.models import D2CVAE
from distributed_inr.models.text import OpenCLIP
from distributed_inr.presets import PRESETS

TINY = {
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
TINY_DOMAINS = {
    "image": {"domain.size": 32},
    "shape": {"domain.size": 32, "domain.num_points": 40},
    "video": {"domain.size": 64, "domain.frames": 8},
    "scene": {
        "domain.size": 16,
        "domain.view_size": 16,
        "domain.cells": 32,
        "domain.num_views": 4,
        "domain.hold_out_every": 2,
        "domain.num_points": 40,
        "domain.samples_per_ray": 6,
        "domain.render_samples": 8,
        "domain.fit_rays": 64,
        "domain.orbit_views": 3,
    },
    "motion": {"domain.size": 32, "domain.channels": 36},
}
TINY_ENCODERS = {
    "pixels": {"autoencoder.encoder.channels": 8},
    "points": {"autoencoder.encoder.channels": 8, "autoencoder.encoder.width": 8},
    "clip": {"autoencoder.encoder.dim": 8, "autoencoder.encoder.depth": 1, "autoencoder.encoder.head_dim": 4},
}
TINY_AUTOENCODERS = {
    "d2c-vae": {
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
    },
}
TINY_FITTINGS = {
    "meta-learning": {"autoencoder.fitting.rate": 0.1},
    "auto-decoding": {"autoencoder.fitting.encode_steps": 3},
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
    changes: dict[str, Any] = TINY | {"output": str(tmp_path)}
    changes |= {f"data.{part}": str(tmp_path / part) for part in ("train", "val")}
    changes |= TINY_DOMAINS[preset.domain.kind] | TINY_DENOISERS[preset.prior.denoiser.kind]
    changes |= TINY_AUTOENCODERS[preset.autoencoder.kind]
    if isinstance(preset.autoencoder, D2CVAE):
        changes |= TINY_ENCODERS[preset.autoencoder.encoder.kind]
    else:
        changes |= TINY_FITTINGS[preset.autoencoder.fitting.kind]
    if isinstance(preset.domain, Image):
        changes["domain.source_size"] = 32 * preset.domain.source_size // preset.domain.size
    if isinstance(preset.text, OpenCLIP):  # whose weights would have to be downloaded
        register(tmp_path)
        changes |= {"text.model": NAME, "text.pretrained": None}
    experiment = override(preset, changes)
    write_sets(experiment.domain, tmp_path, captioned=preset.text is not None)
    made = pipeline.run(experiment)

    model = load(made["run"])
    samples = model.sample(2, steps=2).render(20)
    assert len(samples) == 2 and samples.isfinite().all()
    assert not torch.equal(samples[0], samples[1])
    if preset.text is not None:
        assert model.sample(text=[f"a {model.domain.kind}", "a new one"], steps=2).render(20).isfinite().all()
    assert model.encode(own_file(model.domain, tmp_path)).render(20).isfinite().all()


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in PRESETS for name in PRESETS[family]])
def test_every_option_can_be_typed(family: str, name: str):
    preset, argv = PRESETS[family][name](), [name]
    for path, (_, value, _) in leaves(type(preset), preset).items():
        words = value if isinstance(value, tuple) else [value]
        argv += ["--" + path.replace("_", "-"), *("none" if word is None else str(word) for word in words)]
    assert parse(argv, PRESETS[family], default="", description="") == preset


WITH_COUNTS = [
    (family, name)
    for family in PRESETS
    for name in PRESETS[family]
    if "Parameters: " in str(PRESETS[family][name].__doc__)
]


@pytest.mark.parametrize(("family", "name"), WITH_COUNTS)
def test_presets_have_as_many_parameters_as_they_say(family: str, name: str):
    told = re.search(
        r"Parameters: ([\d.,]+(?: M \+ [\d.,]+)*) M(?: and ([\d.,]+) M)?", str(PRESETS[family][name].__doc__)
    )
    assert told is not None
    experiment = PRESETS[family][name]()
    with torch.device("meta"):
        autoencoder = experiment.autoencoder.build(experiment.domain)
        parts = [(autoencoder, told[1].split(" M + "))]
        if told[2]:
            parts.append((experiment.prior.build(autoencoder.latent_shape), [told[2]]))
    for module, terms in parts:
        count = sum(parameter.numel() for parameter in module.parameters()) / 1e6
        numbers = [term.replace(",", "") for term in terms]
        rounding = sum(0.501 * 10.0 ** -len(number.partition(".")[2]) for number in numbers)
        assert abs(count - sum(map(float, numbers))) <= rounding, (count, terms)
