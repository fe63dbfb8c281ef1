"""Preparing scenes: nerfstudio and SRN folders, splits, shared cameras, and the way to the rays."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_scenes import (
    ARMS,
    FOCAL,
    FORM,
    THICK,
    boxes,
    look_from,
    picture,
    poses,
    prepare,
    write_srn,
    write_transforms,
)
from tiny_sets import by_key

from distributed_inr.config import from_json, to_json
from distributed_inr.data.layouts import SOURCES
from distributed_inr.domains.domain import Record
from distributed_inr.domains.scene import Scene
from distributed_inr.raw import view_folders
from distributed_inr.raw.arrays import read_npy
from distributed_inr.raw.posed_views import Form, decode_views, encode, held_out, webp

DOMAIN = Scene(size=32, view_size=32, num_views=12, hold_out_every=4, num_points=600, point_noise=0.0)


def expect_arms(record: Record) -> None:
    """The record's views, cameras and points are those of the object with three arms."""
    views = decode_views(record["views.webp"], count=12, size=32)
    assert all(np.array_equal(view, picture(pose, 32)) for view, pose in zip(views, poses(), strict=True))
    cameras, points = read_npy(record["cameras.npy"]), read_npy(record["points.npy"]).astype(np.float64)
    expected = np.stack(poses()).reshape(12, 16)
    np.testing.assert_allclose(cameras[:, :16], expected, atol=1e-6)
    np.testing.assert_allclose(cameras[:, 16:], np.tile([FOCAL, FOCAL, 0.5, 0.5], (12, 1)), atol=1e-6)
    assert len(points) == 1000
    for axis, (length, colour) in ARMS.items():
        own = np.abs(points[:, 3:] - (np.array(colour) / 127.5 - 1)).max(1) < 0.02
        assert own.sum() > 200
        np.testing.assert_allclose(points[own, axis].max(), length, atol=1e-2)
        np.testing.assert_allclose(np.delete(np.abs(points[own, :3]), axis, axis=1).max(), THICK, atol=1e-2)


def test_a_nerfstudio_folder_becomes_views_cameras_and_points(tmp_path: Path):
    write_transforms(tmp_path / "raw" / "arms")
    made = prepare(tmp_path / "raw", tmp_path / "out")
    expect_arms(by_key(made.parts["train"])["arms"])


def test_positions_in_other_units_are_scaled(tmp_path: Path):
    write_transforms(tmp_path / "raw" / "arms", scale=10.0)
    form = Form(size=32, num_points=1000, scale=0.1)
    expect_arms(by_key(prepare(tmp_path / "raw", tmp_path / "out", form=form).parts["train"])["arms"])
    made = encode(
        view_folders.read_folder(tmp_path / "raw" / "arms", 64), Form(size=32, num_points=1000, fit="cameras")
    )
    cameras = read_npy(made["cameras.npy"])
    radii = np.linalg.norm(cameras[:, [3, 7, 11]], axis=1)
    np.testing.assert_allclose(radii, 1 / np.sin(np.arctan(0.5 / FOCAL)), rtol=1e-4)
    with pytest.raises(
        ValueError, match=r"outside the unit sphere, 99% within 8\S* of the origin; prepare with --scale"
    ):
        encode(view_folders.read_folder(tmp_path / "raw" / "arms", 64), Form(size=32))


@pytest.mark.parametrize("own", [{"scale": 0.1}, {"fit": "cameras"}, {"fit": "cameras", "scale": 1.5}])
def test_ones_own_folder_is_placed_as_the_set_was(tmp_path: Path, own: dict[str, Any]):
    write_transforms(tmp_path / "raw" / "arms", scale=10.0)
    made = prepare(tmp_path / "raw", tmp_path / "out", form=dataclasses.replace(FORM, **own)).parts["train"]
    protocol = json.loads(json.dumps(dict(made.protocol)))
    domain = DOMAIN.settle(protocol)
    assert from_json(Scene, to_json(domain)) == domain == domain.settle(protocol)
    found, stored = domain.open(tmp_path / "raw" / "arms"), domain.read(by_key(made)["arms"], 0)
    assert torch.equal(found.targets["cameras"][0], stored.targets["cameras"])  # type: ignore[index]
    inside = by_key(made)["arms"]["points.npy"]
    reach = np.abs(read_npy(inside)[:, :3]).max(0)
    np.testing.assert_allclose(found.inputs[0, :, :3].abs().amax(0), reach, atol=0.03)
    kept = dataclasses.replace(DOMAIN, scale=0.2, fit="given").settle(protocol)
    assert isinstance(kept, Scene) and (kept.scale, kept.fit) == (0.2, "given")


