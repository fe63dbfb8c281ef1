"""Encoders of the D2C-VAE: from what a sensor measured to a latent plane's feature map."""

from typing import Annotated, Any, ClassVar, Literal

import pydantic
from jaxtyping import Float
from torch import Tensor, nn

from distributed_inr.config import config
from distributed_inr.models.planes import Middle, ResidualBlock, group_norm
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

    def build(self, out_channels: int) -> nn.Module:
        return ConvolutionalEncoder(self, out_channels)


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

    def build(self, out_channels: int) -> nn.Module:
        return TimmFeatures(self, out_channels)


AnyEncoder = Annotated[PixelEncoder | TimmEncoder, pydantic.Field(discriminator="kind")]


class ConvolutionalEncoder(nn.Module):
    """Residual levels with strided convolutions between them, and one attention block at the coarsest."""

    def __init__(self, cfg: PixelEncoder, out_channels: int) -> None:
        super().__init__()
        widths = [cfg.channels * m for m in cfg.multipliers]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for index, width in enumerate(widths):
            previous = widths[max(index - 1, 0)]
            blocks: list[nn.Module] = [nn.Conv2d(previous, previous, 3, stride=2, padding=1)] if index > 0 else []
            blocks += [ResidualBlock(previous if i == 0 else width, width) for i in range(cfg.num_blocks)]
            self.levels.append(nn.Sequential(*blocks))
        self.middle = Middle(widths[-1])
        self.head = nn.Sequential(group_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], out_channels, 3, padding=1))

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        hidden = self.stem(pixels)
        for level in self.levels:
            hidden = level(hidden)
        return self.head(self.middle(hidden))


class TimmFeatures(nn.Module):
    """A timm backbone's feature map of one stride, mapped to the latent's channels."""

    def __init__(self, cfg: TimmEncoder, out_channels: int) -> None:
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
            cfg.model, features_only=True, pretrained=cfg.pretrained, out_indices=(level,)
        )
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.feature_info.channels()[-1], out_channels, 1)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        return self.head(self.backbone(pixels)[-1])
