"""The ways in which raw shapes lie on disks: mesh files, voxel grids, and the sets of Occupancy Networks."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from distributed_inr.data.layouts.item import Item, Part, content_of, item_of, walk, with_class
from distributed_inr.data.layouts.metadata import described, described_objects
from distributed_inr.data.layouts.source import Source
from distributed_inr.raw import meshes
from distributed_inr.raw.arrays import BITS, FLOATS, INTEGERS, TEXT, Archive, read_npy, write_npy
from distributed_inr.raw.meshes import MESH_SUFFIXES, QUERIED_CUBE, Form

_GRID_SUFFIXES = (".npy", ".npz")
_LISTS: dict[str, Part] = {"train.lst": "train", "val.lst": "val", "test.lst": "val"}
_CELLS = (*BITS, *INTEGERS, *FLOATS)
_HELD_FILES = 2
_ROUNDING = 2e-3
"""How far queried points may lie beyond their cube, of half its side: they are stored with three digits."""


@dataclass(frozen=True)
class _Grid:
    """Cells [x, y, z], as voxel files have them."""

    occupied: np.ndarray


@dataclass(frozen=True)
class _Queried:
    points: np.ndarray
    occupied: np.ndarray
    surface: np.ndarray


def mesh_files(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """Any tree of mesh files; captions from metadata.jsonl, or the first folder's name as class and caption."""

    def load(item: Item) -> Callable[[], Path]:
        return lambda: root / item.name

    return described([replace(item, load=load(item)) for item in walk(root, MESH_SUFFIXES)], root, metadata)


