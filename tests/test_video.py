"""The video domain: reading, coordinates, and rendering at any size and frame count."""

import io

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from tiny_clips import DOMAIN, analytic, moving, noise, record, signals, slanted
from torch import Tensor

from distributed_inr.domains.video import Video
from distributed_inr.evaluation.metrics import FORMATS, METRICS
from distributed_inr.field import Field

# Reading


@pytest.mark.parametrize("encoding", ["webp", "png"])
def test_reading_gives_the_very_pixels_and_the_caption(encoding: str) -> None:
    frames = noise()
    signal = DOMAIN.read(record(frames, encoding), 7)
    assert isinstance(signal.targets, Tensor)
    assert signal.text == "a band" and int(signal.seed) == 7
    assert np.array_equal(signal.targets.permute(1, 2, 3, 0).numpy(), frames)
    torch.testing.assert_close(signal.inputs, signal.targets / 127.5 - 1)


def test_a_record_of_video_gives_its_frames_in_their_order() -> None:
    domain = Video(size=32, frames=6)
    frames = moving(6, 32)
    signal = domain.read(record(frames, "mp4"), 0)
    assert isinstance(signal.targets, Tensor)
    error = signal.targets.permute(1, 2, 3, 0).numpy().astype(float) - frames
    assert np.abs(error).mean() < 6  # half the colours a side, and a little loss
    shifted = signal.targets.permute(1, 2, 3, 0).numpy().astype(float) - np.roll(frames, 1, axis=0)
    assert np.abs(error).mean() < np.abs(shifted).mean() / 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"clip.webp": b"RIFF1234WEBPcut"}, r"k.clip.webp: cannot be decoded"),
        ({"clip.webp": record(noise())["clip.webp"][:300]}, r"k.clip.webp: cannot be decoded"),  # type: ignore[index]
        ({}, r"k: no clip; expected one of clip.webp, clip.png, clip.mp4"),
        (record(noise(5)), r"8 x 40 pixels, not domain.frames=6 frames of domain.size=8"),
        (record(noise(6, 9)), r"9 x 54 pixels, not domain.frames=6"),
        (record(moving(6, 16), "mp4"), r"k.clip.mp4: cannot be decoded: 16 x 16 pixels, above the limit of 64"),
        ({"clip.mp4": b"no video"}, r"k.clip.mp4: cannot be decoded: cannot be opened"),
        (
            {"clip.mp4": record(moving(6, 8), "mp4")["clip.mp4"].replace(b"avc1", b"xxxx")},
            r"k.clip.mp4: cannot be decoded: there is no decoder for its video",
        ),
    ],
)
def test_bad_records_are_refused_by_key(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DOMAIN.read({"__key__": "k", **changed}, 0)


@pytest.mark.parametrize(("count", "words"), [(5, "fewer than 6 frames"), (7, "more than 6 frames")])
def test_records_of_video_of_another_length_are_refused(count: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Video(size=16, frames=6).read(record(moving(count, 16), "mp4"), 0)


def test_a_record_that_claims_a_huge_picture_is_not_decoded() -> None:
    file = io.BytesIO()
    Picture.new("RGB", (8, 60_000)).save(file, "PNG")
    with pytest.raises(ValueError, match="8 x 60000 pixels, not domain.frames=6"):
        DOMAIN.read({"__key__": "k", "clip.png": file.getvalue()}, 0)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"size": 16, "frames": 6}, r"^domain.size=8, but the clips of data.train have size 16; try --domain.size 16$"),
        (
            {"size": 8, "frames": 9},
            r"^domain.frames=6, but the clips of data.train have frames 9; try --domain.frames 9$",
        ),
    ],
)
def test_a_set_of_clips_of_another_shape_is_refused(form: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DOMAIN.settle({"form": form})
    for told in ({"form": {"size": 8, "frames": 6}}, {"form": {"size": None, "frames": 6}}, {"form": None}, {}):
        assert DOMAIN.settle(told) == DOMAIN


# Measuring


@pytest.mark.parametrize("count", [50, 6 * 64, 1000])
def test_supervised_values_are_the_pixels_at_their_coordinates(count: int) -> None:
    batch = signals(3)
    assert isinstance(batch.targets, Tensor)
    for queries, values in (DOMAIN.supervise(batch, count), DOMAIN.measurements(batch, count)):
        assert queries.view is None and queries.coords.shape == (3, min(count, 384), 3)
        x, y, t = ((queries.coords + 1) / 2 * torch.tensor([8, 8, 6])).floor().long().unbind(-1)
        for i in range(3):
            torch.testing.assert_close(values[i], (batch.targets[i][:, t[i], y[i], x[i]] / 127.5 - 1).T)
        centres = (2 * torch.stack([x, y, t], -1) + 1) / torch.tensor([8, 8, 6]) - 1
        torch.testing.assert_close(queries.coords, centres)


def test_all_measurements_are_every_pixel_once() -> None:
    queries, _ = DOMAIN.measurements(signals(1))
    assert len({tuple(row) for row in queries.coords[0].tolist()}) == 6 * 64


def test_supervision_does_not_depend_on_the_batch_and_differs_from_the_measurements() -> None:
    batch = signals(5)
    whole, part = DOMAIN.supervise(batch, 10)[0], DOMAIN.supervise(batch[2:4], 10)[0]
    assert torch.equal(whole.coords[2:4], part.coords)
    assert not torch.equal(whole.coords, DOMAIN.measurements(batch, 10)[0].coords)


def test_mirrored_copies_are_mirrored_along_x_only() -> None:
    batch = signals(2)
    own, mirrored = DOMAIN.copies(batch)
    assert own is batch and DOMAIN.num_copies == 2 and Video(flip=False).num_copies == 1
    assert isinstance(mirrored.targets, Tensor)
    torch.testing.assert_close(mirrored.inputs, mirrored.targets / 127.5 - 1)
    queries, values = DOMAIN.measurements(mirrored)
    field = clip_field(DOMAIN, batch.inputs)
    torch.testing.assert_close(field(queries.coords * torch.tensor([-1.0, 1, 1])), values)


def clip_field(domain: Video, clip: Tensor) -> Field:
    """Fields that are the nearest pixels of real clips [batch, 3, frames, size, size]."""

    def nearest(parameters: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
        pixels = parameters[0]
        frames, height, width = pixels.shape[2:]
        x, y, t = ((coords + 1) / 2 * torch.tensor([width, height, frames])).long().unbind(-1)
        index = (t * height + y) * width + x
        return pixels.flatten(2).gather(2, index[:, None].expand(-1, 3, -1)).transpose(1, 2)

    return Field(nearest, (clip,), domain)


# Rendering


@pytest.mark.parametrize(
    ("size", "frames", "width"), [(8, None, None), (8, 12, None), (16, 12, None), (5, 3, 9), (1, 1, None)]
)
def test_rendering_equals_the_function_at_every_size_and_frame_count(
    size: int, frames: int | None, width: int | None
) -> None:
    fields = analytic(DOMAIN, 2)
    found = fields.render(size, frames=frames, width=width)
    torch.testing.assert_close(found[0], slanted(frames or 6, size, width), atol=1e-6, rtol=0)
    for chunk_points in (1, 7, 100):
        if size < 16:
            assert torch.equal(fields.render(size, frames=frames, width=width, chunk_points=chunk_points), found)


def test_rendering_a_clip_at_its_own_size_gives_it_back() -> None:
    batch = signals(2)
    torch.testing.assert_close(clip_field(DOMAIN, batch.inputs).render(8), DOMAIN.truth(batch))


def test_twice_the_frames_of_a_smooth_function_lie_between_the_original_ones() -> None:
    fine = analytic(DOMAIN).render(8, frames=12)[0]
    torch.testing.assert_close(((fine[0::2] + fine[1::2]) / 2)[1:-1], analytic(DOMAIN).render(8)[0, 1:-1])
    torch.testing.assert_close(fine[[0, -1]], analytic(DOMAIN).render(8)[0, [0, -1]])  # and none outside them


def test_naive_clips_do_not_move() -> None:
    batch = signals(2)
    truth = DOMAIN.truth(batch)
    naive = DOMAIN.naive(batch, numbers=100)
    assert list(naive) == ["the mean frame", "the first frame repeated"]
    torch.testing.assert_close(naive["the mean frame"][:, 3], truth.mean(1))
    torch.testing.assert_close(naive["the first frame repeated"][:, 3], truth[:, 0])
    for name in DOMAIN.metrics:
        assert name in FORMATS and METRICS[name](truth[..., :8, :8], truth).shape == (2,)


def test_the_psnr_of_a_clip_is_over_all_its_frames_and_the_similarity_a_mean_over_them() -> None:
    truth = torch.rand(2, 6, 3, 16, 16) * 0.5
    found = truth.clone()
    found[1, 2] += 0.1
    expected = -10 * np.log10(0.01 / 6)
    assert METRICS["clip_psnr"](found, truth)[1].item() == pytest.approx(expected, abs=1e-3)
    by_frame = METRICS["ssim"](found[1], truth[1])
    assert METRICS["clip_ssim"](found, truth)[1].item() == pytest.approx(by_frame.mean().item(), abs=1e-5)
    assert by_frame[2] < 0.999


def test_pictures_show_the_first_and_the_last_frame_and_thumbnails_are_bounded() -> None:
    clip = torch.rand(2, 30, 3, 40, 40)
    shown = DOMAIN.pictures(clip)
    assert torch.equal(shown[..., :40, :40], clip[:, 0]) and torch.equal(shown[..., 40:, 40:], clip[:, -1])
    assert torch.equal(shown[..., :40, 40:], clip[:, 10])  # in reading order
    assert DOMAIN.thumbnails(clip).shape == (2, 3 * 8 * 24 * 24)
    torch.testing.assert_close(DOMAIN.thumbnails(clip).mean(1), clip.mean((1, 2, 3, 4)), atol=0.02, rtol=0)
    assert DOMAIN.pictures(clip[:, :1]).shape == (2, 3, 80, 80)


def test_enlarging_keeps_frames_apart() -> None:
    clip = torch.rand(2, 3, 1, 1, 1).expand(-1, -1, 3, 8, 8)
    torch.testing.assert_close(DOMAIN.enlarge(clip, 16), clip[..., :1, :1].expand(-1, -1, -1, 16, 16))


def test_blank_signals_have_the_shapes_and_types_of_real_ones() -> None:
    signal = signals(2)
    for blank, own in zip(DOMAIN.blank(2), (signal.inputs, signal.targets), strict=True):
        assert isinstance(own, Tensor) and blank.shape == own.shape and blank.dtype == own.dtype
