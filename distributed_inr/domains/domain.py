"""What a domain is: how records become signals, how fields are measured, and what a person looks at."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

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
        targets: the domain's own, a tensor or several by name: what `Domain.supervise` draws from.
        text: the captions, one a line (`captions`); empty where there are none. For a prior with text, the drawn one.
        mask: bool [batch]; False marks a repeated sample that must not count (evaluation's ragged last step).
        latent: of a batch in auto-decoding: the samples' own latents, which gradients are asked for.
        number: int64 [] or [batch]; the sample's number in its set's own order, where it comes from a set.
        text_tokens: for a prior with text, the drawn caption's embedding [tokens, width], padded by zeros.
        text_mask: bool [tokens]; True where there is a token.
    """

    key: str | list[str]
    seed: Tensor
    position: Tensor
    inputs: Tensor
    targets: Tensor | dict[str, Tensor] | None = None
    text: str | list[str] = ""
    mask: Tensor | None = None
    latent: Tensor | None = None
    number: Tensor | None = None
    text_tokens: Tensor | None = None
    text_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.key)

    def to(self, device: torch.device | str) -> Signal:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, function: Callable[[Tensor], Tensor]) -> Signal:
        """The signal with `function` applied to each of its tensors."""
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, dict):
                changed[field.name] = {name: function(tensor) for name, tensor in value.items()}
        return dataclasses.replace(self, **changed)

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


