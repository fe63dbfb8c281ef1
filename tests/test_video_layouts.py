"""Preparing clips: files and folders, windows and their keys, splits by time, and files that cannot be used."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from tiny_sets import by_key, save_picture

from distributed_inr.data.prepare import Plan, Prepared, prepare_set, verify
from distributed_inr.domains.video import decode_clip
from distributed_inr.raw import clips, footage
from distributed_inr.raw.clips import Form


def numbered(count: int, size: int = 32, first: int = 0) -> np.ndarray:
    """Frames of one grey each, five apart, so that a frame can be told by its level even after H.264."""
    levels = (np.arange(first, first + count) * 5 % 250).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, size, size, 3)).copy()


def save_video(path: Path, count: int, *, size: int = 32, first: int = 0, stamps: list[int] | None = None) -> None:
    """A video of numbered frames; `stamps` in milliseconds make its frame rate variable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if stamps is None:
        clips.write(iter(numbered(count, size, first)), path, rate=25.0)
        return
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width = stream.height = size
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, stamp in zip(numbered(count, size, first), stamps, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def prepared(root: Path, *, form: Form, **plan) -> Prepared:
    plan = {"split": "none"} | plan
    return prepare_set(root / "raw", str(root / "out"), Plan(domain="video", form=form, **plan))


def frames_of(made: Prepared, part: str, form: Form, size: int = 32) -> dict[str, list[int]]:
    """By key, which frames of its video a clip holds."""
    return {
        key: (decode_clip(record, frames=form.frames, size=size).mean((1, 2, 3)) / 5).round().astype(int).tolist()
        for key, record in by_key(made.parts[part]).items()
    }


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".gif", ".webp"])
def test_every_kind_of_file_becomes_windows_of_its_frames(tmp_path: Path, suffix: str) -> None:
    form = Form(frames=4, stride=3, step=2)
    if suffix == ".mkv":
        save_video(tmp_path / "raw/a.mkv", 16, stamps=[40 * i for i in range(16)])
    else:
        save_video(tmp_path / f"raw/a{suffix}", 16)
    found = frames_of(prepared(tmp_path, form=form), "train", form)
    assert found == {f"a/{start:06d}": [start, start + 2, start + 4, start + 6] for start in (0, 3, 6, 9)}
    assert verify(str(tmp_path / "out/train")) == []


def test_a_file_of_one_clip_keeps_its_key_and_records_say_the_frame_rate(tmp_path: Path) -> None:
    form = Form(frames=4)
    save_video(tmp_path / "raw/band/a.v2.mp4", 7)
    made = prepared(tmp_path, form=form)
    assert frames_of(made, "train", form) == {"band/a_v2": [0, 1, 2, 3]}
    (record,) = by_key(made.parts["train"]).values()
    assert record["txt"] == b"band" and record["json"] == b'{"class": "band", "fps": 25.0}'


