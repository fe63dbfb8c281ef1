"""Encoders of the D2C-VAE: from what a sensor measured to feature maps of a latent's planes.

A config says how many `cells` along each axis the planes have for a domain's grid, and builds a module from
`Signal.inputs` to stacks of planes (`planes.stack`) of so many channels.
"""

from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distributed_inr.config import config
from distributed_inr.domains import Domain
from distributed_inr.models.planes import Middle, ResidualBlock, Stack, group_norm, plane_axes, stack
from distributed_inr.models.torchvision_cpu import import_torchvision


@config
class PixelEncoder:
    """The paper's convolutional encoder (DDMI, section 4; sizes of the public configs)."""

    kind: Literal["pixels"] = "pixels"
    channels: Annotated[int, pydantic.Field(gt=0)] = 128
    """Channels of the finest level."""
    multipliers: tuple[int, ...] = (1, 2, 4)
    """Channels of each level over `channels`, finest first; every level after the first halves the resolution."""
    num_blocks: Annotated[int, pydantic.Field(gt=0)] = 2
    """Residual blocks a level."""

    input_kind: ClassVar[str] = "pixels"

    @property
    def reduction(self) -> int:
        """Input pixels a side of one latent cell."""
        return 2 ** (len(self.multipliers) - 1)

    def cells(self, domain: Domain) -> tuple[int, ...]:
        return _reduced(domain, self.reduction)

    def build(self, domain: Domain, out_channels: int) -> nn.Module:
        return ConvolutionalEncoder(
            domain.input_dim,
            channels=self.channels,
            multipliers=self.multipliers,
            num_blocks=self.num_blocks,
            out_channels=out_channels,
        )


@config
class TimmEncoder:
    """Any timm backbone that gives feature maps; its maps of the chosen stride, through a 1x1 convolution."""

    kind: Literal["timm"] = "timm"
    model: str = "resnet18"
    """Name of a timm model with `features_only` support."""
    pretrained: bool = False
    """Download the backbone's published weights (needs a network or timm's cache)."""
    reduction: Annotated[int, pydantic.Field(gt=0)] = 8
    """Input pixels a side of one latent cell; one of the backbone's strides."""

    input_kind: ClassVar[str] = "pixels"

    def cells(self, domain: Domain) -> tuple[int, ...]:
        return _reduced(domain, self.reduction)

    def build(self, domain: Domain, out_channels: int) -> nn.Module:
        return TimmFeatures(self, domain.input_dim, out_channels)


@config
class PointEncoder:
    """Points to planes by a local-pooled PointNet (Peng et al., 2020), then the convolutional encoder over them."""

    kind: Literal["points"] = "points"
    width: Annotated[int, pydantic.Field(gt=0)] = 64
    """Numbers a point has in the PointNet, and of each cell of the planes it is averaged into."""
    num_layers: Annotated[int, pydantic.Field(gt=0)] = 5
    """Blocks of the PointNet; between them each point meets the largest values among the points of its cells."""
    channels: Annotated[int, pydantic.Field(gt=0)] = 64
    """Channels of the finest level of the convolutional encoder."""
    multipliers: tuple[int, ...] = (1, 2, 4)
    """Channels of each level over `channels`, finest first; every level after the first halves the resolution."""
    num_blocks: Annotated[int, pydantic.Field(gt=0)] = 2
    """Residual blocks a level."""

    input_kind: ClassVar[str] = "points"

    def cells(self, domain: Domain) -> tuple[int, ...]:
        return _reduced(domain, 2 ** (len(self.multipliers) - 1))

    def build(self, domain: Domain, out_channels: int) -> nn.Module:
        return LocalPointNet(self, domain, out_channels)


@config
class ClipEncoder:
    """Divided space-time attention over the patches of a clip (TimeSformer), averaged along each axis into planes."""

    kind: Literal["clip"] = "clip"
    dim: Annotated[int, pydantic.Field(gt=0)] = 384
    """Numbers of a token."""
    depth: Annotated[int, pydantic.Field(gt=0)] = 8
    """Blocks: attention along time, attention within a frame, and a perceptron, each."""
    head_dim: Annotated[int, pydantic.Field(gt=0)] = 64
    """Numbers of one attention head."""
    patch: Annotated[int, pydantic.Field(gt=0)] = 8
    """Pixels a side of one token, and of one cell of the planes; along time every frame has its own."""

    input_kind: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        if self.dim % self.head_dim:
            raise ValueError(
                f"autoencoder.encoder.dim={self.dim} must be a multiple of autoencoder.encoder.head_dim="
                f"{self.head_dim}; try {max(1, self.dim // self.head_dim) * self.head_dim}"
            )

    def cells(self, domain: Domain) -> tuple[int, ...]:
        *space, frames = domain.grid
        return (*_reduced(domain, self.patch, axes=len(space)), frames)

    def build(self, domain: Domain, out_channels: int) -> nn.Module:
        return ClipTransformer(self, domain, out_channels)