def voxels(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """Cubic grids [x, y, z]: a .npy or .npz file each, or a .npz of many in `occupancy` (bits may be packed) with
    `keys`; captions as for mesh-files.
    """
    found: list[Item] = []
    grids = _ManyGrids()
    for item in walk(root, _GRID_SUFFIXES):
        path = root / item.name
        try:
            names = _keys(Archive(content_of(path))) if path.suffix.lower() == ".npz" else []
        except ValueError:
            names = []  # what is wrong is said when it is loaded
        if not names:
            found.append(replace(item, load=_OneGrid(path)))
        for number, name in enumerate(names):
            load, own = _Numbered(grids, path, number), Path(item.name).parent / name
            key, name = _sample_key(own), f"{item.name}#{own.as_posix()}"
            found.append(Item(key, name, load, item.size // len(names), unit=key, part=item.part))
    return described(found, root, metadata)


def _keys(archive: Archive) -> list[str]:
    """Of the grids of a file that holds many; empty where it holds one."""
    if "keys" not in archive:
        return []
    keys = archive.read("keys", TEXT)
    if keys.ndim != 1:
        raise ValueError(f"keys of shape {list(keys.shape)}; expected one for each grid")
    return [str(key) for key in keys]


def _sample_key(path: Path) -> str:
    """webdataset's keys end at the first dot of the last part."""
    return (path.parent / path.name.replace(".", "_")).as_posix()


def occupancy_networks(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """As Occupancy Networks distribute ShapeNet: a folder per class, in it a folder per model with points.npz and
    pointcloud.npz, and train.lst, val.lst, test.lst; names of classes in metadata.yaml. Captions are those of
    --metadata (key CLASS/MODEL, or modelId), else the class's name.
    """
    names = _class_names(root / "metadata.yaml") if (root / "metadata.yaml").is_file() else {}
    found: list[Item] = []
    for folder in sorted(path.parent.parent for path in root.glob("*/*/points.npz")):
        if found and found[-1].key.split("/")[0] == folder.name:
            continue
        parts: dict[str, Part] = {}
        for name, part in _LISTS.items():
            if (folder / name).is_file():
                parts |= dict.fromkeys(_text(folder / name).split(), part)
        models = sorted(path.parent for path in folder.glob("*/points.npz"))
        if parts:
            models = [model for model in models if model.name in parts]
            missing = sorted(parts.keys() - {model.name for model in models})
            if missing:
                raise ValueError(f"{folder}: {len(missing)} listed models have no points.npz, first {missing[0]}")
        for model in models:
            item, key = item_of(root, model / "points.npz"), _sample_key(Path(folder.name, model.name))
            item = replace(item, key=key, unit=key, load=_QueriedFiles(model), part=parts.get(model.name))
            found.append(with_class(item, names.get(folder.name, folder.name)))
    return described_objects(found, root, metadata)


def _class_names(path: Path) -> dict[str, str]:
    """By folder, the first of each class's names."""
    import yaml

    remedy, text = "mend it, or move it out of the folder: classes are then named as their folders", _text(path)
    try:
        known = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of dates that cannot be
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}; {remedy}") from None
    entries = known.values() if isinstance(known, dict) else [None]
    if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries):
        raise ValueError(f"{path}: expected a name for each class, such as '03001627': {{name: chair}}; {remedy}")
    return {key: entry["name"].split(",")[0] for key, entry in known.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{path} cannot be read: {reason}; restore it, or move it out of the folder") from None


def _convert(content: _Grid | Path | _Queried, form: Form) -> dict[str, bytes]:
    if isinstance(content, _Queried):
        return _convert_queried(content, form)
    if isinstance(content, Path):
        try:
            mesh = meshes.read_mesh(content, max_faces=form.max_faces)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        mesh = meshes.normalised(mesh, fill=form.fill)
        occupied = meshes.solid(mesh, form.resolution, close=form.close)
        triangles = mesh.vertices[mesh.faces]
    else:
        occupied = content.occupied.transpose(2, 1, 0)
        if set(occupied.shape) != {form.resolution}:
            shape = " x ".join(map(str, content.occupied.shape))
            raise ValueError(f"a grid of {shape} cells, --resolution {form.resolution}; give its own, which is cubic")
        if occupied.all() or not occupied.any():
            raise ValueError(f"all of its cells are {'inside' if occupied.all() else 'outside'}: it has no surface")
        vertices, faces = meshes.from_grid(occupied.astype(np.float32))
        triangles = vertices[faces]
    if not occupied.any():
        raise ValueError("none of its cells is inside; a larger --resolution may find some")
    surface = meshes.points_on(triangles, form.points).astype(np.float16)
    return {"occupancy.npy": meshes.pack(occupied), "surface.npy": write_npy(surface)}


def _convert_queried(content: _Queried, form: Form) -> dict[str, bytes]:
    if len(content.points) < form.queries:
        raise ValueError(f"{len(content.points)} queried points, --queries {form.queries}; ask for so many or fewer")
    generator = np.random.default_rng(0)
    chosen = generator.permutation(len(content.points))[: form.queries]
    seen = generator.permutation(len(content.surface))[: form.points]
    rows = np.concatenate([content.points[chosen], content.occupied[chosen, None]], axis=1)
    surface = content.surface[seen].astype(np.float16)
    if not 0 < content.occupied.mean() < 1:
        raise ValueError(f"all of its points are {'inside' if content.occupied.all() else 'outside'}")
    return {"queries.npy": write_npy(rows.astype(np.float16)), "surface.npy": write_npy(surface)}


@dataclass(frozen=True)
class _OneGrid:
    path: Path

    def __call__(self) -> _Grid:
        content = content_of(self.path)
        if self.path.suffix.lower() == ".npy":
            values = read_npy(content, _CELLS)
        else:
            archive = Archive(content)
            _keys(archive)
            if len(archive.names) != 1:
                raise ValueError(
                    f"it holds {', '.join(archive.names) or 'nothing'}; expected one grid, or occupancy and keys"
                )
            values = archive.read(archive.names[0], _CELLS)
        if values.ndim != 3:
            raise ValueError(f"an array of shape {list(values.shape)}; expected [x, y, z]")
        return _Grid(_occupied(values))


class _ManyGrids:
    """The grids of files that hold many; the last few files' stay in memory, because one is asked for after another."""

    def __init__(self) -> None:
        self._lock, self._read = threading.Lock(), functools.lru_cache(_HELD_FILES)(_read_grids)

    def one(self, path: Path, number: int) -> np.ndarray:
        with self._lock:
            return self._read(path)[number].copy()  # which keeps none of the others


def _read_grids(path: Path) -> np.ndarray:
    archive = Archive(content_of(path))
    if "occupancy" not in archive:
        raise ValueError("it has keys but no occupancy")
    values, count = archive.read("occupancy", _CELLS), len(_keys(archive))
    if values.ndim not in (2, 4) or len(values) != count:
        raise ValueError(
            f"{count} keys, occupancy of shape {list(values.shape)}; expected [keys, x, y, z] or bits [keys, bytes]"
        )
    return values


@dataclass(frozen=True)
class _Numbered:
    grids: _ManyGrids
    path: Path
    number: int

    def __call__(self) -> _Grid:
        values = self.grids.one(self.path, self.number)
        if values.ndim == 1:  # packed bits
            side = round((8 * values.size) ** (1 / 3))
            if side**3 != 8 * values.size or values.dtype != np.uint8:
                raise ValueError(f"{values.size} bytes of packed bits are no cube of cells")
            return _Grid(np.unpackbits(values).reshape((side,) * 3).astype(bool))
        return _Grid(_occupied(values))


@dataclass(frozen=True)
class _QueriedFiles:
    folder: Path

    def __call__(self) -> _Queried:
        try:
            queried, cloud = (Archive((self.folder / name).read_bytes()) for name in ("points.npz", "pointcloud.npz"))
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None
        if not {"points", "occupancies"} <= set(queried.names) or "points" not in cloud:
            raise ValueError("points.npz must have points and occupancies, pointcloud.npz points")
        points, occupied = queried.read("points"), queried.read("occupancies", _CELLS)
        surface = cloud.read("points")
        shapes = f"points of shape {list(points.shape)}, surface {list(surface.shape)}"
        shapes = f"{shapes} and occupancies {list(occupied.shape)}; expected three numbers for each and one"
        if points.shape[1:] != (3,) or surface.shape[1:] != (3,) or occupied.ndim != 1:
            raise ValueError(shapes)
        if occupied.dtype == np.uint8 and len(occupied) == -(-len(points) // 8):
            occupied = np.unpackbits(occupied, count=len(points))
        if len(occupied) != len(points):
            raise ValueError(shapes)
        if len(surface) == 0:
            raise ValueError("no points of the surface")
        if not ((occupied >= 0) & (occupied <= 1)).all():
            raise ValueError("occupancies outside [0, 1]")
        points, surface = (2 / QUERIED_CUBE * values.astype(np.float64) for values in (points, surface))
        if not all((np.abs(values) <= 1 + _ROUNDING).all() for values in (points, surface)):
            raise ValueError(f"points outside the cube of side {QUERIED_CUBE} that they are expected in")
        return _Queried(points, occupied.astype(np.float64), surface)


def _occupied(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite")
    return values > 0.5


SHAPES = Source(
    domain="shape",
    layouts={"mesh-files": mesh_files, "voxels": voxels, "occupancy-networks": occupancy_networks},
    form=Form,
    convert=_convert,
    noun="shape",
    files=(*MESH_SUFFIXES, *_GRID_SUFFIXES),
)
