"""Visual hulls: what silhouettes leave, and how it is coloured."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_scenes import FOCAL, THICK, boxes, picture, poses, write_transforms

from distributed_inr.raw import view_folders, visual_hull
from distributed_inr.raw.arrays import read_npy
from distributed_inr.raw.posed_views import Form, encode


def ball_views(count: int = 24, side: int = 64, radius: float = 0.6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views, silhouettes and cameras of a ball: red where x > 0, blue elsewhere."""
    views, masks, cameras = [], [], []
    for pose in poses(count):
        rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
        x, y = ((columns + 0.5) / side - 0.5) / FOCAL, -((rows + 0.5) / side - 0.5) / FOCAL
        directions = x[..., None] * pose[:3, 0] + y[..., None] * pose[:3, 1] - pose[:3, 2]
        directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        along = -(directions @ pose[:3, 3])
        inside = along**2 - pose[:3, 3] @ pose[:3, 3] + radius**2
        point = pose[:3, 3] + directions * (along - np.sqrt(np.maximum(inside, 0)))[..., None]
        colour = np.where(point[..., :1] > 0, [255, 0, 0], [0, 0, 255])
        views.append(np.where(inside[..., None] > 0, colour, 255))
        masks.append(inside > 0)
        cameras.append(np.concatenate([pose.flatten(), [FOCAL, FOCAL, 0.5, 0.5]]))
    return np.stack(views).astype(np.uint8), np.stack(masks), np.stack(cameras)


def test_the_visual_hull_of_a_ball_is_the_ball():
    points = visual_hull.carve(*ball_views(), 4000)
    assert points is not None
    radii = np.linalg.norm(points[:, :3], axis=1)
    assert abs(np.median(radii) - 0.6) < 2 / visual_hull.CELLS and 0.5 < radii.min() and radii.max() < 0.75
    sure = np.abs(points[:, 0]) > 0.1
    is_red = points[:, 3] > points[:, 5]
    assert (is_red == (points[:, 0] > 0))[sure].mean() > 0.97
    assert np.abs(points[:, 4] + 1).max() < 0.5  # hardly any white of the ground


def test_a_surface_is_coloured_by_the_views_that_see_it():
    """A red plate before a blue one: most views that face the blue one's inner side see the red one there."""
    corner = np.array([0.5, 0.08, 0.5])
    red, blue = np.array([255.0, 0.0, 0.0]), np.array([0.0, 0.0, 255.0])
    shapes = [(np.array([0, y, 0]) - corner, np.array([0, y, 0]) + corner, c) for y, c in ((-0.3, red), (0.3, blue))]
    views = np.stack([picture(pose, 64, shapes=shapes) for pose in poses(30)])
    cameras = np.stack([np.concatenate([pose.flatten(), [FOCAL, FOCAL, 0.5, 0.5]]) for pose in poses(30)])
    points = visual_hull.carve(views, (views != 255).any(3), cameras, 6000)
    assert points is not None
    inner = (np.abs(points[:, [0, 2]]) < 0.4).all(1) & (np.abs(points[:, 1] - 0.22) < 0.06)
    assert inner.sum() > 100
    assert (points[inner, 5] > points[inner, 3]).mean() > 0.9


@pytest.mark.parametrize("wrong", ["far away", "looked past", "other axes"])
def test_views_that_do_not_bound_the_object_are_refused(wrong: str):
    views, masks, cameras = ball_views(12)
    own = cameras[:, :16].reshape(-1, 4, 4)  # a view of the cameras
    if wrong == "far away":  # as in other units: all of the sphere is within the silhouettes
        own[:, :3, 3] *= 30
        masks = np.ones_like(masks) & (np.arange(64) > 1)
    elif wrong == "looked past":
        own[:, :3, 3] += 5 * own[:, :3, 0]
    else:  # OpenCV's: they look away
        own[:, :3, 1:3] *= -1
    with pytest.raises(ValueError, match="100% of the unit sphere's rim is inside all silhouettes: the views do"):
        visual_hull.carve(views, masks, cameras, 10)


def test_what_no_silhouette_holds_is_no_hull():
    views, masks, cameras = ball_views(6)
    assert visual_hull.carve(views, np.zeros_like(masks), cameras, 10) is None


@pytest.mark.parametrize("alpha", [True, False])
def test_views_without_points_are_carved(tmp_path: Path, alpha: bool):
    write_transforms(tmp_path / "arms", points=False, side=48, count=24, alpha=alpha)
    made = encode(view_folders.read_folder(tmp_path / "arms", 64), Form(size=48, num_points=2000))
    points = read_npy(made["points.npy"]).astype(np.float64)
    near = [((points[:, :3] > low - 0.06) & (points[:, :3] < high + 0.06)).all(1) for low, high, _ in boxes()]
    assert np.any(near, axis=0).mean() > 0.9
    for axis, (own, (_, _, colour)) in enumerate(zip(near, boxes(), strict=True)):
        own &= points[:, axis] > THICK + 0.1  # away from the other arms
        assert own.sum() > 100
        assert (points[own, 3:].argmax(1) == colour.argmax()).mean() > 0.95


def test_views_that_show_no_ground_are_refused_with_the_remedy(tmp_path: Path):
    write_transforms(tmp_path / "arms", points=False)
    for file in (tmp_path / "arms").glob("*.png"):
        Image.fromarray(255 - np.array(Image.open(file))).save(file)
    folder = view_folders.read_folder(tmp_path / "arms", 64)
    with pytest.raises(ValueError, match=r"nor on a white ground; name a coloured PLY as ply_file_path"):
        encode(folder, Form(size=32))
    encode(folder, Form(size=32, ground="black"))