def test_windows_share_their_videos_caption(tmp_path: Path) -> None:
    save_video(tmp_path / "raw/a.mp4", 8)
    (tmp_path / "raw/metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "a song"}\n')
    found = by_key(prepared(tmp_path, form=Form(frames=4)).parts["train"])
    assert {key: record["txt"] for key, record in found.items()} == {"a/000000": b"a song", "a/000004": b"a song"}


def test_a_window_late_in_a_long_video_is_reached_by_its_time_stamps(tmp_path: Path) -> None:
    save_video(tmp_path / "a.mp4", 600)  # several key frames, and frames that are stored out of their order
    source = footage.scan(tmp_path / "a.mp4")
    assert len(source) == 600 and source.rate == 25
    clip = clips.cut(source, 590, Form(frames=5, step=2))
    expected = numbered(600)[590:600:2].astype(float)
    assert np.abs(clip - expected).max() < 3


# Splits


def test_the_time_split_shares_no_frames_and_leaves_out_those_between(tmp_path: Path) -> None:
    form = Form(frames=4)
    save_video(tmp_path / "raw/a.mp4", 41)
    made = prepared(tmp_path, form=form, split="auto", val_fraction=0.3)
    assert made.parts["train"].protocol["split"] == "time"
    train, val = ({f for own in frames_of(made, part, form).values() for f in own} for part in ("train", "val"))
    assert train == set(range(24)) and val == set(range(28, 40))


@pytest.mark.parametrize(("stride", "step"), [(1, 1), (2, 1), (3, 1), (2, 3)])
def test_overlapping_clips_are_left_out_between_the_parts(tmp_path: Path, stride: int, step: int) -> None:
    form = Form(frames=4, stride=stride, step=step)
    save_video(tmp_path / "raw/a.mp4", 45)
    made = prepared(tmp_path, form=form, split="auto", val_fraction=0.3)
    train, val = ({f for own in frames_of(made, part, form).values() for f in own} for part in ("train", "val"))
    assert max(train) < min(val)


def test_files_of_one_clip_each_are_one_recording(tmp_path: Path) -> None:
    form = Form(frames=4)
    for number in range(10):
        save_video(tmp_path / f"raw/{number:03d}.mp4", 4, first=4 * number)
    made = prepared(tmp_path, form=form, split="auto", val_fraction=0.2, val_gap=2)
    assert sorted(frames_of(made, "train", form)) == [f"{number:03d}" for number in range(6)]
    assert sorted(frames_of(made, "val", form)) == ["008", "009"]


def save_frames(folder: Path, count: int, *, size: int = 32, name: str = "{}.png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(numbered(count, size)):
        Image.fromarray(pixels).save(folder / name.format(number))


def test_folders_of_frames_are_videos_in_the_natural_order_of_their_names(tmp_path: Path) -> None:
    form = Form(frames=12)
    save_frames(tmp_path / "raw/v1.5/take", 12)  # 10.png comes after 9.png
    save_frames(tmp_path / "raw/b", 24)
    made = prepared(tmp_path, form=form, layout="frames")
    assert frames_of(made, "train", form) == {
        "b/000000": list(range(12)),
        "b/000012": list(range(12, 24)),
        "v1_5/take": list(range(12)),
    }


@pytest.mark.parametrize("names", [("sky_train", "sky_test"), ("train", "test"), ("sky_train", "sky_validation")])
def test_skytimelapse_keeps_its_parts_and_the_segments_of_a_video_together(tmp_path: Path, names) -> None:
    form = Form(frames=4)
    for video, segments, part in (("NyZ", 3, names[0]), ("f6X", 2, names[0]), ("9-b", 2, names[1])):
        for segment in range(1, segments + 1):
            folder = tmp_path / "raw" / part / video / f"{video}_{segment}"
            save_frames(folder, 8, name=f"{video}_frames_{{:08d}}.jpg")
    made = prepared(tmp_path, form=form, layout="skytimelapse", split="auto")
    assert made.parts["train"].protocol["split"] == "given"
    found = {part: frames_of(made, part, form) for part in ("train", "val")}
    assert len(found["train"]) == 10 and len(found["val"]) == 4
    assert all(key.startswith(f"{names[1]}/9-b/9-b_") for key in found["val"])
    assert found["val"][f"{names[1]}/9-b/9-b_1/000004"] == [4, 5, 6, 7]

    other = Plan(domain="video", form=form, layout="skytimelapse", split="object", val_fraction=0.3, split_seed=1)
    again = prepare_set(tmp_path / "raw", str(tmp_path / "by-video"), other)
    videos = [{key.split("/")[1] for key in by_key(again.parts[part])} for part in ("train", "val")]
    assert videos[0] | videos[1] == {"NyZ", "f6X", "9-b"} and not videos[0] & videos[1]


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (["v/1"], "v/1 is not below sky_train/ or sky_test/; give the folder that holds those two"),
        (["sky_train/v/1", "sky_test/v/2"], "video v is both in train and in test; remove it"),
    ],
)
def test_other_folders_are_not_skytimelapse(tmp_path: Path, places: list[str], words: str) -> None:
    for place in places:
        save_frames(tmp_path / "raw" / place, 2)
    with pytest.raises(ValueError, match=words):
        prepared(tmp_path, form=Form(frames=2), layout="skytimelapse")


