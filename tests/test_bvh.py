"""BVH files: forward kinematics, a file's own channels, and what is wrong with damaged ones."""

import contextlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import by_key

from distributed_inr.data.prepare import Plan, prepare_set
from distributed_inr.domains.motion import Motion
from distributed_inr.raw import bvh, motions
from distributed_inr.raw.arrays import read_npy
from distributed_inr.raw.motions import Form

TWO_JOINTS = """HIERARCHY
ROOT Hip
{
  OFFSET 9 9 9
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Knee
  {
    OFFSET 0 -40 0
    CHANNELS 3 Zrotation Xrotation Yrotation
    End Site
    {
      OFFSET 0 -30 0
    }
  }
}
MOTION
Frames: 3
Frame Time: 0.04
1 90 2 0 0 0 0 0 0
1 90 2 90 0 0 0 90 0
1 90 2 0 90 0 90 0 0
"""


def test_forward_kinematics_is_that_by_hand(tmp_path: Path) -> None:
    file = bvh.parse(TWO_JOINTS.encode())
    assert [joint.name for joint in file.joints] == ["Hip", "Knee", "Knee_end"] and file.fps == 25
    found = bvh.positions(file)
    hip = np.array([1.0, 90, 2])
    np.testing.assert_allclose(found[:, 0], [hip] * 3)
    np.testing.assert_allclose(found[0, 1:], [hip + [0, -40, 0], hip + [0, -70, 0]], atol=1e-12)
    # A quarter turn about z takes -y to x; within the turned hip, one about x takes -y to -z, which stays.
    np.testing.assert_allclose(found[1, 1:], [hip + [40, 0, 0], hip + [40, 0, -30]], atol=1e-12)
    # A quarter turn about x takes -y to -z; within it, one about z takes -y to x.
    np.testing.assert_allclose(found[2, 1:], [hip + [0, 0, -40], hip + [30, 0, -40]], atol=1e-12)

    straight = TWO_JOINTS.replace("1 90 2 90 0 0 0 90 0", "1 90 2 90 0 0 90 0 0")
    both = bvh.positions(bvh.parse(straight.encode()))[1]  # half a turn in all
    np.testing.assert_allclose(both[1:], [hip + [40, 0, 0], hip + [40, 30, 0]], atol=1e-12)

    form = Form(frames=3, stride=3, start="kept", metres=0.01)
    recording = motions.read(TWO_JOINTS.encode(), ".bvh", form)
    upright = np.stack([found[..., 0], -found[..., 2], found[..., 1]], axis=-1) / 100
    np.testing.assert_allclose(recording.values, upright.reshape(3, -1), atol=1e-12)
    assert recording.parents == (-1, 0, 1) and recording.content == "positions"


def test_rotations_apply_in_the_order_of_the_channels() -> None:
    turned = TWO_JOINTS.replace("1 90 2 90 0 0 0 90 0", "1 90 2 90 90 0 0 0 0")
    found = bvh.positions(bvh.parse(turned.encode()))
    # R = Rz Rx: x first takes -y to -z, and z leaves that.
    np.testing.assert_allclose(found[1, 1] - found[1, 0], [0, 0, -40], atol=1e-12)
    first_x = turned.replace("Zposition Zrotation Xrotation", "Zposition Xrotation Zrotation")
    found = bvh.positions(bvh.parse(first_x.encode()))
    np.testing.assert_allclose(found[1, 1] - found[1, 0], [40, 0, 0], atol=1e-12)


