"""The run folder: where it may lie, which job holds it, what fits into it, and what its stages were made from."""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_inr.config import differences, override
from distributed_inr.data import storage
from distributed_inr.experiment import DEFAULT_OUTPUT, Experiment

logger = logging.getLogger(__name__)

SHARED_OUTPUT = "~/distributed_inr/runs"
"""Where runs go inside a Ray job, or on several nodes, when nobody says where."""


class InUse(ValueError):
    """Another job holds the run folder."""


@dataclass(frozen=True)
class Stage:
    """One stage's folder, and the options that what it holds depends on."""

    folder: Path
    options: Mapping[str, Any]
    accept_changed: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def _record(self) -> Mapping[str, Any] | None:
        """What `stage.json` says; none when the stage was never begun."""
        path = self.folder / "stage.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}; delete {self.folder} to make it again") from None

    @property
    def was_finished(self) -> bool:
        """Whether what it holds is whole, whatever it was made from."""
        return self._record is not None and self._record["complete"]

    @property
    def made_with(self) -> Mapping[str, Any]:
        """The options that what it holds was made with."""
        record = self._record
        return {} if record is None else record["options"]

    @property
    def made_from(self) -> Mapping[str, str]:
        """The inputs that what it holds was made from."""
        record = self._record
        return {} if record is None else record["inputs"]

    def refuse_other_options(self) -> None:
        record = self._record
        changed = differences(record["options"], self.options) if record else {}
        if self.was_finished:
            changed.pop("checkpoints", None)  # which it needs no more
        if changed:
            shown = "; ".join(f"{path} is {old} there and {new} here" for path, (old, new) in changed.items())
            remedy = f"choose another --name or --output, or delete {self.folder} to make it again"
            if self.folder.is_symlink():
                remedy = "or give another --autoencoder-from"
            raise ValueError(f"{self.folder} was made with other options: {shown}. Set them back, {remedy}")

    def is_complete(self, inputs: Mapping[str, str]) -> bool:
        """Whether it can be skipped. Raises ValueError if it was made from other inputs, unless these are accepted."""
        record = self._record
        if record is None:
            return False
        changed = sorted(differences(record["inputs"], inputs))
        accepted = self.accept_changed and changed == ["train"]
        if changed and not accepted:
            raise ValueError(
                f"{self.folder} was made from other inputs ({', '.join(changed)}). Restore them, choose another --name "
                f"or --output, delete {self.folder} to make it again, or accept other data: --data.accept-changed true"
            )
        if changed:
            logger.warning("%s was made from other data, which are accepted", self.folder)
        return record["complete"]

    def is_current(self, inputs: Mapping[str, str]) -> bool:
        """Whether it can be skipped, where what changed is simply made again."""
        return self._record == self._as_record(inputs, complete=True)

    def begin(self, inputs: Mapping[str, str]) -> None:
        self.folder.mkdir(exist_ok=True)
        write_text(self.folder / "stage.json", json.dumps(self._as_record(inputs, complete=False), indent=1) + "\n")

    def finish(self, inputs: Mapping[str, str]) -> None:
        """Written last: what the folder holds is whole."""
        write_text(self.folder / "stage.json", json.dumps(self._as_record(inputs, complete=True), indent=1) + "\n")

    def clear(self) -> None:
        """Delete the shards of an earlier attempt."""
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in ("stage.json", "log.txt"):
                path.unlink()

    def check_shared(self) -> None:
        """On a worker: is this the folder that the driver sees?"""
        if self._record is None:
            raise ValueError(
                f"{self.folder} on node {socket.gethostname()} is not the driver's folder; set --output to a folder "
                "that all nodes share"
            )

    def _as_record(self, inputs: Mapping[str, str], *, complete: bool) -> dict[str, Any]:
        return {"complete": complete, "options": self.options, "inputs": inputs}


