"""Shapes: occupancy, by both families."""

from collections.abc import Callable
from dataclasses import replace

from distributed_inr.data.reader import Data
from distributed_inr.domains import Shape
from distributed_inr.experiment import Evaluation, Experiment, Sampling
from distributed_inr.models import D2CVAE, HierarchicalDiffusion, LatentDiffusion, LayersOfExperts
from distributed_inr.models.denoisers import UNet
from distributed_inr.models.encoders import PointEncoder
from distributed_inr.models.latent_fitting import MetaLearning
from distributed_inr.models.layer_denoisers import MLPUNet
from distributed_inr.presets import chinr, ddmi
from distributed_inr.training.engine import Optim
from distributed_inr.training.loop import Training

_FURNITURE = Data(train="bundled:furniture-shape/train", val="bundled:furniture-shape/val", num_streams=8)
_CHAIRS, CHAIRS_AND_TABLES, _ALL_13 = 4_746, 10_703, 30_661
"""Training shapes of the sets that Occupancy Networks distribute."""


def ddmi_furniture_shape() -> Experiment:
    """Occupancy of 351 bundled pieces of furniture; 49 more, of other names, are held out.

    python jobs/train_ddmi.py furniture-shape

    Two cores: 9 minutes. Held-out IoU 0.745 from 768 numbers (nearest training shape 0.479).
    """
    autoencoder_samples, prior_samples = 10_000, 400_000
    quick = ddmi.furniture_image()
    return replace(
        quick,
        name="furniture-shape",
        domain=Shape(size=32, num_points=1024, near=0.5),
        data=_FURNITURE,
        autoencoder=D2CVAE(
            encoder=PointEncoder(width=16, num_layers=3, channels=8, multipliers=(1, 2, 4), num_blocks=1),
            latent_channels=4,
            decoder_channels=16,
            decoder_multipliers=(1, 2, 4),
            decoder_blocks=0,
            field_channels=16,
            readout_width=64,
            num_points=1024,
            kl_weight=1e-6,
            kl_anneal_samples=autoencoder_samples * 9 // 10,
        ),
        autoencoder_training=replace(
            quick.autoencoder_training, num_samples=autoencoder_samples, checkpoint_every_samples=2_500
        ),
        prior_training=replace(
            quick.prior_training, num_samples=prior_samples, checkpoint_every_samples=prior_samples // 4
        ),
        evaluation=Evaluation(num_samples=64, surface_points=512),
    )


def ddmi_shapenet_chair() -> Experiment:
    """ShapeNet's chairs (DDMI, table 2: MMD 1.5e-3, COV 0.510).

    python jobs/prepare_data.py shape ShapeNet --layout occupancy-networks --only class=chair --points 10000 \
        --out data/shapenet-chair
    python jobs/train_ddmi.py shapenet-chair --scale.num-workers 8

    Parameters: 15.1 M and 679 M (published: 124.1 M + 2.3 M + 0.63 M, and 679 M: the published encoder and decoder have
    weights of their own for each plane and mix the planes in every block; ours share them, and mix in the middle).

    Ours: not run.
    """
    return shapenet("shapenet-chair", shapes=_CHAIRS)


def ddmi_shapenet_13() -> Experiment:
    """Thirteen classes of ShapeNet (DDMI, table 2: MMD 1.3e-3, COV 0.421).

    python jobs/prepare_data.py shape ShapeNet --layout occupancy-networks --points 10000 --out data/shapenet-13
    python jobs/train_ddmi.py shapenet-13 --scale.num-workers 8

    Parameters as `shapenet-chair`. Ours: not run.
    """
    return shapenet("shapenet-13", shapes=_ALL_13)


