"""Stick figures: poses of a skeleton as pictures, and motions as frames of clips."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

Pose = Float[np.ndarray, "joints 3"]
Motion = Float[np.ndarray, "frames joints 3"]
Canvas = UInt8[np.ndarray, "height width 3"]

_AZIMUTH = np.radians(35.0)
"""The view is from aside: seen along an axis, both legs of one who walks along it would be one."""
_NEAR, _FAR = np.array([20.0, 60.0, 130.0]), np.array([190.0, 205.0, 225.0])
_OVERSAMPLING = 3
_MARGIN = 0.06


def strip(motion: Motion, parents: Sequence[int] | None, *, count: int, height: int, width: int) -> Canvas:
    """Poses at `count` evenly spaced moments side by side, each in a cell of `width` pixels about its root.

    All are of one scale and share the ground, so that heights compare. Without parents the joints are dots.
    """
    motion = motion[np.linspace(0, len(motion) - 1, count).round().astype(int)]
    flat = _seen(motion)
    flat[..., 0] -= flat[:, :1, 0]
    window = _window(flat, height, width)
    return np.concatenate([_draw(pose, parents, window, height, width) for pose in flat], axis=1)


def frames(motion: Motion, parents: Sequence[int] | None, *, side: int = 320) -> Iterator[Canvas]:
    """Every pose, one after the other, in one window that holds the whole motion."""
    flat = _seen(motion)
    window = _window(flat, side, side)
    return (_draw(pose, parents, window, side, side) for pose in flat)


def _seen(motion: Motion) -> Motion:
    """Right, up and away, as seen by the viewer. What is not finite, or far out of any room, is brought back in."""
    x, y, z = np.moveaxis(np.clip(np.nan_to_num(motion.astype(np.float64)), -1e4, 1e4), -1, 0)
    right = x * np.cos(_AZIMUTH) + y * np.sin(_AZIMUTH)
    return np.stack([right, z, y * np.cos(_AZIMUTH) - x * np.sin(_AZIMUTH)], axis=-1)


def _window(flat: Motion, height: int, width: int) -> tuple[Float[np.ndarray, " 2"], float]:
    """The centre of what is shown, and pixels a metre."""
    low, high = flat[..., :2].min((0, 1)), flat[..., :2].max((0, 1))
    extent = np.maximum(high - low, 1e-3) * (1 + 2 * _MARGIN)
    return (low + high) / 2, float(min(width / extent[0], height / extent[1]))


def _draw(
    pose: Pose, parents: Sequence[int] | None, window: tuple[np.ndarray, float], height: int, width: int
) -> Canvas:
    """A pose on white, what is near darker."""
    centre, scale = window
    size = (width * _OVERSAMPLING, height * _OVERSAMPLING)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    places = (pose[:, :2] - centre) * [scale, -scale] * _OVERSAMPLING + np.array(size) / 2
    depth = (pose[:, 2] - pose[:, 2].min()) / max(float(np.ptp(pose[:, 2])), 1e-6)
    thickness = max(1, round(height * _OVERSAMPLING / 90))
    for joint in np.argsort(-depth, kind="stable").tolist():
        colour = tuple(int(c) for c in _NEAR + (_FAR - _NEAR) * 0.8 * depth[joint])
        x, y = places[joint]
        if parents is None:
            draw.ellipse((x - thickness, y - thickness, x + thickness, y + thickness), fill=colour)
        elif parents[joint] >= 0:
            draw.line((x, y, *places[parents[joint]]), fill=colour, width=thickness)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX))
