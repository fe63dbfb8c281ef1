"""What silhouettes leave of a grid: the visual hull, coloured by the views that see each of its surface cells."""

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from scipy import ndimage

CELLS = 64
"""Cells a side of the carved grid over [-1, 1]^3."""

_RIM = 0.97
"""Radius from which on cells lie at the sphere's rim, which objects touch in few places."""
_HIDDEN_BY = 2.5
"""Cells by which a surface cell may lie behind the hull's first surface and still count as seen."""


def carve(
    views: UInt8[np.ndarray, "views side side 3"],
    masks: Bool[np.ndarray, "views side side"],
    cameras: Float[np.ndarray, "views 20"],
    count: int,
) -> Float[np.ndarray, "count 6"] | None:
    """`count` points on the visual hull's surface, xyz and rgb in [-1, 1]; None where nothing is left.

    A cell stays if every view that has it in its frame has it in its silhouette. The hull contains the object: what no
    silhouette shows, such as a bowl's inside, is filled.

    Raises ValueError where most of the sphere's rim is left: its views do not bound the object.
    """
    centres = (np.arange(CELLS) * 2 + 1) / CELLS - 1
    x, y, z = np.meshgrid(centres, centres, centres, indexing="ij")
    cells = np.stack([x, y, z], axis=-1).reshape(-1, 3)
    radius = np.linalg.norm(cells, axis=1)
    kept: np.ndarray = radius <= 1
    for mask, camera in zip(masks, cameras, strict=True):
        pixel, _, is_seen = project(cells, camera, mask.shape[0])
        kept &= np.logical_not(is_seen) | mask.reshape(-1)[pixel]
    if (share := kept[(radius > _RIM) & (radius <= 1)].mean()) > 0.5:
        raise ValueError(
            f"no file of points, and {share:.0%} of the unit sphere's rim is inside all silhouettes: the views do not "
            "bound the object; check --scale, the poses' axes, and where the object lies (--fit cameras)"
        )
    solid = kept.reshape(CELLS, CELLS, CELLS)
    surface = (solid & np.logical_not(ndimage.binary_erosion(solid))).reshape(-1)
    if not surface.any():
        return None

    slope = np.stack(np.gradient(ndimage.gaussian_filter(solid.astype(np.float64), 1.5)), axis=-1)
    normals = -slope.reshape(-1, 3)[surface]
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    places = cells[surface]
    colours = _coloured(places, normals, views, cameras)

    generator = np.random.default_rng(0)
    chosen = generator.integers(len(places), size=count)
    within = generator.uniform(-1, 1, (count, 3)) / CELLS
    return np.concatenate([places[chosen] + within, colours[chosen] / 127.5 - 1], axis=1)


def project(
    points: Float[np.ndarray, "points 3"], camera: Float[np.ndarray, " 20"], side: int
) -> tuple[Int64[np.ndarray, " points"], Float[np.ndarray, " points"], Bool[np.ndarray, " points"]]:
    """The pixel (flat, row by row) that shows each point, its distance along the camera's axis, whether it is seen."""
    pose, (fx, fy, cx, cy) = camera[:16].reshape(4, 4), camera[16:]
    own = (points - pose[:3, 3]) @ pose[:3, :3]  # the inverse of a rotation is its transpose
    distance = -own[:, 2]
    ahead = np.maximum(distance, 1e-6)
    column = np.floor((fx * own[:, 0] / ahead + cx) * side)
    row = np.floor((cy - fy * own[:, 1] / ahead) * side)
    is_seen = (distance > 1e-6) & (column >= 0) & (column < side) & (row >= 0) & (row < side)
    return np.where(is_seen, row * side + column, 0).astype(np.int64), distance, is_seen


def _coloured(
    places: Float[np.ndarray, "points 3"],
    normals: Float[np.ndarray, "points 3"],
    views: UInt8[np.ndarray, "views side side 3"],
    cameras: Float[np.ndarray, "views 20"],
) -> Float[np.ndarray, "points 3"]:
    """Colours in [0, 255]: means over the views that see a cell, those that face it the most."""
    total, weights = np.zeros((len(places), 3)), np.full((len(places), 1), 1e-9)
    fallback = np.zeros((len(places), 3))
    for view, camera in zip(views, cameras, strict=True):
        side = view.shape[0]
        pixel, distance, is_seen = project(places, camera, side)
        # Coarser than a cell, so that the cells behind do not show between those in front.
        pitch = camera[16] * side * 2 / CELLS / max(float(distance.min()), 1e-6)
        coarse = max(1, round(side / max(1.0, 2 * pitch)))
        block, _, _ = project(places, camera, coarse)
        nearest = np.full(coarse * coarse, np.inf)
        np.minimum.at(nearest, block[is_seen], distance[is_seen])
        towards = camera[:16].reshape(4, 4)[:3, 3] - places
        facing = (normals * towards).sum(1) / np.linalg.norm(towards, axis=1)
        in_front = is_seen & (distance <= nearest[block] + _HIDDEN_BY * 2 / CELLS)
        weight = (in_front * np.maximum(facing, 0) ** 4)[:, None]
        colour = view.reshape(-1, 3)[pixel]
        total += weight * colour
        weights += weight
        fallback += colour / len(views)
    return np.where(weights > 1e-6, total / weights, fallback)