def shapenet(name: str, *, shapes: int) -> Experiment:
    """The published recipe for occupancy (DDMI, appendix; sizes and schedules of the public configs)."""
    epochs, points = 300, 2048
    return Experiment(
        name=name,
        domain=Shape(size=64, num_points=3000),
        data=Data(train=f"data/{name}/train", val=f"data/{name}/val", num_loaders=4),
        autoencoder=D2CVAE(
            encoder=PointEncoder(width=64, channels=64, multipliers=(1, 2, 4), num_blocks=2),
            latent_channels=64,
            decoder_channels=64,
            decoder_multipliers=(1, 2, 4),
            decoder_blocks=2,
            num_points=points,
            # Published: 0.01 times the summed KL against the summed error of all points.
            kl_weight=0.01 / points,
            kl_anneal_samples=epochs * shapes * 9 // 10,
        ),
        prior=LatentDiffusion(denoiser=UNet(channels=256, multipliers=(1, 2, 4, 6))),
        autoencoder_training=Training(
            num_samples=epochs * shapes,
            batch_size=240,
            optim=Optim(lr=1e-4, betas=(0.9, 0.99), warmup_samples=5 * shapes),
            checkpoint_every_samples=10 * shapes,
        ),
        prior_training=Training(
            num_samples=1500 * shapes,
            batch_size=96,
            optim=Optim(lr=1e-4, schedule="constant"),
            ema_half_life_samples=6_931 * 96,  # 0.9999 a step
            checkpoint_every_samples=50 * shapes,
        ),
        sampling=Sampling(sampler="ancestral", steps=1000, count=64),
        evaluation=Evaluation(num_samples=1_000),
    )


def chinr_furniture_shape() -> Experiment:
    """Occupancy of 351 bundled pieces of furniture; 49 more, of other names, are held out.

    python jobs/train_chinr.py furniture-shape

    Two cores: 9 minutes. Held-out IoU 0.614 from 320 numbers (nearest training shape 0.479).
    """
    autoencoder_samples = 20_000
    images = chinr.furniture_image()
    return replace(
        images,
        name="furniture-shape",
        domain=Shape(size=32, num_points=1, near=0.5, likelihood="gaussian"),
        data=_FURNITURE,
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
            images.autoencoder_training, num_samples=autoencoder_samples, checkpoint_every_samples=5_000
        ),
        prior_training=replace(images.prior_training, num_samples=60_000),
        evaluation=Evaluation(num_samples=64, surface_points=512),
    )


def chinr_shapenet() -> Experiment:
    """Layers of experts on ShapeNet at 64^3 (CHINR, table 1: PSNR 22.3, accuracy 0.988, COV 0.441, MMD 1.1e-3).

    python jobs/prepare_data.py shape voxels --layout voxels --resolution 64 --out data/shapenet-64
    python jobs/train_chinr.py shapenet --scale.num-workers 8

    Parameters: 3.606 M. Ours: not run.
    """
    return Experiment(
        name="shapenet",
        family="chinr",
        domain=Shape(size=64, num_points=1, likelihood="gaussian"),
        data=Data(train="data/shapenet-64/train", val="data/shapenet-64/val", num_loaders=4),
        autoencoder=LayersOfExperts(num_layers=5, num_experts=256, width=64, latent_dim=256),
        prior=HierarchicalDiffusion(denoiser=MLPUNet(width=1024, num_blocks=6)),
        autoencoder_training=Training(
            num_samples=800 * _ALL_13, batch_size=32, optim=Optim(lr=1e-4), checkpoint_every_samples=10 * _ALL_13
        ),
        prior_training=Training(
            num_samples=1000 * _ALL_13,
            batch_size=32,
            optim=Optim(lr=1e-4),
            ema_half_life_samples=6_931 * 32,  # 0.9999 a step
            checkpoint_every_samples=50 * _ALL_13,
        ),
        sampling=Sampling(sampler="ancestral", steps=1000, count=64),
        evaluation=Evaluation(num_samples=1_000),
    )


DDMI: dict[str, Callable[[], Experiment]] = {
    "furniture-shape": ddmi_furniture_shape,
    "shapenet-chair": ddmi_shapenet_chair,
    "shapenet-13": ddmi_shapenet_13,
}
CHINR: dict[str, Callable[[], Experiment]] = {"furniture-shape": chinr_furniture_shape, "shapenet": chinr_shapenet}
