"""The ways in which raw pictures lie on disks: lists of pictures with key, caption, class, object and part."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from distributed_inr.data.pictures import FILE_SUFFIXES

Part = Literal["train", "val"]

_PARTS: dict[str, Part] = {"train": "train", "val": "val", "validation": "val", "test": "val"}


@dataclass(frozen=True)
class Picture:
    """One raw picture, not read yet.

    Attributes:
        key: its sample key.
        name: how messages name it: the path inside the source.
        load: reads the file's bytes (or makes the picture).
        size: bytes of the file, so that a rerun notices a changed source.
        unit: the object it shows; pictures of one object stay together when split by object.
        part: train or val where the layout says so.
        about: what else is known, such as "class"; becomes the record's json.
    """

    key: str
    name: str
    load: Callable[[], bytes | Image.Image]
    size: int = 0
    text: str = ""
    unit: str = ""
    part: Part | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def folder(root: Path, metadata: Path | None) -> list[Picture]:
    """Any tree of picture files; captions from metadata.jsonl, or the first folder's name as class and caption."""
    pictures = _walk(root)
    rows = _read_metadata(root, metadata)
    if rows is None:
        return [_with_class(p, p.key.split("/")[0]) if "/" in p.key else p for p in pictures]
    place, table = rows
    by_name = {p.name: i for i, p in enumerate(pictures)} | {p.key: i for i, p in enumerate(pictures)}
    missing: list[str] = []
    for row in table:
        if "file_name" in row:
            path = Path(os.path.normpath(place.parent / row["file_name"]))
            if not path.is_relative_to(root):
                continue  # the file lies beside a folder that also holds other things
            name = path.relative_to(root).as_posix()
        else:
            name = str(row["key"])
        if name not in by_name:
            missing.append(name)
            continue
        pictures[by_name[name]] = _with_row(pictures[by_name[name]], row)
    _refuse_missing(missing, place, root)
    return pictures


def views(root: Path, metadata: Path | None) -> list[Picture]:
    """A folder per object with transforms.json and its frames; captions by object from metadata.jsonl."""
    rows = _read_metadata(root, metadata)
    about = {str(row["key"]): row for row in rows[1]} if rows else {}
    pictures: list[Picture] = []
    objects: set[str] = set()
    for path in sorted(root.glob("*/transforms.json")):
        name = path.parent.name
        objects.add(name)
        try:
            frames = [frame["file_path"] for frame in json.loads(path.read_text())["frames"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error!r}); it must list frames with a file_path each") from None
        for frame in frames:
            file = path.parent / frame
            if not file.resolve().is_relative_to(path.parent.resolve()) or not file.is_file():
                raise ValueError(f"{path} names {frame!r}, which is not there; restore it or remove the frame")
            pictures.append(replace(_with_row(_picture(root, file), about.get(name, {})), unit=name))
    if rows:
        _refuse_missing(sorted(about.keys() - objects), rows[0], root)
    return pictures


def afhqv2(root: Path, metadata: Path | None) -> list[Picture]:
    """AFHQv2 as distributed: train/ and test/ (or val/), in each a folder per kind of animal."""
    pictures = [p for p in _walk(root) if p.part is not None and p.key.count("/") >= 2]
    return [_with_class(p, p.key.split("/")[1]) for p in pictures]


def celebahq(root: Path, metadata: Path | None) -> list[Picture]:
    """CelebA-HQ as picture files, in one folder or in train/ and val/ folders; no captions."""
    return _walk(root)


def cifar10(root: Path, metadata: Path | None) -> list[Picture]:
    """CIFAR-10, binary version: data_batch_1.bin to 5, test_batch.bin, batches.meta.txt."""
    files = sorted(root.glob("data_batch_*.bin")) + sorted(root.glob("test_batch.bin"))
    if not files:
        pickled = " (its Python version is a pickle, which could run code)" if (root / "data_batch_1").exists() else ""
        raise ValueError(f"{root}: no data_batch_*.bin there; download CIFAR-10's binary version{pickled}")
    names = (root / "batches.meta.txt").read_text().split() if (root / "batches.meta.txt").exists() else []
    pictures: list[Picture] = []
    for file in files:
        part: Part = "val" if file.stem == "test_batch" else "train"
        if file.stat().st_size % 3073:
            raise ValueError(f"{file} is not a whole number of 3073-byte records; download it again")
        labels = np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, 3073)[:, 0].tolist()
        for number, label in enumerate(labels):
            key = f"{part}/{file.stem}-{number:05d}"
            picture = Picture(key, f"{file.name}#{number}", _Cifar(file, number), 3073, unit=key, part=part)
            pictures.append(_with_class(picture, names[label] if label < len(names) else str(label)))
    return pictures


