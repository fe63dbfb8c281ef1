"""The motion domain: standardisation, cells, frames at any rate, files, and that both models fit motions."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed_inr.config import from_json, override, to_json
from distributed_inr.domains import Domain, Signal, collate
from distributed_inr.domains.domain import pixel_centres
from distributed_inr.domains.motion import Motion
from distributed_inr.evaluation.metrics import METRICS
from distributed_inr.field import Field
from distributed_inr.models import D2CVAE, LayersOfExperts
from distributed_inr.models.encoders import PixelEncoder
from distributed_inr.models.latent_fitting import MetaLearning
from distributed_inr.randomness import sample_seed
from distributed_inr.raw import bvh
from distributed_inr.raw.arrays import write_npy

FRAMES, CHANNELS = 20, 6
DOMAIN = Motion(
    size=FRAMES,
    channels=CHANNELS,
    content="positions",
    fps=10.0,
    mean=(0.5, -1.0, 2.0, 0.0, 3.0, -0.25),
    deviation=(0.5, 2.0, 0.1, 1.0, 0.25, 4.0),
    order=(0, 3, 1, 4, 2, 5),
    parents=(-1, 0),
    start="kept",
)
PLAIN = dataclasses.replace(DOMAIN, content="channels", parents=None)


def motion(number: int = 0, frames: int = FRAMES, channels: int = CHANNELS) -> np.ndarray:
    """Smooth curves, another for each channel and number."""
    time = np.linspace(0, 1, frames)[:, None]
    return np.sin(3 * time * (1 + np.arange(channels) % 3) + number + np.arange(channels)).astype(np.float32)


def motion_between(frames: int) -> np.ndarray:
    """The first of these motions at the middles of `frames` equal shares of its time."""
    place = (np.arange(frames) + 0.5) / frames * FRAMES - 0.5
    return np.stack([np.interp(place, np.arange(FRAMES), curve) for curve in motion().T], axis=1).astype(np.float32)


def signals(count: int, domain: Motion = DOMAIN) -> Signal:
    records = [{"__key__": f"{i}", "motion.npy": write_npy(motion(i)), "txt": b"a wave"} for i in range(count)]
    return collate([domain.read(record, sample_seed(0, i)) for i, record in enumerate(records)])


def field_of(function, domain: Motion, count: int = 1) -> Field:
    """A field that is a known function of its coordinates."""
    return Field(lambda parameters, coords, view: function(coords)[..., None], (torch.zeros(count),), domain)


def at(values: Tensor, coords: Tensor, domain: Motion) -> Tensor:
    """The nearest cells [batch, points] of values [batch, frames, channels], by the padded grid's centres."""
    frames, channels = domain.grid
    column = ((coords[..., 0] + 1) / 2 * frames - 0.5).round().long()
    row = ((coords[..., 1] + 1) / 2 * channels - 0.5).round().long()
    assert 0 <= column.min() and column.max() < domain.size and 0 <= row.min() and row.max() < domain.channels
    return values[torch.arange(len(values))[:, None], column, row]


def test_reading_gives_standardised_values_in_a_grid_padded_with_zeros():
    signal = DOMAIN.read({"__key__": "k", "motion.npy": write_npy(motion()), "txt": b"a wave"}, 7)
    expected = (torch.from_numpy(motion()) - torch.tensor(DOMAIN.mean)) / torch.tensor(DOMAIN.deviation)
    assert DOMAIN.grid == (24, 8) and signal.inputs.shape == (1, 8, 24)
    torch.testing.assert_close(signal.targets, expected[:, [0, 3, 1, 4, 2, 5]])
    assert torch.equal(
        dataclasses.replace(DOMAIN, order=None).read({"__key__": "k", "motion.npy": write_npy(motion())}, 7).targets,
        expected,
    )
    assert torch.equal(signal.inputs[0, :CHANNELS, :FRAMES].T, signal.targets)
    assert not signal.inputs[:, CHANNELS:].any() and not signal.inputs[..., FRAMES:].any()
    assert signal.text == "a wave" and int(signal.seed) == 7
    torch.testing.assert_close(DOMAIN.truth(collate([signal]))[0], torch.from_numpy(motion()), atol=1e-6, rtol=1e-5)
    blank_inputs, blank_targets = DOMAIN.blank(1)
    assert blank_inputs[0].shape == signal.inputs.shape and blank_targets[0].shape == signal.targets.shape


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_both_precisions_are_read_as_float32(dtype):
    values = motion().astype(dtype)
    signal = DOMAIN.read({"__key__": "k", "motion.npy": write_npy(values)}, 0)
    assert signal.inputs.dtype == torch.float32
    torch.testing.assert_close(DOMAIN.truth(collate([signal]))[0], torch.from_numpy(values).float())