def settle_output(experiment: Experiment, *, shared: bool) -> Experiment:
    """The experiment with its output where it can stay: absolute if nodes share it, or Ray runs a copy of the code."""
    output = experiment.output
    storage.check_url(output)
    if not storage.is_local(output):
        raise ValueError(f"output={output!r} is an object store, which cannot hold a running run; use a shared folder")
    if not shared or Path(output).expanduser().is_absolute():
        return experiment
    if output != DEFAULT_OUTPUT:
        raise ValueError(
            f"output={output!r} is relative: inside a Ray job, and on several nodes, it must be an absolute folder "
            f"that all nodes share; leave it out for {SHARED_OUTPUT}"
        )
    logger.info("output: %s", Path(SHARED_OUTPUT).expanduser())
    return override(experiment, {"output": str(Path(SHARED_OUTPUT).expanduser())})


def link_autoencoder(experiment: Experiment, *, shared: bool) -> None:
    """Make the stages that `autoencoder_from` names those of this run. Raises ValueError where they are not whole."""
    assert experiment.autoencoder_from is not None
    if shared and not Path(experiment.autoencoder_from).expanduser().is_absolute():
        raise ValueError(
            f"autoencoder_from={experiment.autoencoder_from!r} is relative: inside a Ray job, and on several nodes, it "
            "must be an absolute folder that all nodes share"
        )
    source = Path(experiment.autoencoder_from).expanduser().resolve()
    for name in ("autoencoder", "latents"):
        link = experiment.folder / name
        if not Stage(source / name, {}).was_finished:
            raise ValueError(
                f"autoencoder_from={experiment.autoencoder_from!r}: {source / name} is not finished; give the folder "
                "of a run whose latents are written, or leave it out"
            )
        if link.is_symlink() and link.resolve() == (source / name).resolve():
            continue
        if link.exists() or link.is_symlink():
            raise ValueError(
                f"autoencoder_from={experiment.autoencoder_from!r}, but {link} is there already; delete it, choose "
                "another --name, or leave --autoencoder-from out"
            )
        link.symlink_to(os.path.relpath(source / name, experiment.folder.resolve()))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder, made if need be, against other jobs. The system lets go of it when this process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115  held open as long as the lock
    except OSError as error:
        raise storage.explain(error, str(folder)) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InUse(
                f"{folder} is in use by {file.read().strip() or 'another job'}; wait for it, or choose another --name "
                "or --output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            logger.warning("%s: this file system has no locks; do not run two jobs of this name at once", folder)
        file.truncate(0)
        since = datetime.datetime.now().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        yield


def settle_checkpoints(experiment: Experiment, *, shared: bool) -> Experiment:
    """The experiment with an absolute place for its checkpoints, if they have one of their own.

    Raises ValueError where it cannot be written, or other nodes would not find it.
    """
    place = experiment.checkpoints
    if place is None:
        return experiment
    storage.check_url(place)
    if not place or place.startswith("memory:"):
        raise ValueError(f"checkpoints={place!r} keeps nothing; give a folder or an object store, or leave it out")
    if shared and storage.is_local(place) and not Path(place).expanduser().is_absolute():
        raise ValueError(
            f"checkpoints={place!r} is relative: inside a Ray job, and on several nodes, it must be an object store or "
            "an absolute folder that all nodes share"
        )
    absolute = str(Path(place).expanduser().absolute()) if storage.is_local(place) else place
    probe = storage.join(experiment.checkpoints_of(".probe"), socket.gethostname())
    try:
        if storage.is_local(probe):
            Path(probe).parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(probe, b"")
        storage.remove_folder(storage.split(probe)[0])
    except OSError as error:
        raise storage.explain(error, place) from None
    return override(experiment, {"checkpoints": absolute})


def write_text(path: Path, text: str) -> None:
    try:
        storage.write_atomic(str(path), text.encode())
    except OSError as error:
        raise storage.explain(error, str(path.parent)) from None


def check_space(folder: Path, needed: Mapping[Path, int]) -> None:
    """Refuse a run whose checkpoints and latents will not fit the disk."""
    total = 0
    for place, size in needed.items():
        held = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        total += max(0, size - held)
    free = shutil.disk_usage(folder).free
    if total > free:
        parts = ", ".join(f"{place.name} {size / 1e9:.3g}" for place, size in needed.items())
        raise ValueError(
            f"no space in {folder}: {total / 1e9:.3g} GB are needed ({parts}) and {free / 1e9:.3g} GB are free; free "
            "some, choose another --output, or lower keep_checkpoints"
        )
