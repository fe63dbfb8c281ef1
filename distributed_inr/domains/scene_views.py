"""Views of scenes as pictures: beside each other, or one after the other as a film."""

import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from distributed_inr.domains.image import to_pillow
from distributed_inr.raw import clips

FILM_SUFFIXES = (".mp4", ".webm", ".gif", ".webp")
SUFFIXES = (*FILM_SUFFIXES, ".png")
FRAME_RATE = 12.0


def beside(
    views: Float[Tensor, "batch views 3 height width"], *, ground: float
) -> Float[Tensor, "batch 3 rows columns"]:
    """The views of each in rows of at most eight; what is left of the last row shows the ground."""
    batch, count, _, height, width = views.shape
    columns = math.ceil(count / math.ceil(count / 8))
    missing = -count % columns
    if missing:
        views = torch.cat([views, views.new_full((batch, missing, 3, height, width), ground)], dim=1)
    rows = views.unflatten(1, (-1, columns)).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(batch, 3, -1, columns * width)


def write(views: Float[Tensor, "views 3 height width"], path: Path, *, ground: float, rate: float = FRAME_RATE) -> None:
    """Write views one after the other as a film (.mp4, .webm, .gif, .webp), or beside each other as .png."""
    suffix = path.suffix.lower()
    if suffix == ".png":
        to_pillow(beside(views[None], ground=ground)[0]).save(path)
    elif suffix in FILM_SUFFIXES:
        clips.write((views.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).numpy(), path, rate=rate)
    else:
        raise ValueError(f"{path.name}: views are written as .png, {', '.join(FILM_SUFFIXES)}; use one of these")
