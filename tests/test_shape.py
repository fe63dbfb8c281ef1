"""Shapes: what is read, measured, rendered and written."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image as Picture
from tiny_sets import by_key

from distributed_inr.config import from_json, override, to_json
from distributed_inr.data.prepare import Plan, prepare_set
from distributed_inr.data.reader import ShardDataset
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.domains import Shape, Signal, collate
from distributed_inr.domains.domain import pixel_centres
from distributed_inr.evaluation.metrics import accuracy, iou
from distributed_inr.field import Field
from distributed_inr.models import D2CVAE, LayersOfExperts
from distributed_inr.models.encoders import PointEncoder
from distributed_inr.models.latent_fitting import MetaLearning
from distributed_inr.raw import meshes
from distributed_inr.raw.arrays import write_npy

SIZE = 16
DOMAIN = Shape(size=SIZE, num_points=100)


def arms() -> torch.Tensor:
    """A solid with three different arms from a cube in the middle: 6 cells along +x, 4 along +y, 2 along +z."""
    grid = torch.zeros(SIZE, SIZE, SIZE, dtype=torch.uint8)  # [z, y, x]
    grid[6:10, 6:10, 6:10] = 1
    grid[7:9, 7:9, 10:16] = 1
    grid[7:9, 10:14, 7:9] = 1
    grid[10:12, 7:9, 7:9] = 1
    return grid


def record(grid: torch.Tensor, key: str = "a") -> dict:
    vertices, faces = meshes.from_grid(grid.float().numpy())
    surface = meshes.points_on(vertices[faces], 500).astype(np.float16)
    occupied = grid.numpy().astype(bool)
    return {"__key__": key, "occupancy.npy": meshes.pack(occupied), "surface.npy": write_npy(surface), "txt": b"arms"}


def queried(points: np.ndarray, occupied: np.ndarray) -> dict:
    rows = np.concatenate([points, occupied[:, None]], axis=1).astype(np.float16)
    return {"__key__": "q", "queries.npy": write_npy(rows), "surface.npy": write_npy(points.astype(np.float16))}


def sphere_field(radius: float, domain: Shape = DOMAIN) -> Field:
    """Logits of a ball around (0.1, -0.2, 0.3), steep enough to be sharp on a grid."""

    def function(parameters: tuple, coords: torch.Tensor, view: torch.Tensor | None) -> torch.Tensor:
        centre = torch.tensor([0.1, -0.2, 0.3])
        return (parameters[0][:, None] - (coords - centre).norm(dim=-1, keepdim=True)) * 60

    return Field(function, (torch.full((1, 1), radius),), domain)


def test_a_record_becomes_its_grid_and_noisy_points_of_its_surface():
    signal = DOMAIN.read(record(arms()), seed=3)
    assert signal.key == "a" and signal.text == "arms" and signal.inputs.shape == (100, 3)
    assert torch.equal(signal.targets, arms())
    again, other = DOMAIN.read(record(arms()), seed=3), DOMAIN.read(record(arms()), seed=4)
    assert torch.equal(signal.inputs, again.inputs) and not torch.equal(signal.inputs, other.inputs)
    # every point lies at the border of the solid, within a cell and the noise
    cells = ((signal.inputs.clamp(-1, 1) + 1) / 2 * SIZE).long().clamp(max=SIZE - 1)
    near = torch.nn.functional.max_pool3d(arms()[None, None].float(), 3, 1, 1)[0, 0]
    assert near[cells[:, 2], cells[:, 1], cells[:, 0]].all()


@pytest.mark.parametrize("near", [0.0, 0.5])
def test_measurements_are_cells_of_the_grid_at_their_places(near: float):
    domain = Shape(size=SIZE, num_points=10, near=near)
    signal = collate([domain.read(record(arms()), seed=s) for s in range(4)])
    for queries, values in (domain.supervise(signal, 300), domain.measurements(signal, 300)):
        cells = ((queries.coords + 1) / 2 * SIZE).long()
        centres = pixel_centres(SIZE)[cells]
        torch.testing.assert_close(queries.coords, centres)
        assert torch.equal(values[..., 0], arms()[cells[..., 2], cells[..., 1], cells[..., 0]].float())
        assert not torch.equal(queries.coords[0], queries.coords[1])
    queries, values = domain.measurements(signal)
    again, _ = domain.measurements(dataclasses.replace(signal, seed=signal.seed + 1))
    assert torch.equal(queries.coords, again.coords)
    if near == 0:
        assert values.shape == (4, SIZE**3, 1) and values[0].sum() == arms().sum()
        assert len(queries.coords[0].unique(dim=0)) == SIZE**3
    else:
        assert values.shape == (4, domain.fit_points, 1) and values.mean() > 3 * arms().float().mean()


def test_near_draws_that_share_from_cells_beside_the_surface():
    domain = Shape(size=SIZE, num_points=10, near=0.75)
    signal = collate([domain.read(record(arms()), seed=s) for s in range(20)])
    _, values = domain.supervise(signal, 400)
    occupied = arms()[None, None].float()
    mixed = torch.nn.functional.max_pool3d(occupied, 3, 1, 1) != -torch.nn.functional.max_pool3d(-occupied, 3, 1, 1)
    expected = 0.75 * occupied[mixed].mean() + 0.25 * occupied.mean()
    assert values.mean().item() == pytest.approx(expected.item(), abs=0.02)
    empty = dataclasses.replace(signal, targets=torch.zeros_like(signal.targets))
    assert domain.supervise(empty, 400)[1].sum() == 0  # no surface: drawn from all cells


def test_queried_points_are_taken_as_they_are_and_make_a_grid():
    generator = np.random.default_rng(0)
    points = generator.uniform(-1, 1, (20_000, 3))
    inside = (np.linalg.norm(points, axis=1) < 0.7).astype(float)
    domain = Shape(size=8, num_points=50)
    signal = collate([domain.read(queried(points, inside), seed=s) for s in range(2)])
    queries, values = domain.supervise(signal, 1000)
    radius = queries.coords.norm(dim=-1)
    assert (values[..., 0] == (radius < 0.7).float())[(radius - 0.7).abs() > 2e-3].all()
    truth = domain.truth(signal)
    side = pixel_centres(8)
    z, y, x = torch.meshgrid(side, side, side, indexing="ij")
    far = (torch.stack([x, y, z]).norm(dim=0) - 0.7).abs() > 0.25
    assert ((truth[0] > 0.5) == (torch.stack([x, y, z]).norm(dim=0) < 0.7))[far].all()


def test_a_queried_balls_grid_is_the_balls_though_most_cells_have_no_point():
    size, radius = 64, 0.7
    points = np.random.default_rng(0).uniform(-1, 1, (100_000, 3)).astype(np.float16)
    inside = np.linalg.norm(points.astype(np.float64), axis=1) < radius
    domain = Shape(size=size, num_points=50)
    truth = domain.truth(collate([domain.read(queried(points, inside), seed=0)]))
    side = pixel_centres(size)
    z, y, x = torch.meshgrid(side, side, side, indexing="ij")
    known = (torch.stack([x, y, z]).norm(dim=0) < radius).float()[None]
    assert iou(truth, known).item() > 0.95 and accuracy(truth, known).item() > 0.99
    vertices, faces = meshes.from_grid(truth[0].numpy())
    volume = trimesh.Trimesh(vertices, faces).volume
    assert volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)


def test_cells_without_a_point_take_the_share_of_the_nearest_that_have_some():
    domain = Shape(size=8, num_points=5)
    points = np.array([[-0.9, -0.9, -0.9], [0.9, -0.9, -0.9], [0.9, -0.9, -0.9], [0.9, -0.9, -0.9]])
    records = [queried(points, np.array(inside)) for inside in ([1.0, 0.0, 0.0, 1.0], [0.0] * 4)]
    both, outside = domain.truth(collate([domain.read(record, seed=0) for record in records]))
    torch.testing.assert_close(both[0, 0], torch.tensor([1.0] * 4 + [1 / 3] * 4))
    assert not outside.any()
    single = Shape(size=64, num_points=5).read(queried(points[:1], np.ones(1)), seed=0)
    assert (Shape(size=64).truth(collate([single])) == 1).all()  # however many rings away


def test_the_likelihood_is_bernoullis_or_gaussian():
    observed, values = torch.tensor([[[2.0], [-1.0]]]), torch.tensor([[[1.0], [0.0]]])
    probability = observed.sigmoid()
    expected = -(probability[0, 0].log() + (1 - probability[0, 1]).log()) / 2
    torch.testing.assert_close(DOMAIN.nll(observed, values), expected)
    gaussian = Shape(size=SIZE, likelihood="gaussian")
    assert gaussian.nll(observed, values).item() == pytest.approx(0.5 * (1 + 1) / 2)
    assert gaussian.squared_error(observed / 4, values).item() == pytest.approx(0.5**2 / 2)  # of what lies in [0, 1]
    assert DOMAIN.squared_error(observed, values).item() == pytest.approx(
        (((1 - probability[0, 0]) ** 2 + probability[0, 1] ** 2) / 2).item()
    )


def test_rendering_is_the_probability_at_cell_centres_whatever_the_chunks():
    field = sphere_field(0.5)
    whole, pieces = DOMAIN.render(field, 20), DOMAIN.render(field, 20, chunk_points=77)
    torch.testing.assert_close(whole, pieces)
    side = pixel_centres(20)
    z, y, x = torch.meshgrid(side, side, side, indexing="ij")
    expected = field(torch.stack([x, y, z], dim=-1).view(1, -1, 3)).sigmoid().view(1, 20, 20, 20)
    torch.testing.assert_close(whole, expected)


def test_a_ball_is_meshed_at_its_place_with_its_volume(tmp_path: Path):
    rendered = DOMAIN.render(sphere_field(0.5), 128)
    DOMAIN.save(rendered[0], tmp_path / "ball.glb")
    mesh = meshes.read_mesh(tmp_path / "ball.glb")
    mesh.merge_vertices()
    assert mesh.is_watertight and mesh.volume == pytest.approx(4 / 3 * np.pi * 0.125, rel=0.02)
    assert np.allclose(mesh.center_mass, (0.1, -0.2, 0.3), atol=5e-3)
    points = DOMAIN.surface(rendered, 300)
    assert (((points - torch.tensor([0.1, -0.2, 0.3])).norm(dim=-1) - 0.5).abs() < 0.01).all()
    assert DOMAIN.surface(torch.zeros(1, 8, 8, 8), 5).isnan().all()


def test_every_kind_of_file_is_written(tmp_path: Path):
    rendered = arms().float()
    for case, suffix in itertools.product((str.lower, str.upper), DOMAIN.suffixes):
        path = tmp_path / case.__name__ / suffix[1:] / f"a{case(suffix)}"
        path.parent.mkdir(parents=True)
        DOMAIN.save(rendered, path)
        assert list(path.parent.iterdir()) == [path] and path.stat().st_size > 100
        if suffix in meshes.MESH_SUFFIXES:
            mesh = meshes.read_mesh(path)
            mesh.merge_vertices()
            assert mesh.is_watertight and mesh.volume == pytest.approx(arms().sum().item() * (2 / SIZE) ** 3, rel=0.1)
    with Picture.open(tmp_path / "lower/gif/a.gif") as turns:
        assert getattr(turns, "n_frames", 1) == 8
    with Picture.open(tmp_path / "lower/png/a.png") as turntable:
        assert turntable.width == 8 * turntable.height
    with np.load(tmp_path / "lower/npz/a.npz") as stored:
        assert np.array_equal(stored["occupancy"], rendered.numpy()) and stored["points"].shape == (10_000, 3)
    with pytest.raises(ValueError, match="there is no surface"):
        DOMAIN.save(torch.zeros(8, 8, 8), tmp_path / "empty.glb")
    for name in ("a.docx", "a.gltf", "a"):
        with pytest.raises(ValueError, match=f"^{name}: shapes are written as .glb, .*; choose one of these suffixes$"):
            DOMAIN.save(rendered, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_a_picture_shows_the_arms_where_they_are():
    """From azimuth 0 the eye is on +z: x goes right, y goes up."""
    from distributed_inr.domains.shape import shaded

    picture = shaded(arms().float(), 64, azimuth=0.0, up="y")
    drawn = (picture < 0.99).any(0)
    rows, columns = drawn.nonzero().unbind(1)
    middle = 32
    right, left = columns.max() - middle, middle - columns.min()
    above, below = middle - rows.min(), rows.max() - middle
    assert right > left + 10 and above > below + 4 and right > above
    side = pixel_centres(32)
    z, y, x = torch.meshgrid(side, side, side, indexing="ij")
    ball = shaded((0.7 - torch.stack([x, y, z]).norm(dim=0)) * 20 + 0.5, 64, azimuth=0.0, up="y")[0]
    assert ball[24, 42] > ball[24, 22] + 0.1 and ball[20, 32] > ball[44, 32] + 0.1  # lit from the right and from above
    behind = (shaded(arms().float(), 64, azimuth=np.pi, up="y") < 0.99).any(0).nonzero()[:, 1]
    assert middle - behind.min() == pytest.approx(right.item(), abs=3)  # from behind it goes left
    turned = shaded(arms().permute(1, 0, 2).float(), 64, azimuth=0.0, up="z")  # y and z exchanged
    assert ((turned < 0.99).any(0) != drawn.flip(1)).float().mean() < 0.25


def test_naive_shapes_are_empty_or_coarse():
    signal = collate([DOMAIN.read(record(arms()), seed=0)])
    empty, (name, coarse) = (found := DOMAIN.naive(signal, numbers=64))["an empty grid"], list(found.items())[1]
    assert empty.sum() == 0 and name == "trilinear from 4 x 4 x 4 cells"
    assert coarse.sum().item() == pytest.approx(arms().sum().item(), rel=0.2)


def test_ones_own_mesh_is_opened_as_it_is_prepared(tmp_path: Path):
    box = trimesh.creation.box((2.0, 1.0, 0.5))
    box.export(tmp_path / "box.stl")
    signal = Shape(size=32, num_points=200).open(tmp_path / "box.stl")
    assert signal.key == ["box.stl"] and signal.inputs.shape == (1, 200, 3)
    z, y, x = signal.targets[0].nonzero().unbind(1)
    assert (x.max() - x.min() + 1, y.max() - y.min() + 1, z.max() - z.min() + 1) == (28, 14, pytest.approx(7, abs=1))
    (tmp_path / "bad.obj").write_text("nothing")
    with pytest.raises(ValueError, match="bad.obj is not a usable mesh: .*are read"):
        DOMAIN.open(tmp_path / "bad.obj")
    with pytest.raises(ValueError, match="none.obj cannot be read"):
        DOMAIN.open(tmp_path / "none.obj")


def test_ones_own_mesh_is_treated_as_the_training_sets_were(tmp_path: Path):
    ball = trimesh.creation.icosphere(subdivisions=4)
    far = np.linalg.norm(ball.triangles_center - ball.triangles_center[0], axis=1)
    (tmp_path / "raw").mkdir()
    trimesh.Trimesh(ball.vertices, ball.faces[far > 0.15], process=False).export(tmp_path / "raw" / "open.obj")
    form = meshes.Form(resolution=16, points=100, fill=0.75, close=3.0)
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(domain="shape", form=form, split="none"))
    domain = DOMAIN.settle(made.parts["train"].protocol)
    stored = domain.read(by_key(made.parts["train"])["open"], seed=0).targets
    own = domain.open(tmp_path / "raw" / "open.obj").targets[0]
    assert torch.equal(own, stored) and own[8, 8, 8] == 1
    assert (domain.fill, domain.close, domain.queries) == (0.75, 3.0, None)
    assert from_json(Shape, to_json(domain)) == domain
    sheet = override(domain, {"close": 0.0}).settle(made.parts["train"].protocol)
    assert sheet.close == 0 and sheet.open(tmp_path / "raw" / "open.obj").targets[0, 8, 8, 8] == 0
    usual = {"layout": "mesh-files", "form": dataclasses.asdict(meshes.Form(resolution=DOMAIN.size))}
    assert DOMAIN.settle(usual) == DOMAIN  # so that runs which began when nothing was told go on
    assert DOMAIN.settle({}) == DOMAIN.settle({"layout": "voxels", "form": {"fill": 0.5}}) == DOMAIN


def test_a_set_of_grids_of_another_size_is_refused():
    for layout in ("mesh-files", "voxels"):
        told = {"layout": layout, "form": {"resolution": 64}}
        with pytest.raises(ValueError, match="domain.size=16, but .* have 64 cells a side; try --domain.size 64"):
            DOMAIN.settle(told)
        assert Shape(size=64).settle(told) == Shape(size=64)
    DOMAIN.settle({"layout": "occupancy-networks", "form": {"resolution": 64}})  # its points lie on no grid


def test_a_queried_set_tells_how_large_its_shapes_are_and_how_many_points_they_have(tmp_path: Path):
    told = {"layout": "occupancy-networks", "form": {"fill": 0.5, "close": 3.0, "queries": 300}}
    domain = Shape(size=22, num_points=50).settle(told)
    trimesh.creation.box((2.0, 1.0, 0.5)).export(tmp_path / "box.stl")
    x = domain.open(tmp_path / "box.stl").targets[0].nonzero()[:, 2]
    assert x.max() - x.min() + 1 == 20  # a side of 1 in the cube of 1.1

    generator = np.random.default_rng(0)
    writer = ShardWriter(tmp_path / "set", domain="shape", protocol=told)
    for number, (count, scale, top) in enumerate([(300, 1, 1), (299, 1, 1), (300, 1, 2), (300, 1e5, 1), (300, 1, 1)]):
        points, inside = generator.uniform(-scale, scale, (count, 3)), top * (generator.random(count) > 0.5)
        rows = np.concatenate([points, inside[:, None]], axis=1).astype(np.float32)
        surface = write_npy(generator.uniform(-1, 1, (50, 3)).astype(np.float16))
        writer.write({"__key__": f"{number}", "queries.npy": write_npy(rows), "surface.npy": surface})
    dataset = ShardDataset(writer.close(), read=domain.read, seed=0, max_bad_fraction=1.0)
    found = [dataset.signal(number) for number in range(5)]
    assert [good for _, good in found] == [True, False, False, False, True]
    signal = collate([signal for signal, _ in found])
    for mine, blank in zip((signal.inputs, signal.targets), domain.blank(5), strict=True):
        assert mine.shape == blank.shape and mine.dtype == blank.dtype
    with pytest.raises(ValueError, match="^a: no queries.npy; prepare the set as shapes"):
        domain.read(record(arms()), seed=0)


def test_what_is_no_mesh_or_too_large_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read"))
    for name in ("box.stl_ascii", "box.dae", "box"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=rf"{name} is not a usable mesh: the suffix '.*' is not .*\.stl are read"):
            DOMAIN.open(tmp_path / name)
    with (tmp_path / "large.obj").open("wb") as file:
        file.truncate(meshes.MAX_MESH_BYTES + 1)
    with pytest.raises(ValueError, match="large.obj is not a usable mesh: 536870913 bytes, above the limit"):
        DOMAIN.open(tmp_path / "large.obj")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"occupancy.npy": meshes.pack(np.zeros((8, 8, 8), bool))}, "about 8 cells a side, expected 16"),
        ({"occupancy.npy": b"junk"}, "cannot be decoded: not a .npy"),
        ({"surface.npy": write_npy(np.zeros((4, 2), np.float32))}, r"expected finite numbers \[rows, 3\]"),
    ],
)
def test_bad_records_name_their_key(changes: dict, message: str):
    with pytest.raises(ValueError, match=f"^a.*{message}"):
        DOMAIN.read(record(arms()) | changes, seed=0)
    with pytest.raises(ValueError, match="a: no surface.npy; prepare the set as shapes"):
        DOMAIN.read({"__key__": "a"}, seed=0)


def overfitted(model: torch.nn.Module, signal: Signal, steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        sum(model(dataclasses.replace(signal, seed=torch.tensor([step]))).values()).backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ddmi", "chinr"])
def test_the_arms_are_in_place_through_encoding_decoding_and_meshing(family: str, tmp_path: Path):
    domain = Shape(size=SIZE, num_points=400, near=0.5, likelihood="bernoulli" if family == "ddmi" else "gaussian")
    torch.manual_seed(0)
    if family == "ddmi":
        model = D2CVAE(
            encoder=PointEncoder(width=16, num_layers=2, channels=8, multipliers=(1, 2), num_blocks=1),
            latent_channels=4,
            decoder_channels=16,
            decoder_multipliers=(1, 2),
            decoder_blocks=0,
            num_fields=2,
            field_channels=16,
            readout_width=32,
            readout_blocks=2,
            num_points=512,
        ).build(domain)
        steps, lr = 250, 5e-3
    else:
        model = LayersOfExperts(
            num_layers=4,
            num_experts=8,
            width=48,
            latent_dim=16,
            omega=15.0,
            num_points=512,
            fitting=MetaLearning(rate=1e-3, num_points=256),
        ).build(domain)
        steps, lr = 500, 3e-3
    signal = collate([domain.read(record(arms()), seed=0)])
    overfitted(model, signal, steps, lr)
    model.eval()
    with torch.no_grad():
        rendered = domain.render(model.decode(model.encode(signal)), 32)
    domain.save(rendered[0], tmp_path / "arms.ply")
    mesh = meshes.read_mesh(tmp_path / "arms.ply")
    low, high = mesh.bounds
    assert np.allclose(high, (1.0, 0.75, 0.5), atol=0.13) and np.allclose(low, (-0.25,) * 3, atol=0.13)
