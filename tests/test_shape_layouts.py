"""Raw shapes as they lie on disks: mesh files, voxel grids, and miniatures of Occupancy Networks' sets."""

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import trimesh
from tiny_sets import by_key

from distributed_inr.data.layouts.shapes import SHAPES
from distributed_inr.data.prepare import Plan, prepare_set
from distributed_inr.domains import Shape
from distributed_inr.raw import meshes
from distributed_inr.raw.meshes import Form


def plan(**changes: object) -> Plan:
    form = Form(resolution=16, points=100, queries=500)
    return Plan(**{"domain": "shape", "form": form, "split": "none", **changes})


def read(record: dict) -> np.ndarray:
    signal = Shape(size=16, num_points=10).read(record, seed=0)
    assert signal.inputs.isfinite().all()
    return Shape(size=16).truth(signal.map(lambda tensor: tensor[None]))[0].numpy()


def test_mesh_files_become_grids_and_bad_ones_are_left_out(tmp_path: Path):
    box = trimesh.creation.box((2.0, 1.0, 0.5))
    for suffix in (".obj", ".ply", ".glb", ".off", ".stl"):
        (tmp_path / "raw" / "box").mkdir(parents=True, exist_ok=True)
        box.export(tmp_path / "raw" / "box" / f"a-{suffix[1:]}{suffix}")
    (tmp_path / "raw" / "box" / "empty.obj").write_text("# nothing\n")
    (tmp_path / "raw" / "box" / "flat.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    (tmp_path / "raw" / "box" / "noise.glb").write_bytes(b"glTF" + bytes(40))
    with (tmp_path / "raw" / "box" / "vast.ply").open("wb") as file:
        file.truncate(meshes.MAX_MESH_BYTES + 1)
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), plan())
    found = by_key(made.parts["train"])
    assert sorted(found) == [f"box/a-{suffix}" for suffix in ("glb", "obj", "off", "ply", "stl")]
    assert sorted(name for name, _ in made.skipped) == [
        f"box/{name}" for name in ("empty.obj", "flat.obj", "noise.glb", "vast.ply")
    ]
    assert "536870913 bytes, above the limit" in dict(made.skipped)["box/vast.ply"]
    for record in found.values():
        z, y, x = np.nonzero(read(record) > 0.5)
        assert np.ptp(x) + 1 == 14 and np.ptp(y) + 1 in (6, 7, 8) and np.ptp(z) + 1 in (2, 3, 4)
        assert record["txt"] == b"box"
    assert made.parts["train"].domain == "shape" and made.parts["train"].protocol["form"]["resolution"] == 16


