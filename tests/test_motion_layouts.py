"""Preparing motions: every kind of file, clips and their keys, splits, statistics, and what is left out and why."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import by_key

from distributed_inr.data.layouts import SOURCES
from distributed_inr.data.prepare import Plan, Prepared, prepare_set, verify
from distributed_inr.domains.motion import Motion
from distributed_inr.raw import arrays, motions
from distributed_inr.raw.arrays import Archive, read_npy, write_npy
from distributed_inr.raw.motions import Form

KEPT = {"frames": 10, "stride": 5, "start": "kept"}


def walk(frames: int, joints: int = 4, number: int = 0) -> np.ndarray:
    """Rigid rods in a chain that swings as it walks; no two frames are equal."""
    time = np.arange(frames) / 10 + number
    places = np.zeros((frames, joints, 3))
    places[:, 0] = np.stack([0.1 * time, 0 * time, 1 + 0 * time], axis=1)
    for joint in range(1, joints):
        angle = np.sin(time * joint)
        rod = np.stack([0.3 * np.sin(angle), 0.3 * np.cos(angle), 0 * angle], axis=1)
        places[:, joint] = places[:, joint - 1] + rod
    return places.reshape(frames, -1)


def save(path: Path, **values: np.ndarray | float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: np.asarray(value) for name, value in values.items()})


def prepared(tmp_path: Path, **plan) -> Prepared:
    form = plan.pop("form", Form(**KEPT))
    return prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(domain="motion", form=form, **plan))


def clips(made: Prepared, part: str = "train") -> dict[str, np.ndarray]:
    return {key: read_npy(record["motion.npy"]) for key, record in by_key(made.parts[part]).items()}


# Clips and splits


def test_clips_are_windows_of_the_files_by_their_first_frames(tmp_path: Path) -> None:
    values = walk(27)
    save(tmp_path / "raw/slow/a.npz", positions=values, fps=30)
    made = prepared(tmp_path, split="none")
    found = clips(made)
    assert list(found) == ["slow/a/000000", "slow/a/000005", "slow/a/000010", "slow/a/000015"]
    for key, clip in found.items():
        first = int(key.split("/")[-1])
        assert clip.dtype == np.float32
        np.testing.assert_allclose(clip, values[first : first + 10], atol=1e-6)
    assert by_key(made.parts["train"])["slow/a/000000"]["txt"] == b"slow"
    assert verify(str(tmp_path / "out/train")) == []


def test_whole_files_are_held_out_unless_asked_otherwise(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / f"raw/{number}.npz", positions=walk(30, number=number), fps=30)
    made = prepared(tmp_path, val_per_class=1)
    files = [{key.split("/")[0] for key in clips(made, part)} for part in ("train", "val")]
    assert not files[0] & files[1] and (len(files[0]), len(files[1])) == (3, 1)
    assert made.parts["train"].protocol["split"] == "object"


def test_a_split_by_time_with_its_gap_shares_no_frame(tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path / f"raw/{number}.npz", positions=walk(80, number=100 * number), fps=30)
    made = prepared(tmp_path, split="time", val_fraction=0.3, val_gap=1)  # frames / stride - 1
    frames = [{row.tobytes() for clip in clips(made, part).values() for row in clip} for part in ("train", "val")]
    assert not frames[0] & frames[1] and len(frames[0]) > 50 and len(frames[1]) > 30


def test_statistics_are_of_the_training_clips_and_settle_the_domain(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"raw/{number}.npz", positions=walk(30, number=number), fps=25)
    made = prepared(tmp_path, val_per_class=1)
    stored = np.concatenate(list(clips(made).values())).astype(np.float64)
    told = made.parts["train"].protocol["motion"]
    np.testing.assert_allclose(told["mean"], stored.mean(0), atol=1e-6)
    expected = np.maximum(stored.std(0), 1e-3 * stored.std(0).max())
    np.testing.assert_allclose(told["deviation"], expected, rtol=1e-5)
    assert expected[2] > stored.std(0)[2] == 0  # the root's height, which does not move
    assert (told["frames"], told["channels"], told["fps"], told["content"]) == (10, 12, 25, "positions")

    domain = Motion(size=10, channels=12).settle(made.parts["val"].protocol)
    standard = np.concatenate([domain.read(r, 0).targets.numpy() for r in by_key(made.parts["train"]).values()])
    standard = standard[:, np.argsort(told["order"])]
    np.testing.assert_allclose(standard.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.delete(standard.std(0), [1, 2, 5, 8, 11]), 1, atol=1e-4)
    assert domain.fps == 25 and domain.start == "kept" and domain.up == "auto" and domain.metres == 1


def test_bones_that_nobody_told_are_the_pairs_that_stay_equally_far_apart(tmp_path: Path) -> None:
    order = [0, 3, 1, 2]  # the chain 0 - 2 - 3 - 1 after shuffling
    values = walk(40).reshape(40, 4, 3)[:, order].reshape(40, -1)
    save(tmp_path / "raw/a.npz", positions=values, fps=30)
    told = prepared(tmp_path, split="none").parts["train"].protocol["motion"]
    assert told["parents"] == [-1, 3, 0, 2] and told["parents_inferred"]
    save(tmp_path / "other/raw/a.npz", positions=values, fps=30, parents=np.array([-1, 0, 0, 0]))
    told = prepared(tmp_path / "other", split="none").parts["train"].protocol["motion"]
    assert told["parents"] == [-1, 0, 0, 0] and not told["parents_inferred"]


def test_bones_are_the_rigid_pairs_even_where_others_are_nearer() -> None:
    fold = 0.35 + 0.25 * np.sin(np.arange(50))
    places = np.zeros((50, 3, 3))
    places[:, 1, 0] = 1
    places[:, 2] = np.stack([1 - np.cos(fold), np.sin(fold), 0 * fold], axis=1)  # folded back beside the first joint
    assert motions.infer_parents(places) == (-1, 0, 1)


def test_channels_that_move_alike_lie_side_by_side_unless_the_files_order_is_kept(tmp_path: Path) -> None:
    time, own = np.arange(40) / 6, np.random.default_rng(0).normal(size=(40, 6)) * 0.01
    waves = np.stack([np.sin(time), np.cos(2 * time), np.sin(5 * time)], axis=1)
    values = np.concatenate([waves, 7 * waves], axis=1) + own + [0, 100, 0, 0, 0, 0]
    np.save(tmp_path / "waves.npy", values)
    (tmp_path / "raw").mkdir()
    (tmp_path / "waves.npy").rename(tmp_path / "raw/waves.npy")
    told = prepared(tmp_path, split="none").parts["train"].protocol["motion"]
    pairs = [{channel % 3 for channel in told["order"][place : place + 2]} for place in (0, 2, 4)]
    assert sorted(told["order"]) == list(range(6)) and all(len(pair) == 1 for pair in pairs)
    kept = Plan(domain="motion", form=Form(**KEPT, order="file"), split="none")
    made = prepare_set(tmp_path / "raw", str(tmp_path / "kept"), kept)
    assert made.parts["train"].protocol["motion"]["order"] is None
    np.testing.assert_allclose(clips(made)["waves/000005"], values[5:15], rtol=1e-6)
    still = np.concatenate([values, np.ones((40, 1))], axis=1)  # a channel that never moves is no obstacle
    assert sorted(motions.similar_order(still)) == list(range(7))


def test_clips_begin_at_the_origin_and_face_one_way_unless_kept(tmp_path: Path) -> None:
    values = walk(30)
    turned = values.reshape(30, 4, 3) @ np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]) + np.array([5.0, -7, 0])
    save(tmp_path / "raw/a.npz", positions=values, fps=30)
    save(tmp_path / "raw/b.npz", positions=turned.reshape(30, -1), fps=30)
    made = prepared(tmp_path, split="none", form=Form(frames=10, stride=5))
    found = clips(made)
    for start in ("000000", "000010"):
        np.testing.assert_allclose(found[f"b/{start}"], found[f"a/{start}"], atol=1e-5)
    np.testing.assert_allclose(found["a/000000"], values[:10] - values[0, 0] * np.tile([1, 0, 0], 4), atol=1e-5)
    np.testing.assert_allclose(found["a/000010"][0, :3], [0, 0, 1], atol=1e-6)
    told = made.parts["train"].protocol["motion"]
    np.testing.assert_allclose(np.reshape(told["facing"], (4, 2)), values[0].reshape(4, 3)[:, :2], atol=1e-5)

    only_moved = Form(frames=10, stride=5, start="centred")
    made = prepare_set(tmp_path / "raw", str(tmp_path / "moved"), Plan(domain="motion", form=only_moved, split="none"))
    expected = turned[:10] - [5, -7, 0]
    np.testing.assert_allclose(clips(made)["b/000000"], expected.reshape(10, -1), atol=1e-5)


def test_clips_are_turned_also_where_the_first_file_begins_badly(tmp_path: Path) -> None:
    values = walk(30)
    turned = values.reshape(30, 4, 3) @ np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    bad, worse = values.copy(), np.full_like(values, np.nan)
    bad[0, 4] = np.inf
    save(tmp_path / "raw/a.npz", positions=worse, fps=30)
    save(tmp_path / "raw/b.npz", positions=bad, fps=30)
    save(tmp_path / "raw/c.npz", positions=turned.reshape(30, -1), fps=30)
    made = prepared(tmp_path, split="none", form=Form(frames=10, stride=5))
    told, reasons = made.parts["train"].protocol["motion"], dict(made.skipped)
    expected = values[1].reshape(4, 3)[:, :2] - values[1, :2]
    np.testing.assert_allclose(np.reshape(told["facing"], (4, 2)), expected, atol=1e-5)
    np.testing.assert_allclose(clips(made)["c/000005"], clips(made)["b/000005"], atol=1e-5)
    assert reasons == {
        "a.npz": "none of its frames is finite",
        "b.npz#0": "1 of 10 frames have values that are not finite, first 0",
    }


def test_going_on_after_an_interruption_ends_with_the_same_bytes(tmp_path: Path) -> None:
    save(tmp_path / "raw/a.npz", positions=walk(60), fps=30)
    first = prepared(tmp_path, split="none").parts["train"].fingerprint
    (tmp_path / "out/train/index.json").unlink()
    assert prepared(tmp_path, split="none").parts["train"].fingerprint == first


# What is left out


def test_what_cannot_be_used_is_left_out_by_name_with_the_reason(tmp_path: Path) -> None:
    save(tmp_path / "raw/a.npz", positions=walk(30), fps=30)
    broken = walk(30)
    broken[7, 3] = np.nan
    save(tmp_path / "raw/nan.npz", positions=broken, fps=30)
    save(tmp_path / "raw/rate.npz", positions=walk(30), fps=60)
    save(tmp_path / "raw/short.npz", positions=walk(9), fps=30)
    save(tmp_path / "raw/wide.npz", positions=walk(30, joints=5), fps=30)
    save(tmp_path / "raw/odd.npz", positions=np.zeros((30, 11)), fps=30)
    save(tmp_path / "raw/none.npz", betas=np.zeros(16), gender=np.array("x"))
    save(tmp_path / "raw/object.npz", positions=np.array([{}], dtype=object))
    (tmp_path / "raw/text.npz").write_bytes(b"garbage")
    (tmp_path / "raw/text.npy").write_bytes(b"garbage")
    (tmp_path / "raw/notes.txt").write_text("not a motion")
    (tmp_path / "raw/gone.npz").symlink_to(tmp_path / "nowhere")
    made = prepared(tmp_path, split="none")
    assert {key.split("/")[0] for key in clips(made)} == {"a", "nan"} and len(clips(made)) == 8
    reasons = dict(made.skipped)
    assert set(reasons) == {
        *("gone.npz", "nan.npz#0", "nan.npz#5", "none.npz", "object.npz", "odd.npz", "rate.npz"),
        *("short.npz", "text.npy", "text.npz", "wide.npz"),
    }
    assert reasons["gone.npz"] == "cannot be read: No such file or directory"
    assert reasons["nan.npz#5"] == "1 of 10 frames have values that are not finite, first 2"
    assert reasons["short.npz"] == "9 frames, shorter than --frames 10"
    assert "30 frames a second" not in reasons["rate.npz"] and reasons["rate.npz"].startswith(
        "60.0 frames a second, but"
    )
    assert reasons["wide.npz"] == "15 channels (positions), but the first file, a.npz, has 12 (positions)"
    assert "not three a joint" in reasons["odd.npz"] and "but |O" in reasons["object.npz"]
    assert reasons["none.npz"].startswith("holds betas, gender; expected positions")
    assert all("\n" not in reason for reason in reasons.values())


def test_a_rate_brings_all_files_to_it_by_linear_interpolation(tmp_path: Path) -> None:
    save(tmp_path / "raw/a.npz", positions=walk(40), fps=40)
    save(tmp_path / "raw/b.npz", positions=walk(61), fps=60)
    np.save(tmp_path / "raw/c.npy", walk(20).reshape(20, 4, 3))
    made = prepared(tmp_path, split="none", form=Form(frames=20, stride=20, start="kept", fps=20.0))
    found = clips(made)
    assert list(found) == ["a/000000", "b/000000", "c/000000"] and not made.skipped
    np.testing.assert_allclose(found["a/000000"], walk(40)[::2], atol=1e-6)
    np.testing.assert_allclose(found["b/000000"], walk(61)[: 20 * 3 : 3], atol=1e-6)
    np.testing.assert_allclose(found["c/000000"], walk(20), atol=1e-6)
    assert made.parts["train"].protocol["motion"]["fps"] == 20
    ramp = motions.Recording(np.arange(5.0)[:, None], 10.0, "channels").resampled(25.0)
    np.testing.assert_allclose(ramp.values[:, 0], np.arange(11) * 0.4)


def test_a_file_that_tells_a_rate_of_next_to_nothing_is_left_out(tmp_path: Path) -> None:
    save(tmp_path / "raw/a.npz", positions=walk(40), fps=40)
    save(tmp_path / "raw/slow.npz", positions=walk(40), fps=1e-6)
    made = prepared(tmp_path, split="none", form=Form(frames=20, stride=20, start="kept", fps=20.0))
    assert list(clips(made)) == ["a/000000"]
    reason = "780000001 frames of 12 channels at --fps 20, above the limit of 134217728 numbers; cut the recording, or "
    assert made.skipped == [("slow.npz", reason + "correct the 1e-06 frames a second that it tells")]
    with pytest.raises(ValueError, match="^inf frames of 12 channels"):
        motions.Recording(walk(40), 1e-308, "positions").resampled(20.0)


def bomb(shape: tuple[int, ...], *, claimed: int | None = None) -> bytes:
    """An archive whose one array is zeros, compressed a thousandfold; `claimed`: the size that its entry pretends."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("positions.npy", write_npy(np.zeros(shape, np.float32)))
    content = file.getvalue()
    if claimed is not None:
        true = len(write_npy(np.zeros(shape, np.float32))).to_bytes(4, "little")
        content = content.replace(true, claimed.to_bytes(4, "little"))
    return content


