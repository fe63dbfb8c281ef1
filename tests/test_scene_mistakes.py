"""Preparing scenes with mistakes: each is of one object, which is left out and listed."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_scenes import FORM, ply, prepare, surface, write_srn, write_transforms
from tiny_sets import by_key

from distributed_inr.raw import view_folders
from distributed_inr.raw.posed_views import encode


def change(folder: Path, **values: object) -> None:
    path = folder / "transforms.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_frame(folder: Path, **values: object) -> None:
    table = json.loads((folder / "transforms.json").read_text())
    table["frames"][1] |= values
    change(folder, frames=table["frames"])


def loop(folder: Path) -> None:
    (folder / "loop.png").symlink_to("loop.png")
    change_frame(folder, file_path="loop.png")


def claim(path: Path, side: int) -> None:
    """A PNG that says that it is so large."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(side))
    sizes = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(sizes))


STRETCHED = np.diag([1.0, 1.0, 1.2, 1.0]).tolist()
MIRRORED = np.diag([1.0, 1.0, -1.0, 1.0]).tolist()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda f: change_frame(f, transform_matrix=STRETCHED),
            r"001.png: its pose is not a rotation \(R\^T R",
        ),
        (lambda f: change_frame(f, transform_matrix=MIRRORED), r"its pose is not a rotation .*determinant -1"),
        (lambda f: change_frame(f, transform_matrix=[[1, 2]]), "transform_matrix is not 4 x 4 numbers"),
        (lambda f: change_frame(f, transform_matrix=[["a"] * 4] * 4), "'a' stands where a number must"),
        (lambda f: change_frame(f, transform_matrix=[[10**400] * 4] * 4), "stands where a number must"),
        (lambda f: change_frame(f, transform_matrix=[[1e300] * 4, [-1e300] * 4, [1.0] * 4]), "1e.300' stands where a"),
        (
            lambda f: change_frame(f, transform_matrix=[[1, 0, 0, 1e30], [0, 1, 0, 0], [0, 0, 1, 0]]),
            "'1e.30' stands where",
        ),
        (lambda f: change_frame(f, transform_matrix=[[1, 0, 0, 0]]), "transform_matrix is not 4 x 4 numbers"),
        (lambda f: change_frame(f, file_path="../../other.png"), "which is not in its folder"),
        (lambda f: change_frame(f, file_path="x" * 300), "which is not in its folder"),
        (lambda f: change_frame(f, file_path="x" * 300 + ".png"), "which is not in its folder"),
        (lambda f: change_frame(f, file_path="a\0b.png"), "which is not in its folder"),
        (loop, "'loop.png', which is not in its folder"),
        (lambda f: change_frame(f, k1=0.1), "k1=0.1: rays here are straight; undistort the pictures"),
        (lambda f: change(f, camera_model="OPENCV_FISHEYE"), "camera_model='OPENCV_FISHEYE': rays here are straight"),
        (lambda f: change(f, fl_x=float("nan")), "'nan' stands where a number must"),
        (lambda f: change(f, fl_x=-3), "a focal length is not positive"),
        (lambda f: change(f, fl_x=10**400), "stands where a number must"),
        (lambda f: change(f, cx=1e300), "'1e.300' stands where a number must"),
        (lambda f: change(f, fl_x=None), "'None' stands where a number must"),
        (lambda f: change(f, w=0, h=0), "w and h must be positive"),
        (lambda f: (f / "transforms.json").write_bytes(b"\xff{}"), "transforms.json cannot be read"),
        (lambda f: claim(f / "000.png", 30_000), "000.png: Image size .* exceeds limit"),
        (lambda f: change(f, frames=[]), "0 views; an object needs 2 or more"),
        (lambda f: change(f, frames=7), "must list frames, each with file_path and transform_matrix"),
        (lambda f: (f / "transforms.json").write_text("{"), "transforms.json cannot be read"),
        (lambda f: (f / "001.png").write_bytes(b"\x89PNG\r\n\x1a\ncut"), "001.png: cannot identify"),
        (lambda f: Image.new("RGB", (40, 40)).save(f / "001.png"), "views of 32 x 32 and of 40 x 40 pixels"),
        (lambda f: Image.new("RGB", (9, 9)).save(f / "001.png"), "9 x 9 pixels, smaller than the 32 of the set"),
        (lambda f: (f / "points.ply").write_bytes(b"ply\nend_header\n"), "not a PLY file whose vertices have colours"),
        (lambda f: (f / "points.ply").write_bytes(ply(*surface())[:300]), "points.ply"),
        (lambda f: change(f, ply_file_path="../good/points.ply"), "which is not in its folder"),
        (lambda f: change(f, ply_file_path="gone.ply"), "names 'gone.ply', which is not in its folder"),
    ],
)
def test_bad_objects_are_left_out_and_listed(tmp_path: Path, spoil: object, words: str):
    for name in ("bad", "good"):
        write_transforms(tmp_path / "raw" / name)
    spoil(tmp_path / "raw" / "bad")  # type: ignore[operator]
    made = prepare(tmp_path / "raw", tmp_path / "out")
    assert list(by_key(made.parts["train"])) == ["good"]
    (name, reason), *others = made.skipped
    assert name == "bad" and not others and "\n" not in reason
    with pytest.raises(ValueError, match=words):
        raise ValueError(reason)