def test_voxels_are_x_y_z_packed_or_not_with_captions_by_key(tmp_path: Path):
    grids = np.zeros((3, 16, 16, 16), bool)
    grids[0, 2:14, 4:8, 6:9] = True  # long in x
    grids[1, 3:5, 3:13, 3:5] = True
    grids[2] = True  # full
    raw = tmp_path / "raw"
    raw.mkdir()
    np.savez(raw / "many.npz", occupancy=np.packbits(grids.reshape(3, -1), axis=1), keys=np.array(["a", "b", "full"]))
    (raw / "sub").mkdir()
    np.save(raw / "sub" / "one.npy", grids[0].astype(np.float32))
    np.save(raw / "sub" / "small.npy", np.ones((4, 4, 4), np.uint8))
    np.save(raw / "sub" / "long.npy", np.ones((4, 4, 5), np.uint8))
    np.save(raw / "sub" / "objects.npy", np.array([None]), allow_pickle=True)
    rows = [
        {"key": "a", "file_name": "elsewhere/a.png", "text": "plank"},
        {"key": "b", "text": "pole", "class": "pole"},
    ]
    (raw / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = prepare_set(raw, str(tmp_path / "out"), plan(layout="voxels"))
    found = by_key(made.parts["train"])
    assert sorted(found) == ["a", "b", "sub/one"]
    assert found["a"]["txt"] == b"plank" and json.loads(found["b"]["json"])["class"] == "pole"
    for key in ("a", "sub/one"):
        assert np.array_equal(read(found[key]) > 0.5, grids[0].transpose(2, 1, 0))
    reasons = dict(made.skipped)
    assert "all of its cells are inside" in reasons["many.npz#full"]
    assert "a grid of 4 x 4 x 4 cells, --resolution 16" in reasons["sub/small.npy"]
    assert "4 x 4 x 5" in reasons["sub/long.npy"]
    assert "not a .npy" in reasons["sub/objects.npy"]


@pytest.mark.parametrize(("layout", "suffixes"), [("mesh-files", (".obj",)), ("voxels", (".npy", ".npz"))])
def test_files_that_cannot_be_read_are_left_out_with_a_reason(layout: str, suffixes: tuple[str, ...], tmp_path: Path):
    raw = tmp_path / "raw"
    raw.mkdir()
    trimesh.creation.box().export(raw / "box.obj")
    grid = np.zeros((16, 16, 16), bool)
    grid[2:9, 3:8, 4:7] = True
    np.save(raw / "box.npy", grid)
    names = [f"gone{suffix}" for suffix in suffixes]
    for name in names:
        (raw / name).symlink_to(tmp_path / "nowhere")
    if layout == "voxels":
        keys = np.array(["a/../../b", "/b", "", "good"])
        np.savez(raw / "many.npz", occupancy=np.stack([grid] * 4), keys=keys)
    made = prepare_set(raw, str(tmp_path / "out"), plan(layout=layout))
    reasons = dict(made.skipped)
    assert all(reasons[name] == "cannot be read: No such file or directory" for name in names)
    assert list(by_key(made.parts["train"])) == (["box", "good"] if layout == "voxels" else ["box"])


def test_files_of_grids_that_cannot_be_right_are_left_out_with_a_reason(tmp_path: Path):
    raw, grids = tmp_path / "raw", np.zeros((3, 16, 16, 16), bool)
    raw.mkdir()
    grids[:, 4:9, 5:12, 3:8] = True
    np.savez(raw / "good.npz", occupancy=grids, keys=np.array(["a.1", "b", "c"]))
    np.savez(raw / "few.npz", occupancy=grids, keys=np.array(["d", "e", "f", "g"]))
    np.savez(raw / "flat.npz", occupancy=grids[0, :1], keys=np.array(["h"]))
    np.savez(raw / "none.npz", keys=np.array(["i"]))
    np.savez(raw / "number.npz", occupancy=np.float32(1), keys=np.array(["j"]))
    np.savez(raw / "one-key.npz", occupancy=grids, keys=np.array("k"))
    np.savez(raw / "numbers.npz", occupancy=grids, keys=np.arange(3))
    np.savez(raw / "zero.npz", grid=np.float32(1))
    np.save(raw / "zero.npy", np.float32(1))
    (raw / "junk.npz").write_bytes(b"PK junk")
    np.savez(raw / "UPPER.npz", grids[0])
    (raw / "UPPER.npz").rename(raw / "UPPER.NPZ")
    made = prepare_set(raw, str(tmp_path / "out"), plan(layout="voxels"))
    assert sorted(by_key(made.parts["train"])) == ["UPPER", "a_1", "b", "c"]
    reasons = dict(made.skipped)
    for name, reason in {
        "few.npz#d": "4 keys, occupancy of shape [3, 16, 16, 16]",
        "few.npz#g": "4 keys, occupancy of shape [3, 16, 16, 16]",
        "flat.npz#h": "1 keys, occupancy of shape [1, 16, 16]",
        "none.npz#i": "keys but no occupancy",
        "number.npz#j": "1 keys, occupancy of shape []",
        "one-key.npz": "keys of shape []",
        "numbers.npz": "keys: not a .npy of version 1.0 that holds one of <U",
        "zero.npz": "an array of shape []",
        "zero.npy": "an array of shape []",
        "junk.npz": "not an .npz file",
    }.items():
        assert reason in reasons.pop(name), name
    assert list(reasons) == ["few.npz#e", "few.npz#f"]


def test_grids_are_read_by_many_threads_and_those_of_few_files_kept(tmp_path: Path):
    size = 8 * 32**3 * 8
    for number in range(8):
        keys = np.array([f"{number}-{i}" for i in range(8)])
        np.savez_compressed(tmp_path / f"{number}.npz", occupancy=np.full((8, 32, 32, 32), float(number)), keys=keys)
    items = SHAPES.layouts["voxels"](tmp_path, None, Form())
    tracemalloc.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda item: (item.key, item.load().occupied.any()), items))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [(f"{number}-{i}", number > 0) for number in range(8) for i in range(8)]
    assert peak < 8 * size  # two files are kept, another is unpacked in parts, and each thread has a grid