def test_a_files_own_channels_have_no_jumps_and_are_written_back(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    text = TWO_JOINTS.replace("1 90 2 90 0 0 0 90 0", "1 90 2 170 0 0 0 0 0").replace("2 0 90 0 90", "2 -170 90 0 90")
    (tmp_path / "raw/a.bvh").write_text(text)
    form = Form(frames=3, stride=3, channels="raw")
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(domain="motion", form=form, split="none"))
    (record,) = by_key(made.parts["train"]).values()
    clip = read_npy(record["motion.npy"])
    assert clip[:, 3].tolist() == [0, 170, 190]
    assert clip[:, 0].tolist() == [0, 0, 0] and clip[:, 1].tolist() == [90] * 3 and clip[:, 2].tolist() == [0, 0, 0]
    domain = Motion(size=3, channels=9).settle(made.parts["train"].protocol)
    signal = domain.open(tmp_path / "raw/a.bvh")
    np.testing.assert_allclose(domain.truth(signal)[0].numpy(), clip, atol=1e-4)
    domain.save(domain.truth(signal)[0], tmp_path / "again.bvh")
    again, before = (bvh.positions(bvh.parse(p.read_bytes())) for p in (tmp_path / "again.bvh", tmp_path / "raw/a.bvh"))
    np.testing.assert_allclose(again, before - [1, 0, 2], atol=1e-3)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("MOTION", "NOTION", "no MOTION section"),
        ("Frames: 3", "Frames: 4", "27 numbers in the MOTION section, expected 4 frames of 9 channels"),
        ("Frames: 3", "Frames: many", "does not begin with Frames and Frame Time"),
        ("Frame Time: 0.04", "Frame Time: 0", "Frame Time is 0.0; it must be above 0"),
        ("1 90 2 90", "1 x 2 90", "holds what is not a number"),
        ("OFFSET 0 -40 0", "OFFSET 0 nan 0", "'nan' stands where a number should"),
        ("CHANNELS 3", "CHANNELS 9", "channels 9 .* are not known"),
        ("  JOINT Knee\n", "", "a brace that belongs to no joint"),
        ("JOINT Knee", "ROOT Knee", "must have one ROOT, first"),
        ("}\nMOTION", "MOTION", "is cut off"),
        ("HIERARCHY", "HIERARCHY surprise", "'surprise' is not expected"),
    ],
)
def test_damaged_bvh_files_are_named_by_what_is_wrong(old: str, new: str, words: str) -> None:
    assert old in TWO_JOINTS
    with pytest.raises(ValueError, match=words) as problem:
        bvh.parse(TWO_JOINTS.replace(old, new).encode())
    assert "\n" not in str(problem.value)


def longer(frames: int) -> bytes:
    return TWO_JOINTS.replace("1 90 2 0 90 0 90 0 0\n", "1 90 2 0 90 0 90 0 0\n" * (frames - 2)).encode()


def peak_of_parsing(content: bytes) -> float:
    """Bytes that parsing takes at most, over the file's own."""
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            bvh.parse(content)
        return tracemalloc.get_traced_memory()[1] / len(content)
    finally:
        tracemalloc.stop()


def test_little_more_than_the_numbers_is_held_of_a_file_and_nothing_of_one_that_counts_wrongly() -> None:
    content = longer(30_000)  # 0.6 MB; 8 bytes are held of each number, which takes 2.3 in this file
    assert bvh.parse(content.replace(b"Frames: 3\n", b"Frames: 30000\n")).values.shape == (30_000, 9)
    assert peak_of_parsing(content.replace(b"Frames: 3\n", b"Frames: 30000\n")) < 4
    for claimed in (b"3", b"29999", b"999999999"):
        assert peak_of_parsing(content.replace(b"Frames: 3\n", b"Frames: " + claimed + b"\n")) < 0.1


def test_what_no_recording_has_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = TWO_JOINTS.replace("ROOT Hip", "ROOT Hip" + " " * 2**20)
    with pytest.raises(
        ValueError, match=r"^the HIERARCHY section has 1048\d\d\d bytes, above the limit of 1048576; sh"
    ):
        bvh.parse(padded.encode())
    monkeypatch.setattr(bvh, "MAX_NUMBERS", 26)
    with pytest.raises(ValueError, match=r"^3 frames of 9 channels, above the limit of 26 numbers; cut the recording"):
        bvh.parse(TWO_JOINTS.encode())
    word = "9" * 100 + "x" + "9" * 100_000
    with pytest.raises(ValueError, match=r"^the MOTION section holds what is not a number") as problem:
        monkeypatch.undo()
        bvh.parse(TWO_JOINTS.replace("1 90 2 90", f"1 {word} 2 90").encode())
    assert len(str(problem.value)) < 200
