"""Images: functions of the plane to colour, measured by pixels."""

import dataclasses
import io
import logging
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image as PillowImage
from torch import Tensor

from distributed_inr import randomness
from distributed_inr.config import config
from distributed_inr.domains.domain import Domain, Queries, Record, Signal, caption, evaluate_grid, pixel_centres
from distributed_inr.field import Field
from distributed_inr.raw import pictures
from distributed_inr.raw.pictures import MAX_PIXELS

logger = logging.getLogger(__name__)

_THUMBNAIL = 64
"""Pixels a side at which pictures are compared with training pictures."""

_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""Member suffix -> the one decoder that is tried on it."""


@config
class Image(Domain):
    """RGB images in [-1, 1]; the encoder sees `size` pixels, the field is trained on `size` and on finer pixels."""

    kind: Literal["image"] = "image"
    size: Annotated[int, pydantic.Field(gt=0)] = 64
    """Base resolution in pixels: what the encoder sees."""
    source_size: Annotated[int, pydantic.Field(gt=0)] = 128
    """Resolution in pixels of the square pictures in the shards; targets are taken from it, never enlarged."""
    scales: tuple[float, ...] = (1.0, 1.5, 2.0)
    """Target resolutions as multiples of `size`; those that the source does not have are left out (DDMI, appendix)."""
    scale_weights: tuple[float, ...] = (0.3, 0.3, 0.4)
    """Probability of each of `scales`, renormalised over those that the source has."""
    likelihood: Literal["gaussian", "laplace"] = "gaussian"
    """Of a pixel, at unit scale: gaussian is half the squared error, laplace the absolute error (the public code)."""
    flip: bool = True
    """Train on mirrored copies too."""
    max_pixels: int = MAX_PIXELS
    """Largest picture, in pixels, that is decoded; larger ones count as bad samples."""

    coord_dim: ClassVar[int] = 2
    value_dim: ClassVar[int] = 3
    view_dim: ClassVar[int] = 1
    value_span: ClassVar[float] = 2.0
    input_kind: ClassVar[str] = "pixels"
    input_dim: ClassVar[int] = 3
    metrics: ClassVar[tuple[str, ...]] = ("psnr", "ssim")
    noun: ClassVar[str] = "picture"
    suffixes: ClassVar[tuple[str, ...]] = (".png", ".jpg", ".webp")
    unit: ClassVar[str] = "px"
    fine: ClassVar[int] = 4
    max_resolution: ClassVar[int] = 16_384  # 3.2 GB in memory

    def __post_init__(self) -> None:
        if len(self.scales) != len(self.scale_weights):
            raise ValueError(
                f"domain.scale_weights has {len(self.scale_weights)} entries and domain.scales {len(self.scales)}; "
                "give one weight per scale"
            )
        if self.scales[0] != 1.0 or list(self.scales) != sorted(set(self.scales)):
            raise ValueError(f"domain.scales={self.scales} must rise from 1.0; try 1.0 1.5 2.0")
        if self.source_size < self.size:
            raise ValueError(
                f"domain.source_size={self.source_size} is smaller than domain.size={self.size}; "
                "pixels are never invented: prepare larger pictures or lower domain.size"
            )

    @property
    def grid(self) -> tuple[int, int]:
        return self.size, self.size

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Target resolutions in pixels that the source has."""
        return tuple(round(self.size * s) for s in self.scales if round(self.size * s) <= self.source_size)

    def read(self, record: Record, seed: int) -> Signal:
        pixels = decode_image(record, size=self.source_size, max_pixels=self.max_pixels)
        return Signal(
            key=record["__key__"],
            seed=torch.tensor(seed),
            position=torch.tensor(0),
            inputs=downscale(pixels[None], self.size)[0],
            targets=pixels,
            text=caption(record),
        )

    def open(self, path: Path) -> Signal:
        """A picture file of any usual kind: upright, its central square."""
        try:
            picture = pictures.decode(path.read_bytes(), max_pixels=self.max_pixels)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; give the path of a file") from None
        except ValueError as error:
            raise ValueError(
                f"{path} is not a usable picture: {error}; PNG, JPEG, WebP, GIF, BMP and TIFF are read"
            ) from None
        pixels = torch.from_numpy(np.array(picture))
        return self.signal(pixels.permute(2, 0, 1), key=path.name)

    def blank(self, count: int) -> tuple[Tensor, Tensor]:
        size, source_size = self.size, self.source_size
        return torch.zeros(count, 3, size, size), torch.zeros(count, 3, source_size, source_size, dtype=torch.uint8)

    def signal(self, pixels: UInt8[Tensor, "3 height width"], key: str = "") -> Signal:
        """One's own picture as a batch of one: the central square, resized to what the encoder sees."""
        side = min(pixels.shape[-2:])
        top, left = ((extent - side) // 2 for extent in pixels.shape[-2:])
        square = pixels[None, :, top : top + side, left : left + side]
        if side >= self.size:
            inputs = downscale(square, self.size)
        else:
            logger.warning("%s: %d pixels enlarged to domain.size=%d for the encoder", key, side, self.size)
            inputs = F.interpolate(_to_unit(square), size=(self.size,) * 2, mode="bicubic").clamp(-1, 1)
        zero = torch.zeros(1, dtype=torch.int64)
        return Signal(key=[key], seed=zero, position=zero, inputs=inputs, targets=square, text=[""])

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
        """Pixels of a base-sized crop of the picture at a random one of `resolutions` (the whole picture at scale 1).

        `count` >= size^2 takes the whole crop, row by row, so that losses on grids can be computed; fewer are drawn.
        """
        assert isinstance(signal.targets, Tensor)
        batch, device, size = len(signal), signal.inputs.device, self.size
        weights = torch.tensor(self.scale_weights[: len(self.resolutions)], dtype=torch.float64).cumsum(0)
        thresholds = (weights / weights[-1]).to(device=device, dtype=torch.float32)[:-1]
        level = torch.bucketize(randomness.uniform(signal.seed, "scale"), thresholds, right=True)
        resolution = torch.tensor(self.resolutions, device=device)[level]
        corner = randomness.uniform(signal.seed, "crop", (2,)) * (resolution - size + 1)[:, None]
        x0, y0 = corner.long().unbind(1)

        if count >= size * size:
            cell = torch.arange(size * size, device=device).expand(batch, -1)
        else:
            cell = randomness.integers(signal.seed, "pixels", (count,), size * size)
        x, y = x0[:, None] + cell % size, y0[:, None] + cell // size  # [batch, points], in target pixels

        values = torch.empty(batch, cell.shape[1], 3, device=device)
        for index, pixels in enumerate(self.resolutions):
            rows = (level == index).nonzero().flatten()
            picture = downscale(signal.targets[rows], pixels).flatten(2)  # [rows, 3, pixels^2]
            where = (y[rows] * pixels + x[rows])[:, None].expand(-1, 3, -1)
            values[rows] = picture.gather(2, where).transpose(1, 2)

        coords = (torch.stack([x, y], dim=-1) * 2 + 1) / resolution[:, None, None] - 1
        return Queries(coords, self._view(resolution, cell.shape[1])), values

    def measurements(self, signal: Signal, count: int | None = None) -> tuple[Queries, Float[Tensor, "batch points 3"]]:
        """The pixels of the picture at its base resolution."""
        batch, size, values = len(signal), self.size, signal.inputs.flatten(2).transpose(1, 2)
        centres = pixel_centres(size, values.device)
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        coords = torch.stack([x, y], dim=-1).view(1, -1, 2).expand(batch, -1, -1)
        if count is not None and count < size * size:
            cell = randomness.integers(signal.seed, "measurements", (count,), size * size)[..., None]
            coords, values = coords.gather(1, cell.expand(-1, -1, 2)), values.gather(1, cell.expand(-1, -1, 3))
        scale = torch.full((batch,), size, device=values.device)
        return Queries(coords, self._view(scale, coords.shape[1])), values

    def nll(self, observed: Tensor, values: Tensor) -> Float[Tensor, " batch"]:
        error = observed - values
        return (error.abs() if self.likelihood == "laplace" else 0.5 * error.square()).mean(dim=(1, 2))

    def render(
        self, field: Field, resolution: int, *, chunk_points: int = 1 << 16
    ) -> Float[Tensor, "batch 3 resolution resolution"]:
        """Pictures in [0, 1]. `chunk_points` bounds the memory: points of the whole batch evaluated at once."""
        centres = pixel_centres(resolution, field.device)
        found = torch.empty(len(field), 3, resolution * resolution, device=field.device)
        scale = self._view(torch.full((len(field),), resolution, device=field.device), 1)[:, 0]
        for part, values in evaluate_grid(field, (centres, centres), scale, chunk_points=chunk_points):
            found[:, :, part] = values.transpose(1, 2).add(1).mul(0.5).clamp(0, 1)
        return found.unflatten(2, (resolution, resolution))

    def truth(self, signal: Signal) -> Float[Tensor, "batch 3 size size"]:
        return (signal.inputs + 1) / 2

    def finer_truth(self, signal: Signal) -> tuple[int, Tensor] | None:
        finest = max(self.resolutions)
        if finest == self.size:
            return None
        assert isinstance(signal.targets, Tensor)
        return finest, (downscale(signal.targets, finest) + 1) / 2

    def enlarge(self, rendered: Tensor, resolution: int) -> Tensor:
        """Bicubic."""
        return enlarge(rendered, resolution)

    def naive(self, signal: Signal, *, numbers: int) -> dict[str, Tensor]:
        """Bicubic from n x n colours that are at most as many numbers (antialiased)."""
        truth = self.truth(signal)
        side = min(max(1, math.isqrt(numbers // 3)), truth.shape[-1])
        small = F.interpolate(truth, size=(side, side), mode="bicubic", antialias=True)
        return {f"bicubic from {side} x {side} colours": enlarge(small, truth.shape[-1])}

    def pictures(self, rendered: Tensor) -> Tensor:
        return rendered

    def shown(self, signal: Signal) -> dict[str, Tensor]:
        assert isinstance(signal.targets, Tensor)
        original, seen = signal.targets[0] / 255, self.truth(signal)[0]
        return {f"original, {original.shape[-1]} px": original, f"what the encoder saw, {self.size} px": seen}

    def thumbnails(self, rendered: Tensor) -> Tensor:
        side = min(_THUMBNAIL, rendered.shape[-1])
        if side < rendered.shape[-1]:
            rendered = F.interpolate(rendered, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return rendered.flatten(1)

    def save(self, rendered: Float[Tensor, "3 height width"], path: Path) -> None:
        """Write one picture as PNG (or whatever the suffix names)."""
        to_pillow(rendered).save(path)

    def _view(self, resolution: Tensor, points: int) -> Float[Tensor, "batch points 1"]:
        """log2 of the resolution over the base's, held at the finest one trained on."""
        finest = max(self.resolutions)
        scale = (resolution.clamp(max=finest) / self.size).log2()
        return scale[:, None, None].expand(-1, points, 1)


def decode_image(record: Record, *, size: int, max_pixels: int) -> UInt8[Tensor, "3 size size"]:
    """The picture of a record as 8-bit RGB. Raises ValueError naming the key when it cannot be decoded.

    What the file claims to hold is checked before anything of it is decoded.
    """
    suffix = next((s for s in _FORMATS if s in record), None)
    if suffix is None:
        raise ValueError(f"{record['__key__']}: no picture; expected one of {', '.join(_FORMATS)} in the shard")
    try:
        with PillowImage.open(io.BytesIO(record[suffix]), formats=(_FORMATS[suffix],)) as picture:
            if picture.width * picture.height > max_pixels:
                raise ValueError(f"{picture.width} x {picture.height} pixels, above domain.max_pixels={max_pixels}")
            if picture.size != (size, size):
                raise ValueError(
                    f"{picture.width} x {picture.height} pixels, domain.source_size={size}; prepare the data at that "
                    "size or change the option"
                )
            pixels = np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, PillowImage.DecompressionBombError) as error:
        raise ValueError(f"{record['__key__']}.{suffix}: cannot be decoded: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_pillow(picture: Float[Tensor, "3 height width"]) -> PillowImage.Image:
    """A picture in [0, 1] as 8-bit RGB; what lies outside is cut off."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return PillowImage.fromarray(pixels)


def enlarge(rendered: Float[Tensor, "batch 3 height width"], size: int) -> Float[Tensor, "batch 3 size size"]:
    """Bicubic interpolation to `size` pixels a side."""
    return F.interpolate(rendered, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)


def downscale(pixels: UInt8[Tensor, "batch 3 height width"], size: int) -> Float[Tensor, "batch 3 size size"]:
    """Reduce 8-bit pictures to `size` pixels (antialiased bicubic) and map them to [-1, 1]; never enlarges."""
    assert size <= pixels.shape[-1]
    pictures = _to_unit(pixels)
    if size == pixels.shape[-1] or len(pixels) == 0:
        return pictures[..., :size, :size]
    return F.interpolate(pictures, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def _to_unit(pixels: Tensor) -> Tensor:
    return pixels.to(torch.float32).mul_(2 / 255).sub_(1)
