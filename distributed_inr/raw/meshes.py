"""Meshes and voxel grids as solids: files read with bounded sizes, occupancy of closed and of open meshes, surfaces.

Everything is in the coordinates of a field: the object centred, its longest side from -fill to fill, axes as in the
file. Grids are indexed [z, y, x], cell centres at (2 i + 1) / resolution - 1.
"""

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from distributed_inr.raw import option
from distributed_inr.raw.arrays import BITS, read_npy, write_npy

if TYPE_CHECKING:
    from trimesh import Trimesh

MESH_SUFFIXES = (".obj", ".ply", ".glb", ".gltf", ".off", ".stl")
MAX_MESH_BYTES = 512 * 2**20
"""Largest mesh file that is read."""
QUERIED_CUBE = 1.1
"""Side of the cube that Occupancy Networks draw points from: around shapes whose longest side is 1, and a tenth."""

_FINE_CELLS = 128
"""Cells a side, at least, of the grid in which inside and outside are told apart."""
_SAMPLES_A_CELL = 16
"""Surface samples over the square of a fine cell's side: enough to leave no holes."""
_MAX_SAMPLES = 20_000_000
_LEAST_STEP = 1e-3
"""How near, of its range, a grid's values come to the level of its surface: vertices lie a thousandth of a cell apart.
"""
_LOOK = (1.2, 1.8, 2.5, 3.2)
"""How far from the surface, in fine cells, is looked for its inside; nearer, its own cells are in the way."""