# What cannot be used


def test_unusable_files_are_listed_with_their_reasons_and_left_out(tmp_path: Path) -> None:
    raw, form = tmp_path / "raw", Form(frames=6, size=24, max_pixels=64 * 64)
    save_video(raw / "good.mp4", 6)
    save_video(raw / "short.mp4", 5)
    save_video(raw / "small.mp4", 6, size=16)
    save_video(raw / "large.mp4", 6, size=80)
    save_video(raw / "uneven.mkv", 6, stamps=[0, 40, 80, 200, 240, 280])
    (raw / "text.mp4").write_text("not a video")
    (raw / "playlist.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")  # would open another file
    content = bytearray((raw / "good.mp4").read_bytes())
    middle = content.index(b"mdat") + 800
    content[middle : middle + 40] = bytes(40)
    (raw / "damaged.mp4").write_bytes(bytes(content))
    (raw / "codec.mp4").write_bytes((raw / "good.mp4").read_bytes().replace(b"avc1", b"xxxx"))
    (raw / "cut.webm").write_bytes(_written(raw / "cut.webm")[:-200])
    (raw / "bomb.gif").write_bytes(b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x00\x00\x00" + b"," + bytes(20))
    save_video(raw / "wide.gif", 6, size=80)
    (raw / "gone.mp4").symlink_to(raw / "nowhere")
    (raw / "gone.gif").symlink_to(raw / "nowhere")
    made = prepared(tmp_path, form=form)
    assert sorted(by_key(made.parts["train"])) == ["good"]
    reasons = dict(made.skipped)
    expected = {
        "short.mp4": "5 frames, fewer than the 6 of a clip; ask for shorter clips",
        "small.mp4": "16 x 16 pixels, smaller than 24; ask for smaller clips",
        "large.mp4": "80 x 80 pixels, above the limit of 4096",
        "wide.gif": "80 x 80 pixels, above the limit of 4096",
        "uneven.mkv": "its frame rate varies by a factor of 3.0; bring it to one frame rate",
        "text.mp4": "cannot be opened: Invalid data found when processing input",
        "playlist.mp4": "cannot be opened: Invalid argument",
        "codec.mp4": "there is no decoder for its video; convert it to H.264",
        "gone.mp4": "cannot be opened: No such file or directory",
        "gone.gif": "cannot be opened",
    }
    assert {name: reasons[name] for name in expected} == expected
    assert set(reasons) == {*expected, "damaged.mp4", "cut.webm", "bomb.gif"}
    assert "cannot be decoded" in reasons["damaged.mp4"]
    assert "pixels" in reasons["bomb.gif"] and "\n" not in "".join(reasons.values())


def _written(path: Path) -> bytes:
    save_video(path, 6)
    return path.read_bytes()


def test_frames_of_several_sizes_and_damaged_frames_are_left_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save_frames(tmp_path / "raw" / name, 4)
    save_picture(tmp_path / "raw/b/2.png", size=24)
    (tmp_path / "raw/c/3.png").write_bytes(b"no picture")
    save_frames(tmp_path / "raw/d", 3)
    (tmp_path / "raw/d/3.png").symlink_to(tmp_path / "nowhere")
    made = prepared(tmp_path, form=Form(frames=4), layout="frames")
    assert sorted(by_key(made.parts["train"])) == ["a"]
    reasons = dict(made.skipped)
    assert reasons["b"] == "its frames change from 32 x 32 pixels to 24 x 24"
    assert reasons["c"].startswith("3.png: cannot identify image file")
    assert reasons["d"] == "3.png: cannot be read: No such file or directory"


def test_equal_frames_that_an_animation_joins_are_counted(tmp_path: Path) -> None:
    frames = numbered(6)
    frames[3] = frames[2]
    for name in ("a.gif", "a.webp"):
        clips.write(iter(frames), tmp_path / name, rate=25.0)
        source = footage.scan(tmp_path / name)
        assert len(source) == 6 and source.rate == pytest.approx(25)
        clip = clips.cut(source, 0, Form(frames=6))
        assert np.abs(clip.astype(int) - frames).max() < 4


def test_animations_of_uneven_or_endless_pictures_and_long_files_are_refused(tmp_path: Path) -> None:
    first, *others = (Image.fromarray(frame) for frame in numbered(3))
    for durations, words in ([40, 60, 40], "last 40 to 60 ms"), ([40, 40, 60_000], "last 40 to 60000 ms"):
        first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=durations)
        with pytest.raises(ValueError, match=words):
            footage.scan(tmp_path / "a.gif")
    clips.write(iter(numbered(9)), tmp_path / "b.gif", rate=25.0)
    save_video(tmp_path / "b.mp4", 9)
    for name in ("b.gif", "b.mp4"):
        with pytest.raises(ValueError, match="more than 8"):
            footage.scan(tmp_path / name, max_frames=8)


