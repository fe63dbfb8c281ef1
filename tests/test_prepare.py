"""Preparing pictures: every kind of file, the splits, the layouts, interruptions, and mistakes."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_sets import png, write_set

from distributed_inr.data import pictures, prepare, storage
from distributed_inr.data.cache import Cache
from distributed_inr.data.pictures import Shape
from distributed_inr.data.prepare import Plan, describe, prepare_images, verify
from distributed_inr.data.shards import OpenShard, ShardIndex, ShardWriter, load_index
from distributed_inr.domains.domain import Record

ROOT = Path(__file__).resolve().parents[1]


def save(path: Path, seed: int = 0, size: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def records(index: ShardIndex) -> dict[str, Record]:
    cache = Cache("/nonexistent", gib=1.0)
    opened = [OpenShard(shard, cache) for shard in index.shards]
    return {record["__key__"]: record for shard in opened for record in map(shard.record, range(len(shard)))}


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def bytes_of(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


# One picture


def pixel(content: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    return pictures.decode(content).getpixel(at)  # type: ignore[return-value]


def test_sixteen_bits_of_grey_keep_their_range() -> None:
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    content = bytes_of(Image.fromarray(values), "PNG")
    assert [pixel(content, (x, y))[0] for y in (0, 1) for x in (0, 1)] == [0, 100, 200, 255]


def test_transparency_is_laid_on_white() -> None:
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert pixel(bytes_of(half, "PNG")) == (255, 127, 127)
    assert pixel(bytes_of(Image.new("LA", (2, 2), (0, 0)), "PNG")) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert pixel(bytes_of(palette, "PNG")) == (0, 0, 255)
    assert pixel(bytes_of(palette, "PNG", transparency=1)) == (255, 255, 255)


def test_a_transparent_colour_of_an_rgb_file_becomes_white() -> None:
    content = bytes_of(Image.new("RGB", (2, 2), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    stored = Image.open(io.BytesIO(pictures.encode(content, Shape())[1]))
    assert stored.info == {} and stored.getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_and_grey_become_rgb() -> None:
    assert pixel(bytes_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))[0] > 200
    assert pixel(bytes_of(Image.new("L", (2, 2), 77), "PNG")) == (77, 77, 77)
    assert pixel(bytes_of(Image.new("1", (2, 2), 1), "PNG")) == (255, 255, 255)


def test_pictures_are_turned_upright() -> None:
    picture = Image.new("RGB", (4, 2), "white")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    content = bytes_of(picture, "PNG", exif=exif)
    assert pictures.decode(content).size == (2, 4)
    assert pixel(content, (1, 0)) == (255, 0, 0)
    suffix, stored = pictures.encode(content, Shape())
    assert Image.open(io.BytesIO(stored)).size == (2, 4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_the_first_frame_of_an_animation_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = bytes_of(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert pixel(content) == (255, 0, 0)
    suffix, stored = pictures.encode(content, Shape())
    assert suffix == "png" and getattr(Image.open(io.BytesIO(stored)), "n_frames", 1) == 1


def test_plain_files_keep_their_bytes_where_no_pixel_changes() -> None:
    content = png(0, 16)
    assert pictures.encode(content, Shape()) == ("png", content)
    assert pictures.encode(content, Shape(size=16)) == ("png", content)
    jpeg = bytes_of(pictures.decode(content), "JPEG")
    assert pictures.encode(jpeg, Shape(size=16)) == ("jpg", jpeg)
    assert pictures.encode(jpeg, Shape(size=8))[0] == "png"


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_lossless_encodings_keep_every_pixel(encoding: pictures.Encoding) -> None:
    content = png(0, 16)
    suffix, stored = pictures.encode(content, Shape(encoding=encoding))
    assert suffix == encoding
    assert pictures.decode(stored).tobytes() == pictures.decode(content).tobytes()


@pytest.mark.parametrize("resize", ["center-crop-lanczos", "center-crop-area", "pad-lanczos"])
@pytest.mark.parametrize("size", [(64, 64), (100, 40), (33, 71)])
def test_resizing_gives_the_size_and_keeps_the_middle(resize: pictures.Resize, size: tuple[int, int]) -> None:
    """A disc in the middle of the shorter side stays a disc in the middle."""
    width, height = size
    y, x = np.mgrid[:height, :width] + 0.5
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(size) / 4) ** 2
    content = bytes_of(Image.fromarray((np.dstack([disc] * 3) * 255).astype(np.uint8)), "PNG")
    _, stored = pictures.encode(content, Shape(size=16, resize=resize, enlarge=True))
    pixels = np.asarray(Image.open(io.BytesIO(stored)).convert("L")).astype(float)
    assert pixels.shape == (16, 16)
    assert pixels[7:9, 7:9].min() > 240
    centre = [(pixels.sum(axis) * np.arange(16)).sum() / pixels.sum() for axis in (0, 1)]
    assert centre == pytest.approx([7.5, 7.5], abs=0.6)  # whole pixels can be off by half of one
    if resize != "pad-lanczos":
        assert pixels.mean() / 255 == pytest.approx(np.pi / 16, abs=0.02)


def test_smaller_pictures_are_enlarged_only_when_asked() -> None:
    with pytest.raises(ValueError, match=r"16 x 16 pixels, smaller than 32; --enlarge would invent the rest"):
        pictures.encode(png(0, 16), Shape(size=32))
    _, stored = pictures.encode(png(0, 16), Shape(size=32, enlarge=True))
    assert Image.open(io.BytesIO(stored)).size == (32, 32)


@pytest.mark.parametrize("content", [b"", b"garbage", png(0, 32)[:-100], png(0, 32)[:30], pickle.dumps([1])])
def test_unreadable_pictures_are_named_in_one_line(content: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        pictures.decode(content)
    assert str(caught.value) and "\n" not in str(caught.value)


def test_floating_point_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="no fixed range"):
        pictures.decode(bytes_of(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


def test_pictures_over_the_pixel_limit_are_not_decoded() -> None:
    with pytest.raises(ValueError, match=r"32 x 32 pixels, above the limit of 1000"):
        pictures.decode(png(0, 32), max_pixels=1000)


# Folders


def test_a_class_per_folder_becomes_caption_and_class(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / "raw" / ("red_chair" if i % 2 else "table") / f"{i}.png", i)
    made = prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))
    found = records(made.parts["train"])
    assert sorted(found) == ["red_chair/1", "red_chair/3", "red_chair/5", "table/0", "table/2", "table/4"]
    assert found["red_chair/1"]["txt"] == b"red chair"
    assert json.loads(found["table/0"]["json"]) == {"class": "table"}
    assert found["table/0"]["png"] == (tmp_path / "raw/table/0.png").read_bytes()


def test_captions_come_from_metadata_by_file_name_or_key(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "raw" / f"{i}.v1.png", i)
    rows = [{"file_name": "0.v1.png", "text": "na\u00efve", "class": "x", "width": 3}, {"key": "1_v1", "text": "one"}]
    (tmp_path / "raw" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    found = records(prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none")).parts["train"])
    assert found["0_v1"]["txt"].decode() == "na\u00efve"
    assert json.loads(found["0_v1"]["json"]) == {"class": "x", "width": 3}
    assert found["1_v1"]["txt"] == b"one"
    assert "txt" not in found["2_v1"]


def test_metadata_that_names_missing_files_is_one_clear_line(tmp_path: Path) -> None:
    save(tmp_path / "raw" / "0.png")
    (tmp_path / "raw" / "metadata.jsonl").write_text('{"file_name": "a/gone.png", "text": "x"}\n')
    with pytest.raises(
        ValueError, match=r"^metadata.jsonl names 1 pictures that are not in .*raw, first 'a/gone.png'; rest"
    ):
        prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ['{"file_name": ', "[1]", '{"text": "x"}'])
def test_metadata_that_is_not_json_lines_is_named_by_line(tmp_path: Path, line: str) -> None:
    save(tmp_path / "raw" / "0.png")
    (tmp_path / "raw" / "metadata.jsonl").write_text('{"file_name": "0.png"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 2 "):
        prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan())


def test_bad_files_are_listed_and_left_out(tmp_path: Path) -> None:
    for i in range(5):
        save(tmp_path / "raw" / f"{i}.png", i)
    (tmp_path / "raw" / "1.png").write_bytes(b"garbage")
    (tmp_path / "raw" / "3.png").write_bytes(png(0, 16)[:-50])
    save(tmp_path / "raw" / "4.png", size=40)
    (tmp_path / "raw" / "notes.txt").write_text("not a picture")
    made = prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none", shape=Shape(max_pixels=1000)))
    assert sorted(records(made.parts["train"])) == ["0", "2"]
    assert [name for name, _ in made.skipped] == ["1.png", "3.png", "4.png"]
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert lines[2] == "4.png\t40 x 40 pixels, above the limit of 1000"


@pytest.mark.parametrize("kind", ["empty", "missing", "a file", "only others"])
def test_a_source_without_pictures_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "raw"
    if kind == "a file":
        source.write_text("x")
    elif kind != "missing":
        source.mkdir()
        (source / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"raw(: no pictures for --layout folder; check| is not a folder; give)"):
        prepare_images(source, str(tmp_path / "out"), Plan())
    assert not (tmp_path / "out").exists()


def test_a_source_of_bad_pictures_only_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "0.png").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"no samples were written, so there is no set"):
        prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))


def test_two_files_of_one_name_get_two_keys(tmp_path: Path) -> None:
    save(tmp_path / "raw" / "a.png", 0)
    save(tmp_path / "raw" / "a.jpg", 1)
    made = prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))
    assert sorted(records(made.parts["train"])) == ["a", "a-png"]


# Splits


def split_keys(made: prepare.Prepared) -> tuple[set[str], set[str]]:
    return set(records(made.parts["train"])), set(records(made.parts["val"]))


def test_equal_captions_are_never_on_both_sides(tmp_path: Path) -> None:
    rows = []
    for i in range(40):
        save(tmp_path / "raw" / f"{i}.png", i)
        rows.append({"file_name": f"{i}.png", "text": ["Chair", " chair", "CHAIR"][i % 3] + f" {i % 10}"})
    (tmp_path / "raw" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    made = prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan(val_fraction=0.3))
    train, val = split_keys(made)
    assert made.parts["train"].protocol["split"] == "text"
    assert not {int(k) % 10 for k in train} & {int(k) % 10 for k in val}
    assert len(train | val) == 40


def make_views(root: Path, objects: int = 8, views: int = 3) -> None:
    rows = []
    for i in range(objects):
        for view in range(views):
            save(root / "views" / f"object-{i}" / f"{view:03d}.png", 10 * i + view)
        frames = [{"file_path": f"{view:03d}.png"} for view in range(views)]
        (root / "views" / f"object-{i}" / "transforms.json").write_text(json.dumps({"frames": frames}))
        rows.append({"key": f"object-{i}", "file_name": f"images/{i}.png", "text": f"Thing {i}", "class": "ab"[i % 2]})
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def test_views_of_an_object_stay_together(tmp_path: Path) -> None:
    make_views(tmp_path)
    plan = Plan(layout="views", val_per_class=1)
    train, val = split_keys(prepare_images(tmp_path / "views", str(tmp_path / "out"), plan))
    objects = [{key.split("/")[0] for key in side} for side in (train, val)]
    assert not objects[0] & objects[1]
    assert len(objects[1]) == 2 and {int(o[-1]) % 2 for o in objects[1]} == {0, 1}
    assert len(val) == 6 and len(train) == 18
    found = records(load_index(str(tmp_path / "out" / "train")))
    key = sorted(found)[0]
    assert found[key]["txt"].decode() == f"Thing {key[7]}"


def test_pictures_are_chosen_by_their_metadata(tmp_path: Path) -> None:
    make_views(tmp_path)
    plan = Plan(layout="views", only={"class": ("b",)}, split="none")
    found = records(prepare_images(tmp_path / "views", str(tmp_path / "out"), plan).parts["train"])
    assert {key.split("/")[0] for key in found} == {"object-1", "object-3", "object-5", "object-7"}
    with pytest.raises(ValueError, match=r"no pictures for --layout views --only class=c; check"):
        prepare_images(tmp_path / "views", str(tmp_path / "other"), Plan(layout="views", only={"class": ("c",)}))


def test_a_view_that_is_missing_or_outside_is_refused(tmp_path: Path) -> None:
    make_views(tmp_path)
    (tmp_path / "views/object-3/001.png").unlink()
    with pytest.raises(ValueError, match=r"object-3/transforms.json names '001.png', which is not there"):
        prepare_images(tmp_path / "views", str(tmp_path / "out"), Plan(layout="views"))
    frames = {"frames": [{"file_path": "../object-1/000.png"}]}
    (tmp_path / "views/object-3/transforms.json").write_text(json.dumps(frames))
    with pytest.raises(ValueError, match=r"names '../object-1/000.png', which is not there"):
        prepare_images(tmp_path / "views", str(tmp_path / "out"), Plan(layout="views"))


def test_a_growing_set_keeps_its_split(tmp_path: Path) -> None:
    for i in range(60):
        save(tmp_path / "raw" / f"{i}.png", i)
    _, before = split_keys(prepare_images(tmp_path / "raw", str(tmp_path / "a"), Plan(val_fraction=0.2)))
    for i in range(60, 80):
        save(tmp_path / "raw" / f"{i}.png", i)
    train, after = split_keys(prepare_images(tmp_path / "raw", str(tmp_path / "b"), Plan(val_fraction=0.2)))
    assert before <= after and not before & train


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(split="text"), "--split text needs a caption for every picture"),
        (Plan(split="given"), "--split given needs every picture under train/"),
        (Plan(split="fraction", val_fraction=1e-9), "--split fraction over 3 of them leaves val empty"),
        (Plan(split="fraction", val_per_class=5), "--split fraction over 3 of them leaves train empty"),
    ],
)
def test_splits_that_cannot_be_are_one_clear_line(tmp_path: Path, plan: Plan, message: str) -> None:
    for i in range(3):
        save(tmp_path / "raw" / f"{i}.png", i)
    with pytest.raises(ValueError, match=message):
        prepare_images(tmp_path / "raw", str(tmp_path / "out"), plan)


# Public layouts


def test_afhqv2_is_split_as_given_with_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            for i in range(2):
                save(tmp_path / "afhq" / part / kind / f"{kind}_{i}.png", i)
    plan = Plan(layout="afhqv2", only={"class": ("cat",)})
    train, val = split_keys(prepare_images(tmp_path / "afhq", str(tmp_path / "out"), plan))
    assert train == {"train/cat/cat_0", "train/cat/cat_1"}
    assert val == {"test/cat/cat_0", "test/cat/cat_1"}


def test_celebahq_is_a_folder_of_faces_without_captions(tmp_path: Path) -> None:
    for i in range(30):
        save(tmp_path / "faces" / f"{i:05d}.jpg", i)
    made = prepare_images(tmp_path / "faces", str(tmp_path / "out"), Plan(layout="celebahq", val_fraction=0.2))
    assert made.parts["train"].num_samples + made.parts["val"].num_samples == 30
    assert all("txt" not in record for record in records(made.parts["train"]).values())


def test_cifar10_is_read_from_its_binary_version(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        rows = [bytes([label]) + planes[label].tobytes() for label in range(3)]
        (tmp_path / name).write_bytes(b"".join(rows))
    (tmp_path / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n")
    made = prepare_images(tmp_path, str(tmp_path / "out"), Plan(layout="cifar10"))
    found = records(made.parts["train"])
    assert sorted(found) == [f"train/data_batch_1-{i:05d}" for i in range(3)]
    assert found["train/data_batch_1-00002"]["txt"] == b"bird"
    pixels = np.asarray(pictures.decode(found["train/data_batch_1-00001"]["png"]))
    assert np.array_equal(pixels, planes[1].transpose(1, 2, 0))
    assert made.parts["val"].num_samples == 3


def test_pickled_cifar10_is_refused_unread(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "owned"),)

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"binary version \(its Python version is a pickle"):
        prepare_images(tmp_path, str(tmp_path / "out"), Plan(layout="cifar10"))
    assert not (tmp_path / "owned").exists()


def test_a_cut_cifar10_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3000))
    with pytest.raises(ValueError, match="not a whole number of 3073-byte records"):
        prepare_images(tmp_path, str(tmp_path / "out"), Plan(layout="cifar10"))


def test_lsun_is_exported_files_or_an_lmdb_with_the_package(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "files" / f"{i}.webp", i)
    made = prepare_images(tmp_path / "files", str(tmp_path / "out"), Plan(layout="lsun", split="none"))
    assert made.parts["train"].num_samples == 3
    (tmp_path / "lmdb").mkdir()
    (tmp_path / "lmdb" / "data.mdb").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lmdb", None)
        with pytest.raises(ValueError, match="is an lmdb; pip install lmdb"):
            prepare_images(tmp_path / "lmdb", str(tmp_path / "out2"), Plan(layout="lsun"))


# Interruptions


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(40):
        save(tmp_path / "raw" / f"{i:02d}.png", i)
    (tmp_path / "raw" / "07.png").write_bytes(b"garbage")
    plan = Plan(val_fraction=0.2, shard_samples=5)
    prepare_images(tmp_path / "raw", str(tmp_path / "whole"), plan)

    real, calls = ShardWriter.write, iter(range(10**6))
    with monkeypatch.context() as patch:

        def dying(self: ShardWriter, record: Record) -> None:
            if next(calls) in (13, 14 + 9):
                raise KeyboardInterrupt
            real(self, record)

        patch.setattr(ShardWriter, "write", dying)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                prepare_images(tmp_path / "raw", str(tmp_path / "parts"), plan)
            assert not (tmp_path / "parts/train/index.json").exists()
    made = prepare_images(tmp_path / "raw", str(tmp_path / "parts"), plan)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert [name for name, _ in made.skipped] == ["07.png"]


def test_a_finished_set_is_left_as_it_is(tmp_path: Path) -> None:
    for i in range(10):
        save(tmp_path / "raw" / f"{i}.png", i)
    plan = Plan(val_fraction=0.3)
    first = prepare_images(tmp_path / "raw", str(tmp_path / "out"), plan)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.tar")}
    again = prepare_images(tmp_path / "raw", str(tmp_path / "out"), plan)
    assert again.parts == first.parts
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.tar")} == before


def test_other_settings_or_files_are_refused_and_leave_the_set_intact(tmp_path: Path) -> None:
    for i in range(10):
        save(tmp_path / "raw" / f"{i}.png", i)
    prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan(val_fraction=0.3))
    before = files(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"holds a set made with shape.size=None, now 8 \(1 differ: shape.size\); choose"
    ):
        prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan(val_fraction=0.3, shape=Shape(size=8)))
    save(tmp_path / "raw" / "10.png")
    with pytest.raises(ValueError, match="holds a set made with source="):
        prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan(val_fraction=0.3))
    assert files(tmp_path / "out") == before


def test_a_folder_with_other_peoples_shards_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "raw" / "0.png")
    write_set(tmp_path / "out" / "train", 3)
    before = files(tmp_path / "out")
    with pytest.raises(
        ValueError, match="already holds train/000000.tar, not made by this command; choose another --out"
    ):
        prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))
    assert files(tmp_path / "out") == before


def test_no_space_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "raw" / "0.png")

    def full(url: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_atomic", full)
    with pytest.raises(ValueError, match=r"^no space left in .*out; free some and run the same command again"):
        prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))


def test_a_set_is_prepared_into_an_object_store(tmp_path: Path) -> None:
    import fsspec

    for i in range(4):
        save(tmp_path / "raw" / f"{i}.png", i)
    made = prepare_images(tmp_path / "raw", "memory://bucket/prepared", Plan(split="none"))
    assert made.parts["train"].num_samples == 4
    store = fsspec.filesystem("memory")
    names = {name.removeprefix("/bucket/prepared/") for name in store.find("/bucket/prepared")}
    assert names == {"prepare.json", "skipped.txt", "train/000000.tar", "train/000000.tar.idx", "train/index.json"}
    store.rm("/bucket", recursive=True)


# Verify and describe


def test_verify_finds_nothing_in_a_good_set_and_every_fault_in_a_bad_one(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 30)
    assert verify(str(tmp_path / "set")) == []
    content = bytearray((tmp_path / "set/000001.tar").read_bytes())
    content[600] ^= 1
    (tmp_path / "set/000001.tar").write_bytes(content)
    (tmp_path / "set/000003.tar").unlink()
    problems = verify(str(tmp_path / "set"))
    assert len(problems) == 3
    assert (
        "000001.tar has sha256" in problems[0]
        and "007.png differs" in problems[1]
        and "000003.tar is missing" in problems[2]
    )


def test_verify_finds_keys_that_occur_twice(tmp_path: Path) -> None:
    write_set(tmp_path / "a", 5)
    write_set(tmp_path / "b", 7)
    [problem] = verify(f"{tmp_path}/{{a,b}}")
    assert problem.startswith("5 keys occur more than once, such as '00")


def test_describe_counts(tmp_path: Path) -> None:
    make_views(tmp_path)
    prepare_images(tmp_path / "views", str(tmp_path / "out"), Plan(layout="views", split="none"))
    about = describe(str(tmp_path / "out" / "train"))
    assert about["samples"] == 24 and about["classes"] == {"a": 12, "b": 12} and about["captions"] == 8
    assert about["members"] == {"json": 24, "png": 24, "txt": 24}
    assert about["protocol"]["layout"] == "views"


# The bundled sets and the job


@pytest.mark.parametrize("name", ["furniture", "furniture-all"])
def test_bundled_sets_are_whole_and_their_objects_on_one_side(name: str) -> None:
    sides = {}
    for part in ("train", "val"):
        url = str(ROOT / "examples" / "data" / name / part)
        assert verify(url) == []
        index = load_index(url)
        assert all(shard.bytes <= 12_000_000 for shard in index.shards)
        sides[part] = records(index)
    objects = [{key.split("/")[0] for key in sides[part]} for part in ("train", "val")]
    assert not objects[0] & objects[1]
    if name == "furniture":
        assert (len(sides["train"]), len(sides["val"])) == (816, 72)
        assert len({json.loads(r["json"])["class"] for r in sides["val"].values()}) == 3
    else:
        assert len(sides["train"]) + len(sides["val"]) == 4200
        texts = [{r["txt"].lower() for r in side.values()} for side in sides.values()]
        assert not texts[0] & texts[1]
    sample = next(iter(sides["val"].values()))
    assert pictures.decode(sample["webp"]).size == (128, 128)


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "prepare_data.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


@pytest.mark.slow
def test_the_job_prepares_verifies_and_describes(tmp_path: Path) -> None:
    for i in range(10):
        save(tmp_path / "raw" / "chair" / f"{i}.png", i, size=40)
    out = str(tmp_path / "out")
    made = job("image", str(tmp_path / "raw"), "--out", out, "--size", "32", "--val-fraction", "0.3")
    assert made.returncode == 0 and "train:" in made.stdout and made.stdout.strip().endswith(out), made.stderr
    assert job("verify", f"{out}/train").returncode == 0
    assert json.loads(job("describe", f"{out}/train").stdout)["protocol"]["shape"]["size"] == 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["image", "{}/empty", "--out", "{}/out"], "no pictures for --layout folder"),
        (["image", "{}/raw", "--out", "{}/out", "--only", "chair"], "--only 'chair' must be FIELD=A,B"),
        (["image", "{}/raw", "--out", "{}/out", "--layout", "imagenet"], "invalid choice: 'imagenet'"),
        (["image", "{}/raw", "--out", "{}/out", "--size", "big"], "argument --size: invalid int value: 'big'"),
        (["image", "{}/raw", "--out", "{}/out", "--sise", "8"], "unrecognized arguments: --sise 8"),
        (["image", "{}/raw", "--out", "/proc/out"], "cannot write to /proc/out"),
        (["verify", "{}/empty"], "no index.json and no .tar files there"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], line: str) -> None:
    (tmp_path / "empty").mkdir()
    for i in range(30):
        save(tmp_path / "raw" / f"{i}.png", i)
    result = job(*(argument.format(tmp_path) for argument in arguments))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and line in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_verify_of_a_damaged_set_exits_with_2(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 10)
    (tmp_path / "set/000001.tar").unlink()
    result = job("verify", str(tmp_path / "set"))
    assert result.returncode == 2 and "1 problems; restore those shards" in result.stderr


def test_archives_in_place_of_pictures_are_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with zipfile.ZipFile(tmp_path / "raw" / "0.png", "w") as archive:
        archive.writestr("../../escape.png", png(0))
    save(tmp_path / "raw" / "1.png")
    made = prepare_images(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))
    assert [name for name, _ in made.skipped] == ["0.png"]
