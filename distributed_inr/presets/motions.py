"""Motions: channels over time, by both families."""

from collections.abc import Callable
from dataclasses import replace

from distributed_inr.data.reader import Data
from distributed_inr.domains import Motion
from distributed_inr.experiment import Evaluation, Experiment, Sampling
from distributed_inr.models import D2CVAE, HierarchicalDiffusion, LayersOfExperts
from distributed_inr.models.encoders import PixelEncoder
from distributed_inr.models.latent_fitting import MetaLearning
from distributed_inr.models.layer_denoisers import MLPUNet
from distributed_inr.presets import chinr, ddmi
from distributed_inr.training.engine import Optim
from distributed_inr.training.loop import Training

_CLIMBING = Data(train="bundled:climbing/train", val="bundled:climbing/val", num_streams=8)


def ddmi_climbing() -> Experiment:
    """65 clips of 200 frames from two bundled takes of a climber; those of a third take are held out.

    python jobs/train_ddmi.py climbing

    Two cores: 7 minutes. 8.4 cm a joint from 260 numbers (linear interpolation from 318: 9.8 cm).
    """
    autoencoder_samples, prior_samples = 10_000, 300_000
    quick = ddmi.furniture_image()
    return replace(
        quick,
        name="climbing",
        domain=Motion(pad=16, content="positions"),
        data=_CLIMBING,
        autoencoder=D2CVAE(
            encoder=PixelEncoder(channels=4, multipliers=(1, 2, 4, 8, 16), num_blocks=1),
            latent_channels=2,
            decoder_channels=16,
            decoder_multipliers=(1, 2, 4),
            decoder_blocks=0,
            field_channels=32,
            readout_width=64,
            num_points=512,
            kl_weight=1.5e-5,
            kl_anneal_samples=autoencoder_samples * 9 // 10,
        ),
        autoencoder_training=replace(
            quick.autoencoder_training, num_samples=autoencoder_samples, checkpoint_every_samples=2_500
        ),
        prior_training=replace(
            quick.prior_training, num_samples=prior_samples, checkpoint_every_samples=prior_samples // 4
        ),
        evaluation=Evaluation(num_samples=128),
    )


def chinr_climbing() -> Experiment:
    """65 clips of 200 frames from two bundled takes of a climber; those of a third take are held out.

    python jobs/train_chinr.py climbing

    Two cores: 8 minutes. 8.9 cm a joint from 320 numbers (linear interpolation from 318: 9.8 cm).
    """
    autoencoder_samples, prior_samples = 20_000, 60_000
    images = chinr.furniture_image()
    return replace(
        images,
        name="climbing",
        domain=Motion(content="positions"),
        data=_CLIMBING,
        autoencoder=LayersOfExperts(
            num_layers=5,
            num_experts=64,
            width=64,
            latent_dim=64,
            num_points=512,
            omega=10.0,
            expert_scale="sqrt",
            fitting=MetaLearning(rate=6e-4, num_points=512),
        ),
        autoencoder_training=replace(
            images.autoencoder_training, num_samples=autoencoder_samples, checkpoint_every_samples=5_000
        ),
        prior_training=replace(
            images.prior_training, num_samples=prior_samples, checkpoint_every_samples=prior_samples // 4
        ),
        evaluation=Evaluation(num_samples=128),
    )


def chinr_amass() -> Experiment:
    """Layers of experts on 140 motions of AMASS (CHINR, appendix B.3), 200 frames each, 8 bits of condition.

    python jobs/prepare_data.py motion AMASS --layout amass --frames 200 --fps 30 --order file --start kept \
        --out data/amass
    python jobs/train_chinr.py amass --scale.num-workers 2

    Parameters: 0.836 M. Ours: not run.
    """
    motions = 140
    return Experiment(
        name="amass",
        family="chinr",
        domain=Motion(content="poses"),
        data=Data(train="data/amass/train", val="data/amass/val", num_loaders=2),
        autoencoder=LayersOfExperts(num_layers=5, num_experts=64, width=64, latent_dim=64),
        prior=HierarchicalDiffusion(condition_bits=8, denoiser=MLPUNet(width=512, num_blocks=4)),
        autoencoder_training=Training(
            num_samples=800 * motions, batch_size=32, optim=Optim(lr=1e-4), checkpoint_every_samples=100 * motions
        ),
        prior_training=Training(
            num_samples=1000 * motions,
            batch_size=32,
            optim=Optim(lr=1e-4),
            ema_half_life_samples=6_931 * 32,  # 0.9999 a step
            checkpoint_every_samples=100 * motions,
        ),
        sampling=Sampling(sampler="ancestral", steps=1000, count=16),
        evaluation=Evaluation(num_samples=140),
    )


DDMI: dict[str, Callable[[], Experiment]] = {"climbing": ddmi_climbing}
CHINR: dict[str, Callable[[], Experiment]] = {"climbing": chinr_climbing, "amass": chinr_amass}
