"""Meshes of scenes: the surface at which a radiance field's density crosses a threshold, with its colours."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from distributed_inr.domains.domain import evaluate_grid, pixel_centres
from distributed_inr.field import Field
from distributed_inr.raw import meshes

SUFFIXES = (".glb", ".ply", ".obj")
MAX_RESOLUTION = 1024
"""Cells a side of the largest grid that is marched: 4.3 GB, and as much again a few times while it is."""


def surface(
    field: Field,
    resolution: int,
    *,
    density: Callable[[Tensor], Tensor],
    inside_sphere: bool,
    threshold: float = 10.0,
    chunk_points: int = 1 << 18,
) -> tuple[Float[np.ndarray, "vertices 3"], Int64[np.ndarray, "faces 3"], UInt8[np.ndarray, "vertices 4"]]:
    """Vertices, faces and RGBA colours of one scene's surface, coloured as seen from straight outside.

    Args:
        density: of the field's first value, for each unit of length.
        inside_sphere: leave out what lies outside of the unit sphere, which no view has seen.
        threshold: of the density, for each unit of length.

    Raises ValueError where the density does not cross it.
    """
    import trimesh

    assert len(field) == 1
    centres = pixel_centres(resolution, field.device)
    grid = torch.empty(resolution**3, device=field.device)
    for part, values in evaluate_grid(field, (centres,) * 3, chunk_points=chunk_points, title="mesh"):
        grid[part] = density(values[0, :, 0])
    if inside_sphere:
        squares = centres.square()
        outside = squares[:, None, None] + squares[:, None] + squares > 1
        grid[outside.flatten()] = 0.0
    vertices, faces = meshes.from_grid(grid.view((resolution,) * 3).cpu().numpy(), level=threshold)

    normals = trimesh.Trimesh(vertices, faces, process=False).vertex_normals
    inwards = torch.tensor(-normals, dtype=torch.float32, device=field.device)[None]
    places = torch.tensor(vertices, dtype=torch.float32, device=field.device)[None]
    pieces = zip(places.split(chunk_points, dim=1), inwards.split(chunk_points, dim=1), strict=True)
    colours = torch.cat([field(*piece)[0, :, 1:].sigmoid() for piece in pieces])
    opaque = torch.cat([colours, torch.ones_like(colours[:, :1])], dim=1)
    return vertices, np.asarray(faces, dtype=np.int64), (opaque * 255).round().to(torch.uint8).cpu().numpy()


def save(
    field: Field, resolution: int, path: Path, *, density: Callable[[Tensor], Tensor], inside_sphere: bool
) -> None:
    """Write the surface of one scene with its colours as .glb, .ply or .obj."""
    import trimesh

    vertices, faces, colours = surface(field, resolution, density=density, inside_sphere=inside_sphere)
    trimesh.Trimesh(vertices, faces, vertex_colors=colours, process=False).export(path)