def test_archives_that_unpack_to_too_much_are_refused_before_they_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bomb((1000, 300))
    with pytest.raises(ValueError, match=r"^positions: 1200128 bytes unpacked, above the limit of 100000"):
        Archive(content, max_bytes=100_000).read("positions")
    assert Archive(content).read("positions").shape == (1000, 300)
    with pytest.raises(ValueError, match=r"^positions"):  # an entry that lies about its size
        Archive(bomb((1000, 300), claimed=5000), max_bytes=100_000).read("positions")
    header = write_npy(np.zeros((2, 3)))[:128].replace(b"(2, 3), }    ", b"(999999, 999)")
    with pytest.raises(ValueError, match="not a .npy|above the limit"):
        read_npy(header)
    monkeypatch.setattr(motions, "_MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="above the limit of 100; cut"):
        motions.read_file(Path(__file__), Form())


@pytest.mark.parametrize(
    "array", [np.float32(30), np.arange(3.0), np.asfortranarray(walk(4)), np.ones((2, 3, 4), "f2")]
)
def test_arrays_of_any_shape_and_order_are_read_as_numpy_wrote_them(array) -> None:
    file = io.BytesIO()
    np.save(file, array)
    found = read_npy(file.getvalue())
    assert found.dtype == np.asarray(array).dtype and np.array_equal(found, array)
    with pytest.raises(ValueError, match="not a .npy of version 1.0 that holds one of [|]u1"):
        read_npy(file.getvalue(), ("|u1",))
    with pytest.raises(ValueError, match=r"not a .npy of version 1.0"):
        read_npy(b"\x93NUMPY\x01\x00\x76\x00{'descr': __import__('os')}" + b" " * 100)
    assert arrays.read_npy(write_npy(np.arange(5, dtype=np.uint8)), ("|u1",)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"frames": 1}, "--frames 1 must be at least 2"),
        ({"stride": 0}, "--stride 0 at least 1"),
        ({"fps": 0.0}, "--fps 0.0 must lie above 0"),
        ({"metres": 0.0}, "--metres 0.0 must be above 0"),
    ],
)
def test_forms_that_mean_nothing_are_refused(values, words) -> None:
    with pytest.raises(ValueError, match=words):
        Form(**values)


