"""Recordings of motion of all kinds of files as one array of frames and channels: rate, axes, windows.

Arrays (.npy, .npz), AMASS (.npz with poses and trans) and BVH are read. What the channels are is the recording's
content:

    positions  places of joints, x y z of each in metres, z up
    poses      AMASS: the root's translation, then the axis-angles of its joints
    bvh        the file's own channels: positions in its unit, angles in degrees without jumps of a turn
    channels   numbers that nothing is known of
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from distributed_inr.raw import bvh, option
from distributed_inr.raw.arrays import FLOATS, INTEGERS, Archive, read_npy

FILE_SUFFIXES = (".npz", ".npy", ".bvh")

Content = Literal["positions", "poses", "bvh", "channels"]
Start = Literal["kept", "centred", "turned"]
Up = Literal["auto", "y", "z"]
Order = Literal["similar", "file"]

_MAX_FILE_BYTES = 2**30
_MAX_NUMBERS = 2**27
"""Of a recording brought to another rate, a GiB: more comes of rates that are none, such as the seconds of a frame."""
_RATES = ("fps", "mocap_framerate", "mocap_frame_rate", "framerate", "frame_rate")
_VALUES = (*FLOATS, *INTEGERS)


@dataclass(frozen=True)
class Form:
    """How recordings are brought to clips of one kind; recorded in `index.json`."""

    frames: int = option(200, "frames of a clip")
    stride: int = option(
        50,
        "frames from one clip of a file to the next; where it is smaller than --frames clips overlap, and a split by "
        "time leaves out as many as do",
    )
    fps: float | None = option(
        None,
        "frames a second that recordings are brought to, by linear interpolation; a file that tells no rate is taken "
        "to have it (default: the first file's, and files of other rates are left out)",
    )
    channels: Literal["positions", "raw"] = option(
        "positions", "of BVH files, the places of joints by forward kinematics, or raw: the file's own channels"
    )
    start: Start = option(
        "turned",
        "kept: as recorded. centred: every clip begins at the origin of the ground (the root's first place there is "
        "taken from all; heights stay). turned: of positions, also turned about the vertical so that its first pose "
        "faces as the first file's does, so that like motions at different places and in different directions are "
        "alike. Channels that nothing is known of are kept",
    )
    up: Up = option(
        "auto", "axis that points up in the files' positions; they are turned to z (auto: y of BVH, else z)"
    )
    metres: float = option(1.0, "metres of a unit of the files' positions; BVH files are mostly in centimetres: 0.01")
    order: Order = option(
        "similar",
        "rows of the grid of time x channel. similar: channels that move alike lie side by side, so that motions are "
        "smooth along both axes; file: as the files have them. The records' own channels stay in the files' order",
    )
    precision: Literal["float32", "float16"] = option(
        "float32", "float16: half the size, to 1 mm at 2 m; float32 keeps more digits"
    )

    def __post_init__(self) -> None:
        if self.frames < 2 or self.stride < 1:
            raise ValueError(f"--frames {self.frames} must be at least 2 and --stride {self.stride} at least 1")
        if self.fps is not None and not 0 < self.fps <= 10_000:
            raise ValueError(f"--fps {self.fps} must lie above 0 and be at most 10000; try 30")
        if not 0 < self.metres < math.inf:
            raise ValueError(f"--metres {self.metres} must be above 0; try 0.01 for centimetres")


@dataclass(frozen=True)
class Recording:
    """A motion, and what is known of its channels.

    Attributes:
        fps: frames a second; None where the file does not tell.
        parents: of each joint, where positions come with a skeleton; -1 of the root.
        names: of the joints, where known.
        hierarchy: of content "bvh", that section of the file.
        ground: lists of channels: the root's place along an axis of the ground is in the first channel of each list,
            and all channels of the list move with it.
        facing: of positions, the pose that clips are turned to face as: places of its joints about the root on the
            ground, x y of each.
    """

    values: Float[np.ndarray, "frames channels"]
    fps: float | None
    content: Content
    parents: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    hierarchy: str = ""
    ground: tuple[tuple[int, ...], ...] = ()
    facing: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def window(self, first: int, frames: int) -> "Recording":
        return replace(self, values=self.values[first : first + frames])

    def resampled(self, fps: float) -> "Recording":
        """At another rate, by linear interpolation between frames; never beyond the last. Raises ValueError where that
        would be too much.
        """
        if self.fps is None or abs(self.fps - fps) < 1e-3 * fps:
            return replace(self, fps=fps)
        intervals = (len(self) - 1) / self.fps * fps + 1e-6
        if (intervals + 1) * self.values.shape[1] > _MAX_NUMBERS:
            raise ValueError(
                f"{intervals + 1:.0f} frames of {self.values.shape[1]} channels at --fps {fps:g}, above the limit of "
                f"{_MAX_NUMBERS} numbers; cut the recording, or correct the {self.fps:g} frames a second that it tells"
            )
        count = math.floor(intervals) + 1
        place = np.minimum(np.arange(count) * (self.fps / fps), len(self) - 1)
        before = np.minimum(place.astype(np.int64), max(0, len(self) - 2))
        after = np.minimum(before + 1, len(self) - 1)
        share = (place - before)[:, None]
        values = self.values.astype(np.float64)
        return replace(self, values=values[before] * (1 - share) + values[after] * share, fps=fps)

    def finished(self, *, start: Start, precision: Literal["float32", "float16"] = "float32") -> np.ndarray:
        """The values as they are stored. Raises ValueError where some are not finite."""
        values = self.values.astype(np.float64)
        if len(bad := np.flatnonzero(~np.isfinite(values).all(axis=1))):
            raise ValueError(f"{len(bad)} of {len(values)} frames have values that are not finite, first {bad[0]}")
        if start != "kept":
            for moved in self.ground:
                values[:, moved] -= values[0, moved[0]]
        if start == "turned" and self.facing is not None:
            values = _turned_to(values, np.reshape(self.facing, (-1, 2)))
        if not (np.abs(values) < np.finfo(precision).max).all():
            raise ValueError(f"values up to {np.abs(values).max():.3g} do not fit into {precision}; check --metres")
        return values.astype(precision)


def read_file(path: Path, form: Form) -> Recording:
    """A whole recording at the form's rate. Raises ValueError where the file cannot be used."""
    try:
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise ValueError(f"{size} bytes, above the limit of {_MAX_FILE_BYTES}; cut the recording")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    return read(content, path.suffix.lower(), form)


