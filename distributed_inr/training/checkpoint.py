"""Checkpoints: a directory of safetensors and JSON that any number of workers under any ZeRO stage can resume from.

    <samples seen, 12 digits>/
      config.json                              the experiment
      model.safetensors, ema.safetensors       whole weights (and buffers), float32
      optimizer-<rank>-of-<world>.safetensors  AdamW's moments: "<moment>/<parameter>" is what the rank owned of a
                                               flattened parameter; "fragments" in the header: {parameter: [offset,
                                               length, size]}
      state.json                               samples and steps done
      manifest.json                            size and sha256 of every file above; written last, it is the commit

`snapshot` is the only part that needs the engine and the other ranks; `write` touches nothing but files, each written
once and whole; `commit` writes the manifest after every rank has written. Nothing executable is stored or loaded.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distributed_inr.training.engine import Engine
from distributed_inr.training.fragments import Fragment, gather, is_first

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Tensors:
    """The contents of a safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


Files = dict[str, str | Tensors]
"""A rank's files of a checkpoint, by name, in this process's memory."""


def snapshot(engine: Engine, *, averages: Sequence[Fragment], config_json: str, state: Mapping[str, Any]) -> Files:
    """This rank's files, gathered on the CPU. Every rank calls it at the same step."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    fragments = engine.state()
    owned = [f for f in fragments if f.moments and f.weight.numel()]
    moments = {f"{key}/{f.name}": moment.cpu() for f in owned for key, moment in f.moments.items()}
    index = {f.name: [f.offset, f.weight.numel(), torch.Size(f.shape).numel()] for f in owned}
    metadata = {"format": str(FORMAT), "fragments": json.dumps(index)}
    files: Files = {f"optimizer-{rank:05d}-of-{world:05d}.safetensors": Tensors(moments, metadata)}

    parameters = {f.name for f in fragments}
    buffers = {k: v.cpu() for k, v in engine.unwrap().state_dict().items() if k not in parameters}
    for name, values in [("model.safetensors", fragments), ("ema.safetensors", averages)]:
        if values:
            whole = gather(values)
            if is_first():
                files[name] = Tensors(whole | buffers, {"format": str(FORMAT)})
    if is_first():
        files["config.json"] = config_json
        files["state.json"] = json.dumps({"format": FORMAT, **state, "steps": engine.steps}, indent=2)
    return files


def write(path: Path, files: Files) -> dict[str, dict[str, Any]]:
    """Write files into a checkpoint's directory; returns the size and sha256 of each."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, contents in files.items():
            if isinstance(contents, str):
                (path / name).write_text(contents)
            else:
                save_file({k: v.contiguous() for k, v in contents.tensors.items()}, path / name, contents.metadata)
        return {name: _describe(path / name) for name in files}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be written: {error}; free some space or choose another output folder "
            "(earlier checkpoints are intact)"
        ) from error


def commit(path: Path, written: dict[str, dict[str, Any]], *, keep: int) -> None:
    """Make the checkpoint valid once every rank has written its files, then delete all but the newest `keep`."""
    everyone = [written]
    if dist.is_initialized():
        everyone = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, written)
    if is_first():
        files = {name: entry for part in everyone for name, entry in sorted(part.items())}
        partial = path / "manifest.json.partial"
        partial.write_text(json.dumps({"format": FORMAT, "files": files}, indent=2))
        partial.replace(path / "manifest.json")
        committed = [p for p in _directories(path.parent) if (p / "manifest.json").exists()]
        for old in _directories(path.parent):
            if old < path and old not in committed[-keep:]:
                (old / "manifest.json").unlink(missing_ok=True)  # first, so that half of a checkpoint is never valid
                shutil.rmtree(old)


