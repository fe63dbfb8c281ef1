"""A real run at tiny size: prepared pictures, trained-shape models with random weights, saved as a job saves them."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PillowImage
from safetensors.torch import save_file

from distributed_inr.config import override, to_json
from distributed_inr.data.reader import Data
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.domains import Image
from distributed_inr.experiment import Evaluation, Experiment, Sampling
from distributed_inr.models.d2c_vae import D2CVAE
from distributed_inr.models.denoisers import UNet
from distributed_inr.models.encoders import PixelEncoder
from distributed_inr.models.latent_diffusion import LatentDiffusion
from distributed_inr.training.loop import Training


def tiny_experiment(folder: Path) -> Experiment:
    return Experiment(
        name="tiny",
        output=str(folder / "runs"),
        domain=Image(size=16, source_size=32),
        data=Data(train=str(folder / "train"), val=str(folder / "val")),
        autoencoder=D2CVAE(
            encoder=PixelEncoder(channels=8, multipliers=(1, 2, 2), num_blocks=1),
            latent_channels=4,
            decoder_channels=8,
            decoder_multipliers=(1, 2, 2),
            decoder_blocks=0,
            field_channels=8,
            readout_width=16,
            readout_blocks=3,
            num_points=64,
        ),
        prior=LatentDiffusion(denoiser=UNet(channels=8, multipliers=(1,), num_blocks=1, head_dim=8)),
        autoencoder_training=Training(num_samples=8),
        prior_training=Training(num_samples=8),
        sampling=Sampling(count=4, steps=4),
        evaluation=Evaluation(num_samples=8, batch_size=5),
    )


def write_run(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A run folder holding config.json and both models; `changes` are dotted paths with __ for the dots."""
    experiment = override(tiny_experiment(folder), {name.replace("__", "."): value for name, value in changes.items()})
    torch.manual_seed(0)
    autoencoder = experiment.autoencoder.build(experiment.domain)
    prior = experiment.prior.build(autoencoder.latent_shape)
    for module in (autoencoder, prior):  # blocks start as their shortcuts: let every weight matter
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    channels = autoencoder.latent_shape[0]
    prior.normalise_from(torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels))
    run = experiment.folder
    for name, module in (("autoencoder", autoencoder), ("prior", prior)):
        (run / name).mkdir(parents=True)
        weights = {key: value.to(dtype).contiguous() for key, value in module.state_dict().items()}
        save_file(weights, run / name / "model.safetensors")
    (run / "config.json").write_text(to_json(experiment))
    return run


def write_pictures(folder: Path, count: int, *, seed: int, size: int = 32, shard_samples: int = 100) -> None:
    """Shards of smooth random pictures."""
    writer = ShardWriter(folder, domain="image", protocol={"made": "for tests"}, shard_samples=shard_samples)
    for number in range(count):
        file = io.BytesIO()
        smooth_picture(seed * 1000 + number, size).save(file, "PNG")
        writer.write({"__key__": f"{number:04d}", "png": file.getvalue()})
    writer.close()


def smooth_picture(seed: int, size: int = 32) -> PillowImage.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return PillowImage.fromarray(coarse).resize((size, size), PillowImage.Resampling.BICUBIC)
