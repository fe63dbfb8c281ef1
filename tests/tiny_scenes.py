"""A small object that looks different along every axis, its views by a ray caster of their own, and its folders."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distributed_inr.data.prepare import Plan, Prepared, prepare_set
from distributed_inr.domains.domain import Record
from distributed_inr.domains.scene import Scene
from distributed_inr.field import Field
from distributed_inr.raw import posed_views, view_folders

ARMS = {0: (0.8, (220, 30, 30)), 1: (0.55, (30, 190, 30)), 2: (0.35, (30, 30, 230))}
"""Axis -> length of the arm along it from the origin, and its colour: red x, green y, blue z."""
THICK = 0.12
FOCAL = 1.1  # in picture sides


Box = tuple[np.ndarray, np.ndarray, np.ndarray]


def boxes() -> list[Box]:
    """Low and high corner, and colour in [0, 255], of each arm."""
    found = []
    for axis, (length, colour) in ARMS.items():
        low, high = np.full(3, -THICK), np.full(3, THICK)
        low[axis], high[axis] = THICK, length
        found.append((low, high, np.array(colour, dtype=np.float64)))
    return found


def look_from(place: list[float]) -> np.ndarray:
    """Camera-to-world in OpenGL axes, looking at the origin with z up."""
    back = np.array(place) / np.linalg.norm(place)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(back, right), back, np.array(place)], axis=1)
    return pose


def poses(count: int = 12, radius: float = 2.4) -> list[np.ndarray]:
    """Around the object, alternately higher and lower."""
    found = []
    for i in range(count):
        angle, height = 2.4 * i, (0.9, -0.5, 0.2)[i % 3]
        flat = (1 - height**2) ** 0.5
        found.append(look_from([radius * flat * np.cos(angle), radius * flat * np.sin(angle), radius * height]))
    return found


def picture(pose: np.ndarray, side: int, *, alpha: bool = False, shapes: list[Box] | None = None) -> np.ndarray:
    """The arms, or other boxes, as a pinhole camera sees them: for each pixel, the first box along its ray."""
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    x = ((columns + 0.5) / side - 0.5) / FOCAL
    y = -((rows + 0.5) / side - 0.5) / FOCAL
    directions = x[..., None] * pose[:3, 0] + y[..., None] * pose[:3, 1] - pose[:3, 2]
    nearest, found = np.full((side, side), np.inf), np.full((side, side, 3), 255.0)
    for low, high, colour in shapes or boxes():
        with np.errstate(divide="ignore"):
            first, second = (low - pose[:3, 3]) / directions, (high - pose[:3, 3]) / directions
        enter, leave = np.minimum(first, second).max(-1), np.maximum(first, second).min(-1)
        hit = (enter < leave) & (enter < nearest)
        nearest[hit], found[hit] = enter[hit], colour
    if alpha:
        found = np.concatenate([found, np.where(np.isinf(nearest), 0, 255)[..., None]], axis=-1)
    return found.round().astype(np.uint8)


def surface(count: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Points on the arms' faces and their colours."""
    generator, places, colours = np.random.default_rng(0), [], []
    for low, high, colour in boxes():
        points = generator.uniform(low, high, (count // 3, 3))
        axis, side = generator.integers(3, size=len(points)), generator.integers(2, size=len(points))
        points[np.arange(len(points)), axis] = np.where(side == 1, high[axis], low[axis])
        places.append(points)
        colours.append(np.tile(colour, (len(points), 1)))
    return np.concatenate(places), np.concatenate(colours).astype(np.uint8)


def ply(places: np.ndarray, colours: np.ndarray) -> bytes:
    header = f"ply\nformat ascii 1.0\nelement vertex {len(places)}\n"
    header += "".join(f"property float {name}\n" for name in "xyz")
    header += "".join(f"property uchar {name}\n" for name in ("red", "green", "blue")) + "end_header\n"
    rows = (f"{x} {y} {z} {r} {g} {b}\n" for (x, y, z), (r, g, b) in zip(places, colours, strict=True))
    return (header + "".join(rows)).encode()


def write_transforms(
    folder: Path, *, side: int = 32, count: int = 12, points: bool = True, alpha: bool = False, scale: float = 1.0
) -> None:
    """A nerfstudio folder; `scale` makes it as if in other units."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    for number, pose in enumerate(poses(count)):
        Image.fromarray(picture(pose, side, alpha=alpha)).save(folder / f"{number:03d}.png")
        placed = pose.copy()
        placed[:3, 3] *= scale
        frames.append({"file_path": f"{number:03d}.png", "transform_matrix": placed.tolist()})
    table = {"fl_x": FOCAL * side, "cx": side / 2, "cy": side / 2, "w": side, "h": side, "frames": frames}
    if points:
        places, colours = surface()
        (folder / "points.ply").write_bytes(ply(places * scale, colours))
        table["ply_file_path"] = "points.ply"
    (folder / "transforms.json").write_text(json.dumps(table))


def write_srn(folder: Path, *, side: int = 32, count: int = 12) -> None:
    """An SRN folder: OpenCV axes, the object half as large as in the unit sphere."""
    for name in ("rgb", "pose"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, pose in enumerate(poses(count)):
        Image.fromarray(picture(pose, side)).save(folder / "rgb" / f"{number:06d}.png")
        right, up, back, place = pose[:3].T
        cv = np.eye(4)
        cv[:3] = np.stack([right, -up, -back, place / 2], axis=1)
        (folder / "pose" / f"{number:06d}.txt").write_text(" ".join(map(str, cv.flatten())))
    lines = f"{FOCAL * side} {side / 2} {side / 2} 0.\n0. 0. 0.\n1.\n1.\n{side} {side}\n"
    (folder / "intrinsics.txt").write_text(lines)


def make_record(folder: Path) -> Record:
    """The object as a record: 12 views of 32 pixels, 500 points."""
    write_transforms(folder)
    form = posed_views.Form(size=32, num_points=500, hold_out_every=4)
    members = posed_views.encode(view_folders.read_folder(folder, form.max_views), form)
    return {"__key__": "arms", "txt": b"Three arms", **members}


FORM = posed_views.Form(size=32, num_points=1000, hold_out_every=4)


def prepare(
    raw: Path, out: Path, layout: str = "transforms", form: posed_views.Form = FORM, **more: object
) -> Prepared:
    plan = Plan(domain="scene", layout=layout, form=form, **{"split": "none", **more})  # type: ignore[arg-type]
    return prepare_set(raw, str(out), plan)


def arms_field(domain: Scene, count: int = 1) -> Field:
    """The object as a field: solid inside the arms, empty elsewhere."""

    def values(parameters: tuple[torch.Tensor, ...], coords: torch.Tensor, view: torch.Tensor | None) -> torch.Tensor:
        found = coords.new_zeros(*coords.shape[:2], 4)
        found[..., 0] = -60.0
        nearest = coords.argmax(-1)  # colours reach beyond the surface, as those of trained fields do
        for axis, (low, high, colour) in enumerate(boxes()):
            inside = ((coords >= coords.new_tensor(low)) & (coords <= coords.new_tensor(high))).all(-1)
            found[..., 0] = torch.where(inside, 60.0, found[..., 0])
            found[..., 1:][nearest == axis] = coords.new_tensor(colour / 255).logit()
        return found

    return Field(values, (torch.zeros(count),), domain)


def ball_field(domain: Scene, radius: float = 0.5, sharpness: float = 200.0) -> Field:
    """A solid ball, blue where seen along +y and else red."""

    def values(parameters: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
        assert view is not None
        density = sharpness * (radius - coords.norm(dim=-1, keepdim=True))
        red = torch.where(view[..., 1:2] > 0.5, -9.0, 9.0)
        return torch.cat([density, red, torch.full_like(red, -9.0), -red], dim=-1)

    return Field(values, (torch.zeros(1),), domain)
