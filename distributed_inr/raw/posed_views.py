"""Posed views of an object as a record: one size, cameras in the unit sphere's frame, coloured points.

A camera is 20 numbers: the camera-to-world matrix, row by row, in OpenGL axes (x right, y up, the camera looks along
-z), then the focal lengths and the principal point (fx, fy, cx, cy; x right, y down) in units of the picture's side.
The world is that of the scene domain: z up, the object inside the unit sphere around the origin.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image

from distributed_inr.raw import option
from distributed_inr.raw.arrays import read_rows, write_npy
from distributed_inr.raw.pictures import MAX_PIXELS
from distributed_inr.raw.view_folders import DECODERS, LARGEST, PosedViews, check_rotation, evenly, read_points
from distributed_inr.raw.visual_hull import carve

Ground = Literal["white", "black"]
Fit = Literal["given", "cameras"]

CAMERA_DIM = 20

_GROUND_TOLERANCE = 8
"""Of 255: how far a pixel without alpha may be from the ground and still belong to it."""


@dataclass(frozen=True)
class Form:
    """How the views of an object become one record; recorded in `index.json`."""

    size: int = option(64, "side in pixels of the stored views: the central square, reduced by Lanczos")
    ground: Ground = option("white", "what transparent pixels show; of opaque views, what they already show")
    num_points: int = option(4096, "coloured points of an object")
    max_views: int = option(64, "most views of an object; of more, evenly spaced ones")
    scale: float | None = option(
        None, "multiplies all positions, so that the object lies in the unit sphere (default: 1, 2 for --layout srn)"
    )
    fit: Fit = option(
        "given",
        "given: the object lies around the origin; cameras: the point that the views look at becomes the origin, and "
        "the largest sphere there that all of them see whole the unit sphere",
    )
    hold_out_every: int = option(
        6, "where points are carved from the views: leave every so many-th view out, as domain.hold_out_every does"
    )
    max_pixels: int = option(MAX_PIXELS, "leave out objects with larger views undecoded")

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("num_points", 1), ("max_views", 2), ("hold_out_every", 2)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)} must be at least {least}")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ValueError(f"--scale {self.scale} must be a positive number, such as 1")


def encode(posed: PosedViews, form: Form) -> dict[str, bytes]:
    """A record's members: all views as one lossless picture, their cameras, and coloured points."""
    pictures, masks, sizes = [], [], set()
    for file in posed.files:
        picture, mask, size = _decode(file, form)
        pictures.append(picture)
        masks.append(mask)
        sizes.add(size)
    if len(sizes) > 1:
        (a, b), (c, d) = sorted(sizes)[:2]
        raise ValueError(f"views of {a} x {b} and of {c} x {d} pixels; make all views of an object one size")
    cameras, centre, scale = _cameras(posed, sizes.pop(), form)
    views = np.stack(pictures)

    if posed.points is None:
        points = _carved(views, masks, cameras, form)
    else:
        points = read_points(posed.points)
        points = _inside_sphere(np.concatenate([(points[:, :3] - centre) * scale, points[:, 3:] / 127.5 - 1], axis=1))
        generator, count = np.random.default_rng(0), len(points)
        extra = generator.choice(count, max(0, form.num_points - count))
        points = points[np.concatenate([generator.permutation(count)[: form.num_points], extra])]
    return {
        "views.webp": webp(views),
        "cameras.npy": write_npy(cameras),
        "points.npy": write_npy(points.astype(np.float16)),
    }


def decode(
    record: Mapping[str, Any], *, size: int, num_views: int | None, every: int
) -> tuple[UInt8[np.ndarray, "views size size 3"], Float32[np.ndarray, "views 20"], Float32[np.ndarray, "points 6"]]:
    """The `chosen` views of a record, None for all, their cameras, and all points.

    Raises ValueError that begins with the member that cannot be used.
    """
    cameras, points = _rows(record, "cameras.npy", CAMERA_DIM), _rows(record, "points.npy", 6)
    try:
        check_cameras(cameras)
        own = chosen(len(cameras), num_views or len(cameras), every)
    except ValueError as error:
        raise ValueError(f"cameras.npy: {error}") from None
    try:
        views = decode_views(record["views.webp"], count=len(cameras), size=size)
    except (OSError, SyntaxError, ValueError, KeyError, Image.DecompressionBombError) as error:
        raise ValueError(f"views.webp: cannot be decoded: {error}") from None
    return views[own], cameras[own], points


def cameras_of(posed: PosedViews, form: Form) -> Float32[np.ndarray, "views 20"]:
    """The record's cameras, of the first picture's size: what else `encode` refuses is not noticed here. Raises
    ValueError.
    """
    try:
        with Image.open(posed.files[0], formats=DECODERS) as picture:
            size = picture.size
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ValueError(f"{posed.files[0].name}: {error}") from None
    return _cameras(posed, size, form)[0]


