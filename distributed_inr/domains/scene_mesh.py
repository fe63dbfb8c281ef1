"""Meshes of scenes: the surface at which a radiance field's density crosses a threshold, with its colours."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8

from distributed_inr.domains.domain import evaluate_grid, pixel_centres
from distributed_inr.domains.scene import Scene
from distributed_inr.field import Field
from distributed_inr.raw import meshes

SUFFIXES = (".glb", ".ply", ".obj")


def mesh(
    field: Field, resolution: int, *, threshold: float = 10.0, chunk_points: int = 1 << 18
) -> tuple[Float[np.ndarray, "vertices 3"], Int64[np.ndarray, "faces 3"], UInt8[np.ndarray, "vertices 4"]]:
    """Vertices, faces and RGBA colours of one scene's surface, coloured as seen from straight outside.

    Args:
        threshold: of the density, for each unit of length.

    Raises ValueError where the density does not cross it.
    """
    import trimesh

    domain = field.domain
    assert isinstance(domain, Scene) and len(field) == 1
    centres = pixel_centres(resolution, field.device)
    grid = torch.empty(resolution**3, device=field.device)
    for part, values in evaluate_grid(field, (centres,) * 3, chunk_points=chunk_points, title="mesh"):
        grid[part] = domain.density(values[0, :, 0])
    if domain.bounds == "sphere":  # no view has seen what lies outside
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


def save_mesh(field: Field, path: Path, resolution: int, *, threshold: float = 10.0) -> None:
    """Write the surface of one scene with its colours as .glb, .ply or .obj."""
    import trimesh

    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path.name}: coloured meshes are written as {', '.join(SUFFIXES)}; use one of these")
    vertices, faces, colours = mesh(field, resolution, threshold=threshold)
    trimesh.Trimesh(vertices, faces, vertex_colors=colours, process=False).export(path)
