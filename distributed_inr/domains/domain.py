"""What a domain is: how records become signals, how fields are measured, and what a person looks at."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distributed_inr import randomness
from distributed_inr.field import Field

Record = dict[str, Any]
"""One sample of a shard: member suffix -> bytes, and "__key__" -> str."""

MAX_CAPTION_BYTES = 2**20


@dataclass(frozen=True)
class Signal:
    """One example, or, after `collate`, a batch of them.

    Attributes:
        key: the sample's key.
        seed: int64 [] or [batch]; every random draw that concerns the sample comes from it.
        position: int64 [] or [batch]; samples that the run had seen before this one (schedules depend on it).
        inputs: what an encoder sees; for a prior, the latent's mean and, if it has one, deviation [1 or 2,
            *latent_shape].
        targets: the domain's own: what `Domain.supervise` draws from.
        text: the caption, empty where there is none.
        mask: bool [batch]; False marks a repeated sample that must not count (evaluation's ragged last step).
        latent: of a batch in auto-decoding: the samples' own latents, which gradients are asked for.
        number: int64 [] or [batch]; the sample's number in its set's own order, where it comes from a set.
    """

    key: str | list[str]
    seed: Tensor
    position: Tensor
    inputs: Tensor
    targets: Tensor | None = None
    text: str | list[str] = ""
    mask: Tensor | None = None
    latent: Tensor | None = None
    number: Tensor | None = None

    def __len__(self) -> int:
        return len(self.key)

    def to(self, device: torch.device | str) -> Signal:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, function: Callable[[Tensor], Tensor]) -> Signal:
        """The signal with `function` applied to each of its tensors."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, Tensor)})

    def __getitem__(self, index: slice) -> Signal:
        """A slice of a batch."""
        part = self.map(lambda tensor: tensor[index])
        return dataclasses.replace(part, key=self.key[index], text=self.text[index])

    def rows(self, indices: Sequence[int]) -> Signal:
        """Some samples of a batch."""
        part = self.map(lambda tensor: tensor[list(indices)])
        return dataclasses.replace(part, key=[self.key[i] for i in indices], text=[self.text[i] for i in indices])


def caption(record: Record) -> str:
    """The text of a shard record, empty where there is none. Raises ValueError when it cannot be one."""
    content = record.get("txt", b"")
    if len(content) > MAX_CAPTION_BYTES:
        raise ValueError(f"{record['__key__']}.txt: {len(content)} bytes, more than a caption may have")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{record['__key__']}.txt: cannot be decoded: {error}") from None


def collate(signals: Sequence[Signal]) -> Signal:
    """Stack examples into a batch."""

    def stack(name: str) -> Any:
        values = [getattr(signal, name) for signal in signals]
        if all(value is None for value in values):
            return None
        return torch.stack(values) if isinstance(values[0], Tensor) else values

    return Signal(**{field.name: stack(field.name) for field in dataclasses.fields(Signal)})


@dataclass(frozen=True)
class Queries:
    """Which measurements to take of a batch of fields.

    Attributes:
        coords: places in [-1, 1]^coord_dim.
        view: what the measurement knows beside the place: for images log2 of the resolution over the base's, for scenes
            the ray's direction.
    """

    coords: Float[Tensor, "batch points coord_dim"]
    view: Float[Tensor, "batch points view_dim"] | None = None


class Domain(ABC):
    """Turns records into signals, and fields into things to look at. Subclasses are final `@config` classes."""

    kind: str
    size: int
    """Base resolution: cells a side of what the encoder sees."""
    coord_dim: ClassVar[int]
    value_dim: ClassVar[int]
    view_dim: ClassVar[int]
    value_span: ClassVar[float]
    """From the smallest to the largest value: the peak of a peak signal-to-noise ratio."""
    input_kind: ClassVar[str]
    """What `Signal.inputs` holds, so that an experiment can check the encoder against it."""
    metrics: ClassVar[tuple[str, ...]]

    @abstractmethod
    def read(self, record: Record, seed: int) -> Signal:
        """Decode one shard record on the CPU. Raises ValueError when the sample is bad (the reader replaces it)."""

    @property
    @abstractmethod
    def num_copies(self) -> int:
        """How many `copies` there are of a batch, itself counted."""

    @abstractmethod
    def copies(self, signal: Signal) -> tuple[Signal, ...]:
        """The batch and its deterministic augmented copies (such as the mirrored pictures)."""

    def augment(self, signal: Signal) -> Signal:
        """For every sample of the batch, one of its copies, drawn from the sample's seed."""
        copies = self.copies(signal)
        choice = randomness.integers(signal.seed, "augment", (), len(copies))
        result = copies[0]
        for index, copy in enumerate(copies[1:], start=1):
            chosen = choice == index
            result = dataclasses.replace(
                result,
                inputs=_select(chosen, copy.inputs, result.inputs),
                targets=None if copy.targets is None else _select(chosen, copy.targets, result.targets),
            )
        return result

    @abstractmethod
    def supervise(self, signal: Signal, count: int) -> tuple[Queries, Float[Tensor, "batch points value_dim"]]:
        """Draw `count` measurements of each signal from the sample's seed: queries and their true values."""

    @abstractmethod
    def measurements(
        self, signal: Signal, count: int | None = None
    ) -> tuple[Queries, Float[Tensor, "batch points value_dim"]]:
        """What an encoder sees of each signal, as queries and values that a latent can be fitted to.

        Args:
            count: draw as many, from the sample's seed; None takes all, which draws nothing.
        """

    def observe(self, field: Field, queries: Queries) -> Float[Tensor, "batch points value_dim"]:
        """What the sensor measures of the field: its value. Scenes integrate along rays instead."""
        return field(queries.coords, queries.view)

    @abstractmethod
    def nll(self, observed: Tensor, values: Tensor) -> Float[Tensor, " batch"]:
        """Negative log-likelihood of the true values, up to a constant, as a mean over measurements and channels."""

    @abstractmethod
    def render(self, field: Field, resolution: int) -> Tensor:
        """Measure the field on a regular grid of any resolution, in chunks of bounded memory."""

    @abstractmethod
    def save(self, rendered: Tensor, path: Path) -> None:
        """Write one rendered field to a file of the domain's usual kind."""


def _select(chosen: Tensor, yes: Tensor, no: Tensor | None) -> Tensor:
    return torch.where(chosen.view(-1, *[1] * (yes.dim() - 1)), yes, no)  # type: ignore[arg-type]


def pixel_centres(count: int, device: torch.device | str | None = None) -> Float[Tensor, " count"]:
    """Centres of `count` equal cells of [-1, 1]: (2 i + 1) / count - 1."""
    return (torch.arange(count, device=device, dtype=torch.float32) * 2 + 1) / count - 1


def seeds_for(seed: int, count: int, start: int = 0) -> Int64[Tensor, " count"]:
    """Seeds of samples start, start + 1, ... of a generation run."""
    return torch.tensor([randomness.sample_seed(seed, i) for i in range(start, start + count)])
