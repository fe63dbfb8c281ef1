"""The motion domain: standardisation, cells, frames at any rate, what its options mean, and what is seen."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_motions import BROKEN, CHANNELS, DOMAIN, FRAMES, HIERARCHY, PLAIN, motion, signals
from torch import Tensor

from distributed_inr.config import from_json, override, to_json
from distributed_inr.domains import Domain, collate
from distributed_inr.domains.domain import pixel_centres
from distributed_inr.domains.motion import Motion
from distributed_inr.evaluation.metrics import METRICS
from distributed_inr.field import Field
from distributed_inr.raw.arrays import write_npy


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
    ("domain", "words"),
    [
        (
            PLAIN,
            r"^domain.content=channels, but the clips of data.train hold positions; try --domain.content pos",
        ),
        (
            dataclasses.replace(PLAIN, content="bvh"),
            r"^domain.content=bvh, but the clips of data.train hold positions; try --domain.content pos",
        ),
        (
            dataclasses.replace(PLAIN, content=None, hierarchy=HIERARCHY),
            r"^domain.hierarchy is another skeleton than that of data.train's clips; leave it to the index",
        ),
    ],
)
def test_a_set_of_another_content_or_skeleton_is_refused(domain: Motion, words: str):
    told = {
        "frames": FRAMES,
        "channels": CHANNELS,
        "content": "positions",
        "hierarchy": HIERARCHY.replace("Hip", "Root"),
    }
    with pytest.raises(ValueError, match=words) as problem:
        domain.settle({"motion": told})
    assert "\n" not in str(problem.value)
    assert dataclasses.replace(domain, content=None, hierarchy=None).settle({"motion": told}).content == "positions"


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
        (
            {"hierarchy": HIERARCHY.replace("6 Xposition Yposition Zposition", "3")},
            r"^domain.hierarchy has 3 channels, domain.channels=6; leave it to the index",
        ),
        (
            {"hierarchy": HIERARCHY[:-1]},
            r"^domain.hierarchy: the HIERARCHY section is cut off.*; leave it to the index",
        ),
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


def test_the_domain_is_one():
    assert isinstance(DOMAIN, Domain)
    assert DOMAIN.copies(signals(2))[0].key == ["0", "1"] and DOMAIN.num_copies == 1
