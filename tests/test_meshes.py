"""Meshes as solids: closed and open ones, what cannot be used, and surfaces of grids."""

from pathlib import Path

import numpy as np
import pytest
import trimesh
from scipy import ndimage
from tiny_sets import by_key

from distributed_inr.data.shards import load_index
from distributed_inr.raw import meshes

SOLIDS = {
    "sphere": (trimesh.creation.icosphere(subdivisions=5), 4 / 3 * np.pi),
    "box": (trimesh.creation.box((1.0, 1.9, 1.3)), 1.0 * 1.9 * 1.3),
    "torus": (trimesh.creation.torus(1.0, 0.4, 256, 128), 2 * np.pi**2 * 0.4**2),
    "cylinder": (trimesh.creation.cylinder(0.5, 2.0, sections=256), np.pi * 0.25 * 2),
}

FILES = sorted((Path(__file__).parent / "fixtures" / "meshes").iterdir())

PLY = b"""ply
format ascii 1.0
element vertex 3
property float x
property float y
property float z
element face 1
property list uchar int vertex_indices
end_header
"""


def opened(mesh: trimesh.Trimesh, share: float) -> trimesh.Trimesh:
    """The mesh without some of its faces, around one of them, and with half of the others turned over."""
    middles = mesh.triangles_center
    far = np.linalg.norm(middles - middles[0], axis=1)
    faces = mesh.faces[np.argsort(far)[int(share * len(far)) :]].copy()
    faces[::2] = faces[::2, ::-1]
    return trimesh.Trimesh(mesh.vertices, faces, process=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLIDS)
def test_solids_of_known_shape_have_their_volume(name: str):
    mesh, volume = SOLIDS[name]
    scale = meshes.normalised(mesh, fill=0.875).scale / mesh.scale
    occupied = meshes.solid(meshes.normalised(mesh, fill=0.875), 64)
    assert occupied.sum() * (2 / 64) ** 3 == pytest.approx(volume * scale**3, rel=0.01)


def test_a_sphere_with_a_small_opening_and_mixed_normals_is_still_solid():
    closed = meshes.normalised(SOLIDS["sphere"][0], fill=0.875)
    whole, other = meshes.solid(closed, 32), meshes.solid(opened(closed, 0.001), 32)
    assert not opened(closed, 0.001).is_watertight
    assert (whole ^ other).sum() < 0.01 * whole.sum()


def test_what_is_wide_open_is_a_sheet():
    closed = meshes.normalised(SOLIDS["sphere"][0], fill=0.875)
    half = meshes.solid(opened(closed, 0.5), 32)
    assert 0 < half.sum() < 0.25 * meshes.solid(closed, 32).sum()
    assert not half[16, 16, 16]


def test_a_closed_off_hollow_is_filled():
    sphere = SOLIDS["sphere"][0]
    inner = sphere.copy()
    inner.apply_scale(0.5)
    both = meshes.normalised(trimesh.util.concatenate([sphere, inner]), fill=0.875)
    assert meshes.solid(both, 32)[16, 16, 16]


def test_a_leg_thinner_than_a_cell_is_kept_and_connected():
    leg = trimesh.creation.box((0.01, 2.0, 0.01))
    occupied = meshes.solid(meshes.normalised(leg, fill=0.875), 32)
    assert occupied.any(axis=(0, 2)).sum() == 28
    assert ndimage.label(occupied, ndimage.generate_binary_structure(3, 3))[1] == 1
    assert occupied.sum() <= 4 * 28


def test_axes_are_as_in_the_file_and_grids_are_z_y_x():
    arm = trimesh.creation.box(bounds=[[-1, -0.1, -0.1], [1, 0.1, 0.1]])
    knob = trimesh.creation.box(bounds=[[0.8, -0.1, -0.1], [1.0, 0.5, 0.1]])
    nose = trimesh.creation.box(bounds=[[0.8, -0.1, -0.1], [1.0, 0.1, 0.9]])
    occupied = meshes.solid(meshes.normalised(trimesh.util.concatenate([arm, knob, nose]), fill=0.875), 32)
    z, y, x = np.nonzero(occupied)
    assert np.ptp(x) == 27 and 6 <= np.ptp(y) <= 10 and 11 <= np.ptp(z) <= 16
    assert x[y == y.max()].min() > 26 and x[z == z.max()].min() > 26 and z[y == y.max()].max() < z.max()


def test_a_grid_survives_its_packed_bits():
    occupied = np.random.default_rng(0).random((5, 5, 5)) > 0.5
    assert np.array_equal(meshes.unpack(meshes.pack(occupied), 5), occupied)
    with pytest.raises(ValueError, match="16 bytes of packed bits, about 5 cells a side, expected 6"):
        meshes.unpack(meshes.pack(occupied), 6)


