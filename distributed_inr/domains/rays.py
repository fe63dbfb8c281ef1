"""Rays of cameras, and what is seen along them: volume rendering (NeRF; Mildenhall et al., 2020, section 4).

A camera is 20 numbers: the camera-to-world matrix [4, 4] row by row, in OpenGL axes (x right, y up, it looks along -z),
then fx, fy, cx, cy in units of the picture's side, the principal point from the upper left corner (x right, y down).
The world's z axis points up.

A ray is asked at one depth in each of equal steps between where it enters and leaves the bounds. Density and colour are
taken as constant within a step, so that constant fields are integrated exactly.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Bounds = Literal["sphere", "box"]


def camera_rays(
    cameras: Float[Tensor, "*rays 20"], places: Float[Tensor, "*rays 2"]
) -> tuple[Float[Tensor, "*rays 3"], Float[Tensor, "*rays 3"]]:
    """Origins and unit directions of the rays through places (x, y) in [0, 1]^2 of the pictures, y down."""
    pose = cameras[..., :16].unflatten(-1, (4, 4))
    focal, centre = cameras[..., 16:18], cameras[..., 18:20]
    x, y = ((places - centre) / focal).unbind(-1)
    own = torch.stack([x, -y, -torch.ones_like(x)], dim=-1)
    directions = (pose[..., :3, :3] @ own[..., None])[..., 0]
    return pose[..., :3, 3], directions / directions.norm(dim=-1, keepdim=True)


def pixel_rays(
    cameras: Float[Tensor, "batch views 20"], pixels: Int64[Tensor, "batch rays"], side: int
) -> tuple[Float[Tensor, "batch rays 3"], Float[Tensor, "batch rays 3"]]:
    """Origins and unit directions of the rays through the centres of pixels, which are numbered view by view and row by
    row.
    """
    own = cameras.gather(1, (pixels // side**2)[..., None].expand(-1, -1, cameras.shape[-1]))
    column, row = pixels % side, pixels // side % side
    return camera_rays(own, (torch.stack([column, row], dim=-1) + 0.5) / side)


def interval(
    origins: Float[Tensor, "*rays 3"], directions: Float[Tensor, "*rays 3"], bounds: Bounds
) -> tuple[Float[Tensor, "*rays"], Float[Tensor, "*rays"]]:
    """Near and far: the part of each ray in front of its origin that lies inside the unit sphere, or [-1, 1]^3.

    Equal where there is none.
    """
    if bounds == "sphere":
        along = -(origins * directions).sum(-1)
        half = (along.square() - origins.square().sum(-1) + 1).clamp(min=0).sqrt()
        return (along - half).clamp(min=0), (along + half).clamp(min=0)
    tiny = torch.finfo(directions.dtype).tiny ** 0.5  # along an axis: the other walls are infinitely far
    safe = torch.where(directions.abs() < tiny, tiny, directions)
    walls = torch.stack([(-1 - origins) / safe, (1 - origins) / safe])
    near = walls.amin(0).amax(-1).clamp(min=0)
    return near, torch.maximum(walls.amax(0).amin(-1), near)


def depths_between(
    near: Float[Tensor, "*rays"], far: Float[Tensor, "*rays"], within: Float[Tensor, "*rays steps"]
) -> Float[Tensor, "*rays steps"]:
    """A depth in each of equal steps from near to far; `within` in [0, 1) says where in its step."""
    count = within.shape[-1]
    share = (torch.arange(count, device=within.device, dtype=within.dtype) + within) / count
    return near[..., None] + (far - near)[..., None] * share


def middles(near: Float[Tensor, "*rays"], far: Float[Tensor, "*rays"], count: int) -> Float[Tensor, "*rays steps"]:
    """The depths in the middles of `count` equal steps."""
    return depths_between(near, far, near.new_full((*near.shape, count), 0.5))


def transmittance(
    density: Float[Tensor, "*rays steps"], length: Float[Tensor, "*rays"]
) -> Float[Tensor, "*rays steps_and_end"]:
    """The share of light that reaches the start of each step, and the end of the last; `length` is a step's."""
    passed = (density * length[..., None]).cumsum(-1)
    return torch.cat([torch.zeros_like(passed[..., :1]), passed], dim=-1).neg().exp()


def composite(
    density: Float[Tensor, "*rays steps"],
    colours: Float[Tensor, "*rays steps 3"],
    length: Float[Tensor, "*rays"],
    ground: float,
) -> Float[Tensor, "*rays 3"]:
    """The colour of each ray: steps hide what is behind them, and what passes all shows the ground."""
    reaching = transmittance(density, length)
    weights = reaching[..., :-1] * -(-density * length[..., None]).expm1()
    return (weights[..., None] * colours).sum(-2) + reaching[..., -1:] * ground


def expected_depth(
    density: Float[Tensor, "*rays steps"], near: Float[Tensor, "*rays"], length: Float[Tensor, "*rays"]
) -> Float[Tensor, "*rays"]:
    """How far light comes on average, that which passes all counted as stopped at far: near + the integral of the
    transmittance, which within a step of constant density is T l (1 - e^-x) / x with x the density times the length l.
    """
    x = density * length[..., None]
    share = torch.where(x > 1e-4, -(-x).expm1() / x.clamp(min=1e-4), 1 - x / 2)
    return near + (transmittance(density, length)[..., :-1] * share).sum(-1) * length


def orbit(count: int, *, elevation: float, radius: float, angle: float) -> Float[Tensor, "count 20"]:
    """Cameras on a circle around the z axis that look at the origin, the first above the -y axis, counter-clockwise.

    Args:
        elevation: in degrees above the ground plane.
        angle: of view, in radians.
    """
    azimuths = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count) - math.pi / 2
    height = math.radians(elevation)
    flat, up = math.cos(height) * torch.ones_like(azimuths), math.sin(height) * torch.ones_like(azimuths)
    back = torch.stack([flat * azimuths.cos(), flat * azimuths.sin(), up], dim=-1)
    right = torch.stack([-azimuths.sin(), azimuths.cos(), torch.zeros_like(azimuths)], dim=-1)
    pose = torch.zeros(count, 4, 4, dtype=torch.float64)
    pose[:, :3] = torch.stack([right, back.cross(right, dim=-1), back, radius * back], dim=-1)
    pose[:, 3, 3] = 1
    focal = 0.5 / math.tan(angle / 2)
    lens = torch.tensor([focal, focal, 0.5, 0.5], dtype=torch.float64).expand(count, -1)
    return torch.cat([pose.flatten(1), lens], dim=1).float()
