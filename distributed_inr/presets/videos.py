"""Videos: colour over the plane and time, by both families."""

from collections.abc import Callable
from dataclasses import replace

from distributed_inr.data.reader import Data
from distributed_inr.domains import Video
from distributed_inr.experiment import Evaluation, Experiment, Sampling
from distributed_inr.models import D2CVAE, LatentDiffusion, LayersOfExperts
from distributed_inr.models.denoisers import UNet
from distributed_inr.models.encoders import ClipEncoder
from distributed_inr.models.latent_fitting import MetaLearning
from distributed_inr.presets import chinr, ddmi
from distributed_inr.training.engine import Optim
from distributed_inr.training.loop import Training

_CONCERT = Data(train="bundled:concert/train", val="bundled:concert/val", num_streams=8)
_SKY = 35_000
"""About so many clips of 16 frames in SkyTimelapse's training part."""


def ddmi_concert() -> Experiment:
    """49 clips of a concert, 16 frames of 64 pixels; 9 later ones are held out.

    python jobs/train_ddmi.py concert

    Two cores: 9 minutes. Held out 24.6 dB (mean frame: 22.9 dB, first frame: 20.0 dB).
    """
    autoencoder_samples, prior_samples = 5_600, 24_000
    quick = ddmi.furniture_image()
    return replace(
        quick,
        name="concert",
        domain=Video(size=64, frames=16, flip=False),
        data=_CONCERT,
        autoencoder=D2CVAE(
            # Wider decoders learn more from a clip, but fewer clips meanwhile (LOG.md).
            encoder=ClipEncoder(dim=32, depth=1, head_dim=32, patch=4),
            latent_channels=8,
            decoder_channels=8,
            decoder_multipliers=(1, 2, 4),
            decoder_blocks=0,
            field_channels=16,
            plane_mixing="concatenate",
            readout_width=64,
            num_points=4096,
            kl_weight=1e-7,
            kl_anneal_samples=autoencoder_samples * 9 // 10,
        ),
        autoencoder_training=replace(
            quick.autoencoder_training,
            num_samples=autoencoder_samples,
            batch_size=2,
            optim=replace(quick.autoencoder_training.optim, lr=4e-3, warmup_samples=200),
            ema_half_life_samples=200,
            checkpoint_every_samples=autoencoder_samples // 4,
        ),
        prior_training=replace(
            quick.prior_training,
            num_samples=prior_samples,
            batch_size=64,
            optim=replace(quick.prior_training.optim, lr=1e-3),
            ema_half_life_samples=5_000,
            checkpoint_every_samples=prior_samples // 4,
        ),
        evaluation=Evaluation(num_samples=64),
    )


def ddmi_skytimelapse() -> Experiment:
    """SkyTimelapse, 16 frames of 256 pixels (DDMI, table 5: FVD 66.25).

    python jobs/prepare_data.py video sky_timelapse --layout skytimelapse --size 256 --out data/skytimelapse
    python jobs/train_ddmi.py skytimelapse --scale.num-workers 8

    Parameters: 33.0 M and 678 M (published: 88.6 M and 768 M: as for shapes, weights are shared by the planes). The
    published model adds LPIPS on a random frame, and critics of frames and clips; ours has neither.

    Ours: not run.
    """
    epochs, size, frames = 200, 256, 16
    return Experiment(
        name="skytimelapse",
        domain=Video(size=size, frames=frames, likelihood="laplace"),
        data=Data(train="data/skytimelapse/train", val="data/skytimelapse/val", num_loaders=4),
        autoencoder=D2CVAE(
            encoder=ClipEncoder(),
            latent_channels=64,
            decoder_channels=64,
            decoder_multipliers=(1, 2, 4, 4),
            decoder_blocks=2,
            plane_mixing="concatenate",
            num_points=size * size,
            # Published: 0.1 times the summed KL against the summed error of all values.
            kl_weight=0.1 / (3 * size * size),
            kl_anneal_samples=epochs * _SKY * 9 // 10,
        ),
        prior=LatentDiffusion(denoiser=UNet(channels=256, multipliers=(1, 2, 4, 6), head_dim=64)),
        autoencoder_training=Training(
            num_samples=epochs * _SKY,
            batch_size=40,
            optim=Optim(lr=1e-4, betas=(0.9, 0.99), warmup_samples=5 * _SKY),
            checkpoint_every_samples=10 * _SKY,
        ),
        prior_training=Training(
            num_samples=1500 * _SKY,
            batch_size=96,
            optim=Optim(lr=1e-4, schedule="constant"),
            ema_half_life_samples=6_931 * 96,  # 0.9999 a step
            checkpoint_every_samples=50 * _SKY,
        ),
        sampling=Sampling(sampler="ancestral", steps=1000, count=16),
        evaluation=Evaluation(num_samples=2_048),
    )


def chinr_concert() -> Experiment:
    """49 clips of a concert, 16 frames of 64 pixels; 9 later ones are held out.

    python jobs/train_chinr.py concert

    Two cores: 6 minutes. Held out 19.8 dB: blurred, and below the mean frame's 22.9 dB (LOG.md).
    """
    autoencoder_samples, prior_samples = 12_000, 60_000
    images = chinr.furniture_image()
    return replace(
        images,
        name="concert",
        domain=Video(size=64, frames=16, flip=False),
        data=_CONCERT,
        autoencoder=LayersOfExperts(
            num_layers=5,
            num_experts=64,
            width=64,
            latent_dim=64,
            num_points=1024,
            omega=15.0,
            expert_scale="sqrt",
            fitting=MetaLearning(rate=6e-4, num_points=1024),
        ),
        autoencoder_training=replace(
            images.autoencoder_training, num_samples=autoencoder_samples, checkpoint_every_samples=3_000
        ),
        prior_training=replace(
            images.prior_training, num_samples=prior_samples, checkpoint_every_samples=prior_samples // 4
        ),
        evaluation=Evaluation(num_samples=64),
    )


DDMI: dict[str, Callable[[], Experiment]] = {"concert": ddmi_concert, "skytimelapse": ddmi_skytimelapse}
CHINR: dict[str, Callable[[], Experiment]] = {"concert": chinr_concert}