def test_the_surface_of_a_grid_has_its_volume_and_lies_at_its_place():
    side = (np.arange(48) * 2 + 1) / 48 - 1
    z, y, x = np.meshgrid(side, side, side, indexing="ij")
    vertices, faces = meshes.from_grid(0.6 - np.sqrt((x - 0.2) ** 2 + y**2 + (z + 0.1) ** 2), level=0.0)
    mesh = trimesh.Trimesh(vertices, faces)
    assert mesh.is_watertight and mesh.volume == pytest.approx(4 / 3 * np.pi * 0.6**3, rel=0.01)
    assert np.allclose(mesh.center_mass, (0.2, 0, -0.1), atol=1e-3)


def test_what_reaches_the_border_is_closed_there():
    values = np.zeros((8, 8, 8), np.float32)
    values[:, 2:6, 2:6] = 1
    mesh = trimesh.Trimesh(*meshes.from_grid(values))
    assert mesh.is_watertight and mesh.extents[2] == pytest.approx(2.0, abs=0.3)
    with pytest.raises(ValueError, match="all values of the grid lie below 0.5: there is no surface"):
        meshes.from_grid(np.zeros((8, 8, 8), np.float32))


def test_surfaces_through_cell_centres_stay_closed_in_single_precision():
    generator = np.random.default_rng(0)
    values = ndimage.gaussian_filter(generator.normal(size=(24, 24, 24)), 1.5).astype(np.float32) * 10
    values.flat[generator.integers(0, values.size, 100)] = 0.5
    values.flat[generator.integers(0, values.size, 400)] = 0.5 + generator.normal(size=400) * 1e-7
    vertices, faces = meshes.from_grid(values)
    mesh = trimesh.Trimesh(vertices.astype(np.float32), faces, process=False)
    mesh.merge_vertices()
    assert mesh.is_watertight


def test_surface_points_are_spread_by_area():
    plates = trimesh.util.concatenate(
        [
            trimesh.creation.box((2, 2, 1e-3)),
            trimesh.creation.box((1, 1, 1e-3), trimesh.transformations.translation_matrix((0, 0, 1))),
        ]
    )
    points = meshes.surface_points(plates, 20_000)
    assert (points[:, 2] > 0.5).mean() == pytest.approx(0.2, abs=0.01)
    assert np.array_equal(points, meshes.surface_points(plates, 20_000))


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (b"", ".obj", "has no faces|cannot be read"),
        (b"not a mesh", ".glb", "cannot be read as .glb"),
        (b"v 0 0 0\nv 1 0 0\n", ".obj", "no faces"),
        (b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", ".obj", "faces have no area"),
        (b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", ".obj", "not finite|cannot be read"),
        (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", ".off", "1 faces, above the limit of 0"),
        (PLY + b"0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", ".ply", "faces of vertices that it does not have: 0 to 7 of 3"),
        (PLY + b"0 0 0\n1 0 0\n0 1 0\n3 0 1 -1\n", ".ply", "faces of vertices that it does not have: -1 to 1 of 3"),
    ],
)
def test_meshes_that_cannot_be_used_are_one_clear_line(content: bytes, suffix: str, message: str, tmp_path: Path):
    path = tmp_path / f"mesh{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        meshes.read_mesh(path, max_faces=0 if suffix == ".off" else 100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".obj", ".ply", ".glb", ".off", ".stl"])
def test_every_kind_of_mesh_file_is_read_and_written(suffix: str, tmp_path):
    box = trimesh.creation.box((1.0, 2.0, 3.0))
    meshes.write_mesh(box.vertices, box.faces, tmp_path / f"box{suffix}")
    mesh = meshes.read_mesh(tmp_path / f"box{suffix}")
    assert np.allclose(sorted(mesh.extents), (1, 2, 3)) and abs(mesh.volume) == pytest.approx(6)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_real_open_meshes_fill_as_other_peoples_voxels_of_them(file: Path):
    """IoU with a tolerance of one cell: what lies within a cell of the other solid counts as in both."""
    mesh = meshes.read_mesh(file)
    assert not mesh.is_watertight
    found, known = meshes.solid(meshes.normalised(mesh, fill=0.875), 32), bundled(file.stem)
    around = ndimage.generate_binary_structure(3, 3)
    near_found, near_known = (ndimage.binary_dilation(solid, around) for solid in (found, known))
    wrong = (found & ~near_known).sum() + (known & ~near_found).sum()
    assert 1 - wrong / (found | known).sum() >= 0.95


def bundled(key: str) -> np.ndarray:
    """The grid of a bundled shape, which was made by another method (NOTICE)."""
    for part in ("train", "val"):
        record = by_key(load_index(f"bundled:furniture-shape/{part}")).get(key)
        if record is not None:
            return meshes.unpack(record["occupancy.npy"], 32)
    raise AssertionError(f"{key} is not bundled")
