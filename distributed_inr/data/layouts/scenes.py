"""The ways in which raw scenes lie on disks: a folder for each object, with its views and their cameras."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distributed_inr.data.layouts.item import PARTS, Item, size_of
from distributed_inr.data.layouts.metadata import described_objects
from distributed_inr.data.layouts.source import Source
from distributed_inr.raw import posed_views, view_folders
from distributed_inr.raw.posed_views import Form
from distributed_inr.raw.view_folders import PosedViews


def transforms(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """A folder per object with transforms.json, as of nerfstudio or instant-ngp, the pictures that it names, and
    perhaps a coloured PLY as its ply_file_path; captions by object from metadata.jsonl.
    """
    found = [_item(path.parent, root, view_folders.read_transforms, form) for path in root.rglob("transforms.json")]
    return described_objects(sorted(found, key=lambda item: item.name), root, metadata)


def srn(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """SRN: a folder per object with rgb/, pose/ and intrinsics.txt; below cars_train/, cars_val/ and cars_test/ (or any
    folder that ends so) they belong to that part.
    """
    found = [_item(path.parent, root, view_folders.read_srn, form) for path in root.rglob("intrinsics.txt")]
    return described_objects(sorted(found, key=lambda item: item.name), root, metadata)


def _item(folder: Path, root: Path, read: Callable[[Path, int], PosedViews], form: Form) -> Item:
    name = folder.name if folder == root else folder.relative_to(root).as_posix()
    files = (Path(place, file) for place, _, files in os.walk(folder) for file in files)
    size = sum(size_of(file) for file in files)
    key = name.replace(".", "_")  # webdataset's keys end at the first dot
    part = PARTS.get(name.split("/")[0].lower().split("_")[-1]) if "/" in name else None
    return Item(key, name, partial(read, folder, form.max_views), size, unit=key, part=part)


def _convert(posed: PosedViews, form: Form) -> dict[str, bytes]:
    return posed_views.encode(posed, form)


def _statistics(items: Sequence[Item], form: Form) -> dict[str, Any]:
    """The cameras, where all training objects share them: what samples of the set are looked at from."""
    shared = None
    for item in items:
        try:
            cameras = posed_views.cameras_of(item.load(), form).tolist()
        except ValueError:  # left out, for the reason that the conversion gives
            continue
        if shared is not None and cameras != shared:
            return {}
        shared = cameras
    return {} if shared is None else {"cameras": shared}


SCENES = Source(
    domain="scene",
    layouts={"transforms": transforms, "srn": srn},
    splits={"srn": "object"},
    form=Form,
    convert=_convert,
    statistics=_statistics,
    noun="scene",
    files=("folders with transforms.json", "or with intrinsics.txt"),
)
