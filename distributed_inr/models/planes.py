"""Plane features: axis-aligned planes read at points, and the 2-D convolutional blocks that make them.

A signal over `coord_dim` coordinates is represented on one plane per pair of coordinates: one for images, three for
shapes and videos.
"""

import itertools

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def plane_axes(coord_dim: int) -> list[tuple[int, int]]:
    """The coordinate pairs that planes span: [(0, 1)] in 2-D; [(0, 1), (0, 2), (1, 2)] in 3-D."""
    return list(itertools.combinations(range(coord_dim), 2))


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
    """Single-head self-attention over all cells of a plane."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # [batch, cells, channels]
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(mixed.transpose(1, 2).unflatten(2, x.shape[-2:]))


class Middle(nn.Sequential):
    """Residual block, attention, residual block: the coarsest level of encoder and decoder."""

    def __init__(self, channels: int) -> None:
        super().__init__(ResidualBlock(channels, channels), PlaneAttention(channels), ResidualBlock(channels, channels))


class Upsample(nn.Module):
    """Twice the cells a side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PlaneDecoder(nn.Module):
    """Latent plane to basis fields, coarse to fine: a convolutional decoder read out at its last levels.

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

    def forward(
        self, latent: Float[Tensor, "batch channels height width"]
    ) -> list[Float[Tensor, "batch channels2 h w"]]:
        hidden = self.middle(self.stem(latent))
        fields, skip = [], len(self.levels) - len(self.heads)
        for index, level in enumerate(self.levels):
            hidden = level(hidden)
            if index >= skip:
                fields.append(self.heads[index - skip](hidden))
        return fields


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or the largest power of two that divides narrow models' channels."""
    groups = 32
    while channels % groups:
        groups //= 2
    return nn.GroupNorm(groups, channels, eps=1e-6)