def captions(text: str) -> list[str]:
    """The captions of a sample's text, one a line, without blank ones."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def collate(signals: Sequence[Signal]) -> Signal:
    """Stack examples into a batch."""

    def stack(name: str) -> Any:
        values = [getattr(signal, name) for signal in signals]
        if all(value is None for value in values):
            return None
        if isinstance(values[0], dict):
            return {key: torch.stack([value[key] for value in values]) for key in values[0]}
        return torch.stack(values) if isinstance(values[0], Tensor) else values

    return Signal(**{field.name: stack(field.name) for field in dataclasses.fields(Signal)})


@dataclass(frozen=True)
class Queries:
    """Which measurements to take of a batch of fields.

    Attributes:
        coords: places in [-1, 1]^coord_dim; for scenes the origins of rays, which may lie outside.
        view: what the measurement knows beside the place: for images log2 of the resolution over the base's, for scenes
            the ray's direction.
        depths: of scenes, where along each ray the field is asked; None takes the middles of equal steps.
    """

    coords: Float[Tensor, "batch points coord_dim"]
    view: Float[Tensor, "batch points view_dim"] | None = None
    depths: Float[Tensor, "batch points depths"] | None = None

    def rows(self, part: slice) -> Queries:
        """The measurements of some of the fields."""
        view, depths = (None if tensor is None else tensor[part] for tensor in (self.view, self.depths))
        return Queries(self.coords[part], view, depths)


class Domain(ABC):
    """Turns records into signals, and fields into things to look at. Subclasses are final `@config` classes.

    What is seen of a field is called its rendering: a tensor [batch, ...] of the domain's own kind, such as pictures,
    grids or clips, on which its metrics are defined.
    """

    kind: str
    size: int
    """Base resolution: cells a side of what the encoder sees."""
    grid_option: ClassVar[str] = "size"
    """The option whose multiples the cells of `grid` are: what an error about them names."""
    coord_dim: ClassVar[int]
    value_dim: int
    view_dim: ClassVar[int]
    num_unviewed: ClassVar[int] = 0
    """Leading values that must not depend on the view: of scenes, the density."""
    value_span: ClassVar[float]
    """From the smallest to the largest value: the peak of a peak signal-to-noise ratio."""
    input_kind: ClassVar[str]
    """What `Signal.inputs` holds, so that an experiment can check the encoder against it."""
    input_dim: int
    """Numbers of each pixel, point or frame cell of `Signal.inputs`."""
    metrics: tuple[str, ...]
    """Names in `evaluation.metrics.METRICS`; the first decides in tables."""
    noun: ClassVar[str]
    """What one signal is called in reports, such as picture."""
    kept_back: ClassVar[str] = ""
    """What of each training signal training never sees, where `truth` and `reproduce` are about that; of scenes, views.
    """
    suffixes: ClassVar[tuple[str, ...]]
    """Of the files that `save` writes; the first where nothing else is asked for."""
    file_options: ClassVar[tuple[str, ...]] = ()
    """What can be chosen of a file beside its resolution: keywords of `write`."""
    unit: ClassVar[str]
    """What a resolution counts, as it stands in file names: px, cells, frames."""
    fine: ClassVar[int]
    """Times the base resolution at which reports show samples too."""
    max_resolution: ClassVar[int]
    """Of the largest rendering that the jobs write."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, ...]:
        """Cells along each coordinate axis of what the encoder sees, x first: what planes are laid over."""

    @property
    def comparable(self) -> bool:
        """Whether renderings, and `truth`, show all signals alike, so that their differences are those of the signals;
        scenes that are not seen from the same cameras are not.
        """
        return True

    @abstractmethod
    def read(self, record: Record, seed: int) -> Signal:
        """Decode one shard record on the CPU. Raises ValueError when the sample is bad (the reader replaces it)."""

    @abstractmethod
    def open(self, path: Path) -> Signal:
        """One's own file as a batch of one. Raises ValueError when it is not usable."""

    @abstractmethod
    def blank(self, count: int) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
        """Inputs and targets of zeros, of the shapes and types that `read` gives: what a step's memory depends on."""

    def settle(self, protocol: Mapping[str, Any]) -> Domain:
        """The domain with what depends on the training set, and was left open, taken from the set's protocol."""
        return self

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
                targets=_select(chosen, copy.targets, result.targets),
            )
        return result

    @abstractmethod
    def supervise(self, signal: Signal, count: int) -> tuple[Queries, Float[Tensor, "batch points channels"]]:
        """Draw `count` measurements of each signal from the sample's seed: queries and their true values."""

    @abstractmethod
    def measurements(
        self, signal: Signal, count: int | None = None
    ) -> tuple[Queries, Float[Tensor, "batch points channels"]]:
        """What an encoder sees of each signal, as queries and values that a latent can be fitted to.

        Args:
            count: draw as many, from the sample's seed; None takes all, which draws nothing.
        """

    def observe(self, field: Field, queries: Queries) -> Float[Tensor, "batch points channels"]:
        """What the sensor measures of the field: its value. Scenes integrate along rays instead."""
        return field(queries.coords, queries.view)

    @abstractmethod
    def nll(self, observed: Tensor, values: Tensor) -> Float[Tensor, " batch"]:
        """Negative log-likelihood of the true values, up to a constant, as a mean over measurements and channels."""

    def squared_error(self, observed: Tensor, values: Tensor) -> Float[Tensor, " batch"]:
        """Mean squared error of what is expected of the measurements, in the units of `value_span`."""
        return (observed - values).square().mean(dim=(1, 2))

    @abstractmethod
    def render(self, field: Field, resolution: int) -> Tensor:
        """Measure the field on a regular grid of any resolution, in chunks of bounded memory."""

    @abstractmethod
    def truth(self, signal: Signal) -> Tensor:
        """The renderings that perfect fields would give at the base resolution."""

    def reproduce(self, field: Field, signal: Signal) -> Tensor:
        """Measure the fields as `truth` says that the signals were."""
        return self.render(field, self.size)

    def finer_truth(self, signal: Signal) -> tuple[int, Tensor] | None:
        """A finer resolution that the signals are known at, and the renderings that perfect fields would give there."""
        return None

    @abstractmethod
    def enlarge(self, rendered: Tensor, resolution: int) -> Tensor:
        """Renderings brought to a finer resolution without the field, by the usual interpolation."""

    @abstractmethod
    def naive(self, signal: Signal, *, numbers: int) -> dict[str, Tensor]:
        """What one would have without a model, by name: in place of `truth`, renderings made of the signals by simple
        means, such as interpolation from `numbers` numbers.
        """

    @abstractmethod
    def pictures(self, rendered: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """Renderings as pictures in [0, 1]: for sheets, and for networks that look at pictures."""

    @abstractmethod
    def shown(self, signal: Signal) -> dict[str, Float[Tensor, "3 height width"]]:
        """Of a batch of one, what there was and what the encoder saw, as pictures by title."""

    @abstractmethod
    def thumbnails(self, rendered: Tensor) -> Float[Tensor, "batch numbers"]:
        """Renderings as vectors of bounded length, whose distances say how alike they are."""

    def surface(self, rendered: Tensor, count: int) -> Float[Tensor, "batch count 3"] | None:
        """Points on the surface of each rendering, where it has one; NaN where a rendering is empty."""
        return None

    def write(self, field: Field, resolution: int, path: Path, **options: Any) -> Tensor:
        """Write one function to a file of the kind that the suffix names; returns a rendering of it, for pictures.

        Raises ValueError where it cannot be one.

        Args:
            options: some of `options_of` the suffix.
        """
        assert not options, f"{self.kind} has no {options}"
        rendered = self.render(field, resolution).cpu()
        self.save(rendered[0], path)
        return rendered

    def options_of(self, suffix: str) -> tuple[str, ...]:
        """Those of `file_options` that a file of this kind has."""
        return self.file_options

    def check_file(self, suffix: str, resolution: int, **options: Any) -> None:  # noqa: B027  most can be written
        """Raise ValueError where `write` could make no such file of any function: what is known before there is one."""

    @abstractmethod
    def save(self, rendered: Tensor, path: Path) -> None:
        """Write one rendering to a file of the kind that the suffix names. Raises ValueError where it cannot be one."""


def _select(chosen: Tensor, yes: Any, no: Any) -> Any:
    if isinstance(yes, dict):
        return {name: _select(chosen, yes[name], no[name]) for name in yes}
    return None if yes is None else torch.where(chosen.view(-1, *[1] * (yes.dim() - 1)), yes, no)


def pixel_centres(count: int, device: torch.device | str | None = None) -> Float[Tensor, " count"]:
    """Centres of `count` equal cells of [-1, 1]: (2 i + 1) / count - 1."""
    return (torch.arange(count, device=device, dtype=torch.float32) * 2 + 1) / count - 1


def seeds_for(seed: int, count: int, start: int = 0) -> Int64[Tensor, " count"]:
    """Seeds of samples start, start + 1, ... of a generation run."""
    return torch.tensor([randomness.sample_seed(seed, i) for i in range(start, start + count)])


def evaluate_grid(
    field: Field, axes: Sequence[Tensor], view: Tensor | None = None, *, chunk_points: int, title: str = ""
) -> Iterator[tuple[slice, Float[Tensor, "batch points value_dim"]]]:
    """Values at every point of a grid, in pieces of at most `chunk_points` points of the whole batch.

    Yields each piece's place in the flattened grid; the first axis varies fastest. A bar shows on a terminal where it
    takes more than a few seconds.

    Args:
        axes: coordinates along each axis, x first.
        view: one for each field.
    """
    lengths, total = [len(axis) for axis in axes], math.prod(len(axis) for axis in axes)
    step = max(1, chunk_points // len(field))
    with tqdm(total=total, desc=title, unit="point", unit_scale=True, delay=3, disable=None, leave=False) as bar:
        for start in range(0, total, step):
            flat = torch.arange(start, min(start + step, total), device=field.device)
            coords = []
            for axis, length in zip(axes, lengths, strict=True):
                coords.append(axis[flat % length])
                flat = flat // length
            points = torch.stack(coords, dim=-1).expand(len(field), -1, -1)
            own = None if view is None else view[:, None].expand(-1, points.shape[1], -1)
            yield slice(start, start + points.shape[1]), field(points, own)
            bar.update(points.shape[1])
