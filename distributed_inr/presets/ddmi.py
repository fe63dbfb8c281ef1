"""DDMI: the D2C-VAE with diffusion over its latents."""

from collections.abc import Callable
from dataclasses import replace

from distributed_inr.data.reader import Data
from distributed_inr.domains import Image
from distributed_inr.experiment import Evaluation, Experiment, Sampling
from distributed_inr.models import D2CVAE, LatentDiffusion
from distributed_inr.models.denoisers import MLP, UNet
from distributed_inr.models.encoders import PixelEncoder
from distributed_inr.training.engine import Optim, Scale
from distributed_inr.training.loop import Training


def furniture_image() -> Experiment:
    """Chairs, tables and sofas from 816 bundled views of 34 objects; three more objects are held out. The quick
    start's.

    python jobs/train_ddmi.py
    """
    autoencoder_samples, prior_samples = 22_000, 900_000
    return Experiment(
        name="furniture-image",
        domain=Image(size=64, source_size=128, flip=False),  # mirrored views are twice as much to learn (LOG.md)
        data=Data(train="bundled:furniture/train", val="bundled:furniture/val", num_streams=8),
        autoencoder=D2CVAE(
            encoder=PixelEncoder(channels=8, multipliers=(1, 2, 4, 8), num_blocks=1),
            latent_channels=4,
            decoder_channels=16,
            decoder_multipliers=(1, 2, 4),
            decoder_blocks=0,
            field_channels=32,
            readout_width=64,
            num_points=512,
            kl_weight=1.5e-5,
            kl_anneal_samples=autoencoder_samples * 9 // 10,
        ),
        prior=LatentDiffusion(
            # For latents of 256 numbers and minutes on a CPU: a U-Net sees a fifth of the samples meanwhile (LOG.md).
            denoiser=MLP(width=544, num_blocks=4),
            prediction="v",  # looked clearer than epsilon in short runs (LOG.md)
            timestep_logit=(-0.6, 0.8),
        ),
        autoencoder_training=Training(
            num_samples=autoencoder_samples,
            batch_size=8,
            optim=Optim(lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_samples=800),
            ema_half_life_samples=500,
            log_every_samples=800,
            checkpoint_every_samples=5_500,
        ),
        prior_training=Training(
            num_samples=prior_samples,
            batch_size=256,
            optim=Optim(lr=2e-3, betas=(0.9, 0.99), warmup_samples=6_400),
            ema_half_life_samples=20_000,
            log_every_samples=12_800,
            checkpoint_every_samples=225_000,
            keep_checkpoints=4,
        ),
        scale=Scale(zero_stage=1),
        sampling=Sampling(count=16),
        evaluation=Evaluation(num_samples=256),
    )