def check_cameras(cameras: Float[np.ndarray, "views 20"]) -> None:
    """Raise ValueError where a camera is none: a pose that is not a rotation and a place, a lens that sees nothing."""
    is_usual = (np.abs(cameras) < LARGEST).all(1)
    if not is_usual.all():
        raise ValueError(
            f"the camera of view {int(is_usual.argmin())} has numbers that are not below {LARGEST:g} in size"
        )
    poses = cameras[:, :16].reshape(-1, 4, 4)
    for number, pose in enumerate(poses):
        check_rotation(pose, f"view {number}")
    if (cameras[:, 16:18] <= 0).any():
        raise ValueError("a focal length is not positive; correct the intrinsics")


def grid_of(num_views: int) -> tuple[int, int]:
    """Rows and columns of the one picture that holds all views; nearly square, as WebP ends at 16,383 pixels a side."""
    columns = math.ceil(math.sqrt(num_views))
    return math.ceil(num_views / columns), columns


def held_out(num_views: int, every: int) -> list[int]:
    """The views kept from training: every so many-th, or the last one where there are fewer."""
    return list(range(every - 1, num_views, every)) or [num_views - 1]


def chosen(stored: int, num_views: int, every: int) -> list[int]:
    """So many of the stored views, evenly spaced, of which those at `held_out` are held out of the stored ones too, and
    the others are not: points were carved from all of these. Raises ValueError where so many are not stored.
    """
    if stored < num_views:
        raise ValueError(f"{stored} views, domain.num_views={num_views}; lower the option")
    kept, own = held_out(stored, every), held_out(num_views, every)
    others = [i for i in range(stored) if i not in kept]
    held = iter([kept[i] for i in evenly(len(kept), len(own))])
    seen = iter([others[i] for i in evenly(len(others), num_views - len(own))])
    return [next(held) if i in own else next(seen) for i in range(num_views)]


def decode_views(content: bytes, *, count: int, size: int) -> UInt8[np.ndarray, "count size size 3"]:
    """The inverse of `webp`. Raises ValueError when it is another picture; its size is checked before it is decoded."""
    rows, columns = grid_of(count)
    with Image.open(io.BytesIO(content), formats=("WEBP",)) as picture:
        if picture.size != (columns * size, rows * size):
            raise ValueError(
                f"{picture.width} x {picture.height} pixels, where {count} views of domain.view_size={size} are "
                f"{columns * size} x {rows * size}; prepare the data at that size or change the option"
            )
        pixels = np.array(picture.convert("RGB"))
    cells = pixels.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(-1, size, size, 3)[:count]


def webp(views: UInt8[np.ndarray, "views side side 3"]) -> bytes:
    rows, columns = grid_of(len(views))
    side = views.shape[1]
    canvas = np.zeros((rows * columns, side, side, 3), dtype=np.uint8)
    canvas[: len(views)] = views
    whole = canvas.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * side, -1, 3)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(whole)).save(file, "WEBP", lossless=True, method=6)
    return file.getvalue()


def _rows(record: Mapping[str, Any], name: str, dim: int) -> Float32[np.ndarray, "rows dim"]:
    try:
        return read_rows(record[name], dim)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name}: cannot be decoded: {error}") from None


def _decode(
    file: Path, form: Form
) -> tuple[UInt8[np.ndarray, "side side 3"], Bool[np.ndarray, "side side"], tuple[int, int]]:
    """The central square on the ground, what of it is not ground, and the picture's width and height."""
    colour = (255,) * 3 if form.ground == "white" else (0,) * 3
    try:
        with Image.open(file, formats=DECODERS) as picture:
            width, height = picture.size
            if width * height > form.max_pixels:
                raise ValueError(f"{width} x {height} pixels, above --max-pixels {form.max_pixels}")
            if min(width, height) < form.size:
                raise ValueError(f"{width} x {height} pixels, smaller than the {form.size} of the set (--size)")
            is_cut_out = picture.has_transparency_data
            pixels = picture.convert("RGBA")
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ValueError(f"{file.name}: {error}") from None
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = pixels.crop((left, top, left + side, top + side))
    size, lanczos = (form.size, form.size), Image.Resampling.LANCZOS
    on_ground = Image.alpha_composite(Image.new("RGBA", pixels.size, colour), pixels).convert("RGB")
    reduced = np.array(on_ground if on_ground.size == size else on_ground.resize(size, lanczos))
    if is_cut_out:
        mask = np.array(pixels.getchannel("A").resize(size, Image.Resampling.BOX)) > 127
    else:
        mask: np.ndarray = np.any(np.abs(reduced.astype(int) - colour[0]) > _GROUND_TOLERANCE, axis=2)
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        if border.mean() > 0.5:
            mask[:] = True  # not on this ground: nothing can be told from such a view
    return reduced, mask, (width, height)


