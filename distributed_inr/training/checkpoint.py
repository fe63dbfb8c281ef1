"""Checkpoints: a directory of safetensors and JSON that any number of workers under any ZeRO stage can resume from.

    <samples seen, 12 digits>/
      config.json                          the experiment
      state-<rank>-of-<world>.safetensors  what the rank owned of each flattened parameter: "weight/<parameter>",
                                           "exp_avg/..." and "exp_avg_sq/..." (AdamW's), "ema/..." (running average);
                                           the first rank's also the buffers, whole: "buffer/<name>". In the header,
                                           "fragments": {parameter: [offset, length, shape]}
      bank.safetensors                     rows, running means and step counts of a bank of latents, where there is one
      state.json                           samples and steps done, and what else the loop goes on with
      manifest.json                        size and sha256 of every file above; written last, it is the commit

Each rank copies what it owns on a thread while the next step is computed, and writes the copy while training goes on
(`Writer`); the first rank commits once all have written. Folders and object stores alike; nothing in it is executable.
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distributed_inr.data import storage
from distributed_inr.training.background import Background
from distributed_inr.training.bank import Bank
from distributed_inr.training.checkpoint_reader import BANK, FORMAT, Reader, read_json, read_state
from distributed_inr.training.engine import Engine
from distributed_inr.training.fragments import Fragment, gather_objects, is_first, rank_and_world

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
"""Times that a rank tries to write its files of one checkpoint: a full disk, or an object store, may recover."""

_MAX_FAILED = 3
"""Checkpoints in a row that may fail to be written before the run stops."""


@dataclass(frozen=True)
class Tensors:
    """The contents of a safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


Files = dict[str, str | Tensors]
"""A rank's files of a checkpoint, by name, in this process's memory."""


def collect(
    engine: Engine,
    *,
    averages: Sequence[Fragment] = (),
    bank: Bank | None = None,
    config_json: str = "{}",
    state: Mapping[str, Any],
) -> Files:
    """This rank's files; their tensors are training's own. No rank waits for another.

    Args:
        state: what state.json holds besides the number of steps.
    """
    rank, world = rank_and_world()
    fragments = engine.state()
    owned = [f for f in fragments if f.weight.numel()]
    tensors = {f"weight/{f.name}": f.weight for f in owned}
    tensors |= {f"{key}/{f.name}": moment for f in owned for key, moment in f.moments.items()}
    tensors |= {f"ema/{f.name}": f.weight for f in averages if f.weight.numel()}
    if is_first():
        parameters = {f.name for f in fragments}
        module = engine.unwrap().state_dict()
        tensors |= {f"buffer/{name}": tensor for name, tensor in module.items() if name not in parameters}
    index = {f.name: [f.offset, f.weight.numel(), f.shape] for f in owned}
    metadata = {"format": str(FORMAT), "fragments": json.dumps(index)}
    files: Files = {f"state-{rank:05d}-of-{world:05d}.safetensors": Tensors(tensors, metadata)}
    if is_first():
        files["config.json"] = config_json
        files["state.json"] = json.dumps({"format": FORMAT, "steps": engine.steps, **state}, indent=1)
        if bank is not None:
            files[BANK] = Tensors(bank.tensors, {"format": str(FORMAT)})
    return files


def write(path: str, files: Files) -> dict[str, dict[str, Any]]:
    """Write files into a checkpoint's directory, down to the disk; returns the size and sha256 of each."""
    described = {}
    with contextlib.ExitStack() as stack:
        folder = Path(path)
        if storage.is_local(path):
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, contents in files.items():
            if isinstance(contents, str):
                (folder / name).write_text(contents)
            else:
                save_file(contents.tensors, folder / name, contents.metadata)
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
            described[name] = {"bytes": (folder / name).stat().st_size, "sha256": storage.sha256_of(folder / name)}
            if not storage.is_local(path):
                storage.publish(folder / name, storage.join(path, name))
    return described


def commit(path: str, written: Sequence[dict[str, dict[str, Any]]]) -> None:
    """Make the checkpoint valid, once every rank has written its files."""
    files = {name: entry for part in written for name, entry in sorted(part.items())}
    storage.write_atomic(storage.join(path, "manifest.json"), _encode_manifest(files))


def purge(path: str, *, keep: int) -> None:
    """Delete what is older than a committed checkpoint, but the newest `keep` and the best; warn where that fails."""
    folder, last = storage.split(path)
    try:
        good = [name for name in committed(folder) if name <= last]
        kept = {*good[-keep:], *_best(folder, good)}
        for name in _names(folder):
            if name <= last and name not in kept:
                _remove(storage.join(folder, name))
    except (OSError, ValueError) as error:
        logger.warning("old checkpoints in %s cannot be deleted: %s; training goes on", folder, error)


