"""Scenes as files: films, meshes and views, and what making them holds in memory."""

import dataclasses
import gc
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_processes
from tiny_scenes import arms_field, ball_field, boxes
from torch import Tensor

from distributed_inr.domains import scene_mesh
from distributed_inr.domains.scene import Scene
from distributed_inr.field import Field
from distributed_inr.raw import footage

DOMAIN = Scene(size=16, cells=16, view_size=32, num_views=12, hold_out_every=4, orbit_views=3)


def test_films_go_once_around(tmp_path: Path):
    film = DOMAIN.render(arms_field(DOMAIN), 24, cameras=DOMAIN.orbit(3))
    assert film.shape == (1, 3, 3, 24, 24)
    for name in ("a.mp4", "a.gif", "a.png"):
        DOMAIN.save(film[0], tmp_path / name)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (72, 24)
    with Image.open(tmp_path / "a.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 3
    assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"
    for name in ("a.mp4", "a.gif"):
        DOMAIN.write(arms_field(DOMAIN), 24, tmp_path / f"written-{name}")
        assert (tmp_path / f"written-{name}").read_bytes() == (tmp_path / name).read_bytes()
    DOMAIN.write(arms_field(DOMAIN), 24, tmp_path / "b.gif", frames=5, fps=10.0)
    with Image.open(tmp_path / "b.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 5 and animation.info["duration"] == 100
    with pytest.raises(ValueError, match=r"a.obj: views are written as .png, .mp4"):
        DOMAIN.save(film[0], tmp_path / "a.obj")


@pytest.mark.parametrize("suffix", Scene.suffixes)
def test_every_kind_of_file_is_written_and_can_be_read(tmp_path: Path, suffix: str):
    import trimesh

    path = tmp_path / f"arms{suffix}"
    shown = DOMAIN.write(arms_field(DOMAIN), 24, path)
    assert shown.shape == (1, 3, 3, 24, 24)
    if suffix in scene_mesh.SUFFIXES:
        loaded: Any = trimesh.load(io.BytesIO(path.read_bytes()), file_type=suffix[1:])
        arms: Any = loaded.to_mesh() if isinstance(loaded, trimesh.Scene) else loaded
        volume = sum(float(np.prod(high - low)) for low, high, _ in boxes())
        assert abs(arms.volume - volume) < 0.3 * volume
    elif suffix == ".png":
        with Image.open(path) as sheet:
            pixels = torch.from_numpy(np.array(sheet)).movedim(-1, 0) / 255
        assert (pixels - DOMAIN.pictures(shown)[0]).abs().max() <= 0.5 / 255 + 1e-6
    else:
        views = DOMAIN.render(arms_field(DOMAIN), 24, cameras=DOMAIN.orbit(3))[0]
        found = footage.scan(path)
        assert len(found) == 3
        for frame, view in zip(found.decode(range(3)), views, strict=True):
            pixels = torch.from_numpy(np.array(frame)).movedim(-1, 0) / 255
            assert (pixels - view).abs().mean() < 0.05


def test_what_is_no_kind_of_file_is_refused_before_anything_is_rendered(tmp_path: Path):
    def values(parameters: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
        raise AssertionError("it was rendered")

    with pytest.raises(ValueError, match=r"arms.stl: views are written as .png, .mp4"):
        DOMAIN.write(Field(values, (torch.zeros(1),), DOMAIN), 16, tmp_path / "arms.stl")


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_files_of_many_views_are_made_view_by_view(tmp_path: Path, suffix: str):
    views, side = 12, 48
    domain = dataclasses.replace(DOMAIN, orbit_views=views, render_samples=2, size=4)
    domain = dataclasses.replace(domain, cameras=tuple(map(tuple, domain.orbit(views).tolist())))
    largest = 0

    def values(parameters: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
        nonlocal largest
        alive = (found for found in gc.get_objects() if type(found) is Tensor and found.dtype == torch.float32)
        largest = max(largest, *(found.numel() for found in alive))
        return coords.new_zeros(1, 1, 4).expand(1, coords.shape[1], 4)

    domain.write(Field(values, (torch.zeros(1),), domain), side, tmp_path / f"film{suffix}")
    assert largest <= 20 * side**2  # the cameras of one view's rays, twenty numbers each; views are three


def peak_of_rendering(side: int) -> float:
    """MB by which memory grows at most while one view is rendered."""

    def values(parameters: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
        return coords.new_zeros(1, 1, 4).expand(1, coords.shape[1], 4)

    def memory(name: str) -> float:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1000

    domain = dataclasses.replace(DOMAIN, render_samples=1)
    field = Field(values, (torch.zeros(1),), domain)
    domain.render(field, 8, cameras=domain.orbit(1))
    before = memory("VmRSS")
    domain.render(field, side, cameras=domain.orbit(1), chunk_points=1 << 14)
    return memory("VmHWM") - before


@pytest.mark.slow
def test_a_large_view_is_held_once():
    (peak,) = run_processes(peak_of_rendering, 1, 4000)
    assert peak < 1.5 * 4000**2 * 12e-6


@pytest.mark.parametrize("suffix", scene_mesh.SUFFIXES)
def test_meshes_of_too_many_cells_are_refused_in_one_line(tmp_path: Path, suffix: str):
    with pytest.raises(ValueError, match=rf"resolution=1025 must lie in 1..1024 cells a side for {suffix} files; "):
        DOMAIN.write(ball_field(DOMAIN), 1025, tmp_path / f"ball{suffix}")
    DOMAIN.check_file(suffix, 1024)
    for other in (".mp4", ".png"):
        DOMAIN.check_file(other, 4096)


def mesh(field: Field, resolution: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return scene_mesh.surface(field, resolution, density=DOMAIN.density, inside_sphere=True)


def test_meshes_have_the_objects_shape_and_colours(tmp_path: Path):
    import trimesh

    vertices, faces, colours = mesh(ball_field(DOMAIN), 48)
    shape = trimesh.Trimesh(vertices, faces, process=False)
    assert shape.is_watertight and abs(shape.volume - 4 / 3 * np.pi * 0.5**3) < 0.02
    from_behind = vertices[:, 1] > 0.3  # seen against +y
    assert (colours[from_behind, 0] > 250).all() and (colours[vertices[:, 1] < -0.3, 2] > 250).all()
    vertices, _, colours = mesh(arms_field(DOMAIN), 64)
    for axis, length in ((0, 0.8), (1, 0.55), (2, 0.35)):
        far = vertices[:, axis] > 0.25
        assert abs(vertices[:, axis].max() - length) < 0.04
        assert (colours[far, :3].argmax(1) == axis).all()
    DOMAIN.write(ball_field(DOMAIN), 32, tmp_path / "ball.ply")
    loaded: Any = trimesh.load(io.BytesIO((tmp_path / "ball.ply").read_bytes()), file_type="ply")
    assert abs(loaded.volume - 4 / 3 * np.pi * 0.5**3) < 0.03
    with pytest.raises(ValueError, match="there is no surface"):
        mesh(ball_field(DOMAIN, radius=-1.0), 16)
    with pytest.raises(ValueError, match=r"ball.stl: views are written as .png, .mp4"):
        DOMAIN.write(ball_field(DOMAIN), 16, tmp_path / "ball.stl")
