"""The video domain: reading, coordinates, rendering at any size and frame count, files, and models that fit a clip."""

import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch import Tensor

from distributed_inr.domains import Signal, collate
from distributed_inr.domains.domain import pixel_centres
from distributed_inr.domains.video import Video
from distributed_inr.evaluation.metrics import FORMATS, METRICS
from distributed_inr.field import Field
from distributed_inr.models import D2CVAE, LayersOfExperts
from distributed_inr.models.encoders import ClipEncoder
from distributed_inr.models.latent_fitting import MetaLearning
from distributed_inr.randomness import sample_seed
from distributed_inr.raw import clips

DOMAIN = Video(size=8, frames=6)


def record(frames: np.ndarray, encoding: str = "webp") -> dict[str, object]:
    suffix, content = clips.encode(frames, clips.Form(encoding=encoding))
    return {"__key__": "k", suffix: content, "txt": b"a band"}


def noise(count: int = 6, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def signals(count: int, domain: Video = DOMAIN) -> Signal:
    frames = (noise(domain.frames, domain.size, i) for i in range(count))
    return collate([domain.read(record(own), sample_seed(0, i)) for i, own in enumerate(frames)])


def analytic(domain: Video, batch: int = 1) -> Field:
    """Colours that say where one is: red rises with x, green with y, blue with t."""

    def function(parameters: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
        return coords * parameters[0][:, None]

    return Field(function, (torch.linspace(0.5, 1.0, batch)[:, None].expand(-1, 3),), domain)


def slanted(frames: int, size: int, width: int | None = None) -> Tensor:
    """What `analytic` looks like: [frames, 3, height, width]."""
    times = pixel_centres(frames).clamp(
        -5 / 6, 5 / 6
    )  # of a domain of six frames, no time before the first or the last
    t, y, x = torch.meshgrid(times, pixel_centres(size), pixel_centres(width or size), indexing="ij")
    return (torch.stack([x, y, t], dim=1) / 2 + 1) / 2


def moving(count: int, size: int, seed: int = 0) -> np.ndarray:
    """A bright square that moves to the right on a ground that is darker above: asymmetric in x, y and t."""
    frames = np.zeros((count, size, size, 3), np.uint8)
    frames[..., 2] = np.linspace(40, 200, size, dtype=np.uint8)[:, None]
    for number in range(count):
        left = 1 + number * (size // 2) // count + seed
        frames[number, size // 4 : size // 2, left : left + size // 4] = (255, 220 - 20 * number, 30)
    return frames


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


# Files


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


def test_blank_signals_have_the_shapes_and_types_of_real_ones() -> None:
    signal = signals(2)
    for blank, own in zip(DOMAIN.blank(2), (signal.inputs, signal.targets), strict=True):
        assert isinstance(own, Tensor) and blank.shape == own.shape and blank.dtype == own.dtype


# Models


def fit(model: torch.nn.Module, signal: Signal, *, steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(signal).values()).backward()
        optimizer.step()


def batch_of_one(domain: Video) -> Signal:
    return collate([domain.read(record(moving(domain.frames, domain.size)), 0)])


def error_of_baselines(domain: Video, signal: Signal) -> float:
    truth = domain.truth(signal)
    return max(METRICS["clip_psnr"](own, truth).item() for own in domain.naive(signal, numbers=0).values())


@pytest.mark.slow
def test_a_d2c_vae_fits_a_clip_that_is_asymmetric_in_x_y_and_t() -> None:
    torch.manual_seed(0)
    domain = Video(size=16, frames=8, flip=False)
    signal = batch_of_one(domain)
    model = D2CVAE(
        encoder=ClipEncoder(dim=16, depth=1, head_dim=8, patch=4),
        latent_channels=4,
        decoder_channels=16,
        decoder_multipliers=(1, 2),
        decoder_blocks=0,
        num_fields=2,
        field_channels=8,
        plane_mixing="concatenate",
        readout_width=32,
        readout_blocks=2,
        num_points=3000,
    ).build(domain)
    assert model.latent_shape == (4, 4 + 8 + 8, 4)
    fit(model, signal, steps=150, lr=5e-3)
    with torch.no_grad():
        found = model.decode(model.posterior(signal)[0]).render(16)
    assert METRICS["clip_psnr"](found, domain.truth(signal)).item() > error_of_baselines(domain, signal) + 3


@pytest.mark.slow
def test_layers_of_experts_fit_a_clip_that_is_asymmetric_in_x_y_and_t() -> None:
    torch.manual_seed(0)
    domain = Video(size=16, frames=8, flip=False)
    signal = batch_of_one(domain)
    model = LayersOfExperts(
        num_layers=4, num_experts=8, width=48, latent_dim=8, num_points=1000, omega=10.0, fitting=MetaLearning(rate=0.1)
    ).build(domain)
    fit(model, signal, steps=100, lr=2e-3)
    found = model.decode(model.posterior(signal)[0]).render(16).detach()
    assert METRICS["clip_psnr"](found, domain.truth(signal)).item() > error_of_baselines(domain, signal) + 3


def test_the_encoders_planes_lie_where_the_clip_changes() -> None:
    """A change at one place and time moves the latents' statistics most where it is, on all three planes."""
    torch.manual_seed(0)
    domain = Video(size=16, frames=8)
    model = D2CVAE(
        encoder=ClipEncoder(dim=16, depth=1, head_dim=8, patch=4), latent_channels=4, decoder_channels=16
    ).build(domain)
    plain, changed = torch.zeros(1, 3, 8, 16, 16), torch.zeros(1, 3, 8, 16, 16)
    changed[:, :, 6, 0:4, 8:12] = 3.0  # t = 6, the first row of patches, the third column
    stacks = [model.encoder(clip) for clip in (plain, changed)]
    before, after = (model.layout.planes(own, 1) for own in stacks)
    places = [(after[i] - before[i]).square().sum(1)[0].flatten().argmax().item() for i in range(3)]
    assert places == [0 * 4 + 2, 6 * 4 + 2, 6 * 4 + 0]  # (y, x), (t, x), (t, y)
