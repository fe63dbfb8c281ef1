"""A tiny domain of clips, and clips of it: noise, a moving square, and colours that say where one is."""

import numpy as np
import torch
from torch import Tensor

from distributed_inr.domains import Signal, collate
from distributed_inr.domains.domain import pixel_centres
from distributed_inr.domains.video import Video
from distributed_inr.field import Field
from distributed_inr.randomness import sample_seed
from distributed_inr.raw import clips

DOMAIN = Video(size=8, frames=6)


def record(frames: np.ndarray, encoding: str = "webp") -> dict[str, object]:
    suffix, content = clips.encode(frames, clips.Form(encoding=encoding))
    return {"__key__": "k", suffix: content, "txt": b"a band"}


def noise(count: int = 6, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def signals(count: int, domain: Video = DOMAIN) -> Signal:
    frames = (noise(domain.frames, domain.size, i) for i in range(count))
    return collate([domain.read(record(own), sample_seed(0, i)) for i, own in enumerate(frames)])


def analytic(domain: Video, batch: int = 1) -> Field:
    """Colours that say where one is: red rises with x, green with y, blue with t."""

    def function(parameters: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
        return coords * parameters[0][:, None]

    return Field(function, (torch.linspace(0.5, 1.0, batch)[:, None].expand(-1, 3),), domain)


def slanted(frames: int, size: int, width: int | None = None) -> Tensor:
    """What `analytic` looks like: [frames, 3, height, width]."""
    times = pixel_centres(frames).clamp(
        -5 / 6, 5 / 6
    )  # of a domain of six frames, no time before the first or the last
    t, y, x = torch.meshgrid(times, pixel_centres(size), pixel_centres(width or size), indexing="ij")
    return (torch.stack([x, y, t], dim=1) / 2 + 1) / 2


def moving(count: int, size: int, seed: int = 0) -> np.ndarray:
    """A bright square that moves to the right on a ground that is darker above: asymmetric in x, y and t."""
    frames = np.zeros((count, size, size, 3), np.uint8)
    frames[..., 2] = np.linspace(40, 200, size, dtype=np.uint8)[:, None]
    for number in range(count):
        left = 1 + number * (size // 2) // count + seed
        frames[number, size // 4 : size // 2, left : left + size // 4] = (255, 220 - 20 * number, 30)
    return frames
