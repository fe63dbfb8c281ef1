"""Rays of scenes: those drawn from posed views to train on, those of whole views to render, and what fields are along
them.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from tqdm import tqdm

from distributed_inr import randomness
from distributed_inr.domains import rays
from distributed_inr.field import Field


def draw(
    views: UInt8[Tensor, "batch views 3 side side"],
    cameras: Float[Tensor, "batch views 20"],
    seeds: Int64[Tensor, " batch"],
    count: int,
    *,
    object_share: float,
    ground: float,
) -> tuple[Float[Tensor, "batch rays 3"], Float[Tensor, "batch rays 3"], Float[Tensor, "batch rays 3"]]:
    """Origins, directions and colours of `count` rays of each row's views.

    Args:
        object_share: of the rays, how many are drawn from pixels that do not show the ground.
    """
    side, pixels = views.shape[-1], views.movedim(2, -1).flatten(1, 3)  # [batch, views * side^2, 3]
    total, num_of_object = pixels.shape[1], round(object_share * count)
    place = randomness.integers(seeds, "rays", (count,), total)
    if num_of_object:
        ranks = (pixels != round(255 * ground)).any(-1).cumsum(1)
        # In whole numbers: there are more pixels than float32's 24 bits tell apart evenly.
        wanted = randomness.integers(seeds, "object rays", (num_of_object,), 2**31) * ranks[:, -1:] >> 31
        found = torch.searchsorted(ranks, wanted + 1)
        some = ranks[:, -1:] > 0  # of views that are all ground, any pixels are as good
        place = torch.cat([torch.where(some, found, place[:, :num_of_object]), place[:, num_of_object:]], dim=1)
    colours = pixels.gather(1, place[..., None].expand(-1, -1, 3)).float() / 255
    return *rays.pixel_rays(cameras, place, side), colours


def ask(
    field: Field,
    origins: Float[Tensor, "batch rays 3"],
    directions: Float[Tensor, "batch rays 3"],
    depths: Float[Tensor, "batch rays steps"] | int,
    *,
    bounds: rays.Bounds,
    density: Callable[[Tensor], Tensor],
) -> tuple[
    Float[Tensor, "batch rays steps"],
    Float[Tensor, "batch rays steps 3"],
    Float[Tensor, "batch rays"],
    Float[Tensor, "batch rays"],
]:
    """Densities and colours along rays, the depths at which these enter the bounds, and the lengths of their steps.

    Args:
        depths: where each ray is asked, once in each of equal steps; a number stands for the middles of so many.
        density: of the field's first value, for each unit of length.
    """
    near, far = rays.interval(origins, directions, bounds)
    depths = rays.middles(near, far, depths) if isinstance(depths, int) else depths
    places = origins[:, :, None] + directions[:, :, None] * depths[..., None]
    view = directions[:, :, None].expand_as(places).flatten(1, 2)
    # Rays that miss the bounds are asked outside of them; their steps have no length.
    values = field(places.clamp(-1, 1).flatten(1, 2), view).unflatten(1, depths.shape[1:])
    return density(values[..., 0]), values[..., 1:].sigmoid(), near, (far - near) / depths.shape[-1]


def pieces(
    cameras: Float[Tensor, "batch views 20"], resolution: int, most: int
) -> Iterator[tuple[slice, Float[Tensor, "batch rays 3"], Float[Tensor, "batch rays 3"]]]:
    """All rays of views in pieces of at most so many of the whole batch: their place among the views' pixels, origins
    and directions.

    A bar shows on a terminal where it takes more than a few seconds.
    """
    total, step = cameras.shape[1] * resolution**2, max(1, most // len(cameras))
    with tqdm(total=total, desc="views", unit="ray", unit_scale=True, delay=3, disable=None, leave=False) as bar:
        for start in range(0, total, step):
            pixels = torch.arange(start, min(start + step, total), device=cameras.device)
            origins, directions = rays.pixel_rays(cameras, pixels.expand(len(cameras), -1), resolution)
            yield slice(start, start + len(pixels)), origins, directions
            bar.update(len(pixels))