AnyEncoder = Annotated[PixelEncoder | TimmEncoder | PointEncoder | ClipEncoder, pydantic.Field(discriminator="kind")]


def _reduced(domain: Domain, reduction: int, *, axes: int | None = None) -> tuple[int, ...]:
    for cells in domain.grid[:axes]:
        if cells % reduction:
            value = getattr(domain, domain.grid_option)
            raise ValueError(
                f"domain.{domain.grid_option}={value} must be a multiple of the encoder's reduction {reduction}; "
                f"try {max(1, value // reduction) * reduction}"
            )
    return tuple(cells // reduction for cells in domain.grid[:axes])


class ConvolutionalEncoder(nn.Module):
    """Residual levels with strided convolutions between them, and one attention block at the coarsest."""

    def __init__(
        self, in_channels: int, *, channels: int, multipliers: tuple[int, ...], num_blocks: int, out_channels: int
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for index, width in enumerate(widths):
            previous = widths[max(index - 1, 0)]
            blocks: list[nn.Module] = [nn.Conv2d(previous, previous, 3, stride=2, padding=1)] if index > 0 else []
            blocks += [ResidualBlock(previous if i == 0 else width, width) for i in range(num_blocks)]
            self.levels.append(nn.Sequential(*blocks))
        self.middle = Middle(widths[-1])
        self.head = nn.Sequential(group_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], out_channels, 3, padding=1))

    def forward(self, planes: Float[Tensor, "stacked channels height width"], num_planes: int = 1) -> list[Stack]:
        hidden = self.stem(planes.contiguous(memory_format=torch.channels_last))
        for level in self.levels:
            hidden = level(hidden)
        (hidden,) = self.middle([hidden], len(planes) // num_planes)
        return [self.head(hidden)]


class TimmFeatures(nn.Module):
    """A timm backbone's feature map of one stride, mapped to the latent's channels."""

    def __init__(self, cfg: TimmEncoder, in_channels: int, out_channels: int) -> None:
        super().__init__()
        import_torchvision()
        import timm

        known = timm.list_models()
        if cfg.model.split(".")[0] not in known:
            import difflib

            near = difflib.get_close_matches(cfg.model, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"autoencoder.encoder.model={cfg.model!r} is not a timm model; did you mean {near}?")
        untrained: Any = timm.create_model(cfg.model, features_only=True, pretrained=False)
        strides = untrained.feature_info.reduction()
        if cfg.reduction not in strides:
            raise ValueError(
                f"autoencoder.encoder.reduction={cfg.reduction} is not a stride of {cfg.model}; choose one of {strides}"
            )
        level = strides.index(cfg.reduction)
        backbone: Any = timm.create_model(
            cfg.model, features_only=True, pretrained=cfg.pretrained, out_indices=(level,), in_chans=in_channels
        )
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.feature_info.channels()[-1], out_channels, 1)

    def forward(self, pixels: Float[Tensor, "batch channels height width"]) -> list[Stack]:
        return [self.head(self.backbone(pixels.contiguous(memory_format=torch.channels_last))[-1])]