def read(content: bytes, suffix: str, form: Form) -> Recording:
    """The same of a file's bytes; the suffix says which of `FILE_SUFFIXES` they are."""
    if suffix == ".bvh":
        found = _of_bvh(content, form)
    elif suffix == ".npz":
        found = _of_archive(Archive(content), form)
    elif suffix == ".npy":
        found = _of_array(read_npy(content, _VALUES), form, fps=None, is_positions=False)
    else:
        raise ValueError(f"{suffix or 'no suffix'} is not one of {' '.join(FILE_SUFFIXES)}")
    if found.fps is not None and not 0 < found.fps <= 10_000:
        raise ValueError(f"{found.fps} frames a second; the rate must lie above 0 and be at most 10000")
    if len(found) < 1 or found.values.shape[1] < 1:
        raise ValueError(f"{len(found)} frames of {found.values.shape[1]} channels; there is nothing in it")
    return found if form.fps is None else found.resampled(form.fps)


def facing_of(recording: Recording) -> tuple[float, ...] | None:
    """What clips are turned to so that they face as the recording's first finite pose does; None where that means
    nothing. Raises ValueError where no pose is finite.
    """
    if recording.content != "positions":
        return None
    finite = np.flatnonzero(np.isfinite(recording.values).all(axis=1))
    if len(finite) == 0:
        raise ValueError("none of its frames is finite")
    ground = recording.values[finite[0]].astype(np.float64).reshape(-1, 3)[:, :2]
    return tuple(float(f"{place:.6g}") for place in (ground - ground[:1]).reshape(-1))