def lsun(root: Path, metadata: Path | None) -> list[Picture]:
    """LSUN: exported picture files, or the lmdb folder as distributed (needs the lmdb package)."""
    if not (root / "data.mdb").exists():
        return _walk(root)
    try:
        import lmdb  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(f"{root} is an lmdb; pip install lmdb, or export its pictures to files first") from None
    environment = lmdb.open(str(root), readonly=True, lock=False, readahead=False)
    with environment.begin() as transaction:
        keys = [(bytes(key).decode(), len(value)) for key, value in transaction.cursor()]
    return [Picture(key, key, _Lmdb(environment, key.encode()), size, unit=key) for key, size in keys]


LAYOUTS: dict[str, Callable[[Path, Path | None], list[Picture]]] = {
    "folder": folder,
    "views": views,
    "afhqv2": afhqv2,
    "celebahq": celebahq,
    "cifar10": cifar10,
    "lsun": lsun,
}


@dataclass(frozen=True)
class _Cifar:
    file: Path
    number: int

    def __call__(self) -> Image.Image:
        with open(self.file, "rb") as file:
            file.seek(self.number * 3073 + 1)
            planes = np.frombuffer(file.read(3072), dtype=np.uint8).reshape(3, 32, 32)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


@dataclass(frozen=True)
class _Lmdb:
    environment: Any
    key: bytes

    def __call__(self) -> bytes:
        with self.environment.begin() as transaction:
            return transaction.get(self.key)


def _walk(root: Path) -> list[Picture]:
    files = (Path(place, name) for place, _, names in os.walk(root) for name in names)
    pictures = [_picture(root, f) for f in files if f.suffix.lower() in FILE_SUFFIXES and not f.name.startswith(".")]
    pictures.sort(key=lambda picture: picture.name)
    seen: set[str] = set()
    for index, picture in enumerate(pictures):
        if picture.key in seen:  # a.png beside a.jpg: the suffix tells them apart
            suffix = Path(picture.name).suffix[1:].lower()
            pictures[index] = picture = replace(picture, key=f"{picture.key}-{suffix}")
        seen.add(picture.key)
    return pictures


def _picture(root: Path, file: Path) -> Picture:
    path = file.relative_to(root)
    parts = path.with_suffix("").as_posix().split("/")
    key = "/".join([*parts[:-1], parts[-1].replace(".", "_")])  # webdataset's keys end at the first dot
    size = file.stat().st_size
    return Picture(key, path.as_posix(), file.read_bytes, size, unit=key, part=_PARTS.get(parts[0].lower()))


def _read_metadata(root: Path, given: Path | None) -> tuple[Path, list[dict[str, Any]]] | None:
    """The caption file: the given one, or metadata.jsonl in the folder or beside it."""
    path = given or next((p for p in (root / "metadata.jsonl", root.parent / "metadata.jsonl") if p.is_file()), None)
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"--metadata {path} is not a file; give a JSON-lines file with file_name or key, and text")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}; give one object a line") from None
        if not isinstance(row, dict) or not row.keys() & {"file_name", "key"}:
            raise ValueError(f"{path}, line {number} has neither file_name nor key; name the picture it describes")
        rows.append(row)
    return path.absolute(), rows


def _refuse_missing(missing: list[str], metadata: Path, root: Path) -> None:
    if missing:
        raise ValueError(
            f"{metadata.name} names {len(missing)} pictures that are not in {root}, first {missing[0]!r}; "
            "restore them or remove those lines"
        )


def _with_row(picture: Picture, row: Mapping[str, Any]) -> Picture:
    about = {name: value for name, value in row.items() if name not in ("key", "file_name", "text")}
    text = str(row.get("text", row.get("class", "")) or "")
    return replace(picture, text=text, about={**picture.about, **about})


def _with_class(picture: Picture, name: str) -> Picture:
    return replace(picture, text=name.replace("_", " ").replace("-", " "), about={**picture.about, "class": name})


def select(pictures: Iterable[Picture], wanted: Mapping[str, tuple[str, ...]]) -> list[Picture]:
    """The pictures whose fields (text, part, or any of `about`) have one of the wanted values."""

    def value(picture: Picture, name: str) -> str:
        own = {"text": picture.text, "part": picture.part, "object": picture.unit}
        return str(own[name] if name in own else picture.about.get(name))

    return [p for p in pictures if all(value(p, name) in values for name, values in wanted.items())]
