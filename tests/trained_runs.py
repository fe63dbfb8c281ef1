"""Real runs at tiny size, trained for a moment by the pipeline."""

import functools
from pathlib import Path

from tiny_run import tiny_experiment, write_pictures

from distributed_inr import pipeline
from distributed_inr.config import override
from distributed_inr.experiment import Experiment
from distributed_inr.presets.chinr import furniture_image

LAYERS, DIM, SIGNALS = 4, 6, 40


def tiny_chinr(folder: Path, *, name: str, condition_bits: int) -> Experiment:
    return override(
        furniture_image(),
        {
            "name": name,
            "output": str(folder / "runs"),
            "domain.size": 8,
            "domain.source_size": 16,
            "data.train": str(folder / "train"),
            "data.val": str(folder / "val"),
            "autoencoder.num_layers": LAYERS,
            "autoencoder.num_experts": 4,
            "autoencoder.width": 8,
            "autoencoder.latent_dim": DIM,
            "autoencoder.num_points": 32,
            "autoencoder.fitting.num_points": 32,
            "autoencoder.fitting.rate": 0.1,
            "autoencoder_training.num_samples": 64,
            "prior.denoiser.width": 8,
            "prior.denoiser.num_blocks": 1,
            "prior.condition_bits": condition_bits,
            "prior_training.num_samples": 256,
            "sampling.count": 2,
            "sampling.steps": 3,
            "evaluation.num_samples": 0,
            "evaluation.max_reconstructions": 2,
            "scale.compile": False,
            "scale.launcher": "none",
            "scale.engine": "accelerate",
            "scale.num_threads": 1,
        },
    )


@functools.cache
def sets(base: Path) -> Path:
    """A folder with `train` and `val`, which the runs lie beside."""
    folder = base / "trained"
    write_pictures(folder / "train", SIGNALS, seed=1, size=16)
    write_pictures(folder / "val", 5, seed=2, size=16)
    return folder


@functools.cache
def chinr(base: Path, *, name: str = "tiny", condition_bits: int = 2) -> Path:
    """A run folder of CHINR with everything that a training job leaves; made once for each `base`."""
    return pipeline.run(tiny_chinr(sets(base), name=name, condition_bits=condition_bits))["run"]


@functools.cache
def ddmi(base: Path) -> Path:
    """The same of DDMI, on pictures of 32 pixels and their mirrored copies, with nothing held out."""
    folder = sets(base)
    changes = {"name": "planes", "scale.launcher": "none", "scale.engine": "accelerate", "scale.num_threads": 1}
    changes |= {"data.train": str(folder / "large"), "data.val": None, "evaluation.num_samples": 0}
    write_pictures(folder / "large", 6, seed=3)
    return pipeline.run(override(tiny_experiment(folder), changes))["run"]