BROKEN = motion()
BROKEN[3, 2] = np.nan
BOMB = write_npy(np.zeros((2, 6), np.float32)).replace(b"(2, 6)", b"(99999999, 6)").replace(b" " * 8 + b"\n", b"\n")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"motion.npy": write_npy(BROKEN)}, r"^k.motion.npy has values that are not finite"),
        (
            {"motion.npy": write_npy(motion(channels=7))},
            r"^k.motion.npy has shape \[20, 7\], expected .* \[20, 6\]; pre",
        ),
        ({"motion.npy": write_npy(motion(frames=12))}, r"^k.motion.npy has shape \[12, 6\], expected .* \[20, 6\]"),
        ({"motion.npy": write_npy(motion())[:-5]}, r"^k.motion.npy cannot be decoded: 475 bytes .* promises 480"),
        ({"motion.npy": write_npy(motion().astype("int64"))}, r"^k.motion.npy cannot be decoded: not a .npy .* <i8"),
        ({"motion.npy": BOMB}, r"^k.motion.npy cannot be decoded: "),
        ({"json": b"{}"}, r"^k: no motion; expected motion.npy"),
    ],
)
def test_bad_records_are_refused_by_key_in_one_line(record, words):
    with pytest.raises(ValueError, match=words) as problem:
        DOMAIN.read({"__key__": "k", **record}, 0)
    assert "\n" not in str(problem.value)


def test_supervised_values_are_the_cells_at_their_coordinates_and_never_the_padding():
    batch = signals(5)
    for count in (30, FRAMES * CHANNELS, 500):
        queries, values = DOMAIN.supervise(batch, count)
        assert values.shape == (5, min(count, FRAMES * CHANNELS), 1) and queries.view is None
        assert torch.equal(values[..., 0], at(batch.targets, queries.coords, DOMAIN))
    drawn, _ = DOMAIN.supervise(batch, 30)
    assert len({tuple(place) for place in drawn.coords[0].tolist()}) > 20
    assert not torch.equal(drawn.coords[0], drawn.coords[1])
    part, _ = DOMAIN.supervise(batch[2:4], 30)
    assert torch.equal(part.coords, drawn.coords[2:4])


def test_measurements_are_all_real_cells_of_the_inputs_once():
    batch = dataclasses.replace(signals(2), targets=None)
    queries, values = DOMAIN.measurements(batch)
    assert values.shape == (2, FRAMES * CHANNELS, 1)
    assert torch.equal(values[..., 0], at(batch.inputs[:, 0, :CHANNELS, :FRAMES].mT, queries.coords, DOMAIN))
    assert len({tuple(place) for place in queries.coords[0].tolist()}) == FRAMES * CHANNELS
    supervised, _ = DOMAIN.supervise(signals(2), 25)
    drawn, found = DOMAIN.measurements(batch, 25)
    assert torch.equal(found[..., 0], at(batch.inputs[:, 0, :CHANNELS, :FRAMES].mT, drawn.coords, DOMAIN))
    assert not torch.equal(drawn.coords, supervised.coords)  # another purpose draws others