def furniture_image_short() -> Experiment:
    """The quick start in a few minutes of one core, for sweeps.

    python jobs/tune_ddmi.py
    """
    quick = furniture_image()
    autoencoder_samples, prior_samples = 8_000, 150_000
    return replace(
        quick,
        name="furniture-image-short",
        autoencoder=replace(quick.autoencoder, kl_anneal_samples=autoencoder_samples * 9 // 10),
        autoencoder_training=replace(
            quick.autoencoder_training, num_samples=autoencoder_samples, checkpoint_every_samples=2_000
        ),
        prior_training=replace(
            quick.prior_training, num_samples=prior_samples, checkpoint_every_samples=50_000, keep_checkpoints=1
        ),
    )


def furniture_image_long() -> Experiment:
    """The quick start for longer: a larger autoencoder, and nine times as many samples of the prior.

    python jobs/train_ddmi.py furniture-image-long

    Ours: 25.75 dB on held-out views at 64 pixels, KID 0.68, one CPU core, about 100 minutes, 57dfe54; its samples are
    close to training views. Bundled as examples/runs/furniture-image-long.
    """
    quick = furniture_image()
    autoencoder_samples, prior_samples = 72_000, 8_000_000
    return replace(
        quick,
        name="furniture-image-long",
        autoencoder=replace(
            quick.autoencoder,
            encoder=PixelEncoder(channels=16, multipliers=(1, 2, 4, 4), num_blocks=1),
            decoder_channels=24,
            num_points=1024,
            kl_anneal_samples=autoencoder_samples * 9 // 10,
        ),
        autoencoder_training=replace(
            quick.autoencoder_training,
            num_samples=autoencoder_samples,
            optim=replace(quick.autoencoder_training.optim, lr=2e-3, warmup_samples=1_600),
            ema_half_life_samples=2_000,
            checkpoint_every_samples=9_000,
        ),
        prior_training=replace(
            quick.prior_training,
            num_samples=prior_samples,
            ema_half_life_samples=200_000,
            log_every_samples=64_000,
            checkpoint_every_samples=prior_samples // 8,
        ),
    )


def furniture_all() -> Experiment:
    """Views of all 175 bundled objects (3,792 to train on, 408 held out), for longer runs.

    python jobs/train_ddmi.py furniture-all

    Ours: not run.
    """
    autoencoder_samples, prior_samples = 400_000, 4_000_000
    return Experiment(
        name="furniture-all",
        domain=Image(size=64, source_size=128),
        data=Data(train="bundled:furniture-all/train", val="bundled:furniture-all/val", num_streams=8),
        autoencoder=D2CVAE(
            encoder=PixelEncoder(channels=32, multipliers=(1, 2, 4, 8), num_blocks=1),
            latent_channels=8,
            decoder_channels=32,
            decoder_multipliers=(1, 2, 4, 8),
            decoder_blocks=1,
            field_channels=32,
            readout_width=128,
            num_points=2048,
            kl_weight=1e-6,
            kl_anneal_samples=autoencoder_samples * 9 // 10,
        ),
        prior=LatentDiffusion(denoiser=UNet(channels=128, multipliers=(1, 2, 2), num_blocks=2)),
        autoencoder_training=Training(
            num_samples=autoencoder_samples,
            batch_size=32,
            optim=Optim(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_samples=8_000),
            ema_half_life_samples=8_000,
            checkpoint_every_samples=40_000,
        ),
        prior_training=Training(
            num_samples=prior_samples,
            batch_size=64,
            optim=Optim(lr=5e-4, betas=(0.9, 0.99), warmup_samples=32_000),
            ema_half_life_samples=100_000,
            checkpoint_every_samples=200_000,
        ),
    )


def afhqv2_cat_256() -> Experiment:
    """AFHQv2 cats at 256 pixels (DDMI, table 4: FID 5.88 / 4.27 / 7.94 at 128 / 256 / 384).

    python jobs/prepare_data.py image afhq_v2 --layout afhqv2 --only class=cat --size 512 --out data/afhqv2-cat
    python jobs/train_ddmi.py afhqv2-cat-256 --scale.num-workers 8

    Parameters: 56.2 M + 0.7 M and 519 M (published: 57.2 M + 1.9 M and 519 M: the published read-out modulates its
    layers by the scale, ours reads the scale as one more input). Ours: not run.
    """
    return _paper(
        "afhqv2-cat-256", images=5_065, batch_size=80, encoder_blocks=2, multipliers=(1, 2, 4, 6), channels=224
    )


def afhqv2_dog_256() -> Experiment:
    """AFHQv2 dogs at 256 pixels (DDMI, table 3: FID 10.81 / 8.54 / 11.47 at 128 / 256 / 384).

    python jobs/prepare_data.py image afhq_v2 --layout afhqv2 --only class=dog --size 512 --out data/afhqv2-dog
    python jobs/train_ddmi.py afhqv2-dog-256 --scale.num-workers 8

    Ours: not run.
    """
    return _paper(
        "afhqv2-dog-256", images=4_678, batch_size=80, encoder_blocks=2, multipliers=(1, 2, 4, 6), channels=224
    )


def celebahq_256() -> Experiment:
    """CelebA-HQ at 256 pixels (DDMI, table 1: FID 9.74 / 8.73 / 7.25 / 10.44 at 64 / 128 / 256 / 384).

    python jobs/prepare_data.py image celeba_hq --layout celebahq --size 512 --out data/celebahq-256
    python jobs/train_ddmi.py celebahq-256 --scale.num-workers 16 --scale.zero-stage 2

    Parameters: 68.6 M + 0.7 M and 1,015 M (published: 69.6 M + 1.9 M and 1,015 M). Ours: not run.
    """
    return _paper(
        "celebahq-256", images=28_000, batch_size=200, encoder_blocks=3, multipliers=(1, 2, 4, 8), channels=256
    )


def lsun_church_256() -> Experiment:
    """LSUN churches at 256 pixels (DDMI, appendix). The pictures are too small for finer targets: one scale.

    python jobs/prepare_data.py image church_outdoor_train --layout lsun --size 256 --out data/lsun-church-256
    python jobs/train_ddmi.py lsun-church-256 --scale.num-workers 16 --scale.zero-stage 2

    Ours: not run.
    """
    return _paper(
        "lsun-church-256",
        images=126_000,
        batch_size=200,
        encoder_blocks=3,
        multipliers=(1, 2, 4, 8),
        channels=256,
        source_size=256,
        prior_epochs=500,
    )


def celebahq_64() -> Experiment:
    """CelebA-HQ at 64 pixels: the model of `celebahq-256` on a quarter of the resolution.

    python jobs/prepare_data.py image celeba_hq --layout celebahq --size 128 --out data/celebahq-64
    python jobs/train_ddmi.py celebahq-64 --scale.num-workers 8

    Paper: FID 9.74, from the 256-pixel model. Ours: not run.
    """
    return _paper(
        "celebahq-64",
        size=64,
        source_size=128,
        images=28_000,
        batch_size=200,
        encoder_blocks=2,
        multipliers=(1, 2, 4),
        channels=256,
    )


def cifar10() -> Experiment:
    """CIFAR10 at its 32 pixels (DDMI, appendix): one scale.

    python jobs/prepare_data.py image cifar-10-batches-bin --layout cifar10 --out data/cifar10
    python jobs/train_ddmi.py cifar10 --scale.num-workers 8

    Ours: not run.
    """
    return _paper(
        "cifar10",
        size=32,
        source_size=32,
        images=50_000,
        batch_size=240,
        encoder_blocks=2,
        multipliers=(1, 2, 2),
        channels=256,
    )


def _paper(
    name: str,
    *,
    images: int,
    batch_size: int,
    encoder_blocks: int,
    multipliers: tuple[int, ...],
    channels: int,
    size: int = 256,
    source_size: int = 512,
    prior_epochs: int = 1500,
) -> Experiment:
    """The published recipe for images (DDMI, appendix; sizes and schedules of the public configs)."""
    epochs = 200
    return Experiment(
        name=name,
        domain=Image(size=size, source_size=source_size, likelihood="laplace"),
        data=Data(train=f"data/{name}/train", val=f"data/{name}/val", num_loaders=4),
        autoencoder=D2CVAE(
            encoder=PixelEncoder(channels=128, multipliers=(1, 2, 4), num_blocks=encoder_blocks),
            latent_channels=64,
            decoder_channels=128,
            decoder_multipliers=(1, 2, 4),
            decoder_blocks=encoder_blocks,
            num_points=size * size,
            # Published: 0.5 times the summed KL against the summed error of all values.
            kl_weight=0.5 / (3 * size * size),
            kl_anneal_samples=epochs * images * 9 // 10,
        ),
        prior=LatentDiffusion(denoiser=UNet(channels=channels, multipliers=multipliers)),
        autoencoder_training=Training(
            num_samples=epochs * images,
            batch_size=batch_size,
            optim=Optim(lr=1e-4, betas=(0.9, 0.99), warmup_samples=5 * images),
            checkpoint_every_samples=10 * images,
        ),
        prior_training=Training(
            num_samples=prior_epochs * images,
            batch_size=96,
            optim=Optim(lr=1e-4, schedule="constant"),
            # The published decay, 0.9999 a step, has its half-life at 6,931 steps.
            ema_half_life_samples=6_931 * 96,
            checkpoint_every_samples=50 * images,
        ),
        sampling=Sampling(sampler="ancestral", steps=1000, count=64),
        evaluation=Evaluation(num_samples=10_000),
    )


PRESETS: dict[str, Callable[[], Experiment]] = {
    preset.__name__.replace("_", "-"): preset
    for preset in (
        furniture_image,
        furniture_image_short,
        furniture_image_long,
        furniture_all,
        afhqv2_cat_256,
        afhqv2_dog_256,
        celebahq_256,
        celebahq_64,
        cifar10,
        lsun_church_256,
    )
}
