"""Plane features: axis-aligned planes read at points, and the 2-D convolutional blocks that make them.

A signal over `coord_dim` coordinates is represented on one plane per pair of coordinates: one for images, three for
shapes and videos.

Planes of one size go through a network together, as a stack [batch * planes, channels, height, width]; planes of
different sizes are several stacks.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Stack = Float[Tensor, "_ _ _ _"]
"""Feature maps of planes of one size: [batch * planes, channels, height, width]."""


def plane_axes(coord_dim: int) -> list[tuple[int, int]]:
    """The coordinate pairs that planes span: [(0, 1)] in 2-D; [(0, 1), (0, 2), (1, 2)] in 3-D."""
    return list(itertools.combinations(range(coord_dim), 2))


@dataclass(frozen=True)
class PlaneLayout:
    """How the planes of a latent lie in one tensor [channels, height, width].

    Planes of one size are stacked on channels; planes of different sizes lie below each other on one canvas, so that
    a network over it sees all of them (across the seams, its convolutions mix what is not adjacent).

    Attributes:
        channels: of one plane.
        sizes: (height, width) of each plane.
    """

    channels: int
    sizes: tuple[tuple[int, int], ...]

    @staticmethod
    def of(channels: int, cells: Sequence[int]) -> "PlaneLayout":
        """Planes over the pairs of coordinates with so many cells, x first. Raises ValueError for unequal widths."""
        sizes = tuple((cells[b], cells[a]) for a, b in plane_axes(len(cells)))
        if len({width for _, width in sizes}) > 1:
            raise ValueError(
                f"planes of {', '.join(f'{width} x {height}' for height, width in sizes)} cells do not fit on one "
                "canvas, which needs equal widths: use as many cells along all axes but the last"
            )
        return PlaneLayout(channels, sizes)

    @property
    def is_stacked(self) -> bool:
        return len(set(self.sizes)) == 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        if self.is_stacked:
            return (len(self.sizes) * self.channels, *self.sizes[0])
        return self.channels, sum(height for height, _ in self.sizes), self.sizes[0][1]

    def stacks(self, latent: Float[Tensor, "batch channels height width"]) -> list[Stack]:
        """The planes, those of one size together; in their order if all are of one size, else by first appearance."""
        if self.is_stacked:
            return [latent.unflatten(1, (len(self.sizes), -1)).flatten(0, 1)]
        return stack(latent.split([height for height, _ in self.sizes], dim=2))

    def join(self, stacks: Sequence[Stack], batch: int) -> Float[Tensor, "batch channels height width"]:
        """The inverse of `stacks`, whatever the channels."""
        if self.is_stacked:
            return stacks[0].unflatten(0, (batch, -1)).flatten(1, 2)
        return torch.cat(self.planes(stacks, batch), dim=2)

    def planes(self, stacks: Sequence[Stack], batch: int) -> list[Float[Tensor, "_ _ _ _"]]:
        """Each plane by itself, in the order of `plane_axes`, of whatever resolution the stacks have."""
        parts = {
            size: iter(own.unflatten(0, (batch, -1)).unbind(1))
            for size, own in zip(dict.fromkeys(self.sizes), stacks, strict=True)
        }
        return [next(parts[size]) for size in self.sizes]


def stack(planes: Sequence[Float[Tensor, "_ _ _ _"]]) -> list[Stack]:
    """Planes of one size together, those of the first one's size first."""
    together: dict[torch.Size, list[Tensor]] = {}
    for plane in planes:
        together.setdefault(plane.shape[-2:], []).append(plane)
    return [torch.stack(same, dim=1).flatten(0, 1) for same in together.values()]


def interpolate(
    planes: Float[Tensor, "batch channels height width"], coords: Float[Tensor, "batch points 2"]
) -> Float[Tensor, "batch points channels"]:
    """Bilinear interpolation at (x, y) in [-1, 1]^2 (DDMI, section 3.1); cell centres are `pixel_centres`."""
    grid = coords[:, :, None].to(planes.dtype)
    return F.grid_sample(planes, grid, align_corners=False, padding_mode="border")[..., 0].transpose(1, 2)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm_1 = group_norm(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = group_norm(out_channels)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_2.weight)  # every block starts as its shortcut
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels2 height width"]:
        hidden = self.conv_1(F.silu(self.norm_1(x)))
        hidden = self.conv_2(F.silu(self.norm_2(hidden)))
        return self.shortcut(x) + hidden


class PlaneAttention(nn.Module):
    """Single-head self-attention over all cells of all planes of a signal."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, stacks: list[Stack], batch: int) -> list[Stack]:
        tokens = [self._tokens(self.qkv(self.norm(x)), batch) for x in stacks]
        q, k, v = torch.cat(tokens, dim=1).chunk(3, dim=-1)  # [batch, cells of all planes, channels]
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        found = []
        for x, part in zip(stacks, mixed.split([t.shape[1] for t in tokens], dim=1), strict=True):
            cells = part.unflatten(1, (len(x) // batch, -1)).flatten(0, 1)  # [batch * planes, cells, channels]
            found.append(x + self.out(cells.transpose(1, 2).unflatten(2, x.shape[-2:])))
        return found

    def _tokens(self, x: Stack, batch: int) -> Float[Tensor, "batch cells channels"]:
        return x.flatten(2).transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)


class Middle(nn.ModuleList):
    """Residual block, attention over all planes, residual block: the coarsest level of encoder and decoder."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            [ResidualBlock(channels, channels), PlaneAttention(channels), ResidualBlock(channels, channels)]
        )

    def forward(self, stacks: list[Stack], batch: int) -> list[Stack]:
        first, attention, second = self
        return [second(x) for x in attention([first(x) for x in stacks], batch)]


class Upsample(nn.Module):
    """Twice the cells a side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PlaneDecoder(nn.Module):
    """Latent planes to basis fields, coarse to fine: a convolutional decoder read out at its last levels.

    The feature maps of the last `num_fields` levels each pass a 1x1 convolution: the hierarchically decomposed basis
    fields (HDBF; DDMI, section 3.1).

    Args:
        multipliers: channels of each level over `channels`, finest level first, as in the published configs.
    """

    def __init__(
        self,
        latent_channels: int,
        *,
        channels: int,
        multipliers: tuple[int, ...],
        num_blocks: int,
        num_fields: int,
        field_channels: int,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in reversed(multipliers)]
        self.stem = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.middle = Middle(widths[0])
        self.levels, self.heads = nn.ModuleList(), nn.ModuleList()
        for index, width in enumerate(widths):
            previous = widths[max(index - 1, 0)]
            blocks = [Upsample(previous)] if index > 0 else []
            blocks += [ResidualBlock(previous if i == 0 else width, width) for i in range(num_blocks + 1)]
            self.levels.append(nn.Sequential(*blocks))
            if index >= len(widths) - num_fields:
                self.heads.append(nn.Sequential(group_norm(width), nn.SiLU(), nn.Conv2d(width, field_channels, 1)))

    def forward(self, stacks: list[Stack], batch: int) -> list[list[Stack]]:
        """For each scale, coarse to fine, the fields of every stack."""
        hidden = self.middle([self.stem(x) for x in stacks], batch)
        fields, skip = [], len(self.levels) - len(self.heads)
        for index, level in enumerate(self.levels):
            hidden = [level(x) for x in hidden]
            if index >= skip:
                fields.append([self.heads[index - skip](x) for x in hidden])
        return fields


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or the largest power of two that divides narrow models' channels."""
    groups = 32
    while channels % groups:
        groups //= 2
    return nn.GroupNorm(groups, channels, eps=1e-6)