# AMASS


def test_amass_is_read_as_translation_and_poses(tmp_path: Path) -> None:
    poses, translation = np.random.default_rng(0).normal(size=(24, 156)), np.cumsum(np.ones((24, 3)), axis=0)
    about = {"betas": np.zeros(16), "gender": np.array("female"), "dmpls": np.zeros((24, 8))}
    save(tmp_path / "raw/CMU/01/01_poses.npz", poses=poses, trans=translation, mocap_framerate=120.0, **about)
    save(tmp_path / "raw/CMU/01/shape.npz", betas=np.zeros(16))
    save(tmp_path / "raw/SOMA/x_stageii.npz", poses=poses, trans=translation, mocap_frame_rate=np.int64(60))
    save(tmp_path / "raw/BAD/y_poses.npz", poses=poses[:5], trans=translation, mocap_framerate=120.0)
    form = Form(frames=6, stride=6, fps=30.0)
    made = prepared(tmp_path, layout="amass", split="none", form=form)
    found = clips(made)
    assert list(found) == ["CMU/01/01_poses/000000", "SOMA/x_stageii/000000", "SOMA/x_stageii/000006"]
    assert found["CMU/01/01_poses/000000"].shape == (6, 159)
    np.testing.assert_allclose(found["CMU/01/01_poses/000000"][:, 3:], poses[::4], atol=1e-6)
    np.testing.assert_allclose(found["SOMA/x_stageii/000006"][:, :3], [[2 * i, 2 * i, 13 + 2 * i] for i in range(6)])
    assert [name for name, _ in made.skipped] == ["BAD/y_poses.npz"]
    told = made.parts["train"].protocol["motion"]
    assert told["content"] == "poses" and told["parents"] is None and told["facing"] is None
    domain = Motion(size=6).settle(made.parts["train"].protocol)
    signal = domain.open(tmp_path / "raw/SOMA/x_stageii.npz")
    np.testing.assert_allclose(domain.truth(signal)[0].numpy(), found["SOMA/x_stageii/000000"], atol=1e-4)
    domain.save(domain.truth(signal)[0], tmp_path / "again.npz")
    np.testing.assert_allclose(domain.open(tmp_path / "again.npz").inputs, signal.inputs, atol=1e-4)


def test_motions_are_registered() -> None:
    assert SOURCES["motion"].noun == "motion"
    json.dumps(vars(Form()))
