"""For every domain a tiny instance, a tiny set of it, one's own file, and tiny models of both families."""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from PIL import Image as Picture
from tiny_run import smooth_picture
from tiny_scenes import write_transforms

from distributed_inr.data.reader import Data
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.domains import Domain, Image, Motion, Record, Scene, Shape, Video
from distributed_inr.experiment import Evaluation, Experiment, Sampling
from distributed_inr.models import D2CVAE, HierarchicalDiffusion, LatentDiffusion, LayersOfExperts
from distributed_inr.models.denoisers import MLP
from distributed_inr.models.encoders import ClipEncoder, PixelEncoder, PointEncoder
from distributed_inr.models.latent_fitting import AutoDecoding, MetaLearning
from distributed_inr.models.layer_denoisers import MLPUNet
from distributed_inr.raw import meshes, posed_views, view_folders
from distributed_inr.raw.arrays import write_npy
from distributed_inr.training.engine import Optim, Scale
from distributed_inr.training.loop import Training

CHANNELS, FRAMES = 12, 16

DOMAINS: dict[str, Domain] = {
    "image": Image(size=16, source_size=32, scales=(1.0,), scale_weights=(1.0,), flip=False),
    "shape": Shape(size=16, num_points=40),
    "video": Video(size=16, frames=4, flip=False),
    "scene": Scene(
        size=16,
        cells=16,
        view_size=16,
        num_views=4,
        hold_out_every=2,
        num_points=40,
        samples_per_ray=6,
        render_samples=8,
        fit_rays=64,
        orbit_views=3,
    ),
    "motion": Motion(size=FRAMES, channels=CHANNELS),
}
ENCODERS: dict[str, Any] = {
    "pixels": PixelEncoder(channels=4, multipliers=(1, 2, 2), num_blocks=1),
    "points": PointEncoder(width=8, num_layers=2, channels=4, multipliers=(1, 2, 2), num_blocks=1),
    "clip": ClipEncoder(dim=8, depth=1, head_dim=4, patch=4),
}
FAMILIES = ("ddmi", "chinr")


def autoencoder(domain: Domain, family: str) -> D2CVAE | LayersOfExperts:
    if family == "ddmi":
        return D2CVAE(
            encoder=ENCODERS[domain.input_kind],
            latent_channels=2,
            decoder_channels=8,
            decoder_multipliers=(1, 2, 2),
            decoder_blocks=0,
            field_channels=4,
            readout_width=8,
            readout_blocks=3,
            num_points=32,
        )
    fitting = AutoDecoding(encode_steps=3) if domain.kind == "scene" else MetaLearning(rate=1e-3, num_points=32)
    return LayersOfExperts(num_layers=3, num_experts=4, width=8, latent_dim=6, num_points=32, fitting=fitting)


def tiny_experiment(kind: str, family: str, folder: Path) -> Experiment:
    """Training of a few steps on the sets that `write_sets` makes in the folder."""
    domain: Any = DOMAINS[kind]
    training = Training(
        num_samples=8, batch_size=4, checkpoint_every_samples=4, optim=Optim(lr=1e-3), keep_checkpoints=4
    )
    prior = LatentDiffusion(denoiser=MLP(width=8, num_blocks=1), num_timesteps=20)
    layered = HierarchicalDiffusion(denoiser=MLPUNet(width=8, num_blocks=1), condition_bits=2, num_timesteps=20)
    return Experiment(
        name=kind,
        family=family,
        output=str(folder / "runs"),
        domain=domain,
        data=Data(train=str(folder / "train"), val=str(folder / "val"), num_streams=2),
        autoencoder=autoencoder(domain, family),
        prior=prior if family == "ddmi" else layered,
        autoencoder_training=training,
        prior_training=training,
        scale=Scale(engine="accelerate", launcher="none"),
        sampling=Sampling(count=2, steps=2),
        evaluation=Evaluation(num_samples=4, batch_size=3, surface_points=16),
    )