def test_frames_may_have_their_own_intrinsics_and_the_pictures_be_wide(tmp_path: Path):
    write_transforms(tmp_path / "arms")
    path = tmp_path / "arms" / "transforms.json"
    table = json.loads(path.read_text())
    for frame in table["frames"]:
        wide = np.full((32, 48, 3), 255, dtype=np.uint8)
        wide[:, 8:40] = np.array(Image.open(tmp_path / "arms" / frame["file_path"]))
        Image.fromarray(wide).save(tmp_path / "arms" / frame["file_path"])
        # Intrinsics of twice the pictures' size, as where pictures were reduced afterwards.
        frame |= {"fl_x": 2 * FOCAL * 32, "fl_y": 2 * FOCAL * 32, "cx": 48.0, "cy": 32.0, "w": 96, "h": 64}
    table = {"frames": table["frames"], "ply_file_path": "points.ply", "aabb_scale": 16}
    path.write_text(json.dumps(table))
    expect_arms(encode(view_folders.read_folder(tmp_path / "arms", 64), FORM))
    for frame in table["frames"]:
        frame["h"] = 96
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="the intrinsics are those of 96 x 96 pixels, the pictures have 48 x 32"):
        encode(view_folders.read_folder(tmp_path / "arms", 64), FORM)


def test_an_angle_of_view_stands_for_the_focal_length(tmp_path: Path):
    write_transforms(tmp_path / "arms")
    path = tmp_path / "arms" / "transforms.json"
    table = json.loads(path.read_text())
    frames = [frame | {"file_path": frame["file_path"].removesuffix(".png")} for frame in table["frames"]]
    angle = 2 * np.arctan(0.5 / FOCAL)
    path.write_text(json.dumps({"camera_angle_x": angle, "frames": frames, "ply_file_path": "points.ply"}))
    expect_arms(encode(view_folders.read_folder(tmp_path / "arms", 64), FORM))


def test_an_srn_folder_is_turned_to_opengl_axes_and_scaled_by_two(tmp_path: Path):
    write_srn(tmp_path / "raw" / "cars_train" / "a1")
    write_srn(tmp_path / "raw" / "cars_test" / "b2")
    made = prepare(tmp_path / "raw", tmp_path / "out", "srn", split="auto")
    assert list(by_key(made.parts["train"])) == ["cars_train/a1"] and list(by_key(made.parts["val"])) == [
        "cars_test/b2"
    ]
    record = by_key(made.parts["train"])["cars_train/a1"]
    views, cameras = decode_views(record["views.webp"], count=12, size=32), read_npy(record["cameras.npy"])
    np.testing.assert_allclose(cameras[:, :16], np.stack(poses()).reshape(12, 16), atol=1e-6)
    assert np.array_equal(views[5], picture(poses()[5], 32))
    points = read_npy(record["points.npy"]).astype(np.float64)  # carved: no file of points
    red = points[:, 3] - points[:, 5] > 1
    assert points[red, 0].mean() > 0.3 and np.abs(points[red, 1:3]).mean() < 0.15


def test_fewer_views_are_taken_evenly(tmp_path: Path):
    write_transforms(tmp_path / "arms")
    posed = view_folders.read_folder(tmp_path / "arms", 5)
    assert [file.stem for file in posed.files] == ["000", "002", "004", "007", "009"]


def test_many_views_fit_one_picture():
    generator = np.random.default_rng(0)
    for count in (2, 5, 12, 50):
        views = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        assert np.array_equal(decode_views(webp(views), count=count, size=8), views)
    with pytest.raises(ValueError, match=r"24 x 24 pixels, where 5 views of domain.view_size=16 are 48 x 32"):
        decode_views(webp(views[:9]), count=5, size=16)