def occupancy_networks(root: Path, *, models: int = 4) -> None:
    """Balls of several radii, as in the distributed archive."""
    generator = np.random.default_rng(0)
    (root / "metadata.yaml").parent.mkdir(parents=True)
    (root / "metadata.yaml").write_text("'03001627': {id: '03001627', name: 'chair'}\n")
    for number in range(models):
        folder = root / "03001627" / f"model{number}"
        folder.mkdir(parents=True)
        radius = 0.3 + 0.05 * number
        points = generator.uniform(-0.55, 0.55, (2000, 3))
        occupied = np.packbits(np.linalg.norm(points, axis=1) < radius)
        about = {"loc": np.zeros(3), "scale": np.float64(1)}
        np.savez(folder / "points.npz", points=points.astype(np.float16), occupancies=occupied, **about)
        normals = generator.normal(size=(1000, 3))
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        np.savez(folder / "pointcloud.npz", points=(radius * normals).astype(np.float32), normals=normals, **about)
    (root / "03001627" / "train.lst").write_text("model0\nmodel1\n")
    (root / "03001627" / "val.lst").write_text("model2\n")


def test_occupancy_networks_sets_keep_their_lists_and_points(tmp_path: Path):
    occupancy_networks(tmp_path / "raw")
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), plan(layout="occupancy-networks", split="auto"))
    train, val = (by_key(made.parts[part]) for part in ("train", "val"))
    assert sorted(train) == ["03001627/model0", "03001627/model1"] and sorted(val) == ["03001627/model2"]
    domain = Shape(size=16, num_points=50)
    signal = domain.read(val["03001627/model2"], seed=0)
    assert signal.text == "chair" and signal.targets.shape == (500, 4)
    radius = signal.targets[:, :3].float().norm(dim=1)
    assert ((radius < 0.4 / 0.55) == (signal.targets[:, 3] > 0.5))[(radius - 0.4 / 0.55).abs() > 2e-3].all()
    assert signal.inputs.norm(dim=1).mean().item() == pytest.approx(0.4 / 0.55, abs=0.01)