@np.errstate(all="ignore")  # what does not become a usual number is told of at the end
def _cameras(
    posed: PosedViews, size: tuple[int, int], form: Form
) -> tuple[Float32[np.ndarray, "views 20"], Float[np.ndarray, "3"], float]:
    """Cameras of the central squares in the unit sphere's frame; and its centre and scale over the folder's."""
    width, height = size
    fx, fy, cx, cy, own_width, own_height = posed.lenses.T.copy()
    own_width, own_height = (np.where(np.isnan(a), b, a) for a, b in ((own_width, width), (own_height, height)))
    if not (np.minimum(own_width, own_height) > 0).all():
        raise ValueError(f"w={own_width.min():g} and h={own_height.min():g}: w and h must be positive; correct them")
    if (np.abs(own_width / width - own_height / height) > 0.01 * own_width / width).any():
        raise ValueError(
            f"the intrinsics are those of {own_width[0]:.0f} x {own_height[0]:.0f} pixels, the pictures have "
            f"{width} x {height}: another shape; correct w and h"
        )
    fx = np.where(np.isnan(fx), own_width / 2 / np.tan(posed.angles / 2), fx)
    fy = np.where(np.isnan(fy), fx, fy)
    cx, cy = np.where(np.isnan(cx), own_width / 2, cx), np.where(np.isnan(cy), own_height / 2, cy)
    side = np.minimum(own_width, own_height)
    cx, cy = cx - (own_width - side) / 2, cy - (own_height - side) / 2
    lenses = np.stack([fx, fy, cx, cy], axis=1) / side[:, None]

    poses, centre, scale = posed.poses.copy(), np.zeros(3), posed.scale
    if form.fit == "cameras":
        centre, scale = _fit(poses, lenses)
    scale = scale if form.scale is None else form.scale * (scale if form.fit == "cameras" else 1.0)
    poses[:, :3, 3] = (poses[:, :3, 3] - centre) * scale
    cameras = np.concatenate([poses.reshape(-1, 16), lenses], axis=1)
    check_cameras(cameras)
    return cameras.astype(np.float32), centre, scale


def _fit(
    poses: Float[np.ndarray, "views 4 4"], lenses: Float[np.ndarray, "views 4"]
) -> tuple[Float[np.ndarray, "3"], float]:
    """The point nearest to all optical axes, and the scale from the sphere that all views see whole to the unit one."""
    axes, places = poses[:, :3, 2], poses[:, :3, 3]
    across = np.eye(3) - axes[:, :, None] * axes[:, None]  # projections onto the planes across the axes
    centre = np.linalg.lstsq(across.sum(0), (across @ places[..., None]).sum(0)[:, 0], rcond=None)[0]
    half = np.arctan(0.5 / lenses[:, :2].max(1))
    radius = (np.linalg.norm(places - centre, axis=1) * np.sin(half)).min()
    if not radius > 0:
        raise ValueError("--fit cameras: a camera stands where the views look; use --fit given with --scale")
    return centre, float(1 / radius)


def _inside_sphere(points: Float[np.ndarray, "points 6"]) -> Float[np.ndarray, "points2 6"]:
    radii = np.linalg.norm(points[:, :3], axis=1)
    inside = radii <= 1.01  # of exported objects that touch the sphere
    if inside.mean() < 0.5:
        reach = float(np.quantile(radii, 0.99))
        raise ValueError(
            f"most points lie outside the unit sphere, 99% within {reach:.3g} of the origin; prepare with --scale "
            f"{1 / reach:.3g} times the present one, or --fit cameras"
        )
    return points[inside]


def _carved(
    views: UInt8[np.ndarray, "views side side 3"],
    masks: list[np.ndarray],
    cameras: Float32[np.ndarray, "views 20"],
    form: Form,
) -> Float[np.ndarray, "points 6"]:
    without = set(held_out(len(views), form.hold_out_every))
    used = [i for i in range(len(views)) if i not in without]
    if any(masks[i].all() for i in used):
        raise ValueError(
            f"no file of points, and views that are neither cut out (alpha) nor on a {form.ground} ground; name a "
            "coloured PLY as ply_file_path in transforms.json, or cut the object out of the pictures"
        )
    found = carve(views[used], np.stack([masks[i] for i in used]), cameras[used].astype(np.float64), form.num_points)
    if found is None:
        raise ValueError(
            "no file of points, and no part of the unit sphere is inside all silhouettes; check --scale, the poses' "
            "axes and the ground"
        )
    return found