def test_missing_intrinsics_are_refused(tmp_path: Path):
    write_transforms(tmp_path / "arms")
    table = json.loads((tmp_path / "arms" / "transforms.json").read_text())
    del table["fl_x"]
    (tmp_path / "arms" / "transforms.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="no intrinsics; give fl_x in pixels, or camera_angle_x"):
        view_folders.read_folder(tmp_path / "arms", 64)
    change(tmp_path / "arms", camera_angle_x=1e-320)
    with pytest.raises(ValueError, match="the camera of view 0 has numbers that are not below"):
        encode(view_folders.read_folder(tmp_path / "arms", 64), FORM)


def test_links_that_lead_nowhere_are_no_part_of_an_object(tmp_path: Path):
    write_transforms(tmp_path / "raw" / "arms")
    (tmp_path / "raw" / "arms" / "notes.txt").symlink_to("gone.txt")
    assert list(by_key(prepare(tmp_path / "raw", tmp_path / "out").parts["train"])) == ["arms"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "intrinsics.txt").write_text("1 2 3"), "must have five lines"),
        (lambda f: (f / "pose" / "000001.txt").write_text("1 2 3"), "holds 3 numbers"),
        (lambda f: (f / "pose" / "000001.txt").unlink(), "000001.txt is missing"),
        (lambda f: shutil.rmtree(f / "rgb"), "no pictures in rgb/"),
        (lambda f: (f / "pose" / "000001.txt").write_bytes(b"\xff"), "000001.txt is not a text in UTF-8"),
        (lambda f: (f / "pose" / "000001.txt").write_text("1e30 " * 16), "'1e30' stands where a number must"),
        (lambda f: (f / "intrinsics.txt").write_text("9e999 1 1 0\n0 0 0\n1\n1\n32 32\n"), "'9e999' stands where"),
        (lambda f: claim(f / "rgb" / "000000.png", 30_000), "000000.png: Image size .* exceeds limit"),
    ],
)
def test_bad_srn_folders_are_left_out_and_listed(tmp_path: Path, spoil: object, words: str):
    for name in ("bad", "good"):
        write_srn(tmp_path / "raw" / name)
    spoil(tmp_path / "raw" / "bad")  # type: ignore[operator]
    made = prepare(tmp_path / "raw", tmp_path / "out", "srn")
    assert list(by_key(made.parts["train"])) == ["good"]
    ((name, reason),) = made.skipped
    with pytest.raises(ValueError, match=words):
        raise ValueError(reason)
    assert name == "bad" and "\n" not in reason