def save(
    folder: Path,
    engine: Engine,
    *,
    averages: Sequence[Fragment],
    config_json: str,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write and commit the checkpoint `folder/<samples>`; every rank calls it at the same step."""
    path = folder / f"{state['samples']:012d}"
    if is_first() and path.exists():  # left by an earlier attempt that got no further, or superseded
        (path / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(path)
    if dist.is_initialized():
        dist.barrier()
    commit(path, write(path, snapshot(engine, averages=averages, config_json=config_json, state=state)), keep=keep)
    return path


def newest(folder: Path) -> Path | None:
    """The newest valid checkpoint of a folder, the same on every rank; none where none was ever committed.

    Invalid ones are skipped with a warning. Raises ValueError if there are committed ones and all of them are damaged:
    starting again from nothing would overwrite them.
    """
    found: list[Path | str | None] = [None]
    if is_first():
        damaged = []
        for path in reversed(_directories(folder)):
            problem = _problem(path)
            if problem is None:
                found = [path]
                break
            logger.warning("checkpoint %s is ignored: %s", path, problem)
            damaged += [path] if (path / "manifest.json").exists() else []
        if found[0] is None and damaged:
            found = [f"every checkpoint in {folder} is damaged; restore one, or delete the folder to start again"]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], str):
        raise ValueError(found[0])
    return found[0]


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises ValueError if another version wrote it."""
    state = json.loads((path / "state.json").read_text())
    if state["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {state['format']}, this version reads {FORMAT}; use the version that wrote it"
        )
    return state


def load(path: Path, engine: Engine, *, averages: Sequence[Fragment]) -> dict[str, Any]:
    """Set the weights, optimizer state and running averages from a valid checkpoint; returns its state.json."""
    state = read_state(path)
    with _Reader.open(path) as reader:
        reader.check({f.name: f.shape for f in engine.state()}, averages=bool(averages))
        engine.load(reader.read, steps=state["steps"])
        for f in averages:
            f.weight.copy_(reader.read("ema", f.name, f.offset, f.offset + f.weight.numel()))
    return state


class _Reader:
    """Parts of flattened tensors by name, put together from the files of however many ranks wrote them."""

    def __init__(self, path: Path, files: dict[str, Any]):
        self.path, self.files = path, files
        self.fragments: dict[str, list[tuple[int, int, str]]] = {}
        for name, file in files.items():
            if name.startswith("optimizer-"):
                for parameter, (offset, length, _) in json.loads(file.metadata()["fragments"]).items():
                    self.fragments.setdefault(parameter, []).append((offset, length, name))

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator["_Reader"]:
        with contextlib.ExitStack() as stack:
            opened = {p.name: stack.enter_context(safe_open(p, "pt")) for p in sorted(path.glob("*.safetensors"))}
            yield cls(path, opened)

    def check(self, shapes: dict[str, tuple[int, ...]], *, averages: bool) -> None:
        """Raise ValueError unless it holds parameters of these names and shapes, and their averages where wanted."""
        model = self.files["model.safetensors"]
        stored = {name: tuple(model.get_slice(name).get_shape()) for name in model.keys()}
        wrong = [
            f"{k}: {stored.get(k, 'absent')} there, {shape} here"
            for k, shape in shapes.items()
            if stored.get(k) != shape
        ]
        if wrong:
            raise ValueError(
                f"{self.path} holds another model ({'; '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}); "
                "use the configuration that it was written with, or another output folder"
            )
        if averages and "ema.safetensors" not in self.files:
            raise ValueError(
                f"{self.path} keeps no average of the weights, but training.ema_half_life_samples asks for one; "
                "set it to 0 or use another output folder"
            )

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        if kind in ("weight", "ema"):
            file = self.files["model.safetensors" if kind == "weight" else "ema.safetensors"]
            return file.get_tensor(name).reshape(-1)[start:stop]
        parts, position = [], start
        for offset, length, file_name in sorted(self.fragments.get(name, [])):
            if offset <= position < min(offset + length, stop):
                end = min(offset + length, stop)
                parts.append(self.files[file_name].get_slice(f"{kind}/{name}")[position - offset : end - offset])
                position = end
        if position != stop:
            raise ValueError(f"{self.path} lacks {kind} of {name} from element {position}; use an older checkpoint")
        return torch.cat(parts) if parts else torch.empty(0)


def _directories(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    return sorted(p for p in folder.glob("*") if p.is_dir() and p.name.isdigit()) if folder.exists() else []


def _problem(path: Path) -> str | None:
    """Why a checkpoint is not valid, or none."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                return f"its manifest names a file outside it: {name!r}"
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes, its manifest says {entry['bytes']}"
            if _describe(path / name) != entry:
                return f"{name} differs from the sha256 in its manifest"
        with _Reader.open(path):
            return None
    except FileNotFoundError:
        return "it has no manifest (its writing was cut short)"
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return f"it cannot be read: {error!r}"


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
