"""The ways in which raw videos lie on disks. A video becomes clips: windows of its frames."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distributed_inr.data.layouts.item import PARTS, Item, Part, Unusable, item_of, size_of, walk
from distributed_inr.data.layouts.metadata import described
from distributed_inr.data.layouts.source import Source
from distributed_inr.raw import clips, footage, pictures
from distributed_inr.raw.clips import Form
from distributed_inr.raw.footage import FILE_SUFFIXES, Footage


def folder(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """Any tree of video files (MP4, WebM, MKV, MOV, GIF, WebP); captions from metadata.jsonl, or the first folder's
    name as class and caption. Where each file is one clip, they are one recording in the order of their names.
    """
    return _windows(described(walk(root, FILE_SUFFIXES), root, metadata), root, form)


def frames(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """Folders of picture files: each that holds pictures is a video, its frames in the natural order of their names."""
    return _windows(described(_frame_folders(root), root, metadata), root, form)


def skytimelapse(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """SkyTimelapse: sky_train/ and sky_test/ (or train/ and test/), in each <video>/<segment>/<frame>.jpg."""
    found, parts = [], dict[str, Part]()
    for item in _frame_folders(root):
        place = item.name.split("/")
        part = PARTS.get(place[0].removeprefix("sky_"))
        if part is None or len(place) < 2:
            raise ValueError(
                f"{root}: {item.name} is not below sky_train/ or sky_test/; give the folder that holds those two"
            )
        if parts.setdefault(place[1], part) != part:
            raise ValueError(f"{root}: video {place[1]} is both in train and in test; remove it from one of them")
        found.append(replace(item, unit=place[1], part=part))
    return _windows(found, root, form)


def _frame_folders(root: Path) -> list[Item]:
    found = []
    for place, _, names in os.walk(root):
        path = Path(place)
        files = [
            path / name
            for name in names
            if Path(name).suffix.lower() in pictures.FILE_SUFFIXES and not name.startswith(".")
        ]
        if files and path != root:
            name = path.relative_to(root).as_posix()
            key = name.replace(".", "_")  # webdataset's keys end at the first dot
            size = sum(size_of(file) for file in files)
            part = item_of(root, files[0]).part
            found.append(Item(key, name, _nothing_yet, size, unit=key, part=part))
    return sorted(found, key=lambda item: footage.natural(item.name))


def _windows(videos: list[Item], root: Path, form: Form) -> list[Item]:
    """The clips of each video; one that has none stays an item, which says why when it is read."""
    found: list[Item] = []
    for video in tqdm(videos, desc="look through", unit="video", delay=3, disable=None, leave=False):
        try:
            source = footage.scan(root / video.name, max_pixels=form.max_pixels, max_frames=form.max_frames)
        except ValueError as error:
            found.append(replace(video, load=Unusable(str(error))))
            continue
        about = dict(video.about) | ({} if source.rate is None else {"fps": round(source.rate, 3)})
        starts = range(0, max(1, len(source) - form.span + 1), form.stride or form.span)
        for start in starts:
            item = replace(video, load=_Window(source, start, form), about=about)
            if len(starts) > 1:
                item = replace(item, key=f"{video.key}/{start:06d}", name=f"{video.name}#{start}")
            found.append(item)
    return found


@dataclass(frozen=True)
class _Window:
    source: Footage
    start: int
    form: Form

    def __call__(self) -> np.ndarray:
        return clips.cut(self.source, self.start, self.form)


def _nothing_yet() -> Any:
    raise AssertionError("a video is read by its windows")


def _convert(clip: np.ndarray, form: Form) -> dict[str, bytes]:
    suffix, content = clips.encode(clip, form)
    return {suffix: content}


def _overlap(form: Form) -> int:
    """How many clips after one begin before it ends."""
    return (form.span - 1) // (form.stride or form.span)


LAYOUTS: dict[str, Callable[[Path, Path | None, Form], list[Item]]] = {
    "folder": folder,
    "frames": frames,
    "skytimelapse": skytimelapse,
}

VIDEOS = Source(
    domain="video",
    layouts=LAYOUTS,
    splits={"folder": "time", "frames": "time"},
    overlap=_overlap,
    form=Form,
    convert=_convert,
    noun="clip",
    files=(*FILE_SUFFIXES, "folders of pictures"),
)