class Writer:
    """Writes one checkpoint at a time while training goes on. Every rank calls the same methods at the same step.

    Args:
        folder: where the checkpoints lie: a path, or an object store's address.
        keep: how many of the newest to keep, besides the best.
        copies: where to copy the tensors of these names; the others go to new memory.
    """

    def __init__(self, folder: str, *, keep: int, copies: Mapping[str, Tensor] | None = None) -> None:
        self.folder, self.keep = folder, keep
        self._thread = Background("checkpoint")
        self._writing: Future[dict[str, dict[str, Any]] | str] | None = None
        self._copying: Future[None] | None = None
        self._reported: Future[None] | None = None
        self._path, self._num_failed = "", 0
        self._copies = dict(copies or {})  # used again: new memory would take longer than the copying
        self._leftovers = set(gather_objects(_names(folder) if is_first() else [])[0])

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint was begun and is not committed yet."""
        return self._writing is not None

    @property
    def has_written(self) -> bool:
        """Whether this rank's files of it are written: `commit` will not wait for this rank."""
        return self._writing is not None and self._writing.done()

    def begin(
        self,
        engine: Engine,
        *,
        averages: Sequence[Fragment],
        bank: Bank | None = None,
        config_json: str,
        state: Mapping[str, Any],
    ) -> None:
        """Start to copy this rank's state, and then to write it as the checkpoint of state["samples"].

        The state must not change before `wait_for_copy`.
        """
        assert self._writing is None, "commit the one before first"
        name = f"{state['samples']:012d}"
        self._path = storage.join(self.folder, name)
        if name in self._leftovers:  # of an attempt that got no further, or damaged
            if is_first():
                self._thread.submit(_remove, self._path).result()
            if dist.is_initialized():
                dist.barrier()
        files = collect(engine, averages=averages, bank=bank, config_json=config_json, state=state)
        self._copying = self._thread.submit(self._copy, files)
        self._writing = self._thread.submit(_write_patiently, self._path, files)

    def wait_for_copy(self) -> None:
        """Wait until training may change its state again."""
        if self._copying is not None:
            self._copying.result()
            self._copying = None

    def commit(self, *, needed: bool = False) -> str | None:
        """Wait until every rank has written and make the checkpoint valid; returns its path.

        Where it could not be written, warns and returns None, and earlier ones stay. Raises ValueError instead where
        the checkpoint is `needed`, or when that happens for the third time in a row.
        """
        assert self._writing is not None
        self.wait_for_copy()
        found = gather_objects(self._writing.result())
        self._writing = None
        problem = next((result for result in found if isinstance(result, str)), None)
        if problem is None:
            (problem,) = gather_objects(self._commit(found) if is_first() else None)[:1]
        self._num_failed = 0 if problem is None else self._num_failed + 1
        if problem is None:
            return self._path
        if is_first():
            self._thread.submit(_remove, self._path).result()  # the next one may need the space
        message = f"checkpoint {self._path} cannot be written: {problem}; mend that, or choose another place"
        if needed or self._num_failed == _MAX_FAILED:
            raise ValueError(f"{message}. Earlier checkpoints are intact, and the same command goes on from them")
        if is_first():
            logger.warning("%s. Earlier ones are intact; training goes on, and the next one is tried in time", message)
        return None

    def report(self, report: Callable[[dict[str, Any]], None], about: dict[str, Any]) -> None:
        """Call `report` on the thread: Ray's waits for the driver."""
        self._reported = self._thread.submit(report, about)

    def close(self) -> None:
        """Wait for the thread; raises what the last report has raised."""
        self._thread.submit(lambda: None).result()
        self._thread.stop()
        if self._reported is not None:
            self._reported.result()

    def _copy(self, files: Files) -> None:
        """Replace training's own tensors by copies on the CPU."""
        for contents in files.values():
            if isinstance(contents, str):
                continue
            for name, tensor in contents.tensors.items():
                if name not in self._copies:
                    self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                contents.tensors[name] = self._copies[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _commit(self, written: Sequence[Any]) -> str | None:
        """Why it cannot be committed, or none."""
        try:
            there = storage.list_files(self._path)
            lacking = [name for files in written for name, entry in files.items() if there.get(name) != entry["bytes"]]
            if lacking:
                return f"{', '.join(lacking)} cannot be seen on the first node: all must share the place"
            commit(self._path, written)
        except (OSError, ValueError) as error:
            return str(error)
        self._thread.submit(functools.partial(purge, self._path, keep=self.keep))
        return None


def committed(folder: str) -> list[str]:
    """Names of a folder's committed checkpoints, the oldest first, also of those that were damaged since."""
    return [n for n in _names(folder) if "manifest.json" in storage.list_files(storage.join(folder, n))]


def newest(folder: str) -> str | None:
    """The newest valid checkpoint of a folder, the same on every rank; none where none was ever committed.

    Invalid ones are skipped with a warning; the ranks share the work of checking. Raises ValueError if there are
    committed ones and all of them are damaged: starting again from nothing would overwrite them.
    """
    rank, world = rank_and_world()
    names = gather_objects(_names(folder) if is_first() else [])[0]
    damaged = False
    for name in reversed(names):
        path = storage.join(folder, name)
        problems = [found for found in gather_objects(_problem(path, rank, world)) if found is not None]
        for problem in problems:
            if isinstance(problem, storage.Unreachable):
                raise problem
        if not problems:
            return path
        if is_first():
            logger.warning("checkpoint %s is ignored: %s", path, problems[0])
        damaged = damaged or problems[0] != _UNCOMMITTED
    if damaged:
        raise ValueError(f"every checkpoint in {folder} is damaged; restore one, or delete the folder to start again")
    return None


def read_config(folder: str) -> str | None:
    """The config.json of the newest checkpoint in a folder; none where there is none."""
    for name in reversed(_names(folder)):
        content = storage.read_bytes(storage.join(folder, f"{name}/config.json"))
        if content is not None:
            return content.decode(errors="replace")
    return None


def load(path: str, engine: Engine, *, averages: Sequence[Fragment], bank: Bank | None = None) -> dict[str, Any]:
    """Set weights, optimizer state, running averages and bank from a valid checkpoint; returns its state.json."""
    state = read_state(path)
    with Reader.open(path) as reader:
        reader.check({f.name: f.shape for f in engine.state()}, averages=bool(averages))
        engine.load(reader.read, steps=state["steps"])
        for f in averages:
            f.weight.copy_(reader.read("ema", f.name, f.offset, f.offset + f.weight.numel()))
        if bank is not None:
            bank.load(reader)
    return state


def weights(path: str, *, average: bool) -> dict[str, Tensor]:
    """A module's whole state: weights, or their average, and buffers. Raises ValueError for a checkpoint not valid."""
    if (problem := _problem(path)) is not None:
        raise ValueError(f"checkpoint {path} cannot be used: {problem}; take another one, or train again")
    kind = "ema" if average else "weight"
    with Reader.open(path) as reader:
        whole = {name: reader.read(kind, name, 0, math.prod(s)).view(s) for name, s in reader.shapes.items()}
        return whole | {name: reader.read("buffer", name, 0, -1) for name in reader.buffers}


_UNCOMMITTED = "it has no manifest (its writing was cut short)"


def _problem(path: str, rank: int = 0, world: int = 1) -> str | storage.Unreachable | None:
    """Why a checkpoint is not valid, or none, as far as this rank's share of its files tells."""
    try:
        content = storage.read_bytes(storage.join(path, "manifest.json"))
        if content is None:
            return _UNCOMMITTED
        manifest = json.loads(content)
        if manifest["format"] != FORMAT and manifest["format"] == read_json(path, "state.json")["format"]:
            return None  # another version's, as both of its files say: not ours to judge, and `read_state` refuses it
        files = manifest["files"]
        if content != _encode_manifest(files):
            return "its manifest is not what was written"
        for name, entry in list(files.items())[rank::world]:
            if Path(name).name != name:
                return f"its manifest names a file outside it: {name!r}"
            if (found := storage.size_and_sha256(storage.join(path, name))) is None:
                return f"{name} is missing"
            if found[0] != entry["bytes"]:
                return f"{name} has {found[0]} bytes, its manifest says {entry['bytes']}"
            if found[1] != entry["sha256"]:
                return f"{name} differs from the sha256 in its manifest"
        if "state.json" not in files:
            return "its manifest lacks state.json"
        if rank == 0 and storage.is_local(path):
            with Reader.open(path):
                pass
        return None
    except storage.Unreachable as error:
        return error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it cannot be read: {error}"


def _write_patiently(path: str, files: Files) -> dict[str, dict[str, Any]] | str:
    """`write`, or after several attempts what went wrong."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(0.25 * 2**attempt)
        try:
            return write(path, files)
        except (OSError, ValueError, SafetensorError) as error:
            problem = str(error)
    return problem


def _names(folder: str) -> list[str]:
    """Names of a folder's checkpoints, the oldest first; nothing else that lies there is ours."""
    return sorted(name for name in storage.list_folders(folder) if re.fullmatch(r"[0-9]{12}", name))


def _encode_manifest(files: Mapping[str, dict[str, Any]]) -> bytes:
    """The only way to write these entries, so that damage to a manifest shows in its bytes."""
    return json.dumps({"format": FORMAT, "files": files}, indent=1).encode()


def _remove(path: str) -> None:
    """Delete a checkpoint, its manifest first, so that half of one is never valid; warn where that fails."""
    try:
        storage.remove_file(storage.join(path, "manifest.json"))
        storage.remove_folder(path)
    except (OSError, ValueError) as error:
        logger.warning("checkpoint %s cannot be deleted: %s; training goes on", path, error)


def _best(folder: str, names: Sequence[str]) -> list[str]:
    """The checkpoint with the least validation loss, the earliest of equals; none where none was measured."""
    scores = []
    for name in names:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            score = read_json(storage.join(folder, name), "state.json")["score"]
            if isinstance(score, float) and math.isfinite(score):
                scores.append((score, name))
    return [min(scores)[1]] if scores else []
