"""Public layouts of pictures: AFHQv2, CelebA-HQ, CIFAR10, LSUN."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import by_key, save_picture

from distributed_inr.data.prepare import Plan, prepare_set
from distributed_inr.raw import pictures


def test_afhqv2_is_split_as_given_with_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            for i in range(2):
                save_picture(tmp_path / "afhq" / part / kind / f"{kind}_{i}.png", i)
    plan = Plan(layout="afhqv2", only={"class": ("cat",)})
    made = prepare_set(tmp_path / "afhq", str(tmp_path / "out"), plan)
    train, val = (set(by_key(made.parts[part])) for part in ("train", "val"))
    assert train == {"train/cat/cat_0", "train/cat/cat_1"}
    assert val == {"test/cat/cat_0", "test/cat/cat_1"}


def test_celebahq_is_a_folder_of_faces_without_captions(tmp_path: Path) -> None:
    for i in range(30):
        save_picture(tmp_path / "faces" / f"{i:05d}.jpg", i)
    made = prepare_set(tmp_path / "faces", str(tmp_path / "out"), Plan(layout="celebahq", val_fraction=0.2))
    assert made.parts["train"].num_samples + made.parts["val"].num_samples == 30
    assert all("txt" not in record for record in by_key(made.parts["train"]).values())


def test_cifar10_is_read_from_its_binary_version(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        rows = [bytes([label]) + planes[label].tobytes() for label in range(3)]
        (tmp_path / name).write_bytes(b"".join(rows))
    (tmp_path / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n")
    made = prepare_set(tmp_path, str(tmp_path / "out"), Plan(layout="cifar10"))
    found = by_key(made.parts["train"])
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
        prepare_set(tmp_path, str(tmp_path / "out"), Plan(layout="cifar10"))
    assert not (tmp_path / "owned").exists()


def test_a_cut_cifar10_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3000))
    with pytest.raises(ValueError, match="not a whole number of 3073-byte records"):
        prepare_set(tmp_path, str(tmp_path / "out"), Plan(layout="cifar10"))


def test_lsun_is_exported_files_or_an_lmdb_with_the_package(tmp_path: Path) -> None:
    for i in range(3):
        save_picture(tmp_path / "files" / f"{i}.webp", i)
    made = prepare_set(tmp_path / "files", str(tmp_path / "out"), Plan(layout="lsun", split="none"))
    assert made.parts["train"].num_samples == 3
    (tmp_path / "lmdb").mkdir()
    (tmp_path / "lmdb" / "data.mdb").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lmdb", None)
        with pytest.raises(ValueError, match="is an lmdb; pip install lmdb"):
            prepare_set(tmp_path / "lmdb", str(tmp_path / "out2"), Plan(layout="lsun"))


def test_files_that_cannot_be_read_are_left_out_and_the_others_kept(tmp_path: Path) -> None:
    save_picture(tmp_path / "raw/a.png")
    (tmp_path / "raw/gone.png").symlink_to(tmp_path / "nowhere")
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))
    assert list(by_key(made.parts["train"])) == ["a"]
    assert made.skipped == [("gone.png", "cannot be read: No such file or directory")]


def test_files_whose_names_no_shard_can_hold_are_left_out_and_the_others_kept(tmp_path: Path) -> None:
    (tmp_path / "raw/__old__").mkdir(parents=True)
    for name in (b"a.png", b"caf\xe9.png", b"two\nlines.png", b"__old__/b.png", "caf\u00e9.png".encode()):
        save_picture(tmp_path / "raw/new.png")
        os.rename(tmp_path / "raw/new.png", os.path.join(os.fsencode(tmp_path / "raw"), name))
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))
    assert list(by_key(made.parts["train"])) == ["a", "caf\u00e9"]
    reason = "its name is empty, has control characters, __x__ or '..', is not UTF-8, or is too long; rename it"
    assert sorted(made.skipped) == [(name, reason) for name in ("__old__/b.png", "caf\\udce9.png", "two\\nlines.png")]
    assert (tmp_path / "out/skipped.txt").read_text().count("\n") == 3
