"""Motions: functions of time and channel, measured by frames."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distributed_inr import randomness
from distributed_inr.config import config, override
from distributed_inr.domains.domain import Domain, Queries, Record, Signal, caption, evaluate_grid, pixel_centres
from distributed_inr.field import Field
from distributed_inr.raw import bvh, clips, motions, stick_figures
from distributed_inr.raw.arrays import read_npy
from distributed_inr.raw.motions import Content, Start, Up

MEMBER = "motion.npy"

_SETTLED = ("fps", "content", "mean", "deviation", "order", "parents", "hierarchy", "start", "facing", "up", "metres")
"""Fields that the training set's protocol tells, under "motion"."""

_THUMBNAIL_FRAMES = 25
_STRIP = {"count": 6, "height": 128, "width": 80}
_MATRIX = (128, 256)
_FPS = 30.0
"""Of animations of motions whose rate nobody told."""


@config
class Motion(Domain):
    """Clips of `size` frames and any number of channels, standardised; x is the time and y the channel (CHINR).

    A clip lies in the first cells of a grid padded with zeros to multiples of `pad`, so that convolutions halve it
    evenly, and planes and coordinates both mean that grid: the centre of cell i of n is (2 i + 1) / n - 1. Where `size`
    is a multiple of `pad`, a clip's time is all of [-1, 1]; else the padding's share is missing at its end. Padding is
    never measured.
    """

    kind: Literal["motion"] = "motion"
    size: Annotated[int, pydantic.Field(ge=2)] = 200
    """Base resolution in frames: what the encoder sees."""
    channels: Annotated[int, pydantic.Field(gt=0)] = 159
    """Numbers of a frame, such as 3 for each of 53 joints, or AMASS's 3 of translation and 156 of pose."""
    pad: Annotated[int, pydantic.Field(gt=0)] = 8
    """Frames and channels of the grid are padded to multiples of it; encoders must not halve more often."""
    content: Content | None = None
    """What the channels are. positions: x y z of joints in metres, z up; poses: AMASS's; bvh: a BVH file's own;
    channels: unknown. none: taken from the training set's index, as the following are."""
    fps: Annotated[float, pydantic.Field(gt=0)] | None = None
    """Frames a second at the base resolution."""
    mean: tuple[float, ...] | None = None
    """Of each channel over the training set."""
    deviation: tuple[Annotated[float, pydantic.Field(gt=0)], ...] | None = None
    """Of each channel over the training set."""
    order: tuple[int, ...] | None = None
    """Channel that each row of the grid holds. Which channel comes next to which means nothing to the data, but along y
    functions are smooth: interleaved x y z of joints fit far worse than like channels side by side. none, also in the
    index: as they are, as in the paper."""
    parents: tuple[int, ...] | None = None
    """Of each joint of a skeleton, -1 of the root; what figures are drawn by."""
    hierarchy: str | None = None
    """Of channels from BVH files, that section, so that such files can be written."""
    start: Start | None = None
    """How one's own files are placed. kept: as they are; centred: they begin at the origin of the ground; turned: also
    turned about the vertical, to face as `facing` does."""
    facing: tuple[float, ...] | None = None
    """Of a pose, the places of its joints about the root on the ground, x y of each."""
    up: Up | None = None
    """Axis that points up in the positions of one's own files; auto: y in BVH, else z."""
    metres: Annotated[float, pydantic.Field(gt=0)] | None = None
    """Metres of a unit of the positions in one's own files."""

    grid_option: ClassVar[str] = "pad"
    coord_dim: ClassVar[int] = 2
    value_dim: ClassVar[int] = 1
    view_dim: ClassVar[int] = 0
    value_span: ClassVar[float] = 6.0  # three deviations to each side, which 997 of 1000 normal values do not leave
    input_kind: ClassVar[str] = "pixels"
    input_dim: ClassVar[int] = 1
    noun: ClassVar[str] = "motion"
    suffixes: ClassVar[tuple[str, ...]] = (".npz", ".npy", ".bvh", ".mp4", ".gif")
    unit: ClassVar[str] = "frames"
    fine: ClassVar[int] = 2
    max_resolution: ClassVar[int] = 100_000  # an hour at 30 frames/s

    def __post_init__(self) -> None:
        for name in ("mean", "deviation"):
            if (values := getattr(self, name)) is not None and len(values) != self.channels:
                raise ValueError(
                    f"domain.{name} has {len(values)} entries and domain.channels={self.channels}; give one a channel"
                )
        if self.content == "positions" and self.channels % 3:
            raise ValueError(f"domain.channels={self.channels} must be three a joint with domain.content=positions")
        if self.order is not None and sorted(self.order) != list(range(self.channels)):
            raise ValueError(f"domain.order must name each of 0 to {self.channels - 1} once; leave it to the index")
        if self.parents is not None:
            try:
                motions.check_parents(self.parents, self.channels // 3)
            except ValueError as error:
                raise ValueError(f"domain.{error}") from None
        if self.hierarchy is not None:
            try:
                width = bvh.num_channels(self.hierarchy)
            except ValueError as error:
                raise ValueError(f"domain.hierarchy: {error}; leave it to the index") from None
            if width != self.channels:
                raise ValueError(
                    f"domain.hierarchy has {width} channels, domain.channels={self.channels}; leave it to the index"
                )

    @property
    def grid(self) -> tuple[int, int]:
        frames, channels = (math.ceil(count / self.pad) * self.pad for count in (self.size, self.channels))
        return frames, channels

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]  # distances are of positions only
        return ("joint_error",) if self.content == "positions" else ("rms_error",)

    def settle(self, protocol: Mapping[str, Any]) -> "Motion":
        """What is left open, as the set tells it. Refuses a set of another shape, content or BVH skeleton."""
        known = protocol.get("motion")
        if known is None:
            return self
        for name, own in (("channels", self.channels), ("frames", self.size)):
            if known[name] != own:
                option = "size" if name == "frames" else name
                raise ValueError(
                    f"domain.{option}={own}, but the clips of data.train have {known[name]} {name}; "
                    f"try --domain.{option} {known[name]}"
                )
        if self.content is not None and (content := known.get("content", self.content)) != self.content:
            raise ValueError(
                f"domain.content={self.content}, but the clips of data.train hold {content}; "
                f"try --domain.content {content}, or a set of {self.content}"
            )
        if self.hierarchy is not None and known.get("hierarchy") not in (None, self.hierarchy):
            raise ValueError(
                "domain.hierarchy is another skeleton than that of data.train's clips; leave it to the index"
            )
        return override(self, {name: known.get(name) for name in _SETTLED if getattr(self, name) is None})

    def read(self, record: Record, seed: int) -> Signal:
        key = record["__key__"]
        try:
            values = read_npy(record[MEMBER], ("<f2", "<f4"))
        except KeyError:
            raise ValueError(f"{key}: no motion; expected {MEMBER} in the shard") from None
        except ValueError as error:
            raise ValueError(f"{key}.{MEMBER} cannot be decoded: {error}") from None
        if values.shape != (self.size, self.channels):
            raise ValueError(
                f"{key}.{MEMBER} has shape {list(values.shape)}, expected [domain.size, domain.channels] = "
                f"[{self.size}, {self.channels}]; prepare the data so or change the options"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{key}.{MEMBER} has values that are not finite")
        inputs, targets = self._standardised(values)
        return Signal(
            key=key,
            seed=torch.tensor(seed),
            position=torch.tensor(0),
            inputs=inputs,
            targets=targets,
            text=caption(record),
        )

    def open(self, path: Path) -> Signal:
        """A file of any kind that preparation reads: its first `size` frames."""
        form = motions.Form(
            frames=self.size,
            fps=self.fps,
            channels="raw" if self.content == "bvh" else "positions",
            up=self.up or "auto",
            metres=self.metres or 1.0,
        )
        try:
            found = motions.read_file(path, form)
            if found.values.shape[1] != self.channels or found.hierarchy != (self.hierarchy or ""):
                reason = "another skeleton" if found.hierarchy else f"{found.values.shape[1]} channels"
                raise ValueError(f"{reason}, domain.channels={self.channels}; give a motion of the kind trained on")
            found = dataclasses.replace(found, facing=self.facing)
            if len(found) < self.size:
                rate = "" if self.fps is None else f" at {self.fps:g} a second"
                raise ValueError(f"{len(found)} frames{rate}, domain.size={self.size}; give a longer motion")
            values = found.window(0, self.size).finished(start=self.start or "kept")
        except ValueError as error:
            raise ValueError(f"{path} is not a usable motion: {error}") from None
        inputs, targets = self._standardised(values)
        zero = torch.zeros(1, dtype=torch.int64)
        return Signal(key=[path.name], seed=zero, position=zero, inputs=inputs[None], targets=targets[None], text=[""])

    def blank(self, count: int) -> tuple[Tensor, Tensor]:
        frames, channels = self.grid
        return torch.zeros(count, 1, channels, frames), torch.zeros(count, self.size, self.channels)

    @property
    def num_copies(self) -> int:
        return 1

    def copies(self, signal: Signal) -> tuple[Signal, ...]:
        return (signal,)

    def supervise(self, signal: Signal, count: int) -> tuple[Queries, Float[Tensor, "batch points 1"]]:
        """Cells of the clip; `count` >= size * channels takes all, frame by frame; fewer are drawn."""
        assert isinstance(signal.targets, Tensor)
        return self._cells(signal, signal.targets, count, "cells")

    def measurements(self, signal: Signal, count: int | None = None) -> tuple[Queries, Float[Tensor, "batch points 1"]]:
        """Cells of the clip, without the padding."""
        return self._cells(signal, self._seen(signal), count, "measurements")

    def nll(self, observed: Tensor, values: Tensor) -> Float[Tensor, " batch"]:
        """Gaussian of unit deviation: half the squared error."""
        return 0.5 * (observed - values).square().mean(dim=(1, 2))

    def render(
        self, field: Field, resolution: int, *, chunk_points: int = 1 << 16
    ) -> Float[Tensor, "batch frames channels"]:
        """`resolution` frames of the clip's time, in the data's own units.

        Each frame stands for the middle of an equal share of the time: of twice the frames, the first lies a quarter of
        a frame before the clip's first, and two lie between each of its frames and the next.

        Args:
            chunk_points: bounds the memory: points of the whole batch evaluated at once.
        """
        time, channel = self._time(resolution, field.device), self._channel(field.device)
        found = torch.empty(len(field), self.channels * resolution, device=field.device)
        for part, values in evaluate_grid(field, (time, channel), chunk_points=chunk_points, title="frames"):
            found[:, part] = values[..., 0]
        return self._restored(found.unflatten(1, (self.channels, resolution)).transpose(1, 2))

    def truth(self, signal: Signal) -> Float[Tensor, "batch frames channels"]:
        return self._restored(self._seen(signal))

    def enlarge(self, rendered: Tensor, resolution: int) -> Tensor:
        """Linear between frames; before the first and after the last they stand still."""
        return F.interpolate(rendered.transpose(1, 2), size=resolution, mode="linear").transpose(1, 2)

    def naive(self, signal: Signal, *, numbers: int) -> dict[str, Tensor]:
        """Linear between evenly spaced frames, the first and the last among them, of at most as many numbers in all;
        two at least, which the name tells if they are more.
        """
        truth = self.truth(signal)
        count = min(max(2, numbers // self.channels), self.size)
        excess = f", {count * self.channels} numbers" if count * self.channels > numbers else ""
        places = torch.linspace(0, self.size - 1, count, device=truth.device).round().long()
        time = torch.arange(self.size, device=truth.device)
        after = torch.bucketize(time, places).clamp(1, count - 1)  # places[after - 1] < time <= places[after]
        start, end = places[after - 1], places[after]
        share = ((time - start) / (end - start))[:, None]
        return {f"linear interpolation from {count} frames{excess}": torch.lerp(truth[:, start], truth[:, end], share)}

    def pictures(self, rendered: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """Stick figures at moments along the time; of channels that are not positions, a row each, red where they are
        above their mean and blue below.
        """
        if self.content != "positions":
            return _matrix(self._standard(rendered).transpose(1, 2))
        drawn = [stick_figures.strip(motion, self.parents, **_STRIP) for motion in self._joints(rendered)]
        pictures = torch.from_numpy(np.stack(drawn)).to(rendered.device)
        return pictures.permute(0, 3, 1, 2) / 255

    def shown(self, signal: Signal) -> dict[str, Float[Tensor, "3 height width"]]:
        original = self.pictures(self.truth(signal))[0]
        return {
            f"original, {self.size} frames": original,
            "what the encoder saw, a row for each channel": _matrix(signal.inputs[:, 0])[0],
        }

    def thumbnails(self, rendered: Tensor) -> Tensor:
        """Channels at moments along the time, in deviations; of positions, places about the root in metres."""
        frames = torch.linspace(0, rendered.shape[1] - 1, min(_THUMBNAIL_FRAMES, rendered.shape[1]))
        rendered = rendered[:, frames.round().long()]
        if self.content != "positions":
            return self._standard(rendered).flatten(1)
        joints = rendered.unflatten(2, (-1, 3))
        return (joints - joints[:, :, :1]).flatten(1)

    def check_file(self, suffix: str, resolution: int) -> None:
        if suffix == ".bvh" and self.hierarchy is None:
            raise ValueError(".bvh needs channels that come from BVH files (prepared with --channels raw); write .npz")
        if suffix in (".mp4", ".gif"):
            if self.content != "positions":
                raise ValueError(f"{suffix} shows positions of joints, domain.content={self.content}; write .npz")
            clips.check_rate(suffix, self._rate(resolution))

    def save(self, rendered: Float[Tensor, "frames channels"], path: Path) -> None:
        """Write one motion: .npz with its rate and skeleton, .npy, .bvh of BVH's own channels, .mp4 or .gif of stick
        figures.
        """
        values, suffix = rendered.detach().cpu().float().numpy(), path.suffix.lower()
        rate = self._rate(len(values))
        try:
            self.check_file(suffix, len(values))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if suffix in (".npz", ".npy"):
            with path.open("wb") as file:  # numpy appends what it takes for the suffix to a path
                if suffix == ".npy":
                    np.save(file, values)
                else:
                    np.savez_compressed(file, allow_pickle=False, **self._arrays(values, rate))
        elif suffix == ".bvh":
            assert self.hierarchy is not None
            path.write_text(bvh.write(self.hierarchy, values, rate))
        elif suffix in (".mp4", ".gif"):
            clips.write(stick_figures.frames(self._joints(rendered[None])[0], self.parents), path, rate=rate)
        else:
            raise ValueError(f"{path}: {suffix or 'no suffix'} cannot be written; use .npz, .npy, .bvh, .mp4 or .gif")

    def _rate(self, frames: int) -> float:
        """Of so many frames, how many are shown a second."""
        return (self.fps or _FPS) * frames / self.size

    def _cells(
        self, signal: Signal, values: Float[Tensor, "batch frames channels"], count: int | None, purpose: str
    ) -> tuple[Queries, Float[Tensor, "batch points 1"]]:
        batch, total, device = len(signal), self.size * self.channels, values.device
        if count is None or count >= total:
            cell = torch.arange(total, device=device).expand(batch, -1)
        else:
            cell = randomness.integers(signal.seed, purpose, (count,), total)
        frame, channel = cell // self.channels, cell % self.channels
        coords = torch.stack([self._time(self.size, device)[frame], self._channel(device)[channel]], dim=-1)
        return Queries(coords), values.flatten(1).gather(1, cell)[..., None]

    def _time(self, frames: int, device: torch.device) -> Float[Tensor, " frames"]:
        """Where so many frames lie in the clip's share of [-1, 1]."""
        return (pixel_centres(frames, device) + 1) * (self.size / self.grid[0]) - 1

    def _channel(self, device: torch.device) -> Float[Tensor, " channels"]:
        return pixel_centres(self.grid[1], device)[: self.channels]

    def _seen(self, signal: Signal) -> Float[Tensor, "batch frames channels"]:
        return signal.inputs[:, 0, : self.channels, : self.size].transpose(1, 2)

    def _standardised(
        self, values: np.ndarray
    ) -> tuple[Float[Tensor, "1 rows columns"], Float[Tensor, "frames channels"]]:
        """A clip in the data's own units as inputs and targets."""
        targets = self._standard(torch.from_numpy(values.astype(np.float32)))
        frames, channels = self.grid
        return F.pad(targets.T, (0, frames - self.size, 0, channels - self.channels))[None], targets

    def _standard(self, values: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        """Rows of the grid, in deviations, of channels in the data's own units."""
        mean, deviation = self._statistics(values)
        standard = (values - mean) / deviation
        return standard if self.order is None else standard[..., list(self.order)]

    def _restored(self, values: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        """The inverse of `_standard`."""
        mean, deviation = self._statistics(values)
        rows = values if self.order is None else values[..., np.argsort(self.order).tolist()]
        return rows * deviation + mean

    def _statistics(self, like: Tensor) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
        if self.mean is None or self.deviation is None:
            raise ValueError(
                "domain.mean and domain.deviation are not set, and the training set's index tells none; prepare it "
                "with jobs/prepare_data.py motion, or set both"
            )
        return like.new_tensor(self.mean), like.new_tensor(self.deviation)

    def _joints(self, rendered: Tensor) -> Float[np.ndarray, "batch frames joints 3"]:
        return rendered.detach().cpu().float().unflatten(2, (-1, 3)).numpy()

    def _arrays(self, values: Float[np.ndarray, "frames channels"], fps: float) -> dict[str, np.ndarray]:
        """What an .npz file holds, by the names under which preparation reads it again."""
        if self.content == "poses":
            return {"trans": values[:, :3], "poses": values[:, 3:], "mocap_framerate": np.array(fps)}
        if self.content != "positions":
            return {"channels": values, "fps": np.array(fps)}
        skeleton = {} if self.parents is None else {"parents": np.array(self.parents)}
        return {"positions": values, "fps": np.array(fps), **skeleton}


def _matrix(values: Float[Tensor, "batch channels frames"]) -> Float[Tensor, "batch 3 height width"]:
    """White at zero, red at three and blue at minus three deviations."""
    share = (values / 3).clamp(-1, 1)
    above, below = share.clamp(min=0), -share.clamp(max=0)
    picture = 1 - torch.stack([below, torch.maximum(above, below), above], dim=1)
    return F.interpolate(picture, size=_MATRIX, mode="bilinear", antialias=True).clamp(0, 1)