@dataclass(frozen=True)
class Form:
    """How shapes become records; recorded in `index.json`."""

    resolution: int = option(32, "cells a side of the occupancy grid made of meshes")
    points: int = option(2048, "points stored on each surface, for encoders of points")
    fill: float = option(0.875, "half the longest side in the records' coordinates, which end at 1")
    close: float = option(1.0, "radius, in cells, of the openings that are closed before meshes are filled")
    queries: int = option(100_000, "of queried points (occupancy-networks), how many are stored of each shape")
    max_faces: int = option(2_000_000, "leave out meshes with more faces")

    def __post_init__(self) -> None:
        if not 0 < self.fill <= 1:
            raise ValueError(f"--fill {self.fill} must lie in (0, 1]; try 0.875")
        if not 0 <= self.close < np.inf:
            raise ValueError(f"--close {self.close} must be at least 0, and finite; try 1")
        for name in ("resolution", "points", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")


def read_mesh(path: Path, *, max_faces: int = Form.max_faces) -> "Trimesh":
    """The triangles of a mesh file, all of its parts as one. Raises ValueError where there are none.

    Its suffix says which decoder is tried.
    """
    import trimesh

    suffix = path.suffix.lower()
    if suffix not in MESH_SUFFIXES:
        raise ValueError(f"the suffix {path.suffix!r} is not that of a mesh")
    if (size := path.stat().st_size) > MAX_MESH_BYTES:
        raise ValueError(f"{size} bytes, above the limit of {MAX_MESH_BYTES}")
    content = path.read_bytes()
    logging.getLogger("trimesh").setLevel(logging.CRITICAL)  # what is wrong is said in the error
    try:
        loaded: Any = trimesh.load(io.BytesIO(content), file_type=suffix.removeprefix("."), process=False)
        mesh = loaded.to_mesh() if isinstance(loaded, trimesh.Scene) else loaded
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ValueError(
            f"cannot be read as {suffix}: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None
    if not isinstance(mesh, trimesh.Trimesh) or len(mesh.faces) == 0:
        raise ValueError("it has no faces; give a mesh, not points or lines")
    if len(mesh.faces) > max_faces:
        raise ValueError(f"{len(mesh.faces)} faces, above the limit of {max_faces}")
    least, most = mesh.faces.min(), mesh.faces.max()
    if least < 0 or most >= len(mesh.vertices):
        raise ValueError(f"faces of vertices that it does not have: {least} to {most} of {len(mesh.vertices)}")
    if not np.isfinite(mesh.vertices[mesh.faces]).all():
        raise ValueError("vertices that are not finite")
    if not mesh.area > 0:
        raise ValueError("its faces have no area")
    return mesh


def normalised(mesh: "Trimesh", *, fill: float) -> "Trimesh":
    """The mesh centred, with its longest side from -fill to fill."""
    import trimesh

    low, high = mesh.bounds
    vertices = (mesh.vertices - (low + high) / 2) * (2 * fill / (high - low).max())
    return trimesh.Trimesh(vertices, mesh.faces, process=False)


def surface_points(mesh: "Trimesh", count: int, *, seed: int = 0) -> Float[np.ndarray, "count 3"]:
    """Points drawn from the surface, evenly by area."""
    return points_on(mesh.vertices[mesh.faces], count, seed=seed)


def points_on(triangles: Float[np.ndarray, "faces 3 3"], count: int, *, seed: int = 0) -> Float[np.ndarray, "count 3"]:
    """Points drawn from triangles, evenly by area."""
    generator = np.random.default_rng(seed)
    a, b, c = triangles.transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    face = np.searchsorted(np.cumsum(area) / area.sum(), generator.random(count), side="right").clip(max=len(area) - 1)
    u, v = generator.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    a, b, c = a[face], b[face], c[face]
    return a + u * (b - a) + v * (c - a)


def solid(mesh: "Trimesh", resolution: int, *, close: float = 1.0) -> Bool[np.ndarray, "z y x"]:
    """Which cells of the grid over [-1, 1]^3 a mesh fills; it need not be closed, nor have consistent normals.

    The solid is what cannot be reached from outside: surfaces bar the way in a finer grid, after openings of up to
    `close` cells' radius were closed. A cell is filled if half of it is, or if a thin part crosses it: one that is
    thinner than a cell, such as a leg, or a sheet, a surface with outside on both of its sides. Thin parts so become
    one or two cells thick. Hollows that are closed off are filled, and what is open by more than the radius (a cup, a
    cabinet without its back) is a sheet.
    """
    from scipy import ndimage
    from scipy.spatial import KDTree

    factor = -(-_FINE_CELLS // resolution)
    factor += factor % 2 == 0  # odd, so that no cell is just half full
    side = factor * resolution
    margin = 2 + int(np.ceil(close * factor))
    cell = 2 / side
    count = int(min(_MAX_SAMPLES, _SAMPLES_A_CELL * mesh.area / cell**2 + 1000))
    points = np.concatenate([surface_points(mesh, count), mesh.vertices[np.unique(mesh.faces)]])
    places = np.floor((points + 1) / cell).astype(np.int64) + margin
    wide = side + 2 * margin
    places = places.clip(0, wide - 1)
    barrier = np.zeros((wide,) * 3, bool)  # [x, y, z] until the end
    barrier[tuple(places.T)] = True

    shut: np.ndarray = barrier
    if close > 0:
        radius = close * factor
        near = _distance(~barrier) <= radius + 1
        shut = (_distance(near) > radius) | barrier
    labels = _label(~shut)
    outside = labels == labels[0, 0, 0]
    # What was closed is outside again as far as it is reached: concave edges, and the mouths of openings.
    steps = int(np.ceil(close * factor)) + 1
    reached: Any = ndimage.binary_dilation(outside, mask=outside | (shut & ~barrier), iterations=steps)
    inside = ~reached & ~barrier

    # A barrier's cell is inside if its centre lies on the inside of the surface; on a sheet there is none.
    cells = np.argwhere(barrier)
    centres = (cells + 0.5 - margin) * cell - 1
    foot = points[KDTree(points).query(centres, workers=1)[1]]
    away = centres - foot
    away /= np.linalg.norm(away, axis=1, keepdims=True).clip(min=1e-12)
    beyond, before = (
        np.any([_look(inside, foot + sign * step * cell * away, margin, cell) for step in _LOOK], axis=0)
        for sign in (1, -1)
    )
    filled, sheet = inside.copy(), np.zeros_like(inside)
    filled[tuple(cells[beyond].T)] = True
    sheet[tuple(cells[~beyond & ~before].T)] = True

    inner = (slice(margin, -margin),) * 3
    filled, sheet = filled[inner], sheet[inner]
    solid_parts = filled | sheet
    # Thinner than a cell: what a ball of half a cell's radius does not fit into, but for the edges of thick parts.
    core = _distance(solid_parts) > factor / 2
    thin = solid_parts & (_distance(~core) > factor)
    parts = (resolution, factor) * 3
    share, crossing = (grid.reshape(parts).sum((1, 3, 5)) for grid in (filled, thin))
    return np.ascontiguousarray(((2 * share >= factor**3) | (2 * crossing >= factor)).transpose(2, 1, 0))


def _label(cells: Bool[np.ndarray, "x y z"]) -> np.ndarray:
    """A number for each connected part of the true cells."""
    from scipy import ndimage

    labels: Any = ndimage.label(cells)
    return labels[0]


def _distance(cells: Bool[np.ndarray, "x y z"]) -> Float[np.ndarray, "x y z"]:
    """Of each true cell, to the nearest false one."""
    from scipy import ndimage

    return np.asarray(ndimage.distance_transform_edt(cells))


def _look(
    inside: Bool[np.ndarray, "x y z"], points: Float[np.ndarray, "count 3"], margin: int, cell: float
) -> np.ndarray:
    places = np.floor((points + 1) / cell).astype(np.int64) + margin
    return inside[tuple(places.clip(0, len(inside) - 1).T)]


def from_grid(
    values: Float[np.ndarray, "z y x"], *, level: float = 0.5
) -> tuple[Float[np.ndarray, "vertices 3"], np.ndarray]:
    """Vertices in [-1, 1]^3 and faces, normals outwards, of the surface at which a grid's values cross a level.

    What reaches the border of the grid is closed there. Raises ValueError where the values do not cross the level.
    """
    from skimage.measure import marching_cubes

    low, high = values.min(), values.max()
    if not low < level < high:
        side = "below" if high <= level else "above"
        raise ValueError(f"all values of the grid lie {side} {level}: there is no surface")
    padded = np.pad(values, 1, constant_values=low)
    # Where a value is the level itself, vertices of several edges fall into one place, and surfaces touch themselves.
    least = _LEAST_STEP * (high - low)
    near = np.flatnonzero(np.abs(padded - level) < least)
    padded.flat[near] = level + np.where(padded.flat[near] < level, -least, least)
    vertices, faces, _, _ = marching_cubes(padded, level=level, gradient_direction="ascent")
    spans = np.array(values.shape)
    vertices = (vertices - 1 + 0.5) * 2 / spans - 1  # cell centres to coordinates
    # The axes are reversed from [z, y, x], which turns normals; they are turned back.
    return vertices[:, ::-1].copy(), faces[:, ::-1].copy()


def write_mesh(vertices: np.ndarray, faces: np.ndarray, path: Path) -> None:
    """A mesh as a .glb, .ply, .obj, .off or .stl file."""
    import trimesh

    trimesh.Trimesh(vertices, faces, process=False).export(path)


def pack(occupied: Bool[np.ndarray, "z y x"]) -> bytes:
    """A grid as a .npy of packed bits, x fastest."""
    return write_npy(np.packbits(occupied.reshape(-1)))


def unpack(content: bytes, resolution: int) -> Bool[np.ndarray, "z y x"]:
    """The inverse of `pack`. Raises ValueError where the grid does not have so many cells."""
    bits, cells = read_npy(content, BITS), resolution**3
    if bits.ndim != 1 or bits.dtype != np.uint8 or len(bits) != -(-cells // 8):
        side = round((8 * bits.size) ** (1 / 3))
        raise ValueError(f"{bits.size} bytes of packed bits, about {side} cells a side, expected {resolution}")
    return np.unpackbits(bits, count=cells).reshape((resolution,) * 3).astype(bool)