def test_the_likelihood_is_half_the_mean_squared_error():
    observed, values = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [0.5]]])
    assert DOMAIN.nll(observed, values).item() == pytest.approx(0.5 * (1 + 0.25) / 2)


def test_a_field_is_rendered_where_the_frames_and_channels_lie_and_in_the_datas_units():
    def function(coords: Tensor) -> Tensor:
        return coords[..., 0] + 10 * coords[..., 1]

    mean, deviation = torch.tensor(DOMAIN.mean), torch.tensor(DOMAIN.deviation)
    channel = pixel_centres(8)[[0, 2, 4, 1, 3, 5]]  # the rows that hold the channels
    for frames in (FRAMES, 40, 7):
        time = (torch.arange(frames) + 0.5) / frames * (2 * FRAMES / 24) - 1  # the clip's share of the padded grid
        expected = (time[:, None] + 10 * channel) * deviation + mean
        found = field_of(function, DOMAIN).render(frames)
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
        for chunk in (1, 9, 1000):
            assert torch.equal(field_of(function, DOMAIN).render(frames, chunk_points=chunk), found)
    torch.testing.assert_close(
        DOMAIN.render(field_of(function, DOMAIN), FRAMES)[0],
        (pixel_centres(24)[:FRAMES, None] + 10 * channel) * deviation + mean,
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_smooth_field_at_twice_the_frames_has_accelerations_no_larger_than_the_datas():
    domain = Motion(size=200, channels=3, mean=(0.0,) * 3, deviation=(1.0,) * 3, fps=30.0)
    field = field_of(lambda coords: torch.sin(9 * coords[..., 0].double() + coords[..., 1]).float(), domain)

    def acceleration(frames: int) -> float:
        moved = domain.render(field, frames).double()[0]
        return float(moved.diff(n=2, dim=0).abs().max()) * (30 * frames / 200) ** 2

    assert acceleration(400) == pytest.approx(acceleration(200), rel=0.02)
    assert acceleration(200) == pytest.approx((9 * 2 * 30 / 200) ** 2, rel=0.02)


def test_enlarging_is_linear_between_the_frames_middles():
    ramp = torch.arange(4.0)[None, :, None].expand(1, 4, 2)
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    torch.testing.assert_close(DOMAIN.enlarge(ramp, 8)[0, :, 0], expected)


def test_the_naive_motion_is_linear_between_as_many_numbers():
    truth = DOMAIN.truth(signals(2))
    ((name, found),) = DOMAIN.naive(signals(2), numbers=20).items()
    assert name == "linear interpolation from 3 frames"
    assert torch.equal(found[:, [0, 10, 19]], truth[:, [0, 10, 19]])
    torch.testing.assert_close(found[:, 4], 0.6 * truth[:, 0] + 0.4 * truth[:, 10])
    torch.testing.assert_close(found[:, 13], truth[:, 10] * 6 / 9 + truth[:, 19] * 3 / 9)
    assert list(DOMAIN.naive(signals(1), numbers=3)) == ["linear interpolation from 2 frames, 12 numbers"]
    ((_, whole),) = DOMAIN.naive(signals(1), numbers=1000).items()
    torch.testing.assert_close(whole, DOMAIN.truth(signals(1)))


def test_errors_are_in_centimetres_a_joint_or_in_the_channels_own_units():
    truth = torch.zeros(1, 4, 6)
    found = truth + torch.tensor([0.03, 0.04, 0, 0, 0, 0.01])
    assert METRICS["joint_error"](found, truth).item() == pytest.approx((5 + 1) / 2)
    assert METRICS["rms_error"](found, truth).item() == pytest.approx(((9 + 16 + 1) / 6) ** 0.5 / 100)
    assert DOMAIN.metrics == ("joint_error",) and PLAIN.metrics == ("rms_error",)


def test_what_the_training_set_tells_is_settled_and_what_was_set_stays():
    told = {"frames": 20, "channels": 6, "fps": 30.0, "content": "positions", "mean": [0.0] * 6, "deviation": [1.0] * 6}
    open_domain = Motion(size=20, channels=6, fps=25.0)
    settled = open_domain.settle(json.loads(json.dumps({"motion": told | {"parents": [-1, 0], "start": "turned"}})))
    assert settled.mean == (0.0,) * 6 and settled.parents == (-1, 0) and settled.start == "turned"
    assert settled.fps == 25.0
    assert from_json(Motion, to_json(settled)) == settled and open_domain.settle({}) == open_domain
    with pytest.raises(
        ValueError, match=r"^domain.size=10, but the clips of data.train have 20 frames; try --domain.s"
    ):
        Motion(size=10, channels=6).settle({"motion": told})
    with pytest.raises(ValueError, match=r"^domain.channels=159, but the clips .* have 6 channels; try --domain.chann"):
        Motion(size=20).settle({"motion": told})
    with pytest.raises(ValueError, match=r"^domain.mean and domain.deviation are not set"):
        open_domain.read({"__key__": "k", "motion.npy": write_npy(motion())}, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": (0.0,) * 5}, r"^domain.mean has 5 entries and domain.channels=6; give one a channel"),
        (
            {"channels": 7, "mean": None, "deviation": None, "order": None, "parents": None},
            r"^domain.channels=7 must be three a joint",
        ),
        ({"order": (0, 1, 2, 3, 4, 4)}, r"^domain.order must name each of 0 to 5 once"),
        ({"parents": (-1, 0, 0)}, r"^domain.parents has 3 entries for 2 joints"),
        ({"parents": (1, 0)}, r"^domain.parents of joint 0 lead to no root"),
        ({"deviation": (1.0,) * 5 + (0.0,)}, r"^deviation.5=0.0: "),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words) as problem:
        override(DOMAIN, changes)
    assert "\n" not in str(problem.value)


# What is seen


def test_figures_move_with_the_joints_and_the_matrix_is_red_above_the_mean():
    standing = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]).expand(1, FRAMES, -1)
    lying = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0]).expand(1, FRAMES, -1)
    pictures = DOMAIN.pictures(torch.cat([standing, lying, torch.full_like(standing, torch.nan)]))
    assert pictures.shape == (3, 3, 128, 480) and pictures.min() >= 0 and pictures.max() <= 1
    dark = pictures.mean(1) < 0.9
    rows, columns = dark[0].any(1).sum(), dark[0, :, :80].any(0).sum()
    assert rows > 100 and columns < 10  # upright: tall and thin
    assert dark[1].any(1).sum() < 10 and dark[1, :, :80].any(0).sum() > 50
    dots = dataclasses.replace(DOMAIN, parents=None).pictures(standing)
    assert 0 < (dots.mean(1) < 0.9).sum() < dark[0].sum()

    values = torch.tensor(PLAIN.mean) + torch.tensor(PLAIN.deviation) * torch.tensor([3.0, 3.0, 3.0, -3.0, -3.0, -3.0])
    matrix = PLAIN.pictures(values.expand(1, FRAMES, -1))[0]
    torch.testing.assert_close(matrix[:, 10, 10], torch.tensor([1.0, 0.0, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix[:, 32, 10], torch.tensor([0.0, 0.0, 1.0]), atol=0.05, rtol=0)  # channel 3
    torch.testing.assert_close(matrix[:, 118, 10], torch.tensor([0.0, 0.0, 1.0]), atol=1e-5, rtol=0)


def test_thumbnails_of_one_movement_at_two_places_are_equal():
    truth = DOMAIN.truth(signals(2))
    moved = truth + torch.tensor([5.0, -2.0, 1.0] * 2)
    torch.testing.assert_close(DOMAIN.thumbnails(moved), DOMAIN.thumbnails(truth), atol=1e-5, rtol=0)
    assert not torch.allclose(DOMAIN.thumbnails(truth)[0], DOMAIN.thumbnails(truth)[1], atol=0.1)
    assert DOMAIN.thumbnails(truth.repeat(1, 50, 1)).shape == (2, 25 * CHANNELS)
    assert DOMAIN.surface(truth, 10) is None
    assert {key: tuple(p.shape) for key, p in DOMAIN.shown(signals(1)).items()} == {
        "original, 20 frames": (3, 128, 480),
        "what the encoder saw, a row for each channel": (3, 128, 256),
    }


# Files


@pytest.mark.parametrize("domain", [DOMAIN, PLAIN], ids=["positions", "channels"])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_saved_arrays_are_opened_again(tmp_path: Path, domain: Motion, suffix: str):
    rendered = domain.truth(signals(1))[0]
    domain.save(rendered, tmp_path / f"m{suffix}")
    again = domain.open(tmp_path / f"m{suffix}")
    torch.testing.assert_close(domain.truth(again)[0], rendered, atol=1e-5, rtol=1e-5)
    assert again.key == [f"m{suffix}"]
    finer = domain.enlarge(rendered[None], 2 * FRAMES)[0]
    domain.save(finer, tmp_path / f"finer{suffix}")
    if suffix == ".npz":  # it tells its rate, so that it is brought back to the domain's
        with np.load(tmp_path / "finer.npz") as arrays:
            assert arrays["fps"] == 20 and len(arrays["positions" if domain is DOMAIN else "channels"]) == 40
            assert domain is PLAIN or arrays["parents"].tolist() == [-1, 0]
        torch.testing.assert_close(domain.truth(domain.open(tmp_path / "finer.npz"))[0], finer[::2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_animations_have_all_frames_at_the_motions_own_speed(tmp_path: Path, suffix: str):
    import av

    DOMAIN.save(DOMAIN.truth(signals(1))[0], tmp_path / f"m{suffix}")
    with av.open(str(tmp_path / f"m{suffix}")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.duration / 1e6 == pytest.approx(FRAMES / DOMAIN.fps, rel=0.06)
    assert len(frames) == FRAMES and frames[0].shape == (320, 320, 3)
    assert (frames[0] < 128).any() and not np.array_equal(frames[0], frames[10])
    with pytest.raises(ValueError, match=r"shows positions of joints, domain.content=channels; write .npz"):
        PLAIN.save(PLAIN.truth(signals(1))[0], tmp_path / f"n{suffix}")


HIERARCHY = """HIERARCHY
ROOT Hip
{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  End Site
  {
    OFFSET 0 1 0
  }
}"""


def test_bvh_channels_are_written_as_bvh_and_opened_again(tmp_path: Path):
    domain = dataclasses.replace(PLAIN, content="bvh", hierarchy=HIERARCHY, mean=(0.0,) * 6, deviation=(1.0,) * 6)
    rendered = domain.truth(signals(1, domain))[0]
    domain.save(rendered, tmp_path / "m.bvh")
    file = bvh.parse((tmp_path / "m.bvh").read_bytes())
    assert file.hierarchy == HIERARCHY and file.fps == 10
    torch.testing.assert_close(domain.truth(domain.open(tmp_path / "m.bvh"))[0], rendered, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"m.bvh: .bvh needs channels that come from BVH files"):
        DOMAIN.save(rendered, tmp_path / "m.bvh")
    with pytest.raises(ValueError, match=r"m.obj: .obj cannot be written; use .npz"):
        DOMAIN.save(rendered, tmp_path / "m.obj")
    (tmp_path / "other.bvh").write_text((tmp_path / "m.bvh").read_text().replace("OFFSET 0 1 0", "OFFSET 0 2 0"))
    with pytest.raises(ValueError, match=r"other.bvh is not a usable motion: another skeleton"):
        domain.open(tmp_path / "other.bvh")


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        (
            "short.npy",
            motion(frames=12),
            r"short.npy is not a usable motion: 12 frames at 10 a second, domain.size=20; g",
        ),
        ("wide.npy", motion(channels=9), r"wide.npy is not a usable motion: 9 channels, domain.channels=6; give"),
        ("nan.npy", BROKEN, r"nan.npy is not a usable motion: 1 of 20 frames have values that are not finite, first 3"),
        ("cube.npy", np.zeros((2, 2, 2)), r"cube.npy is not a usable motion: an array of shape \[2, 2, 2\]"),
        ("words.npy", np.array(["a"]), r"words.npy is not a usable motion: not a .npy of version 1.0 .* but <U1"),
        ("absent.npy", None, r"absent.npy is not a usable motion: cannot be read: No such file"),
        ("table.csv", "1,2", r"table.csv is not a usable motion: .csv is not one of .npz .npy .bvh"),
    ],
)
def test_ones_own_file_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, name, values, words):
    if isinstance(values, str):
        (tmp_path / name).write_text(values)
    elif values is not None:
        np.save(tmp_path / name, values)
    with pytest.raises(ValueError, match=words) as problem:
        DOMAIN.open(tmp_path / name)
    assert "\n" not in str(problem.value)


def test_ones_own_file_is_placed_and_turned_as_the_training_clips_were(tmp_path: Path):
    domain = dataclasses.replace(DOMAIN, start="turned", facing=(0.0, 0.0, 0.0, 2.0))
    walk = np.zeros((FRAMES, 2, 3))
    walk[:, 0] = [4.0, 5.0, 1.0]
    walk[:, 0, 0] += np.arange(FRAMES)
    walk[:, 1] = walk[:, 0] + [1.0, 0.0, 0.5]  # looks along x and goes there
    np.save(tmp_path / "walk.npy", walk)
    found = domain.truth(domain.open(tmp_path / "walk.npy"))[0].unflatten(1, (2, 3))
    torch.testing.assert_close(found[5, 0], torch.tensor([0.0, 5.0, 1.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[5, 1], torch.tensor([0.0, 6.0, 1.5]), atol=1e-4, rtol=0)
    kept = DOMAIN.truth(DOMAIN.open(tmp_path / "walk.npy"))[0]
    torch.testing.assert_close(kept, torch.from_numpy(walk.reshape(FRAMES, -1)).float(), atol=1e-4, rtol=0)


# Models

VAE = D2CVAE(
    encoder=PixelEncoder(channels=8, multipliers=(1, 2, 2, 2), num_blocks=1),
    latent_channels=4,
    decoder_channels=8,
    decoder_multipliers=(1, 2, 2),
    decoder_blocks=0,
    field_channels=8,
    readout_width=16,
    num_points=120,
    kl_weight=0.0,
)
EXPERTS = LayersOfExperts(
    num_layers=3, num_experts=4, width=32, latent_dim=8, num_points=120, omega=10.0, fitting=MetaLearning(rate=1e-3)
)


@pytest.mark.parametrize("cfg", [VAE, EXPERTS], ids=["d2c-vae", "layers-of-experts"])
def test_a_model_fits_a_motion(cfg):
    torch.manual_seed(0)
    domain = dataclasses.replace(DOMAIN, mean=(0.0,) * CHANNELS, deviation=(0.7,) * CHANNELS, order=None)
    model, signal = cfg.build(domain), signals(1, domain)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = sum(model(signal).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        field = model.decode(model.posterior(signal)[0])
        found, finer = domain.render(field, FRAMES), domain.render(field, 2 * FRAMES)
    truth = domain.truth(signal)
    assert METRICS["rms_error"](found, truth).item() < 0.3 * truth.std().item()
    between = torch.from_numpy(motion_between(2 * FRAMES))[None]
    assert METRICS["rms_error"](finer, between).item() < 0.35 * truth.std().item()


def test_the_domain_is_one():
    assert isinstance(DOMAIN, Domain)
    assert DOMAIN.copies(signals(2))[0].key == ["0", "1"] and DOMAIN.num_copies == 1
