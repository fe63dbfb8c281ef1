"""Videos: functions of the plane and of time to colour, measured by the pixels of frames."""

import dataclasses
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image as PillowImage
from torch import Tensor
from tqdm import tqdm

from distributed_inr import randomness
from distributed_inr.config import config
from distributed_inr.domains.domain import Domain, Queries, Record, Signal, caption, evaluate_grid, pixel_centres
from distributed_inr.domains.image import downscale, enlarge
from distributed_inr.field import Field
from distributed_inr.raw import clips, footage
from distributed_inr.raw.footage import MAX_PIXELS

logger = logging.getLogger(__name__)

_THUMBNAIL = (8, 24, 24)
"""Frames, and pixels a side, at which clips are compared with training clips."""
_SHOWN = 4
"""Frames of a clip that a picture of it shows, in two rows: square, as the networks that look at pictures want it."""

_FORMATS = {"clip.webp": "WEBP", "clip.png": "PNG"}
"""Member suffix -> the one decoder that is tried on it."""


@config
class Video(Domain):
    """Clips of RGB frames in [-1, 1] on a square, over the coordinates x, y and t."""

    kind: Literal["video"] = "video"
    size: Annotated[int, pydantic.Field(gt=0)] = 64
    """Pixels a side of a frame, in the shards and for the encoder."""
    frames: Annotated[int, pydantic.Field(gt=0)] = 16
    """Frames of a clip, in the shards and for the encoder."""
    fps: Annotated[float, pydantic.Field(gt=0)] = 12.0
    """Frames a second of clips of `frames` frames; clips rendered at more frames last as long, at a higher rate."""
    likelihood: Literal["gaussian", "laplace"] = "gaussian"
    """Of a pixel, at unit scale: gaussian is half the squared error, laplace the absolute error."""
    flip: bool = True
    """Train on mirrored copies too."""
    max_pixels: int = MAX_PIXELS
    """Largest frame, in pixels, of one's own file that is decoded."""

    coord_dim: ClassVar[int] = 3
    value_dim: ClassVar[int] = 3
    view_dim: ClassVar[int] = 0
    value_span: ClassVar[float] = 2.0
    input_kind: ClassVar[str] = "clip"
    input_dim: ClassVar[int] = 3
    metrics: ClassVar[tuple[str, ...]] = ("clip_psnr", "clip_ssim")
    noun: ClassVar[str] = "clip"
    suffixes: ClassVar[tuple[str, ...]] = clips.WRITTEN_SUFFIXES
    file_options: ClassVar[tuple[str, ...]] = ("frames", "width", "fps")
    unit: ClassVar[str] = "px"
    fine: ClassVar[int] = 2
    max_resolution: ClassVar[int] = 4096  # 3.2 GB in memory for 16 frames; `write` holds one frame

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.size, self.size, self.frames

    def read(self, record: Record, seed: int) -> Signal:
        frames = torch.from_numpy(decode_clip(record, frames=self.frames, size=self.size))
        pixels = frames.permute(3, 0, 1, 2).contiguous()
        return Signal(
            key=record["__key__"],
            seed=torch.tensor(seed),
            position=torch.tensor(0),
            inputs=pixels.to(torch.float32).mul_(2 / 255).sub_(1),
            targets=pixels,
            text=caption(record),
        )

    def open(self, path: Path) -> Signal:
        """The first clip of a video file, an animation or a folder of frames: its central square."""
        form = clips.Form(frames=self.frames)
        try:
            frames = clips.cut(footage.scan(path, max_pixels=self.max_pixels), 0, form)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; give the path of a video") from None
        except ValueError as error:
            kinds = ", ".join(suffix[1:].upper() for suffix in footage.FILE_SUFFIXES)
            raise ValueError(
                f"{path} is not a usable clip of domain.frames={self.frames}: {error}; {kinds} and folders of pictures "
                "are read"
            ) from None
        return self.signal(torch.from_numpy(frames), key=path.name)

    def signal(self, frames: UInt8[Tensor, "frames height width 3"], key: str = "") -> Signal:
        """One's own clip as a batch of one: the central square, resized to what the encoder sees."""
        side = min(frames.shape[1:3])
        top, left = ((extent - side) // 2 for extent in frames.shape[1:3])
        square = frames[:, top : top + side, left : left + side].permute(0, 3, 1, 2)
        if side >= self.size:
            seen = downscale(square, self.size)
        else:
            logger.warning("%s: %d pixels enlarged to domain.size=%d for the encoder", key, side, self.size)
            seen = enlarge(square / 255, self.size) * 2 - 1
        zero = torch.zeros(1, dtype=torch.int64)
        inputs, targets = seen.transpose(0, 1)[None].contiguous(), square.transpose(0, 1)[None]
        return Signal(key=[key], seed=zero, position=zero, inputs=inputs, targets=targets, text=[""])

    def blank(self, count: int) -> tuple[Tensor, Tensor]:
        shape = count, 3, self.frames, self.size, self.size
        return torch.zeros(shape), torch.zeros(shape, dtype=torch.uint8)

    def settle(self, protocol: Mapping[str, Any]) -> "Video":
        """Refuses a set of clips of another shape."""
        form = protocol.get("form") or {}
        for name, own in (("size", self.size), ("frames", self.frames)):
            if (told := form.get(name)) not in (None, own):
                raise ValueError(
                    f"domain.{name}={own}, but the clips of data.train have {name} {told}; try --domain.{name} {told}"
                )
        return self

    @property
    def num_copies(self) -> int:
        return 2 if self.flip else 1

    def copies(self, signal: Signal) -> tuple[Signal, ...]:
        if not self.flip:
            return (signal,)
        assert not isinstance(signal.targets, dict)
        targets = None if signal.targets is None else signal.targets.flip(-1)
        return signal, dataclasses.replace(signal, inputs=signal.inputs.flip(-1), targets=targets)

    def supervise(self, signal: Signal, count: int) -> tuple[Queries, Float[Tensor, "batch points 3"]]:
        """Pixels of the frames: drawn, or all of them frame by frame and row by row where `count` reaches them."""
        return self._pixels(signal, count, "pixels")

    def measurements(self, signal: Signal, count: int | None = None) -> tuple[Queries, Float[Tensor, "batch points 3"]]:
        """The pixels of the frames."""
        return self._pixels(signal, count, "measurements")

    def nll(self, observed: Tensor, values: Tensor) -> Float[Tensor, " batch"]:
        error = observed - values
        return (error.abs() if self.likelihood == "laplace" else 0.5 * error.square()).mean(dim=(1, 2))

    def render(
        self,
        field: Field,
        resolution: int,
        *,
        frames: int | None = None,
        width: int | None = None,
        chunk_points: int = 1 << 16,
    ) -> Float[Tensor, "batch frames 3 height width"]:
        """Clips in [0, 1].

        Args:
            resolution: pixels a side; with `width`, of the height.
            frames: over the same stretch of time; None takes as many as the encoder sees, whatever the resolution.
            width: of frames that are not square; the square of the coordinates is stretched to it.
            chunk_points: bounds the memory beside the result: points of the whole batch evaluated at once.
        """
        frames, width = frames or self.frames, width or resolution
        axes = [
            *(pixel_centres(cells, field.device) for cells in (width, resolution)),
            self._times(frames, field.device),
        ]
        found = torch.empty(len(field), 3, frames * resolution * width, device=field.device)
        for part, values in evaluate_grid(field, axes, chunk_points=chunk_points, title="render"):
            found[:, :, part] = _to_unit(values).transpose(1, 2)
        return found.unflatten(2, (frames, resolution, width)).transpose(1, 2)

    def write(
        self,
        field: Field,
        resolution: int,
        path: Path,
        *,
        frames: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        chunk_points: int = 1 << 16,
    ) -> Float[Tensor, "1 frames 3 height width"]:
        """Render one function into a file frame by frame: of long or large clips, one frame is held. Returns it at a
        bounded resolution.

        Args:
            frames, width: as for `render`.
            fps: frames a second of the file; None keeps the clip's duration.
        """
        if len(field) != 1:
            raise ValueError(f"{len(field)} functions do not fit in one file; take one, such as fields[0]")
        frames, width = frames or self.frames, width or resolution
        x, y = (pixel_centres(cells, field.device) for cells in (width, resolution))
        times = self._times(frames, field.device)

        def rendered() -> Iterator[np.ndarray]:
            for now in tqdm(times.split(1), desc=path.name, unit="frame", delay=3, disable=None, leave=False):
                frame = torch.empty(resolution * width, 3, device=field.device)
                for part, values in evaluate_grid(field, (x, y, now), chunk_points=chunk_points):
                    frame[part] = _to_unit(values[0])
                yield _to_bytes(frame.unflatten(0, (resolution, width)))

        clips.write(rendered(), path, rate=fps or self._rate(frames))
        return self.render(field, min(resolution, 2 * self.size), chunk_points=chunk_points).cpu()

    def options_of(self, suffix: str) -> tuple[str, ...]:
        """Sheets of frames have no rate."""
        return ("frames", "width") if suffix == ".png" else self.file_options

    def check_file(
        self,
        suffix: str,
        resolution: int,
        *,
        frames: int | None = None,
        width: int | None = None,
        fps: float | None = None,
    ) -> None:
        clips.check_rate(suffix, fps or self._rate(frames or self.frames))

    def truth(self, signal: Signal) -> Float[Tensor, "batch frames 3 size size"]:
        return (signal.inputs.transpose(1, 2) + 1) / 2

    def enlarge(self, rendered: Tensor, resolution: int) -> Tensor:
        """Each frame by bicubic interpolation; no new frames."""
        return enlarge(rendered.flatten(0, 1), resolution).unflatten(0, rendered.shape[:2])

    def naive(self, signal: Signal, *, numbers: int) -> dict[str, Tensor]:
        """Two clips without movement; each has more numbers than most latents."""
        truth = self.truth(signal)
        return {
            "the mean frame": truth.mean(1, keepdim=True).expand_as(truth),
            "the first frame repeated": truth[:, :1].expand_as(truth),
        }

    def pictures(self, rendered: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """Four frames from the first to the last, in two rows."""
        frames = rendered.shape[1]
        chosen = rendered[:, [round(i * (frames - 1) / (_SHOWN - 1)) for i in range(_SHOWN)]]
        rows = torch.cat(chosen.unflatten(1, (2, 2)).unbind(2), dim=-1)  # [batch, rows, 3, height, 2 width]
        return torch.cat(rows.unbind(1), dim=-2)

    def shown(self, signal: Signal) -> dict[str, Float[Tensor, "3 height width"]]:
        assert isinstance(signal.targets, Tensor)
        original = signal.targets.transpose(1, 2) / 255
        return {
            f"original, {original.shape[-1]} px": self.pictures(original)[0],
            f"what the encoder saw, {self.size} px": self.pictures(self.truth(signal))[0],
        }

    def thumbnails(self, rendered: Tensor) -> Float[Tensor, "batch numbers"]:
        """Means over blocks of frames and pixels."""
        clip = rendered.transpose(1, 2)
        frames, height, width = (min(most, own) for most, own in zip(_THUMBNAIL, clip.shape[2:], strict=True))
        return F.adaptive_avg_pool3d(clip, (frames, height, width)).flatten(1)

    def save(self, rendered: Float[Tensor, "frames 3 height width"], path: Path) -> None:
        """Write one clip as MP4, WebM, GIF, WebP, or PNG for a sheet of its frames."""
        frames = (_to_bytes(frame.permute(1, 2, 0)) for frame in rendered)
        clips.write(frames, path, rate=self._rate(len(rendered)))

    def _times(self, frames: int, device: torch.device) -> Float[Tensor, " frames"]:
        """Middles of equal steps, but never before the first frame or after the last: nothing was seen there."""
        edge = 1 - 1 / self.frames
        return pixel_centres(frames, device).clamp(-edge, edge)

    def _rate(self, frames: int) -> float:
        return self.fps * frames / self.frames

    def _pixels(self, signal: Signal, count: int | None, purpose: str) -> tuple[Queries, Tensor]:
        batch, device, cells = len(signal), signal.inputs.device, self.frames * self.size**2
        values = signal.inputs.flatten(2).transpose(1, 2)
        if count is None or count >= cells:
            cell = torch.arange(cells, device=device).expand(batch, -1)
        else:
            cell = randomness.integers(signal.seed, purpose, (count,), cells)
            values = values.gather(1, cell[..., None].expand(-1, -1, 3))
        centres = [pixel_centres(axis, device) for axis in self.grid]
        x, y, t = cell % self.size, cell // self.size % self.size, cell // self.size**2
        coords = torch.stack([axis[index] for axis, index in zip(centres, (x, y, t), strict=True)], dim=-1)
        return Queries(coords), values


def decode_clip(record: Record, *, frames: int, size: int) -> UInt8[np.ndarray, "frames size size 3"]:
    """The frames of a record as 8-bit RGB. Raises ValueError naming the key when they cannot be decoded.

    What the file claims to hold is checked before anything of it is decoded.
    """
    key, suffix = record["__key__"], next((s for s in (*_FORMATS, "clip.mp4") if s in record), None)
    if suffix is None:
        raise ValueError(f"{key}: no clip; expected one of {', '.join(_FORMATS)}, clip.mp4 in the shard")
    try:
        if suffix == "clip.mp4":
            return footage.decode_video(record[suffix], frames=frames, size=size)
        with PillowImage.open(io.BytesIO(record[suffix]), formats=(_FORMATS[suffix],)) as strip:
            if strip.size != (size, frames * size):
                raise ValueError(
                    f"{strip.width} x {strip.height} pixels, not domain.frames={frames} frames of domain.size={size} "
                    "below each other; prepare the data so or change the options"
                )
            return np.array(strip.convert("RGB")).reshape(frames, size, size, 3)
    except (OSError, SyntaxError, ValueError, PillowImage.DecompressionBombError) as error:
        raise ValueError(f"{key}.{suffix}: cannot be decoded: {error}") from None


def _to_unit(values: Tensor) -> Tensor:
    return values.add(1).mul(0.5).clamp(0, 1)


def _to_bytes(frame: Float[Tensor, "height width 3"]) -> UInt8[np.ndarray, "height width 3"]:
    return (frame.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
