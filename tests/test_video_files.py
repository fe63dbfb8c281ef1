"""Clips as files: every kind is written and opened again, at any size, frame count and rate."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from tiny_clips import DOMAIN, analytic, noise, slanted
from torch import Tensor

from distributed_inr.domains.video import Video
from distributed_inr.evaluation.metrics import METRICS
from distributed_inr.field import Field
from distributed_inr.raw import clips


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
@pytest.mark.parametrize("size", [32, 33])
def test_a_written_clip_is_read_back(tmp_path: Path, suffix: str, size: int) -> None:
    domain = Video(size=size, frames=6)
    clip = analytic(domain).render(size)
    domain.save(clip[0], tmp_path / f"clip{suffix}")
    again = domain.open(tmp_path / f"clip{suffix}")
    assert domain.truth(again).shape == clip.shape
    assert METRICS["clip_psnr"](domain.truth(again), clip).item() > 28
    shown = domain.shown(again)
    assert all(picture.shape[0] == 3 and picture.max() <= 1 for picture in shown.values())


def test_files_last_as_long_whatever_the_frame_count(tmp_path: Path) -> None:
    for frames in (6, 12):
        DOMAIN.save(analytic(DOMAIN).render(16, frames=frames)[0], tmp_path / f"{frames}.mp4")
        with av.open(str(tmp_path / f"{frames}.mp4")) as file:
            assert file.streams.video[0].average_rate == 12 * frames // 6
            assert len(list(file.decode(video=0))) == frames


def test_a_sheet_has_every_frame(tmp_path: Path) -> None:
    clip = slanted(6, 8)
    DOMAIN.save(clip, tmp_path / "sheet.png")
    with Picture.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels[8:, 8:16] / 255 - clip[5].permute(1, 2, 0).numpy()).max() < 0.003


def test_other_suffixes_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clip.txt: clips are written as .mp4, .webm, .gif, .webp, .png; use"):
        DOMAIN.save(slanted(6, 8), tmp_path / "clip.txt")


def test_a_file_holds_what_rendering_gives_written_with_one_frame_held(tmp_path: Path) -> None:
    asked: list[int] = []
    domain = Video(size=8, frames=6)
    plain = analytic(domain)

    def function(parameters: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
        asked.append(coords.shape[1])
        return plain.function(parameters, coords, view)

    field = Field(function, plain.parameters, domain)
    small = domain.write(field, 18, tmp_path / "a.mp4", frames=24, width=32, chunk_points=200)
    assert max(asked) <= 200 and sum(asked) == 24 * 18 * 32 + small.numel() // 3
    assert torch.allclose(small, domain.render(plain, 16), atol=1e-5)  # twice the base resolution, for sheets
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.streams.video[0].average_rate == 48
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    expected = slanted(24, 18, 32).permute(0, 2, 3, 1).numpy()
    assert frames.shape == expected.shape and np.abs(frames / 255 - expected).mean() < 0.02
    domain.write(field, 8, tmp_path / "c.mp4", fps=30.0)
    with av.open(str(tmp_path / "c.mp4")) as file:
        assert file.streams.video[0].average_rate == 30
    with pytest.raises(ValueError, match="2 functions do not fit in one file"):
        domain.write(analytic(domain, 2), 8, tmp_path / "b.mp4")


def test_ones_own_clip_is_its_central_square(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = np.zeros((8, 32, 64, 3), np.uint8)
    colours = np.array([(200, 100 + 20 * number, 50) for number in range(8)], np.uint8)  # equal frames would be joined
    frames[:, :, 16:48] = colours[:, None, None]
    clips.write(iter(frames), tmp_path / "wide.webp", rate=10.0)
    signal = DOMAIN.open(tmp_path / "wide.webp")
    assert signal.inputs.shape == (1, 3, 6, 8, 8) and isinstance(signal.targets, Tensor)
    assert signal.targets.shape == (1, 3, 6, 32, 32)
    expected = torch.from_numpy(colours[:6]).view(1, 6, 3, 1, 1) / 255
    assert (DOMAIN.truth(signal) - expected).abs().max() < 0.05
    clips.write(iter(frames[:, :4, 20:24]), tmp_path / "small.webp", rate=10.0)
    assert (DOMAIN.truth(DOMAIN.open(tmp_path / "small.webp")) - expected).abs().max() < 0.05
    assert "small.webp: 4 pixels enlarged to domain.size=8" in caplog.text


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("gone.mp4", lambda path: None, "cannot be opened: No such file"),
        ("text.mp4", lambda path: path.write_text("no video"), "cannot be opened: Invalid data"),
        ("text.gif", lambda path: path.write_text("no animation"), "cannot be opened"),
        ("short.webp", lambda path: clips.write(iter(noise(5)), path, rate=10.0), "5 frames, fewer than the 6"),
    ],
)
def test_files_that_are_no_clips_are_one_clear_line(
    tmp_path: Path, name: str, make: Callable[[Path], object], words: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=words) as caught:
        DOMAIN.open(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)