def test_clips_are_their_central_squares_and_a_phones_are_upright(tmp_path: Path) -> None:
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[:, :, :16], frames[:, :, 48:] = 255, 128
    frames[:, :, 16:48, 0] = np.linspace(0, 240, 32, dtype=np.uint8)[:, None]
    clips.write(iter(frames), tmp_path / "a.mp4", rate=25.0)
    clip = clips.cut(footage.scan(tmp_path / "a.mp4"), 0, Form(frames=4, size=32))
    assert clip.shape == (4, 32, 32, 3) and clip[:, 2:-2, 3:-3, 1:].max() < 12
    content = (tmp_path / "a.mp4").read_bytes()
    identity, quarter = (
        struct.pack(">9i", *m)
        for m in ([65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30], [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30])
    )
    track = content.index(b"tkhd")
    (tmp_path / "a.mp4").write_bytes(content[:track] + content[track:].replace(identity, quarter, 1))
    turned = clips.cut(footage.scan(tmp_path / "a.mp4"), 0, Form(frames=4))
    assert turned.shape == (4, 64, 32, 3)
    assert turned[0, 4, 16].min() > 230 and abs(int(turned[0, -4, 16].mean()) - 128) < 20  # a quarter clockwise


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frames": 0}, "--frames 0 must be at least 1"),
        ({"stride": 0}, "--stride 0 must"),
        ({"size": -1}, "--size -1 must"),
    ],
)
def test_forms_that_cannot_be_are_one_clear_line(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Form(**options)


def test_clips_too_high_for_webp_are_kept_as_png() -> None:
    clip = np.zeros((4, 5000, 2, 3), np.uint8)
    with pytest.raises(ValueError, match="too high for one WebP; use --encoding png or mp4"):
        clips.encode(clip, Form())
    assert clips.encode(clip, Form(encoding="png"))[0] == "clip.png"


def test_clips_too_wide_for_mp4_are_one_clear_line(tmp_path: Path) -> None:
    clip = np.zeros((2, 4, 20_000, 3), np.uint8)
    with pytest.raises(
        ValueError, match=r"^20000 x 4 pixels cannot be written as mp4: .*; reduce them, or use another"
    ):
        clips.encode(clip, Form(encoding="mp4"))
    with pytest.raises(ValueError, match=r"^20000 x 4 pixels cannot be written as mp4") as problem:
        clips.write(iter(clip), tmp_path / "a.mp4", rate=10.0)
    assert "\n" not in str(problem.value)
