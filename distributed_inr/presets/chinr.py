"""CHINR: layers of experts with hierarchical diffusion over their latents, and its peers in the same harness."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from distributed_inr.data.reader import Data
from distributed_inr.domains import Image
from distributed_inr.experiment import Evaluation, Experiment, Sampling
from distributed_inr.models import HierarchicalDiffusion, LatentDiffusion, LayersOfExperts
from distributed_inr.models.denoisers import MLP
from distributed_inr.models.latent_fitting import MetaLearning
from distributed_inr.models.layer_denoisers import MLPUNet
from distributed_inr.training.engine import Optim, Scale
from distributed_inr.training.loop import Training


def furniture_image() -> Experiment:
    """Chairs, tables and sofas from 816 bundled views of 34 objects; three more objects are held out.

    python jobs/train_chinr.py

    Two cores: 10 minutes. 20.5 dB on held-out views from 320 numbers (20.64, 20.45, 20.51 by seed; bicubic
    19.02). 0.844 M parameters.
    """
    autoencoder_samples, prior_samples = 36_000, 160_000
    return Experiment(
        name="furniture-image",
        family="chinr",
        domain=Image(size=64, source_size=128, scales=(1.0,), scale_weights=(1.0,), flip=False),
        data=Data(train="bundled:furniture/train", val="bundled:furniture/val", num_streams=8),
        autoencoder=LayersOfExperts(
            num_layers=5,
            num_experts=64,
            width=64,
            latent_dim=64,
            num_points=512,
            # With SIREN's frequency of 30, or experts that start smaller, larger steps make the inner loop chaotic
            # (LOG.md).
            omega=15.0,
            expert_scale="sqrt",
            fitting=MetaLearning(rate=6e-4, num_points=512),
        ),
        prior=HierarchicalDiffusion(denoiser=MLPUNet(width=256, num_blocks=3)),
        autoencoder_training=Training(
            num_samples=autoencoder_samples,
            batch_size=8,
            optim=Optim(lr=1e-3, betas=(0.9, 0.99), warmup_samples=1_600),
            log_every_samples=800,
            checkpoint_every_samples=9_000,
        ),
        prior_training=Training(
            num_samples=prior_samples,
            batch_size=64,
            optim=Optim(lr=1e-3, warmup_samples=6_400),
            ema_half_life_samples=10_000,
            log_every_samples=12_800,
            checkpoint_every_samples=40_000,
            keep_checkpoints=4,
        ),
        scale=Scale(zero_stage=1, compile=True),
        sampling=Sampling(count=16),
        evaluation=Evaluation(num_samples=256),
    )


def furniture_image_short() -> Experiment:
    """The bundled preset in a few minutes of one core, for sweeps; not compiled, which would take a minute of them.

    python jobs/tune_loe.py
    python jobs/tune_hcdm.py
    """
    ours = furniture_image()
    return replace(
        ours,
        name="furniture-image-short",
        autoencoder_training=replace(
            ours.autoencoder_training, num_samples=9_000, checkpoint_every_samples=1_000, keep_checkpoints=1
        ),
        prior_training=replace(
            ours.prior_training, num_samples=30_000, checkpoint_every_samples=10_000, keep_checkpoints=1
        ),
        scale=replace(ours.scale, compile=False),
    )


def furniture_image_mnif() -> Experiment:
    """mNIF in the same harness: one latent of as many numbers gates all layers, as many parameters, joint diffusion.

    python jobs/train_chinr.py furniture-image-mnif

    Fits as well as ours at equal steps, within the seeds (LOG.md). 0.839 M parameters.
    """
    return _peer("furniture-image-mnif", modulation="flat", num_experts=58)


def furniture_image_functa() -> Experiment:
    """Functa in the same harness: one latent of as many numbers moves the biases of one network, joint diffusion.

    python jobs/train_chinr.py furniture-image-functa

    0.215 M parameters: as many as ours, 0.844 M, take a width of 357, and thirty times the work.
    """
    fitting = MetaLearning(rate=0.3, num_points=512)
    return _peer("furniture-image-functa", modulation="shift", width=128, fitting=fitting)


def _peer(name: str, **changes: Any) -> Experiment:
    ours = furniture_image()
    assert isinstance(ours.autoencoder, LayersOfExperts)
    num_layers, latent_dim = ours.autoencoder.num_layers, ours.autoencoder.latent_dim
    return replace(
        ours,
        name=name,
        autoencoder=replace(ours.autoencoder, latent_dim=num_layers * latent_dim, **changes),
        prior=LatentDiffusion(denoiser=MLP(width=400, num_blocks=4), prediction="v", timestep_logit=(-0.6, 0.8)),
    )


def celebahq_64() -> Experiment:
    """Layers of experts on CelebA-HQ at 64 pixels (CHINR, table 1: 34.9 dB, SSIM 0.963, FID 13.4).

    python jobs/prepare_data.py image celeba_hq --layout celebahq --size 128 --out data/celebahq-64
    python jobs/train_chinr.py celebahq-64 --scale.num-workers 8

    Parameters: 32.346 M. Ours: not run.
    """
    images = 28_000
    return Experiment(
        name="celebahq-64",
        family="chinr",
        domain=Image(size=64, source_size=128, scales=(1.0,), scale_weights=(1.0,), flip=False),
        data=Data(train="data/celebahq-64/train", val="data/celebahq-64/val", num_loaders=4),
        autoencoder=LayersOfExperts(num_layers=7, num_experts=384, width=128, latent_dim=128),
        prior=HierarchicalDiffusion(denoiser=MLPUNet(width=1024, num_blocks=6)),
        autoencoder_training=Training(
            num_samples=800 * images,
            batch_size=32,
            optim=Optim(lr=1e-4),
            checkpoint_every_samples=10 * images,
        ),
        prior_training=Training(
            num_samples=1000 * images,
            batch_size=32,
            optim=Optim(lr=1e-4),
            # 0.9999 a step has its half-life at 6,931 steps.
            ema_half_life_samples=6_931 * 32,
            checkpoint_every_samples=50 * images,
        ),
        sampling=Sampling(sampler="ancestral", steps=1000, count=64),
        evaluation=Evaluation(num_samples=10_000),
    )


def celebahq_64_l5() -> Experiment:
    """`celebahq-64` with five layers, as the paper's figures show them.

    python jobs/train_chinr.py celebahq-64-l5 --scale.num-workers 8

    Ours: not run.
    """
    seven = celebahq_64()
    assert isinstance(seven.autoencoder, LayersOfExperts)
    return replace(seven, name="celebahq-64-l5", autoencoder=replace(seven.autoencoder, num_layers=5))


PRESETS: dict[str, Callable[[], Experiment]] = {
    preset.__name__.replace("_", "-"): preset
    for preset in (
        furniture_image,
        furniture_image_short,
        furniture_image_mnif,
        furniture_image_functa,
        celebahq_64,
        celebahq_64_l5,
    )
}
