"""A set of balls and boxes with classes and captions, and a model that knows them: latents are kind and radius."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tiny_domains import tiny_experiment
from torch import Tensor

from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.domains import Shape, Signal
from distributed_inr.field import Field
from distributed_inr.generation import FieldModel
from distributed_inr.models import FieldAutoencoder
from distributed_inr.raw import meshes
from distributed_inr.raw.arrays import write_npy

DOMAIN = Shape(size=16, num_points=40)
KINDS = ("ball", "box")
BALL, BOX = 0.0, 1.0


def depths(kinds: Tensor, radii: Tensor, coords: Tensor) -> Tensor:
    """How deep points lie inside balls, or boxes of about the same volume: [batch, points]."""
    ball, box = coords.norm(dim=-1), coords.abs().amax(-1) / 0.8
    return radii[:, None] - torch.where(kinds[:, None] == BALL, ball, box)


class Solids(FieldAutoencoder):
    """Latents [kind, radius]; there is nothing to train."""

    latent_shape = (2,)
    is_variational: ClassVar[bool] = False

    def __init__(self, domain: Shape) -> None:
        super().__init__()
        self.cfg, self.domain = None, domain

    def forward(self, signal: Signal) -> dict[str, Tensor]:
        raise NotImplementedError

    def posterior(self, signal: Signal) -> tuple[Tensor, None]:
        raise NotImplementedError

    def decode(self, latent: Tensor) -> Field:
        def values(parameters: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
            kinds, radii = parameters[0].unbind(1)
            return 200 * depths(kinds, radii, coords)[..., None]

        return Field(values, (latent,), self.domain)

    def for_sampling(self) -> "Solids":
        return self


def grid(kind: float, radius: float) -> np.ndarray:
    """Cells [z, y, x]."""
    field = Solids(DOMAIN).decode(torch.tensor([[kind, radius]]))
    return field.render(DOMAIN.size)[0].numpy() > 0.5


def write_solids(folder: Path, names: list[str | None], captions: list[str], *, seed: int, raw: bytes = b"") -> None:
    """A ball where the class is one, else a box. Without a class, `raw` stands in place of the json."""
    generator = np.random.default_rng(seed)
    writer = ShardWriter(folder, domain="shape", protocol={"made": "for tests"})
    for number, (name, text) in enumerate(zip(names, captions, strict=True)):
        occupied = grid(BALL if name == "ball" else BOX, generator.uniform(0.4, 0.8))
        vertices, faces = meshes.from_grid(occupied.astype(np.float32))
        surface = meshes.points_on(vertices[faces], 100).astype(np.float16)
        members: dict[str, Any] = {"json": json.dumps({"class": name}).encode() if name else raw, "txt": text.encode()}
        members |= {"occupancy.npy": meshes.pack(occupied), "surface.npy": write_npy(surface)}
        writer.write({"__key__": f"{number:04d}", **members})
    writer.close()


def solid_model(folder: Path) -> FieldModel:
    """A model of the sets train and val in the folder, without a prior."""
    return FieldModel(tiny_experiment("shape", "ddmi", folder), folder, Solids(DOMAIN), None, torch.device("cpu"))