def test_held_out_views_are_every_so_many_th():
    assert held_out(24, 6) == [5, 11, 17, 23] and held_out(3, 6) == [2]


# Captions, splits, shared cameras


def test_captions_split_and_shared_cameras(tmp_path: Path):
    rows = []
    for number in range(12):
        write_transforms(tmp_path / "raw" / f"{number:03d}", side=16, count=4)
        rows.append({"key": f"{number:03d}", "text": f"Thing {number % 6}", "class": "ab"[number % 2]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    form = Form(size=16, num_points=50)
    made = prepare(tmp_path / "raw", tmp_path / "out", form=form, split="auto", val_fraction=0.3)
    train, val = (by_key(made.parts[part]) for part in ("train", "val"))
    assert made.parts["train"].protocol["split"] == "text"
    assert not {record["txt"] for record in train.values()} & {record["txt"] for record in val.values()}
    np.testing.assert_allclose(made.parts["train"].protocol["cameras"], read_npy(train[min(train)]["cameras.npy"]))

    shutil.rmtree(tmp_path / "out")
    table = json.loads((tmp_path / "raw" / min(train) / "transforms.json").read_text())
    table["frames"][0]["transform_matrix"] = look_from([0.0, -2.0, 1.0]).tolist()
    (tmp_path / "raw" / min(train) / "transforms.json").write_text(json.dumps(table))
    made = prepare(tmp_path / "raw", tmp_path / "out", form=form, split="auto", val_fraction=0.3)
    assert "cameras" not in made.parts["train"].protocol


def test_a_folder_of_one_object_alone_is_a_set_of_one(tmp_path: Path):
    write_transforms(tmp_path / "arms", side=8, count=4)
    made = prepare(tmp_path / "arms", tmp_path / "out", form=Form(size=8, num_points=20))
    assert list(by_key(made.parts["train"])) == ["arms"]


def test_metadata_that_names_missing_objects_is_one_clear_line(tmp_path: Path):
    write_transforms(tmp_path / "raw" / "arms", side=8, count=2)
    (tmp_path / "metadata.jsonl").write_text('{"key": "gone", "text": "x"}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl names 1 files that are not in .*raw, first 'gone'"):
        prepare(tmp_path / "raw", tmp_path / "out")


def test_the_source_is_registered_and_its_options_checked():
    assert SOURCES["scene"].form is Form and set(SOURCES["scene"].layouts) == {"transforms", "srn"}
    for values in ({"scale": -1.0}, {"size": 0}, {"max_views": 1}):
        with pytest.raises(ValueError, match="^--"):
            Form(**values)


# The whole way: files -> shards -> rays


def test_rays_of_a_prepared_set_have_the_colours_of_the_object(tmp_path: Path):
    write_transforms(tmp_path / "raw" / "arms")
    made = prepare(tmp_path / "raw", tmp_path / "out")
    signal = DOMAIN.read(by_key(made.parts["train"])["arms"], 5)
    batch = signal.map(lambda tensor: tensor[None])
    queries, colours = DOMAIN.supervise(batch, 4000)
    assert queries.view is not None
    origins, directions = (t[0].double().numpy() for t in (queries.coords, queries.view))
    nearest, expected = np.full(4000, np.inf), np.full((4000, 3), 255.0)
    margins = np.full(4000, np.inf)
    for low, high, colour in boxes():
        first, second = (low - origins) / directions, (high - origins) / directions
        enter, leave = np.minimum(first, second).max(-1), np.maximum(first, second).min(-1)
        hit = (enter < leave) & (enter < nearest)
        nearest[hit], expected[hit] = enter[hit], colour
        margins = np.minimum(margins, np.abs(leave - enter))
    clear = margins > 1e-4
    assert clear.mean() > 0.95
    np.testing.assert_allclose(colours[0].numpy()[clear] * 255, expected[clear], atol=0.5)
    assert 0.4 < (expected != 255).any(1).mean() < 0.75  # half of the rays are the object's, and some of the others
    assert batch.inputs.shape == (1, 600, 6) and len(batch.inputs[0].unique(dim=0)) == 600  # none twice
