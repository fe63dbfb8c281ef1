"""Views of scenes as pictures: larger or smaller, beside each other, or one after the other as a film."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from PIL import Image
from torch import Tensor

from distributed_inr.raw import clips

FILM_SUFFIXES = (".mp4", ".webm", ".gif", ".webp")
SUFFIXES = (*FILM_SUFFIXES, ".png")
FRAME_RATE = 12.0


def beside(views: Num[Tensor, "batch views 3 height width"], *, ground: float) -> Num[Tensor, "batch 3 rows columns"]:
    """The views of each in rows of at most eight; what is left of the last row shows the ground."""
    batch, count, _, height, width = views.shape
    columns = math.ceil(count / math.ceil(count / 8))
    missing = -count % columns
    if missing:
        views = torch.cat([views, views.new_full((batch, missing, 3, height, width), ground)], dim=1)
    rows = views.unflatten(1, (-1, columns)).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(batch, 3, -1, columns * width)


def resized(views: Float[Tensor, "batch views 3 side side"], side: int) -> Float[Tensor, "batch views 3 side2 side2"]:
    """Bicubic, each view; antialiased where that makes it smaller."""
    if side == views.shape[-1]:
        return views
    is_smaller, flat = side < views.shape[-1], views.flatten(0, 1)
    found = F.interpolate(flat, size=(side, side), mode="bicubic", align_corners=False, antialias=is_smaller)
    return found.clamp(0, 1).unflatten(0, views.shape[:2])


def write(
    views: Iterable[Float[Tensor, "3 height width"]], path: Path, *, ground: float, rate: float = FRAME_RATE
) -> None:
    """Write views one after the other as a film (.mp4, .webm, .gif, .webp), or beside each other as .png.

    They are taken one by one. Of a MP4 or WebM few are held, of the others all, as bytes.
    """
    suffix = path.suffix.lower()
    shots = ((view.clamp(0, 1) * 255).round().to(torch.uint8) for view in views)
    if suffix == ".png":
        sheet = beside(torch.stack(list(shots))[None], ground=255 * ground)[0]
        Image.fromarray(sheet.movedim(0, -1).numpy()).save(path)
    elif suffix in FILM_SUFFIXES:
        clips.write((shot.movedim(0, -1).numpy() for shot in shots), path, rate=rate)
    else:
        raise ValueError(f"{path.name}: views are written as .png, {', '.join(FILM_SUFFIXES)}; use one of these")
