"""The scene domain: reading, drawing rays, axes, rendering, depth."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_scenes import arms_field, ball_field, look_from, make_record, picture, poses, write_srn, write_transforms
from torch import Tensor

from distributed_inr.config import from_json, to_json
from distributed_inr.domains.domain import Queries, Record, Signal, collate
from distributed_inr.domains.scene import Scene
from distributed_inr.field import Field
from distributed_inr.randomness import sample_seed
from distributed_inr.raw import posed_views, view_folders
from distributed_inr.raw.arrays import write_npy

DOMAIN = Scene(
    size=16, cells=16, view_size=32, num_views=12, hold_out_every=4, num_points=256, samples_per_ray=24, orbit_views=3
)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return make_record(tmp_path_factory.mktemp("raw") / "arms")


def signals(record: Record, count: int = 1, domain: Scene = DOMAIN) -> Signal:
    return collate([domain.read(record, sample_seed(0, i)) for i in range(count)])


def camera(pose: np.ndarray, focal: float = 1.1) -> Tensor:
    return torch.tensor(np.concatenate([pose.flatten(), [focal, focal, 0.5, 0.5]]), dtype=torch.float32)[None]


# Reading


def test_reading_gives_views_cameras_points_and_the_caption(record: Record):
    signal = DOMAIN.read(record, 7)
    assert isinstance(signal.targets, dict)
    assert signal.text == "Three arms" and int(signal.seed) == 7
    expected = np.stack([picture(pose, 32) for pose in poses()]).transpose(0, 3, 1, 2)
    assert np.array_equal(signal.targets["views"].numpy(), expected)
    np.testing.assert_allclose(signal.targets["cameras"][:, :16], np.stack(poses()).reshape(12, 16), atol=1e-6)
    assert signal.inputs.shape == (256, 6)
    assert not torch.equal(signal.inputs, DOMAIN.read(record, 8).inputs)
    assert torch.equal(signal.inputs, DOMAIN.read(record, 7).inputs)


def test_noise_is_on_the_places_of_points_only(record: Record):
    still, noisy = (dataclasses.replace(DOMAIN, point_noise=noise).read(record, 3).inputs for noise in (0.0, 0.02))
    assert torch.equal(still[:, 3:], noisy[:, 3:])
    assert abs(float((noisy - still)[:, :3].std()) - 0.02) < 0.002


def test_fewer_views_are_spread_and_few_points_repeated(record: Record):
    domain = Scene(size=16, view_size=32, num_views=4, num_points=1200, point_noise=0.0)
    signal = domain.read(record, 0)
    assert isinstance(signal.targets, dict)
    assert np.array_equal(signal.targets["views"][1].permute(1, 2, 0).numpy(), picture(poses()[3], 32))
    assert signal.inputs.shape == (1200, 6) and len(signal.inputs.unique(dim=0)) <= 500


def bad_camera() -> bytes:
    cameras = np.tile(np.append(np.eye(4).flatten() * 1.1, [1, 1, 0.5, 0.5]), (12, 1)).astype(np.float32)
    return write_npy(cameras)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"views.webp": b"RIFF"}, "arms.views.webp: cannot be decoded"),
        ({"views.webp": None}, "arms.views.webp: cannot be decoded"),
        ({"cameras.npy": b"x"}, "arms.cameras.npy: cannot be decoded: not a .npy"),
        ({"cameras.npy": bad_camera()}, "arms.cameras.npy: view 0: its pose is not a rotation"),
        (
            {"cameras.npy": write_npy(np.zeros((3, 19), np.float32))},
            r"arms.cameras.npy: cannot be decoded: .* \(3, 19\), expected finite numbers \[rows, 20\]",
        ),
        ({"points.npy": write_npy(np.full((9, 6), np.nan, np.float16))}, "arms.points.npy"),
        ({"points.npy": write_npy(np.zeros((0, 6), np.float16))}, "arms.points.npy"),
        ({"txt": b"\xff"}, "arms.txt: cannot be decoded"),
    ],
)
def test_bad_records_are_refused_by_key(record: Record, change: dict[str, Any], words: str):
    spoilt = {name: value for name, value in (record | change).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        DOMAIN.read(spoilt, 0)


def test_other_sizes_and_numbers_of_views_are_refused_with_the_option(record: Record):
    with pytest.raises(ValueError, match="where 12 views of domain.view_size=64 are 256 x 192; prepare"):
        Scene(size=16, num_views=12).read(record, 0)
    with pytest.raises(ValueError, match="12 views, domain.num_views=13; lower the option"):
        dataclasses.replace(DOMAIN, num_views=13).read(record, 0)
    with pytest.raises(ValueError, match="domain.view_size=32 is smaller than domain.size=64"):
        Scene(view_size=32)


def test_the_config_survives_json_and_takes_shared_cameras_from_the_set(record: Record):
    cameras = signals(record).targets["cameras"][0]  # type: ignore[index]
    settled = DOMAIN.settle({"cameras": cameras.tolist()})
    assert isinstance(settled, Scene) and len(settled.cameras) == 3
    torch.testing.assert_close(torch.tensor(settled.cameras), cameras[[3, 7, 11]])
    assert from_json(Scene, to_json(settled)) == settled
    assert DOMAIN.settle({}) is DOMAIN
    with pytest.raises(ValueError, match="domain.ground=white, but the set's views lie on black; set it to black"):
        DOMAIN.settle({"form": {"ground": "black"}})
    with pytest.raises(ValueError, match="view_size=48, but the set's views have 64 pixels a side; try --domain.view-"):
        dataclasses.replace(DOMAIN, view_size=48).settle({"form": {"size": 64}})
    with pytest.raises(ValueError, match=r"domain.hold_out_every=4, but the set was prepared with 6, .*; set it to 6"):
        DOMAIN.settle({"form": {"hold_out_every": 6}})
    with pytest.raises(ValueError, match="12 views, domain.num_views=13; lower the option"):
        dataclasses.replace(DOMAIN, num_views=13).settle({"cameras": cameras.tolist()})
    fewer = dataclasses.replace(DOMAIN, num_views=9).settle({"cameras": cameras.tolist()})
    assert isinstance(fewer, Scene) and torch.equal(torch.tensor(fewer.cameras), cameras[[3, 7]])
    field = arms_field(settled)
    assert torch.equal(settled.render(field, 8), DOMAIN.render(arms_field(DOMAIN), 8, cameras=cameras[[3, 7, 11]]))


def test_scenes_are_comparable_where_all_are_seen_from_the_same_cameras(record: Record):
    batch = signals(record)
    assert isinstance(batch.targets, dict)
    shared = batch.targets["cameras"][0]
    settled = DOMAIN.settle({"cameras": shared.tolist()})
    assert settled.comparable and not DOMAIN.comparable and not DOMAIN.settle({"form": {}}).comparable
    field = arms_field(DOMAIN)
    assert torch.equal(settled.render(field, 16), settled.reproduce(field, batch))
    assert not torch.equal(DOMAIN.render(field, 16), DOMAIN.reproduce(field, batch))
    others = dataclasses.replace(DOMAIN, cameras=tuple(map(tuple, shared[:3].tolist())))
    for protocol in ({}, {"cameras": shared.tolist()}):
        with pytest.raises(
            ValueError, match="domain.cameras holds 3 cameras that the set does not tell of; leave it em"
        ):
            others.settle(protocol)
    assert settled.settle({"cameras": shared.tolist()}) == settled


def test_blank_signals_have_the_shapes_and_types_of_real_ones(record: Record):
    inputs, targets = DOMAIN.blank(2)
    real = signals(record, 2)
    assert isinstance(real.targets, dict) and isinstance(targets, dict)
    assert (inputs.shape, inputs.dtype) == (real.inputs.shape, real.inputs.dtype)
    for name, tensor in real.targets.items():
        assert (targets[name].shape, targets[name].dtype) == (tensor.shape, tensor.dtype)
    empty = dataclasses.replace(real, inputs=inputs, targets=targets)
    assert DOMAIN.observe(arms_field(DOMAIN, 2), DOMAIN.supervise(empty, 8)[0]).isfinite().all()


# One's own folders


@pytest.mark.parametrize("kind", ["transforms", "srn"])
def test_ones_own_folder_opens(tmp_path: Path, kind: str):
    (write_transforms if kind == "transforms" else write_srn)(tmp_path / "arms")
    signal = DOMAIN.open(tmp_path / "arms")
    assert signal.key == ["arms"] and signal.inputs.shape == (1, 256, 6)
    found = DOMAIN.reproduce(arms_field(DOMAIN), signal)
    assert (found - DOMAIN.truth(signal)).abs().mean() < 0.03
    assert DOMAIN.shown(signal)["seen"].shape == (3, 16, 64)


def test_ones_own_folder_gives_as_many_views_and_points_as_the_set_has(tmp_path: Path):
    write_transforms(tmp_path / "arms", side=16, count=70, points=False)
    domain = Scene(size=16, view_size=16, num_views=70, num_points=5000, point_noise=0.0)
    signal = domain.open(tmp_path / "arms")
    assert signal.targets["views"].shape[1] == 70  # type: ignore[index]
    assert len(signal.inputs[0].unique(dim=0)) == 5000


def test_what_is_no_folder_of_views_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither transforms.json nor intrinsics.txt"):
        DOMAIN.open(tmp_path / "empty")
    with pytest.raises(ValueError, match="is not a folder; give one of views, with transforms.json"):
        DOMAIN.open(tmp_path / "x.ply")


# Rays


def test_training_never_sees_held_out_views(record: Record):
    batch = signals(record, 3)
    assert isinstance(batch.targets, dict)
    marked = batch.targets["views"].clone()
    marked[:, [3, 7, 11]] = torch.tensor([255, 0, 255], dtype=torch.uint8).view(3, 1, 1)
    batch = dataclasses.replace(batch, targets=batch.targets | {"views": marked})
    magenta = torch.tensor([1.0, 0.0, 1.0])
    for _, colours in (DOMAIN.supervise(batch, 3000), DOMAIN.measurements(batch), DOMAIN.measurements(batch, 500)):
        assert not (colours == magenta).all(-1).any()
    for rendered in DOMAIN.naive(batch, numbers=8).values():
        assert not torch.allclose(rendered.amin((0, 1, 3, 4)), magenta)
    truth = DOMAIN.truth(batch)
    assert torch.equal(truth, magenta.view(3, 1, 1).expand_as(truth))


@pytest.mark.parametrize(("num_views", "every"), [(12, 4), (9, 4), (5, 4), (2, 4), (7, 3), (11, 12)])
def test_held_out_views_of_a_part_are_those_that_points_were_carved_without(tmp_path: Path, num_views: int, every: int):
    """These are marked, by a black object, and nothing else that is read is black."""
    write_transforms(tmp_path, points=False, alpha=True)
    kept = posed_views.held_out(12, every)
    for number in kept:
        pixels = np.array(Image.open(tmp_path / f"{number:03d}.png"))
        pixels[..., :3] = 0
        Image.fromarray(pixels).save(tmp_path / f"{number:03d}.png")
    form = posed_views.Form(size=32, num_points=500, hold_out_every=every)
    members = posed_views.encode(view_folders.read_folder(tmp_path, form.max_views), form)
    domain = dataclasses.replace(DOMAIN, size=32, num_views=num_views, hold_out_every=every)
    batch = signals({"__key__": "arms", **members}, domain=domain)
    truth = domain.truth(batch)
    assert truth.shape[1] == len(posed_views.held_out(num_views, every)) and (truth == truth[:, :, :1]).all()
    assert (truth.amin((0, 2, 3, 4)) == 0).all()
    assert batch.targets["views"].shape[1] == num_views  # type: ignore[index]
    _, colours = domain.supervise(batch, 2000)
    assert (colours.amax(-1) > 0.5).all() and (batch.inputs[..., 3:].amax(-1) > -0.2).all()


def test_rays_and_depths_come_from_the_samples_seed_alone(record: Record):
    batch = signals(record, 4)
    whole, colours = DOMAIN.supervise(batch, 50)
    part, part_colours = DOMAIN.supervise(batch[1:3], 50)
    assert torch.equal(colours[1:3], part_colours) and torch.equal(whole.coords[1:3], part.coords)
    assert whole.depths is not None and part.depths is not None and torch.equal(whole.depths[1:3], part.depths)
    assert not torch.equal(whole.coords[0], whole.coords[1])
    all_of_it, _ = DOMAIN.measurements(batch)
    assert all_of_it.coords.shape == (4, DOMAIN.fit_rays, 3)
    assert torch.equal(all_of_it.coords[0], all_of_it.coords[1])  # draws nothing


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_objects_share_of_rays_is_drawn_evenly_from_its_pixels(record: Record, share: float):
    domain = dataclasses.replace(DOMAIN, object_share=share)
    batch = signals(record)
    _, colours = domain.supervise(batch, 20_000)
    assert isinstance(batch.targets, dict)
    views = batch.targets["views"][0, [i for i in range(12) if i % 4 != 3]]
    is_object = (views != 255).any(1)
    expected = share + (1 - share) * float(is_object.float().mean())
    assert abs(float((colours != 1).any(-1).float().mean()) - expected) < 0.01
    red = views.movedim(1, -1)[is_object][:, 0] == 220  # among the object's pixels, none are preferred
    found = colours[(colours != 1).any(-1)][:, 0] > 0.8
    assert abs(float(found.float().mean()) - float(red.float().mean())) < 0.02


def test_views_of_ground_alone_give_rays_too(record: Record):
    batch = signals(record)
    assert isinstance(batch.targets, dict)
    empty = dataclasses.replace(batch, targets=batch.targets | {"views": torch.full_like(batch.targets["views"], 255)})
    queries, colours = DOMAIN.supervise(empty, 100)
    assert torch.equal(colours, torch.ones_like(colours)) and len(queries.coords[0].unique(dim=0)) > 4


def test_the_true_field_explains_the_rays(record: Record):
    domain = dataclasses.replace(DOMAIN, samples_per_ray=192)
    batch = signals(record, 2, domain)
    queries, colours = domain.supervise(batch, 1000)
    error = (domain.observe(arms_field(domain, 2), queries) - colours).abs().amax(-1)
    assert (error < 0.05).float().mean() > 0.95  # the others graze an edge between two depths
    queries, colours = domain.measurements(batch, 1000)
    error = (domain.observe(arms_field(domain, 2), queries) - colours).abs().amax(-1)
    assert (error < 0.05).float().mean() > 0.95


def test_a_mist_of_constant_density_is_seen_in_closed_form(record: Record):
    """Through the middle of the unit sphere the way is 2; beside it there is only the ground."""

    def values(parameters: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
        return torch.tensor([0.5, 0.3, -0.4, 1.1]).expand(*coords.shape[:2], 4)

    field = Field(values, (torch.zeros(1),), DOMAIN)
    origins = torch.tensor([[[0.0, -3.0, 0.0], [0.6, -3.0, 0.0], [1.2, -3.0, 0.0]]])
    seen = DOMAIN.observe(field, Queries(origins, torch.tensor([0.0, 1.0, 0.0]).expand(1, 3, 3)))
    density = 20.0 * torch.nn.functional.softplus(torch.tensor(0.5 - 3.0))
    through = (-density * torch.tensor([[2.0], [1.6], [0.0]])).exp()
    expected = (1 - through) * torch.tensor([0.3, -0.4, 1.1]).sigmoid() + through
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)


# Axes


def test_every_axis_appears_where_it_should():
    """From -y with z up: red x to the right, blue z up, green y away from the eye; from +x: y to the right."""
    where = {"red": (1, 0), "green": (2, 1), "blue": (0, 2)}
    seen = {}
    for name, place in (("front", [0.0, -2.4, 0.0]), ("side", [2.4, 0.0, 0.0]), ("above", [0.0, -0.3, 2.4])):
        view = DOMAIN.render(arms_field(DOMAIN), 64, cameras=camera(look_from(place)))[0, 0]
        stored = torch.from_numpy(picture(look_from(place), 64)).permute(2, 0, 1) / 255
        assert (view - stored).abs().mean() < 0.03, name
        for colour, (_, channel) in where.items():
            others = [c for c in range(3) if c != channel]
            mask = (view[channel] > 0.6) & (view[others] < 0.4).all(0)
            rows, columns = mask.nonzero().float().add(0.5).unbind(1)
            seen[name, colour] = (float(columns.mean()), float(rows.mean())) if len(rows) else None
    x, y = seen["front", "red"]  # type: ignore[misc]
    assert x > 40 and abs(y - 32) < 2
    x, y = seen["front", "blue"]  # type: ignore[misc]
    assert abs(x - 32) < 2 and y < 28
    x, y = seen["side", "green"]  # type: ignore[misc]
    assert x > 36 and abs(y - 32) < 2
    x, y = seen["above", "green"]  # type: ignore[misc]
    assert abs(x - 32) < 2 and y < 26
    x, y = seen["above", "red"]  # type: ignore[misc]
    assert x > 40


# Rendering


def test_held_out_views_are_reproduced_and_the_pieces_do_not_matter(record: Record):
    batch = signals(record, 2)
    field = arms_field(DOMAIN, 2)
    found = DOMAIN.reproduce(field, batch)
    assert found.shape == DOMAIN.truth(batch).shape == (2, 3, 3, 16, 16)
    assert (found - DOMAIN.truth(batch)).abs().mean() < 0.03
    cameras = batch.targets["cameras"][:, [3, 7, 11]]  # type: ignore[index]
    assert torch.equal(DOMAIN.render(field, 16, cameras=cameras, chunk_points=5000), found)


def test_large_views_ask_for_few_points_at_a_time():
    most = []

    def values(parameters: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
        most.append(coords.shape[1])
        return coords.new_zeros(1, 1, 4).expand(1, coords.shape[1], 4)

    domain = dataclasses.replace(DOMAIN, render_samples=2)
    field = Field(values, (torch.zeros(1),), domain)
    view = domain.render(field, 1024, cameras=camera(look_from([0.0, -2.4, 0.3])), chunk_points=1 << 17)
    assert view.shape == (1, 1, 3, 1024, 1024) and max(most) <= 1 << 17 and len(most) == 16


def test_the_colour_may_depend_on_the_direction():
    places = ([0.0, -2.4, 0.0], [0.0, 2.4, 0.0])
    cameras = torch.cat([camera(look_from(place)) for place in places])
    views = DOMAIN.render(ball_field(DOMAIN), 17, cameras=cameras)[0]
    assert views[0, 2, 8, 8] > 0.95 > views[0, 0, 8, 8] and views[1, 0, 8, 8] > 0.95 > views[1, 2, 8, 8]


def test_depth_is_the_distance_to_the_surface_or_the_end_of_the_ray():
    domain = dataclasses.replace(DOMAIN, render_samples=400)
    field = ball_field(domain, sharpness=4000.0)
    found = domain.depth(field, 33, cameras=camera(look_from([0.0, -2.4, 0.0])))[0, 0]
    assert abs(float(found[16, 16]) - 1.9) < 0.01
    assert 2 < found[16, 0] < 2.7  # past the ball, where the ray leaves the unit sphere


# What reports need


def test_views_lie_beside_each_other():
    rendered = torch.arange(2 * 10, dtype=torch.float32).view(2, 10, 1, 1, 1).expand(2, 10, 3, 4, 4) / 20
    found = DOMAIN.pictures(rendered)
    assert found.shape == (2, 3, 8, 20)
    assert torch.equal(found[1, 0, ::4, ::4], rendered[1, :, 0, 0, 0].view(2, 5))
    assert DOMAIN.pictures(rendered[:, :7]).shape == (2, 3, 4, 28)
    large = torch.rand(2, 3, 3, 64, 64)
    assert DOMAIN.thumbnails(large).shape == (2, 3 * 3 * 32 * 32) and DOMAIN.enlarge(large, 96).shape[-1] == 96


def test_naive_views_are_the_scenes_own_training_views(record: Record):
    batch = signals(record)
    assert isinstance(batch.targets, dict)
    cameras = batch.targets["cameras"].clone()
    for held_out, near in ((3, 5), (7, 0), (11, 10)):
        cameras[:, held_out] = cameras[:, near]
    batch = dataclasses.replace(batch, targets=batch.targets | {"cameras": cameras})
    found = DOMAIN.naive(batch, numbers=8)
    views = batch.targets["views"][:, [0, 1, 2, 5, 4, 5, 6, 0, 8, 9, 10, 10]]
    moved = dataclasses.replace(batch, targets=batch.targets | {"views": views})
    assert torch.equal(found["its nearest training view"], DOMAIN.truth(moved))
    assert found["the mean of its training views"].shape == (1, 3, 3, 16, 16)
