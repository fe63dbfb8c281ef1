"""Reading a checkpoint: any part of any tensor, put together from the files of however many ranks wrote them."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distributed_inr.data import storage

FORMAT = 2

BANK = "bank.safetensors"
"""The file of a bank of latents, in a checkpoint and beside the final model."""


class Reader:
    """An open checkpoint.

    Attributes:
        shapes: of the parameters, by name.
        buffers: the open file of each buffer, by name.
        bank: the open file of a bank of latents, where there is one.
    """

    def __init__(self, path: str, by_name: Mapping[str, Any]):
        self.bank, files = by_name.get(BANK), [file for name, file in by_name.items() if name != BANK]
        self.path, self.fragments = path, dict[str, list[tuple[int, int, Any]]]()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.buffers: dict[str, Any] = {}
        self.names = {name for file in files for name in file.keys()}
        for file in files:
            for name, (offset, length, shape) in json.loads(file.metadata()["fragments"]).items():
                self.fragments.setdefault(name, []).append((offset, length, file))
                self.shapes[name] = tuple(shape)
            self.buffers |= {n.removeprefix("buffer/"): file for n in file.keys() if n.startswith("buffer/")}

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: str) -> Iterator["Reader"]:
        """Open a committed checkpoint; one in an object store is downloaded. Raises ValueError if it cannot be read."""
        with contextlib.ExitStack() as stack:
            try:
                files = read_json(path, "manifest.json")["files"]
                names = [Path(name).name for name in files if name.endswith(".safetensors")]
                folder = Path(path)
                if not storage.is_local(path):
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    for name in names:
                        storage.download(storage.join(path, name), folder / name)
                reader = cls(path, {n: stack.enter_context(safe_open(folder / n, "pt")) for n in sorted(names)})
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"checkpoint {path} cannot be read: {error!r}; use an older one") from None
            yield reader

    def check(self, shapes: dict[str, tuple[int, ...]], *, averages: bool) -> None:
        """Raise ValueError unless it holds parameters of these names and shapes, and their averages where wanted."""
        wrong = [
            f"{name}: {self.shapes.get(name, 'absent')} there, {shapes.get(name, 'absent')} here"
            for name in shapes | self.shapes
            if self.shapes.get(name) != shapes.get(name)
        ]
        if wrong:
            raise ValueError(
                f"{self.path} holds another model ({'; '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}); "
                "use the configuration that it was written with, or another output folder"
            )
        if averages and not any(name.startswith("ema/") for name in self.names):
            raise ValueError(
                f"{self.path} keeps no average of the weights, but ema_half_life_samples asks for one; "
                "set it to 0 or use another output folder"
            )

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a flattened parameter's "weight", moment or "ema"; a buffer whole.

        Raises ValueError where the files do not cover them.
        """
        if name in self.buffers:
            return self.buffers[name].get_tensor(f"buffer/{name}")
        parts, position = [], start
        for offset, length, file in sorted(self.fragments.get(name, []), key=lambda fragment: fragment[:2]):
            if offset <= position < min(offset + length, stop):
                end = min(offset + length, stop)
                parts.append(file.get_slice(f"{kind}/{name}")[position - offset : end - offset])
                position = end
        if position != stop:
            raise ValueError(f"{self.path} lacks {kind} of {name} from element {position}; use an older checkpoint")
        return torch.cat(parts) if parts else torch.empty(0)


def read_state(path: str) -> dict[str, Any]:
    """A checkpoint's state.json. Raises ValueError if another version wrote it."""
    try:
        state = read_json(path, "state.json")
    except ValueError as error:
        raise ValueError(f"{path}/state.json cannot be read: {error}; use an older checkpoint") from None
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {state.get('format')}, this version reads {FORMAT}; use the version that wrote it"
        )
    return state


def read_json(path: str, name: str) -> Any:
    """One of a checkpoint's JSON files. Raises ValueError where it is absent or garbled."""
    return json.loads(storage.read_bytes(storage.join(path, name)) or b"")