def test_what_occupancy_networks_sets_lack_is_one_clear_line(tmp_path: Path):
    occupancy_networks(tmp_path / "raw")
    (tmp_path / "raw" / "03001627" / "test.lst").write_text("model9\n")
    with pytest.raises(ValueError, match="1 listed models have no points.npz, first model9"):
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), plan(layout="occupancy-networks"))
    (tmp_path / "raw" / "03001627" / "test.lst").unlink()
    (tmp_path / "raw" / "03001627" / "model1" / "pointcloud.npz").unlink()
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), plan(layout="occupancy-networks"))
    assert [name for name, _ in made.skipped] == ["03001627/model1/points.npz"]
    assert "pointcloud.npz cannot be read" in made.skipped[0][1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.yaml", b"'03001627': {name: chair", "metadata.yaml is not YAML: .*; mend it, or move it"),
        ("metadata.yaml", b"'03001627': {name: 2020-13-45}\n", "metadata.yaml is not YAML: month must be in"),
        ("metadata.yaml", b"- chair\n", "metadata.yaml: expected a name for each class, .*; mend it, or move it"),
        ("metadata.yaml", b"'03001627': chair\n", "metadata.yaml: expected a name for each class"),
        ("metadata.yaml", b"'03001627': {id: '03001627'}\n", "metadata.yaml: expected a name for each class"),
        ("metadata.yaml", b"", "metadata.yaml: expected a name for each class"),
        ("metadata.yaml", b"'03001627': {name: \xff}\n", "metadata.yaml cannot be read: it is not UTF-8; restore it"),
        ("03001627/train.lst", b"model0\n\xff\n", "train.lst cannot be read: it is not UTF-8; restore it"),
    ],
)
def test_lists_and_names_that_cannot_be_read_are_one_clear_line(
    name: str, content: bytes, message: str, tmp_path: Path
):
    occupancy_networks(tmp_path / "raw")
    (tmp_path / "raw" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), plan(layout="occupancy-networks"))
    assert str(tmp_path / "raw" / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"points": np.float32(1)}, "points of shape [], surface [1000, 3] and occupancies [250]"),
        ({"occupancies": np.uint8(1)}, "points of shape [2000, 3], surface [1000, 3] and occupancies []"),
        ({"occupancies": np.ones((2000, 1))}, "and occupancies [2000, 1]"),
        ({"occupancies": np.ones(1999)}, "and occupancies [1999]"),
        ({"occupancies": np.linspace(-1, 1, 2000)}, "occupancies outside [0, 1]"),
        ({"occupancies": np.full(2000, np.nan)}, "occupancies outside [0, 1]"),
        ({"points": np.full((2000, 3), 1e6)}, "points outside the cube of side 1.1"),
        ({"points": np.full((2000, 3), np.nan)}, "points outside the cube of side 1.1"),
        ({"surface": np.full((10, 3), 0.7)}, "points outside the cube of side 1.1"),
        ({"surface": np.zeros((0, 3))}, "no points of the surface"),
        ({"surface": np.float32(0)}, "surface [] and"),
    ],
)
def test_queried_points_that_cannot_be_right_are_left_out_with_a_reason(changes: dict, reason: str, tmp_path: Path):
    occupancy_networks(tmp_path / "raw", models=2)
    folder = tmp_path / "raw" / "03001627"
    (folder / "val.lst").unlink()
    arrays = dict(np.load(folder / "model1" / "points.npz")) | changes
    if (surface := arrays.pop("surface", None)) is not None:
        np.savez(folder / "model1" / "pointcloud.npz", points=surface)
    np.savez(folder / "model1" / "points.npz", **arrays)
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), plan(layout="occupancy-networks"))
    assert list(by_key(made.parts["train"])) == ["03001627/model0"]
    assert [name for name, _ in made.skipped] == ["03001627/model1/points.npz"] and reason in made.skipped[0][1]


def test_the_form_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"--fill 1.5 must lie in \(0, 1\]"):
        Form(fill=1.5)
    with pytest.raises(ValueError, match="--resolution 0 must be at least 1"):
        Form(resolution=0)
    for close in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"--close {close} must be at least 0, and finite; try 1"):
            Form(close=close)
    assert list(SHAPES.layouts) == ["mesh-files", "voxels", "occupancy-networks"]


def test_a_grid_of_another_size_is_a_bad_sample(tmp_path: Path):
    (tmp_path / "raw").mkdir()
    np.save(tmp_path / "raw" / "a.npy", np.arange(16**3).reshape(16, 16, 16) % 2)
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), plan(layout="voxels"))
    with pytest.raises(
        ValueError, match="a: cannot be decoded: 512 bytes of packed bits, about 16 cells a side, expected 8"
    ):
        Shape(size=8).read(by_key(made.parts["train"])["a"], seed=0)
    assert meshes.unpack(by_key(made.parts["train"])["a"]["occupancy.npy"], 16).sum() == 2048
