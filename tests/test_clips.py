"""Clips as animations: how long their frames last, what is held of them, and what a kind of file cannot play."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distributed_inr.raw import clips, footage


def distinct(count: int, size: int = 16) -> Iterator[np.ndarray]:
    """Frames of one grey each, no two of them equal, one at a time."""
    for number in range(count):
        yield np.full((size, size, 3), 5 * number % 256, np.uint8)


def durations(path: Path) -> list[float]:
    """Milliseconds of each picture of an animation."""
    with Image.open(path) as picture:
        found = []
        for number in range(picture.n_frames):
            picture.seek(number)
            picture.load()
            found.append(picture.info["duration"])
    return found


@pytest.mark.parametrize(
    ("suffix", "tick", "rate"),
    [
        *((".gif", 10, rate) for rate in (7.0, 12.0, 24.0, 29.97, 30.0, 45.0, 50.0)),
        *((".webp", 1, rate) for rate in (7.0, 12.0, 24.0, 29.97, 60.0, 90.0)),
    ],
)
def test_every_frame_begins_at_its_time_to_half_a_tick_of_the_files_clock(
    tmp_path: Path, suffix: str, tick: int, rate: float
) -> None:
    clips.write(distinct(50), tmp_path / f"a{suffix}", rate=rate)
    found = durations(tmp_path / f"a{suffix}")
    assert len(found) == 50 and min(found) > 10  # players show 10 ms and less for 100
    ends = np.cumsum(found)
    assert np.abs(ends - np.arange(1, 51) * 1000 / rate).max() <= tick / 2 + 1e-6
    source = footage.scan(tmp_path / f"a{suffix}")
    assert len(source) == 50 and source.rate == pytest.approx(rate, rel=0.006)


def test_animations_of_two_rates_are_refused_though_their_durations_are_near(tmp_path: Path) -> None:
    first, *others = (Image.fromarray(frame) for frame in distinct(3))
    for suffix, times in ((".gif", [40, 60, 40]), (".gif", [20, 50, 20]), (".webp", [30, 40, 30])):
        first.save(tmp_path / f"a{suffix}", save_all=True, append_images=others, duration=times)
        with pytest.raises(ValueError, match=f"its frames last {min(times)} to {max(times)} ms; bring it to one frame"):
            footage.scan(tmp_path / f"a{suffix}")


def test_joined_frames_of_a_coarse_clock_are_told_apart_again(tmp_path: Path) -> None:
    frames = list(distinct(40))
    for place in (7, 8, 9, 10, 20, 33):
        frames[place] = frames[place - 1]
    for name in ("a.gif", "a.webp"):
        clips.write(iter(frames), tmp_path / name, rate=30.0)
        assert len(durations(tmp_path / name)) < 40
        found = clips.cut(footage.scan(tmp_path / name), 0, clips.Form(frames=40))
        assert np.abs(found.astype(int) - np.stack(frames)).max() < 4


def test_durations_that_are_multiples_of_the_shortest_are_kept_as_they_are(tmp_path: Path) -> None:
    first, *others = (Image.fromarray(frame) for frame in distinct(5))
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=[10, 30, 10, 20, 40])
    found = footage.scan(tmp_path / "a.gif")
    assert isinstance(found, footage.Animation) and found.seen == (0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4)
    assert found.rate == pytest.approx(100)


@pytest.mark.parametrize(
    ("suffix", "rate", "words"),
    [
        (".gif", 60.0, r"^60 frames a second: players slow .gif down above 50; write .mp4, or fewer frames a second"),
        (".webp", 120.0, r"^120 frames a second: players slow .webp down above 90; write .mp4, or fewer frames a sec"),
    ],
)
def test_rates_that_players_slow_down_are_refused_before_a_frame_is_made(
    tmp_path: Path, suffix: str, rate: float, words: str
) -> None:
    frames = distinct(3)
    with pytest.raises(ValueError, match=words) as problem:
        clips.write(frames, tmp_path / f"a{suffix}", rate=rate)
    assert "\n" not in str(problem.value) and not list(tmp_path.iterdir()) and len(list(frames)) == 3
    clips.write(distinct(3), tmp_path / "a.mp4", rate=rate)


@pytest.mark.parametrize(("count", "rate"), [(3, 0.001), (1, 0.001), (2000, 1.0)])
def test_a_picture_that_lasts_longer_than_a_gif_can_say_is_one_clear_line(
    tmp_path: Path, count: int, rate: float
) -> None:
    frames = distinct(count) if count < 5 else (np.zeros((16, 16, 3), np.uint8) for _ in range(count))
    with pytest.raises(
        ValueError, match=r"^a.gif: one picture is seen for more than 655 s, which no GIF can say; writ"
    ):
        clips.write(frames, tmp_path / "a.gif", rate=rate)


def test_a_gif_is_written_without_holding_its_frames_in_full_colour(tmp_path: Path) -> None:
    def in_colour() -> int:
        return sum(type(one) is Image.Image and one.mode == "RGB" for one in gc.get_objects())

    def watched() -> Iterator[np.ndarray]:
        for frame in distinct(30):
            held.append(in_colour() - before)
            yield frame

    held, before = list[int](), in_colour()
    clips.write(watched(), tmp_path / "a.gif", rate=10.0)
    assert len(held) == 30 and max(held) <= 4
