"""The ways in which raw pictures lie on disks."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distributed_inr.data.layouts.item import Item, Part, item_of, walk, with_class
from distributed_inr.data.layouts.metadata import described, described_objects
from distributed_inr.data.layouts.source import Source
from distributed_inr.raw import pictures
from distributed_inr.raw.pictures import FILE_SUFFIXES, Form


def folder(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """Any tree of picture files; captions from metadata.jsonl, or the first folder's name as class and caption."""
    return described(walk(root, FILE_SUFFIXES), root, metadata)


def views(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """A folder per object with transforms.json and its frames; captions by object from metadata.jsonl."""
    found: list[Item] = []
    for path in sorted(root.glob("*/transforms.json")):
        name = path.parent.name
        try:
            frames = [frame["file_path"] for frame in json.loads(path.read_text())["frames"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error!r}); it must list frames with a file_path each") from None
        for frame in frames:
            file = path.parent / frame
            if not file.resolve().is_relative_to(path.parent.resolve()) or not file.is_file():
                raise ValueError(f"{path} names {frame!r}, which is not there; restore it or remove the frame")
            found.append(replace(item_of(root, file), unit=name))
    return described_objects(found, root, metadata)


def afhqv2(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """AFHQv2 as distributed: train/ and test/ (or val/), in each a folder per kind of animal."""
    found = [p for p in walk(root, FILE_SUFFIXES) if p.part is not None and p.key.count("/") >= 2]
    return [with_class(p, p.key.split("/")[1]) for p in found]


def celebahq(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """CelebA-HQ as picture files, in one folder or in train/ and val/ folders; no captions."""
    return walk(root, FILE_SUFFIXES)


def cifar10(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """CIFAR-10, binary version: data_batch_1.bin to 5, test_batch.bin, batches.meta.txt."""
    files = sorted(root.glob("data_batch_*.bin")) + sorted(root.glob("test_batch.bin"))
    if not files:
        pickled = " (its Python version is a pickle, which could run code)" if (root / "data_batch_1").exists() else ""
        raise ValueError(f"{root}: no data_batch_*.bin there; download CIFAR-10's binary version{pickled}")
    names = (root / "batches.meta.txt").read_text().split() if (root / "batches.meta.txt").exists() else []
    found: list[Item] = []
    for file in files:
        part: Part = "val" if file.stem == "test_batch" else "train"
        if file.stat().st_size % 3073:
            raise ValueError(f"{file} is not a whole number of 3073-byte records; download it again")
        labels = np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, 3073)[:, 0].tolist()
        for number, label in enumerate(labels):
            key = f"{part}/{file.stem}-{number:05d}"
            picture = Item(key, f"{file.name}#{number}", _Cifar(file, number), 3073, unit=key, part=part)
            found.append(with_class(picture, names[label] if label < len(names) else str(label)))
    return found


def lsun(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """LSUN: exported picture files, or the lmdb folder as distributed (needs the lmdb package)."""
    if not (root / "data.mdb").exists():
        return walk(root, FILE_SUFFIXES)
    try:
        import lmdb  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(f"{root} is an lmdb; pip install lmdb, or export its pictures to files first") from None
    environment = lmdb.open(str(root), readonly=True, lock=False, readahead=False)
    with environment.begin() as transaction:
        keys = [(bytes(key).decode(), len(value)) for key, value in transaction.cursor()]
    return [Item(key, key, _Lmdb(environment, key.encode()), size, unit=key) for key, size in keys]


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


def _convert(content: bytes | Image.Image, form: Form) -> dict[str, bytes]:
    suffix, encoded = pictures.encode(content, form)
    return {suffix: encoded}


IMAGES = Source(
    domain="image",
    layouts={
        "folder": folder,
        "views": views,
        "afhqv2": afhqv2,
        "celebahq": celebahq,
        "cifar10": cifar10,
        "lsun": lsun,
    },
    splits={"views": "object"},
    form=Form,
    convert=_convert,
    noun="picture",
    files=FILE_SUFFIXES,
)