def infer_parents(positions: Float[np.ndarray, "frames joints 3"]) -> tuple[int, ...]:
    """A plausible skeleton of joints whose bones are not known, rooted at the first joint.

    Bones are rigid: the tree whose edges' lengths vary least over time (a minimum spanning tree over their deviation).
    Within a rigid part all pairs vary as little, so that shorter ones are preferred a little.
    """
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

    total, squares = 0.0, 0.0
    for part in np.array_split(positions.astype(np.float64), max(1, len(positions) // 64)):
        distances = np.linalg.norm(part[:, :, None] - part[:, None], axis=-1)
        total, squares = total + distances.sum(0), squares + np.square(distances).sum(0)
    mean = np.asarray(total) / len(positions)
    deviation = np.sqrt(np.maximum(np.asarray(squares) / len(positions) - np.square(mean), 0))
    weights = deviation + 0.02 * mean + 1e-9  # an edge of weight 0 would be none
    np.fill_diagonal(weights, 0)
    tree = minimum_spanning_tree(weights)
    _, parents = breadth_first_order(tree + tree.T, 0, directed=False)
    return (-1, *(int(parent) for parent in parents[1:]))


def similar_order(values: Float[np.ndarray, "frames channels"]) -> tuple[int, ...]:
    """Channels in an order in which neighbours correlate: the leaves of a hierarchical clustering, turned at each node
    so that the sum of the distances from one to the next is smallest.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    channels = values.shape[1]
    if channels < 3:
        return tuple(range(channels))
    centred = values.astype(np.float64) - values.mean(0, dtype=np.float64)
    centred /= np.maximum(np.linalg.norm(centred, axis=0), 1e-12)  # what never moves correlates with nothing
    distances = np.maximum(1 - centred.T @ centred, 0)[np.triu_indices(channels, 1)]
    return tuple(leaves_list(linkage(distances, "average", optimal_ordering=True)).tolist())


def check_parents(parents: Sequence[int], joints: int) -> tuple[int, ...]:
    """The parents of `joints` joints. Raises ValueError where they are no tree."""
    if len(parents) != joints:
        raise ValueError(f"parents has {len(parents)} entries for {joints} joints; give one a joint")
    for joint in range(joints):
        seen, place = 0, joint
        while 0 <= place < joints and seen <= joints:
            place, seen = int(parents[place]), seen + 1
        if place != -1:
            raise ValueError(f"parents of joint {joint} lead to no root; every chain must end with -1")
    return tuple(int(parent) for parent in parents)


def _of_array(values: np.ndarray, form: Form, *, fps: float | None, is_positions: bool) -> Recording:
    """Frames x channels, or frames x joints x 3, which are positions."""
    if values.ndim == 3 and values.shape[2] == 3:
        values, is_positions = values.reshape(len(values), -1), True
    if values.ndim != 2:
        raise ValueError(f"an array of shape {list(values.shape)}, expected [frames, channels] or [frames, joints, 3]")
    if not is_positions:
        return Recording(values, fps, "channels")
    if values.shape[1] % 3:
        raise ValueError(f"positions of {values.shape[1]} channels, which are not three a joint")
    upright = _upright(values.reshape(len(values), -1, 3), form, up="z")
    return Recording(upright, fps, "positions", ground=_ground(upright.shape[1]))


def _of_archive(archive: Archive, form: Form) -> Recording:
    rate = next((name for name in _RATES if name in archive), None)
    fps = None if rate is None else float(archive.read(rate, _VALUES).reshape(-1)[:1].sum())
    if "poses" in archive and "trans" in archive:
        translation, poses = archive.read("trans"), archive.read("poses")
        if translation.ndim != 2 or translation.shape[1] != 3 or poses.ndim != 2 or len(poses) != len(translation):
            raise ValueError(
                f"trans of shape {list(translation.shape)} and poses of shape {list(poses.shape)}, expected "
                "[frames, 3] and [frames, numbers]"
            )
        return Recording(np.concatenate([translation, poses], axis=1), fps, "poses", ground=((0,), (1,)))
    known = [name for name in ("positions", "channels", "motion") if name in archive]
    if not known and len(others := [name for name in archive.names if name not in _RATES]) == 1:
        known = others
    if not known:
        raise ValueError(
            f"holds {', '.join(archive.names[:8]) or 'nothing'}; expected positions [frames, joints * 3], channels, or "
            "AMASS's poses and trans"
        )
    found = _of_array(archive.read(known[0]), form, fps=fps, is_positions=known[0] == "positions")
    if found.content == "positions" and "parents" in archive:
        parents = archive.read("parents", INTEGERS).reshape(-1).tolist()
        found = replace(found, parents=check_parents(parents, found.values.shape[1] // 3))
    return found


def _of_bvh(content: bytes, form: Form) -> Recording:
    file = bvh.parse(content)
    if form.channels == "raw":
        other = "Y" if form.up == "z" else "Z"
        names = [name for joint in file.joints[:1] for name in joint.channels]  # the root's come first
        ground = [(names.index(f"{axis}position"),) for axis in ("X", other) if f"{axis}position" in names]
        values = bvh.without_jumps(file)
        return Recording(values, file.fps, "bvh", hierarchy=file.hierarchy, ground=tuple(ground))
    upright = _upright(bvh.positions(file), form, up="y")
    parents, names = (tuple(getattr(joint, part) for joint in file.joints) for part in ("parent", "name"))
    return Recording(upright, file.fps, "positions", parents, names, ground=_ground(upright.shape[1]))


def _turned_to(
    values: Float[np.ndarray, "frames channels"], facing: Float[np.ndarray, "joints 2"]
) -> Float[np.ndarray, "frames channels"]:
    """Turned about the vertical by the angle that brings the first pose nearest to `facing`, in least squares."""
    joints = values.reshape(len(values), -1, 3)
    x, y = joints[0, :, 0], joints[0, :, 1]
    angle = np.arctan2((x * facing[:, 1] - y * facing[:, 0]).sum(), (x * facing[:, 0] + y * facing[:, 1]).sum())
    turn = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return (joints @ turn).reshape(values.shape)


def _upright(positions: np.ndarray, form: Form, *, up: Literal["y", "z"]) -> Float[np.ndarray, "frames channels"]:
    """In metres, z up, from files in which `up` points up unless the form knows better."""
    if (up if form.up == "auto" else form.up) == "y":
        positions = np.stack([positions[..., 0], -positions[..., 2], positions[..., 1]], axis=-1)
    flat = positions.reshape(len(positions), -1)
    return flat if form.metres == 1 else flat.astype(np.float64) * form.metres


def _ground(channels: int) -> tuple[tuple[int, ...], ...]:
    return tuple(range(0, channels, 3)), tuple(range(1, channels, 3))