def write_sets(domain: Domain, folder: Path, count: int = 6, *, captioned: bool = False) -> None:
    """Shards for training and for validation that a domain of these sizes reads."""
    for number, part in enumerate(("train", "val")):
        records = [RECORDS[domain.kind](domain, 100 * number + i) for i in range(count)]
        writer = ShardWriter(folder / part, domain=domain.kind, protocol=protocol(domain))
        for i, record in enumerate(records):
            text = {"txt": f"{domain.kind} {i}\na {domain.kind}".encode()} if captioned else {}
            writer.write({"__key__": f"{i:04d}", **record, **text})
        writer.close()


def protocol(domain: Domain) -> dict[str, Any]:
    if not isinstance(domain, Motion):
        return {"made": "for tests"}
    channels = domain.channels
    content = domain.content or ("positions" if channels % 3 == 0 else "channels")
    known = {"frames": domain.size, "channels": channels, "fps": 30.0, "content": content}
    return {"motion": known | {"mean": [0.1] * channels, "deviation": [0.5] * channels}}


def image_record(domain: Any, seed: int) -> Record:
    file = io.BytesIO()
    smooth_picture(seed, domain.source_size).save(file, "PNG")
    return {"png": file.getvalue()}


def shape_record(domain: Any, seed: int) -> Record:
    generator, side = np.random.default_rng(seed), (np.arange(domain.size) * 2 + 1) / domain.size - 1
    z, y, x = np.meshgrid(side, side, side, indexing="ij")
    radii, centre = generator.uniform(0.3, 0.8, 3), generator.uniform(-0.2, 0.2, 3)
    squares = [((axis - middle) / radius) ** 2 for axis, middle, radius in zip((x, y, z), centre, radii, strict=True)]
    occupied = np.sum(squares, axis=0) < 1
    vertices, faces = meshes.from_grid(occupied.astype(np.float32))
    surface = meshes.points_on(vertices[faces], 100).astype(np.float16)
    return {"occupancy.npy": meshes.pack(occupied), "surface.npy": write_npy(surface)}


def video_record(domain: Any, seed: int) -> Record:
    strip = np.concatenate([np.asarray(smooth_picture(seed + i, domain.size)) for i in range(domain.frames)])
    file = io.BytesIO()
    Picture.fromarray(strip).save(file, "WEBP", lossless=True)
    return {"clip.webp": file.getvalue()}


def scene_record(domain: Any, seed: int) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        write_transforms(Path(folder), side=domain.view_size, count=domain.num_views, scale=1 + 0.01 * (seed % 7))
        form = posed_views.Form(size=domain.view_size, num_points=60, hold_out_every=domain.hold_out_every)
        return posed_views.encode(view_folders.read_folder(Path(folder), form.max_views), form)


def motion_values(frames: int, channels: int, seed: int) -> np.ndarray:
    generator, time = np.random.default_rng(seed), np.linspace(0, 1, frames)[:, None]
    phase, rate = generator.uniform(0, 6, channels), generator.uniform(1, 4, channels)
    return (0.1 + 0.5 * np.sin(rate * time + phase)).astype(np.float32)


def motion_record(domain: Any, seed: int) -> Record:
    return {"motion.npy": write_npy(motion_values(domain.size, domain.channels, seed))}


RECORDS: dict[str, Callable[[Any, int], Record]] = {
    "image": image_record,
    "shape": shape_record,
    "video": video_record,
    "scene": scene_record,
    "motion": motion_record,
}


def own_file(domain: Domain, folder: Path) -> Path:
    """One's own file of the kind that the domain opens."""
    path = folder / "mine"
    if domain.kind == "image":
        smooth_picture(7, 48).save(path := path.with_suffix(".png"))
    elif domain.kind == "shape":
        trimesh.creation.box((2.0, 1.0, 0.5)).export(path := path.with_suffix(".obj"))
    elif domain.kind == "video":
        frames = [smooth_picture(i, 24) for i in range(domain.grid[2] + 1)]
        frames[0].save(path := path.with_suffix(".gif"), save_all=True, append_images=frames[1:], duration=80)
    elif domain.kind == "scene":
        write_transforms(path, side=24)
    else:
        assert isinstance(domain, Motion)
        np.save(path := path.with_suffix(".npy"), motion_values(domain.size, domain.channels, 7))
    return path