class LocalPointNet(nn.Module):
    """Points [batch, points, 3 or more] to planes: the first three numbers of a point are its place in [-1, 1]^3."""

    def __init__(self, cfg: PointEncoder, domain: Domain, out_channels: int) -> None:
        super().__init__()
        self.axes, self.cells = plane_axes(domain.coord_dim), domain.grid[0]
        if len(set(domain.grid)) > 1:
            raise ValueError(f"domain.kind={domain.kind}: points go to planes of equal sides, not {domain.grid} cells")
        self.place = nn.Linear(domain.input_dim, 2 * cfg.width)
        self.blocks = nn.ModuleList(PointBlock(2 * cfg.width, cfg.width) for _ in range(cfg.num_layers))
        self.planes = ConvolutionalEncoder(
            cfg.width,
            channels=cfg.channels,
            multipliers=cfg.multipliers,
            num_blocks=cfg.num_blocks,
            out_channels=out_channels,
        )

    def forward(self, points: Float[Tensor, "batch points dim"]) -> list[Stack]:
        cell = ((points[..., :3].clamp(-1, 1) + 1) / 2 * self.cells).long().clamp(max=self.cells - 1)
        # [batch, points] for each plane: rows are the second coordinate of its pair
        indices = [cell[..., b] * self.cells + cell[..., a] for a, b in self.axes]
        hidden = self.place(points)
        for number, block in enumerate(self.blocks):
            if number > 0:
                own = [self._scatter(hidden, index, "amax").gather(1, _wide(index, hidden)) for index in indices]
                hidden = torch.cat([hidden, torch.stack(own).sum(0)], dim=-1)
            hidden = block(hidden)
        planes = [self._scatter(hidden, index, "mean") for index in indices]  # [batch, cells^2, width] each
        stacked = torch.stack(planes, dim=1).flatten(0, 1).transpose(1, 2).unflatten(2, (self.cells, self.cells))
        return self.planes(stacked, len(self.axes))

    def _scatter(self, values: Tensor, index: Tensor, reduce: str) -> Float[Tensor, "batch cells width"]:
        """The largest or the mean value of each cell's points; zero where there are none."""
        empty = values.new_zeros(len(values), self.cells**2, values.shape[-1])
        return empty.scatter_reduce(1, _wide(index, values), values, reduce, include_self=False)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, like.shape[-1])


class PointBlock(nn.Module):
    """Two linear layers around a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_dim, out_dim)
        self.second = nn.Linear(out_dim, out_dim)
        nn.init.zeros_(self.second.weight)  # the block starts as its shortcut
        self.shortcut = nn.Linear(in_dim, out_dim, bias=False)

    def forward(self, x: Float[Tensor, "batch points in_dim"]) -> Float[Tensor, "batch points out_dim"]:
        return self.shortcut(x) + self.second(F.relu(self.first(F.relu(x))))


class ClipTransformer(nn.Module):
    """A clip [batch, channels, frames, height, width] to planes: tokens averaged over the axis that a plane lacks."""

    def __init__(self, cfg: ClipEncoder, domain: Domain, out_channels: int) -> None:
        super().__init__()
        width, height, frames = cfg.cells(domain)
        self.embed = nn.Conv2d(domain.input_dim, cfg.dim, cfg.patch, stride=cfg.patch)
        self.place = nn.Parameter(torch.zeros(1, 1, height * width, cfg.dim))
        self.time = nn.Parameter(torch.zeros(1, frames, 1, cfg.dim))
        for embedding in (self.place, self.time):
            nn.init.normal_(embedding, std=0.02)
        self.blocks = nn.ModuleList(SpaceTimeBlock(cfg.dim, cfg.dim // cfg.head_dim) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.dim)
        self.heads = nn.ModuleList(nn.Conv2d(cfg.dim, out_channels, 1) for _ in range(3))
        self.sides = (height, width)

    def forward(self, clip: Float[Tensor, "batch channels frames height width"]) -> list[Stack]:
        frames = clip.shape[2]
        tokens = self.embed(clip.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        tokens = tokens.unflatten(0, (-1, frames)) + self.place + self.time  # [batch, frames, cells, dim]
        for block in self.blocks:
            tokens = block(tokens)
        grid = self.norm(tokens).unflatten(2, self.sides).movedim(-1, 1)  # [batch, dim, frames, height, width]
        means = (grid.mean(2), grid.mean(3), grid.mean(4).contiguous())  # over (x, y), (x, t), (y, t)
        return stack([head(mean) for head, mean in zip(self.heads, means, strict=True)])


class SpaceTimeBlock(nn.Module):
    """Attention along time, attention within each frame, and a perceptron, each around a shortcut."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.perceptron = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Float[Tensor, "batch frames cells dim"]) -> Float[Tensor, "batch frames cells dim"]:
        tokens = tokens + self._attend(tokens.transpose(1, 2), 0).transpose(1, 2)
        tokens = tokens + self._attend(tokens, 1)
        return tokens + self.perceptron(self.norms[2](tokens))

    def _attend(self, x: Float[Tensor, "batch rows length dim"], kind: int) -> Float[Tensor, "batch rows length dim"]:
        q, k, v = self.qkv[kind](self.norms[kind](x)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        mixed = F.scaled_dot_product_attention(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
        return self.out[kind](mixed.transpose(2, 3).flatten(-2))
