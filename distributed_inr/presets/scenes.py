"""Scenes: radiance fields, by both families."""

from collections.abc import Callable
from dataclasses import replace

from distributed_inr.data.reader import Data
from distributed_inr.domains import Scene
from distributed_inr.experiment import Evaluation, Experiment, Sampling
from distributed_inr.models import D2CVAE, HierarchicalDiffusion, LatentDiffusion, LayersOfExperts
from distributed_inr.models.denoisers import UNet
from distributed_inr.models.encoders import PointEncoder
from distributed_inr.models.latent_fitting import AutoDecoding
from distributed_inr.models.layer_denoisers import MLPUNet
from distributed_inr.presets import chinr, ddmi
from distributed_inr.training.engine import Optim
from distributed_inr.training.loop import Training

_FURNITURE = Data(train="bundled:furniture-scene/train", val="bundled:furniture-scene/val", num_streams=8)
_CARS = 2_458
"""Training objects of SRN's cars, with 50 views of 128 pixels each."""


def ddmi_furniture_scene() -> Experiment:
    """Radiance fields of 29 chairs, tables and sofas from 24 views each; 8 more, of other names, are held out.

    python jobs/train_ddmi.py furniture-scene

    Two cores: 10 minutes. 20.9 dB on views kept back of training objects (their nearest training view: 13.7), 18.6 on
    held-out objects.
    """
    autoencoder_samples, prior_samples = 5_000, 16_000
    quick = ddmi.furniture_image()
    return replace(
        quick,
        name="furniture-scene",
        domain=Scene(cells=32, num_points=1024, samples_per_ray=24, render_samples=32),
        data=_FURNITURE,
        autoencoder=D2CVAE(
            encoder=PointEncoder(width=16, num_layers=3, channels=16, multipliers=(1, 2), num_blocks=1),
            latent_channels=8,
            decoder_channels=8,
            decoder_multipliers=(1, 2, 4),
            decoder_blocks=0,
            field_channels=16,
            readout_width=64,
            readout_blocks=3,
            num_points=256,
            kl_weight=1e-7,
            kl_anneal_samples=autoencoder_samples * 9 // 10,
            use_view=False,
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
        sampling=Sampling(count=8),
        evaluation=Evaluation(num_samples=16, batch_size=8),
    )


def ddmi_srn_cars() -> Experiment:
    """SRN's cars (DDMI, section 4.3).

    python jobs/prepare_data.py scene cars --layout srn --size 128 --out data/srn-cars
    python jobs/train_ddmi.py srn-cars --scale.num-workers 8

    Parameters: 15.4 M and 679 M. The released code has one field of 64 cells a side; ours decomposes it, as the paper
    does. Ours: not run.
    """
    epochs, rays = 4000, 1024
    return Experiment(
        name="srn-cars",
        domain=Scene(size=128, cells=64, view_size=128, num_views=50, num_points=4096, samples_per_ray=64),
        data=Data(train="data/srn-cars/train", val="data/srn-cars/val", num_loaders=4),
        autoencoder=D2CVAE(
            encoder=PointEncoder(width=64, channels=64, multipliers=(1, 2, 4), num_blocks=2),
            latent_channels=64,
            decoder_channels=64,
            decoder_multipliers=(1, 2, 4),
            decoder_blocks=2,
            readout_blocks=6,
            num_points=rays,
            # Published: 0.05 times the summed KL against the summed error of all values.
            kl_weight=0.05 / (3 * rays),
            kl_anneal_samples=epochs * _CARS * 9 // 10,
        ),
        prior=LatentDiffusion(denoiser=UNet(channels=256, multipliers=(1, 2, 4, 6))),
        autoencoder_training=Training(
            num_samples=epochs * _CARS,
            batch_size=40,
            optim=Optim(lr=5e-5, betas=(0.9, 0.99), warmup_samples=5 * _CARS),
            checkpoint_every_samples=100 * _CARS,
        ),
        prior_training=_paper_prior(),
        sampling=Sampling(sampler="ancestral", steps=1000, count=16),
        evaluation=Evaluation(num_samples=256),
    )


def chinr_furniture_scene() -> Experiment:
    """Radiance fields of 29 chairs, tables and sofas from 24 views each, in a bank of latents; 8 more are held out.

    python jobs/train_chinr.py furniture-scene

    Two cores: 6 minutes. 23.6 dB on views kept back of training objects (their nearest training view: 13.7), 17.6 on
    held-out objects.
    """
    autoencoder_samples, prior_samples = 20_000, 40_000
    images = chinr.furniture_image()
    return replace(
        images,
        name="furniture-scene",
        domain=Scene(samples_per_ray=20, render_samples=32, fit_rays=1024, num_points=1),
        data=_FURNITURE,
        autoencoder=LayersOfExperts(
            num_layers=5,
            num_experts=32,
            width=64,
            latent_dim=64,
            omega=12.0,
            expert_scale="sqrt",
            num_points=128,
            fitting=AutoDecoding(lr=1e-2, penalty=1e-4, encode_lr=1e-2, encode_steps=100),
        ),
        autoencoder_training=replace(
            images.autoencoder_training,
            num_samples=autoencoder_samples,
            optim=replace(images.autoencoder_training.optim, lr=3e-3),
            checkpoint_every_samples=autoencoder_samples // 4,
        ),
        prior_training=replace(
            images.prior_training, num_samples=prior_samples, checkpoint_every_samples=prior_samples // 4
        ),
        sampling=Sampling(count=8),
        evaluation=Evaluation(num_samples=16, batch_size=8),
    )


def chinr_srn_cars() -> Experiment:
    """Layers of experts on SRN's cars (CHINR, table 1: PSNR 26.2, SSIM 0.772, FID 77.9), in a bank of latents.

    python jobs/prepare_data.py scene cars --layout srn --size 128 --out data/srn-cars
    python jobs/train_chinr.py srn-cars --scale.num-workers 8

    Parameters: 4.492 M. Ours: not run.
    """
    return Experiment(
        name="srn-cars",
        family="chinr",
        domain=Scene(size=128, view_size=128, num_views=50, num_points=1, samples_per_ray=64),
        data=Data(train="data/srn-cars/train", val="data/srn-cars/val", num_loaders=4),
        autoencoder=LayersOfExperts(
            num_layers=6, num_experts=256, width=64, latent_dim=64, num_points=1024, fitting=AutoDecoding(lr=1e-4)
        ),
        prior=HierarchicalDiffusion(denoiser=MLPUNet(width=512, num_blocks=6)),
        autoencoder_training=Training(
            num_samples=1000 * _CARS, batch_size=8, optim=Optim(lr=1e-4), checkpoint_every_samples=25 * _CARS
        ),
        prior_training=replace(_paper_prior(), num_samples=1000 * _CARS, batch_size=32, optim=Optim(lr=1e-4)),
        sampling=Sampling(sampler="ancestral", steps=1000, count=16),
        evaluation=Evaluation(num_samples=256),
    )


def _paper_prior() -> Training:
    return Training(
        num_samples=3000 * _CARS,
        batch_size=96,
        optim=Optim(lr=1e-4, schedule="constant"),
        ema_half_life_samples=6_931 * 96,  # 0.9999 a step
        checkpoint_every_samples=100 * _CARS,
    )


DDMI: dict[str, Callable[[], Experiment]] = {"furniture-scene": ddmi_furniture_scene, "srn-cars": ddmi_srn_cars}
CHINR: dict[str, Callable[[], Experiment]] = {"furniture-scene": chinr_furniture_scene, "srn-cars": chinr_srn_cars}
