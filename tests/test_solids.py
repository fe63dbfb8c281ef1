"""A ball, a box and a torus of exactly known volume, through encoding, decoding and marching cubes."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from distributed_inr.domains import Record, Shape, collate
from distributed_inr.models import D2CVAE, LayersOfExperts
from distributed_inr.models.encoders import PointEncoder
from distributed_inr.models.latent_fitting import MetaLearning
from distributed_inr.raw import meshes
from distributed_inr.raw.arrays import write_npy

BALL, BOX, RING, TUBE = 0.7, (1.6, 1.0, 1.2), 0.6, 0.25
INSIDE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ball": lambda points: np.linalg.norm(points, axis=1) < BALL,
    "box": lambda points: (np.abs(points) < np.array(BOX) / 2).all(axis=1),
    "torus": lambda points: np.hypot(np.hypot(points[:, 0], points[:, 1]) - RING, points[:, 2]) < TUBE,
}
SURFACES = {
    "ball": trimesh.creation.icosphere(subdivisions=4, radius=BALL),
    "box": trimesh.creation.box(BOX),
    "torus": trimesh.creation.torus(RING, TUBE),
}
VOLUMES = {"ball": 4 / 3 * math.pi * BALL**3, "box": math.prod(BOX), "torus": 2 * math.pi**2 * RING * TUBE**2}


def queried(name: str) -> Record:
    """15,000 points of the cube and as many near the surface, each known to be inside or outside."""
    generator, count = np.random.default_rng(0), 15_000
    surface = np.asarray(trimesh.sample.sample_surface(SURFACES[name], count, seed=1)[0])
    near = (surface + generator.normal(0, 0.05, surface.shape)).clip(-1, 1)
    points = np.concatenate([generator.uniform(-1, 1, (count, 3)), near]).astype(np.float16)
    rows = np.concatenate([points, INSIDE[name](points.astype(np.float64))[:, None]], axis=1).astype(np.float16)
    return {"__key__": name, "queries.npy": write_npy(rows), "surface.npy": write_npy(surface.astype(np.float16))}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ddmi", "chinr"])
def test_fitted_solids_are_meshed_with_their_volumes(family: str, tmp_path: Path):
    domain = Shape(size=16, num_points=400, likelihood="bernoulli" if family == "ddmi" else "gaussian")
    torch.manual_seed(0)
    if family == "ddmi":
        steps, rate = 300, 5e-3
        model = D2CVAE(
            encoder=PointEncoder(width=16, num_layers=2, channels=8, multipliers=(1, 2), num_blocks=1),
            latent_channels=4,
            decoder_channels=16,
            decoder_multipliers=(1, 2),
            decoder_blocks=0,
            num_fields=2,
            field_channels=16,
            readout_width=32,
            readout_blocks=2,
            num_points=1024,
        ).build(domain)
    else:
        steps, rate = 500, 3e-3
        fitting = MetaLearning(rate=1e-3, num_points=512)
        model = LayersOfExperts(
            num_layers=4, num_experts=8, width=48, latent_dim=16, omega=15.0, num_points=1024, fitting=fitting
        ).build(domain)
    signal = collate([domain.read(queried(name), seed=0) for name in VOLUMES])
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        seeds = 3 * step + torch.arange(3)
        sum(model(dataclasses.replace(signal, seed=seeds)).values()).backward()
        optimizer.step()
        schedule.step()

    model.eval()
    with torch.no_grad():
        rendered = domain.render(model.decode(model.encode(signal)), 128)
    for (name, volume), grid in zip(VOLUMES.items(), rendered, strict=True):
        path = tmp_path / f"{name}.ply"
        domain.save(grid, path)
        mesh = meshes.read_mesh(path)
        mesh.merge_vertices()
        assert mesh.is_watertight, name
        assert mesh.volume == pytest.approx(volume, rel=0.02), name
