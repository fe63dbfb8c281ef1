"""Folders of views with their cameras, as they lie on disks: transforms.json (nerfstudio, instant-ngp) and SRN."""

import io
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

DECODERS = ("PNG", "JPEG", "WEBP")
LARGEST = 1e18
"""Of poses and intrinsics: float32 cannot hold the squares of much larger numbers."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
_CAMERA_MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV")
_MAX_TEXT_BYTES = 64 * 2**20
_MAX_PLY_BYTES = 256 * 2**20
_MAX_PLY_HEADER = 2**16
_OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True)
class PosedViews:
    """The views of one object as they lie in its folder.

    Attributes:
        files: the pictures' paths.
        poses: camera-to-world, OpenGL axes, in the folder's own units.
        lenses: fx, fy, cx, cy, width, height in pixels, which are those of the pictures up to a common factor; width
            and height are nan where they are not given, and then fx may be given as an angle.
        angles: the horizontal angle of view in radians, nan where fx is given.
        points: a PLY file in the poses' frame, if there is one.
        scale: to the unit sphere, where the layout knows it.
    """

    files: list[Path]
    poses: Float[np.ndarray, "views 4 4"]
    lenses: Float[np.ndarray, "views 6"]
    angles: Float[np.ndarray, " views"]
    points: Path | None = None
    scale: float = 1.0


def read_folder(folder: Path, max_views: int) -> PosedViews:
    """The views of a folder in either form. Raises ValueError where they cannot be used."""
    if (folder / "transforms.json").is_file():
        return read_transforms(folder, max_views)
    if (folder / "intrinsics.txt").is_file() or (folder / "pose").is_dir():
        return read_srn(folder, max_views)
    raise ValueError(
        f"{folder} holds neither transforms.json nor intrinsics.txt; give a folder of views with their cameras, of "
        "nerfstudio, instant-ngp or SRN"
    )


def read_transforms(folder: Path, max_views: int) -> PosedViews:
    """transforms.json: intrinsics for all frames or in each; distorted views are refused."""
    try:
        table = json.loads(_text(folder / "transforms.json"))
        frames = [dict(frame) for frame in table["frames"]]
        names = [str(frame["file_path"]) for frame in frames]
        matrices = [frame["transform_matrix"] for frame in frames]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"transforms.json cannot be read ({error!r}); it must list frames, each with file_path and transform_matrix"
        ) from None
    chosen = evenly(len(frames), max_views)
    files, poses, lenses, angles = [], [], [], []
    for number in chosen:
        own, name = {**table, **frames[number]}, names[number]
        files.append(_inside(folder, name))
        poses.append(_pose(matrices[number], name))
        lens, angle = _lens(own, name)
        lenses.append(lens)
        angles.append(angle)
    points = None
    if table.get("ply_file_path"):
        points = _inside(folder, str(table["ply_file_path"]))
    return PosedViews(files, *_stacked(poses, lenses), np.array(angles), points)


def read_srn(folder: Path, max_views: int) -> PosedViews:
    """rgb/, pose/ and intrinsics.txt, as scene representation networks' sets have them (OpenCV axes)."""
    files = sorted(f for f in (folder / "rgb").glob("*") if f.suffix.lower() in _SUFFIXES)
    if not files:
        raise ValueError("no pictures in rgb/; restore them")
    rows = [[_number(word) for word in line.split()] for line in _text(folder / "intrinsics.txt").splitlines()]
    if len(rows) < 5 or len(rows[0]) < 3 or len(rows[1]) != 3 or len(rows[4]) < 2:
        raise ValueError("intrinsics.txt must have five lines: f cx cy 0; grid barycenter; near; scale; height width")
    (focal, cx, cy, *_), barycenter, _, _, (height, width, *_) = rows[:5]
    poses = []
    for file in (chosen := [files[i] for i in evenly(len(files), max_views)]):
        words = _text(folder / "pose" / f"{file.stem}.txt").split()
        matrix = np.array([_number(word) for word in words])
        if matrix.size != 16:
            raise ValueError(f"pose/{file.stem}.txt holds {matrix.size} numbers; a camera-to-world matrix has 16")
        pose = _pose(matrix.reshape(4, 4).tolist(), file.name) @ _OPENCV_TO_OPENGL
        pose[:3, 3] -= barycenter
        poses.append(pose)
    lens = [focal, focal, cx, cy, width, height]
    # ShapeNet's objects fit a cube of side 1 in these sets.
    return PosedViews(chosen, *_stacked(poses, [lens] * len(poses)), np.full(len(poses), np.nan), scale=2.0)


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly spaced, the first among them."""
    return [i * count // min(count, most) for i in range(min(count, most))]


def read_points(path: Path) -> Float[np.ndarray, "points 6"]:
    """Vertices of a PLY file and their colours in [0, 255]."""
    import trimesh

    content = _content(path, _MAX_PLY_BYTES)
    header = content[:_MAX_PLY_HEADER].split(b"end_header")[0]
    if not content.startswith(b"ply") or b" red" not in header:
        raise ValueError(f"{path.name} is not a PLY file whose vertices have colours (red, green, blue); add them")
    try:
        loaded: Any = trimesh.load(io.BytesIO(content), file_type="ply", process=False)
        visual: Any = loaded.visual if isinstance(loaded, trimesh.Trimesh) else loaded
        colours = visual.vertex_colors if visual is not loaded else visual.colors
        points = np.concatenate([loaded.vertices, np.asarray(colours)[:, :3]], axis=1, dtype=np.float64)
    except Exception as error:  # parsers of damaged files raise nearly anything
        raise ValueError(f"{path.name} cannot be read as PLY: {' '.join(str(error).split())[:200]}") from None
    points = points[np.isfinite(points).all(1)]
    if len(points) == 0:
        raise ValueError(f"{path.name} holds no points; write them again or remove ply_file_path")
    return points


def _content(path: Path, most: int) -> bytes:
    try:
        if not path.is_file():
            raise ValueError(f"{path.name} is missing; restore it")
        if (size := path.stat().st_size) > most:
            raise ValueError(f"{path.name} has {size} bytes, more than {most}; make it smaller")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}; restore it") from None


def _text(path: Path) -> str:
    try:
        return _content(path, _MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not a text in UTF-8: {error}; write it again") from None


def _number(word: Any) -> float:
    try:
        value = float(word)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not abs(value) < LARGEST:
        shown = str(word)[:40] if isinstance(word, str | int | float) else reprlib.repr(word)
        raise ValueError(f"{shown!r} stands where a number must, below {LARGEST:g} in size; correct the file")
    return value


def _inside(folder: Path, name: str) -> Path:
    """A file that another names. One without suffix is a PNG, as in the synthetic NeRF scenes."""
    file = folder / name
    try:
        if not file.suffix and not file.exists():
            file = file.with_suffix(".png")
        is_inside = file.resolve().is_relative_to(folder.resolve()) and file.is_file()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, empty or no name; links in a circle
        is_inside = False
    if not is_inside:
        shown = repr(name[:100])
        raise ValueError(f"transforms.json names {shown}, which is not in its folder; restore it or remove the frame")
    return file


def _pose(rows: Sequence[Sequence[Any]], name: str) -> Float[np.ndarray, "4 4"]:
    try:
        matrix = np.array([[_number(value) for value in row] for row in rows])
        if matrix.shape not in ((3, 4), (4, 4)):
            raise ValueError(" x ".join(map(str, matrix.shape)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: transform_matrix is not 4 x 4 numbers ({error})") from None
    matrix = np.concatenate([matrix[:3], [[0.0, 0.0, 0.0, 1.0]]])
    check_rotation(matrix, name)
    return matrix


def check_rotation(pose: Float[np.ndarray, "4 4"], name: str) -> None:
    rotation = pose[:3, :3]
    error, turn = np.abs(rotation.T @ rotation - np.eye(3)).max(), np.linalg.det(rotation)
    if error > 1e-3 or turn < 0:
        raise ValueError(
            f"{name}: its pose is not a rotation (R^T R differs from 1 by {error:.2g}, determinant {turn:.3g}); give "
            "camera-to-world matrices without scale or mirroring"
        )


def _lens(own: Mapping[str, Any], name: str) -> tuple[list[float], float]:
    """fx, fy, cx, cy, width, height, nan where not given, and the angle of view."""
    model = own.get("camera_model", "PINHOLE")
    bent = [key for key in _DISTORTION if _number(own.get(key, 0.0)) != 0]
    if bent or model not in _CAMERA_MODELS:
        what = f"{bent[0]}={own[bent[0]]}" if bent else f"camera_model={reprlib.repr(model)}"
        raise ValueError(f"{name}: {what}: rays here are straight; undistort the pictures, then set it to 0 or PINHOLE")
    given = {key: _number(own[key]) for key in ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x") if key in own}
    nan = math.nan
    if "fl_x" in given:
        focal, angle = given["fl_x"], nan
    elif "camera_angle_x" in given and 0 < given["camera_angle_x"] < math.pi:
        focal, angle = nan, given["camera_angle_x"]
    else:
        raise ValueError(f"{name}: no intrinsics; give fl_x in pixels, or camera_angle_x in (0, pi)")
    lens = [focal, given.get("fl_y", focal), *(given.get(key, nan) for key in ("cx", "cy", "w", "h"))]
    return lens, angle


def _stacked(
    poses: list[np.ndarray], lenses: list[list[float]]
) -> tuple[Float[np.ndarray, "views 4 4"], Float[np.ndarray, "views 6"]]:
    if len(poses) < 2:
        raise ValueError(f"{len(poses)} views; an object needs 2 or more")
    return np.stack(poses), np.array(lenses)
