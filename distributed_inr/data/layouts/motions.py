"""The ways in which recordings of motion lie on disks; each is cut into clips."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distributed_inr.data.layouts.item import Item, Unusable, walk
from distributed_inr.data.layouts.metadata import described
from distributed_inr.data.layouts.source import Source
from distributed_inr.raw import motions
from distributed_inr.raw.arrays import write_npy
from distributed_inr.raw.motions import FILE_SUFFIXES, Form, Recording

_HELD_FILES = 4
_SAMPLED_FRAMES = 2000
"""Of all training clips together, that bones and the order of channels are inferred from."""
_SMALLEST_DEVIATION = 1e-3
"""Of a channel over the largest channel's: what hardly moves is not blown up into noise as large as the motion."""


def folder(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """Any tree of .npy, .npz or .bvh files, each a recording; captions from metadata.jsonl, or the first folder's name
    as class and caption.
    """
    return _clips(described(walk(root, FILE_SUFFIXES), root, metadata), root, form)


def amass(root: Path, metadata: Path | None, form: Form) -> list[Item]:
    """AMASS as distributed: folders of *_poses.npz or *_stageii.npz; its files' rates differ, so that --fps is needed
    to keep all.
    """
    found = [item for item in walk(root, (".npz",)) if item.name.endswith(("_poses.npz", "_stageii.npz"))]
    return _clips(described(found, root, metadata), root, form)


def _clips(files: list[Item], root: Path, form: Form) -> list[Item]:
    """An item for each window of each file. A file that cannot be used is one item, which says why when it is loaded.

    The first usable file says what all must be like.
    """
    recordings, found = _Recordings(form), []
    first: tuple[Item, Recording] | None = None
    facing: tuple[float, ...] | None = None
    for item in files:
        path = root / item.name
        try:
            recording = recordings.read(path)
            if len(recording) < form.frames:
                raise ValueError(f"{len(recording)} frames, shorter than --frames {form.frames}")
            if first is None:
                first, facing = (item, recording), motions.facing_of(recording)
            _check_alike(recording, *first)
        except ValueError as error:
            found.append(replace(item, load=Unusable(str(error))))
            continue
        for start in range(0, len(recording) - form.frames + 1, form.stride):
            key, name = f"{item.key}/{start:06d}", f"{item.name}#{start}"
            found.append(replace(item, key=key, name=name, load=_Window(recordings, path, start, facing)))
    return found


def _check_alike(recording: Recording, item: Item, first: Recording) -> None:
    """Raise ValueError where a recording is not of the kind of the first one."""
    if recording.content != first.content or recording.values.shape[1] != first.values.shape[1]:
        raise ValueError(
            f"{recording.values.shape[1]} channels ({recording.content}), but the first file, {item.name}, has "
            f"{first.values.shape[1]} ({first.content})"
        )
    if recording.hierarchy != first.hierarchy or recording.parents != first.parents:
        raise ValueError(f"another skeleton than that of the first file, {item.name}")
    if recording.fps != first.fps:
        raise ValueError(
            f"{recording.fps or 'an unknown number of'} frames a second, but the first file, {item.name}, has "
            f"{first.fps or 'an unknown number'}; --fps brings all to one rate"
        )


class _Recordings:
    """Recordings by path; the last few stay in memory, because their windows are asked for one after another."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self._held: OrderedDict[Path, Recording] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path) -> Recording:
        with self._lock:
            if path not in self._held:
                self._held[path] = motions.read_file(path, self.form)
                if len(self._held) > _HELD_FILES:
                    self._held.popitem(last=False)
            self._held.move_to_end(path)
            return self._held[path]


@dataclass(frozen=True)
class _Window:
    recordings: _Recordings
    path: Path
    start: int
    facing: tuple[float, ...] | None

    def __call__(self) -> Recording:
        clip = self.recordings.read(self.path).window(self.start, self.recordings.form.frames)
        return replace(clip, facing=self.facing)


def _finished(recording: Recording, form: Form) -> np.ndarray:
    return recording.finished(start=form.start, precision=form.precision)


def _convert(recording: Recording, form: Form) -> dict[str, bytes]:
    return {"motion.npy": write_npy(_finished(recording, form))}


def _statistics(training: Sequence[Item], form: Form) -> dict[str, Any]:
    """What the domain must know: mean and deviation of each channel over the training clips, and what they are of."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    some: list[np.ndarray] = []
    first: Recording | None = None
    for item in training:
        try:
            recording = item.load()
            values = _finished(recording, form).astype(np.float64)
        except ValueError:
            continue  # it is left out, and listed, when the records are written
        first = first or recording
        count, total, squares = count + len(values), total + values.sum(0), squares + np.square(values).sum(0)
        some.append(values[:: max(1, len(training) * len(values) // _SAMPLED_FRAMES)].copy())
    if first is None:
        return {}
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    deviation = np.maximum(deviation, _SMALLEST_DEVIATION * (deviation.max() or 1 / _SMALLEST_DEVIATION))
    parents, inferred = first.parents, first.content == "positions" and first.parents is None
    sampled = np.concatenate(some)
    if inferred:
        parents = motions.infer_parents(sampled.reshape(len(sampled), -1, 3))
    known = {
        "frames": form.frames,
        "channels": len(mean),
        "fps": first.fps,
        "content": first.content,
        "mean": [float(f"{value:.7g}") for value in mean],
        "deviation": [float(f"{value:.7g}") for value in deviation],
        "order": list(motions.similar_order(sampled)) if form.order == "similar" else None,
        "parents": None if parents is None else list(parents),
        "parents_inferred": inferred,
        "names": list(first.names),
        "hierarchy": first.hierarchy or None,
        "start": form.start,
        "facing": None if first.facing is None else list(first.facing),
        "up": form.up,
        "metres": form.metres,
    }
    return {"motion": known}


def _overlap(form: Form) -> int:
    return -(-form.frames // form.stride) - 1


MOTIONS = Source(
    domain="motion",
    layouts={"folder": folder, "amass": amass},
    splits={"folder": "object", "amass": "object"},
    form=Form,
    convert=_convert,
    noun="motion",
    files=FILE_SUFFIXES,
    statistics=_statistics,
    overlap=_overlap,
)
