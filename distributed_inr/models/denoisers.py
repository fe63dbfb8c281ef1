"""Denoising networks of the latent priors."""

import math
from typing import Annotated, Any, Literal

import pydantic
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from distributed_inr.config import config
from distributed_inr.models.text_conditioning import TextAttention, TextCondition
from distributed_inr.models.torchvision_cpu import import_torchvision

TIME_DIM = 128
"""Sinusoids of the timestep in the MLP, and numbers in its embedding."""


@config
class UNet:
    """diffusers' 2-D U-Net over latent planes, sized as in the public configs."""

    kind: Literal["unet"] = "unet"
    channels: Annotated[int, pydantic.Field(gt=0)] = 224
    """Channels of the finest level."""
    multipliers: tuple[int, ...] = (1, 2, 4, 6)
    """Channels of each level over `channels`, finest first; every level after the first halves the resolution."""
    num_blocks: Annotated[int, pydantic.Field(gt=0)] = 2
    """Residual blocks a level."""
    attention_from: Annotated[int, pydantic.Field(ge=0)] = 1
    """First level with self-attention (1: at half the latent's resolution and below)."""
    head_dim: Annotated[int, pydantic.Field(gt=0)] = 32
    """Channels of one attention head."""
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    """Dropout in the residual blocks. Its draws are torch's own, so losses then depend on how a batch is split."""

    def __post_init__(self) -> None:
        for multiplier in self.multipliers:
            if self.channels * multiplier % self.head_dim:
                raise ValueError(
                    f"prior.denoiser.channels={self.channels} times multiplier {multiplier} must be a multiple of "
                    f"prior.denoiser.head_dim={self.head_dim}; try {-(-self.channels // self.head_dim) * self.head_dim}"
                )

    def build(self, latent_shape: tuple[int, ...], text_dim: int | None = None) -> "UNetDenoiser":
        return UNetDenoiser(self, latent_shape, text_dim)


@config
class MLP:
    """A multilayer perceptron over the whole latent as one vector: for latents of some hundred numbers."""

    kind: Literal["mlp"] = "mlp"
    width: Annotated[int, pydantic.Field(gt=0)] = 544
    """Numbers in the hidden state."""
    num_blocks: Annotated[int, pydantic.Field(gt=0)] = 4
    """Residual blocks of two layers each."""

    def build(self, latent_shape: tuple[int, ...], text_dim: int | None = None) -> "MLPDenoiser":
        return MLPDenoiser(self, latent_shape, text_dim)


AnyDenoiser = Annotated[UNet | MLP, pydantic.Field(discriminator="kind")]


class UNetDenoiser(nn.Module):
    """Noisy latent and timestep to the prediction, of the latent's shape.

    Args:
        text_dim: numbers of a text token, which the levels with self-attention attend to as well; None without text.
    """

    def __init__(self, cfg: UNet, latent_shape: tuple[int, ...], text_dim: int | None) -> None:
        super().__init__()
        import_torchvision()
        from diffusers import UNet2DConditionModel, UNet2DModel

        if len(latent_shape) != 3:
            raise ValueError(
                f"prior.denoiser.kind=unet needs planes, but this autoencoder's latents are {latent_shape[0]} vectors; "
                "use prior.denoiser.kind mlp"
            )
        channels, height, width = latent_shape
        factor = 2 ** (len(cfg.multipliers) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"prior.denoiser.multipliers has {len(cfg.multipliers)} levels, which need latents of a multiple of "
                f"{factor} cells a side; this one has {height} x {width}: use fewer levels"
            )
        levels = range(len(cfg.multipliers))
        attends = [level >= cfg.attention_from for level in levels]
        widths = [cfg.channels * m for m in cfg.multipliers]
        groups = 32
        while any(width % groups for width in widths):
            groups //= 2
        name = "Attn" if text_dim is None else "CrossAttn"
        kinds = [name if with_attention else "" for with_attention in attends]
        shared: dict[str, Any] = dict(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(widths),
            layers_per_block=cfg.num_blocks,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            norm_num_groups=groups,
            dropout=cfg.dropout,
        )
        self.unet: nn.Module
        if text_dim is None:
            self.unet = UNet2DModel(**shared, attention_head_dim=cfg.head_dim)
        else:  # what this one calls attention_head_dim is the number of heads
            heads: Any = tuple(width // cfg.head_dim for width in widths)
            self.unet = UNet2DConditionModel(**shared, attention_head_dim=heads, cross_attention_dim=text_dim)

    def forward(
        self,
        noisy: Float[Tensor, "batch channels height width"],
        timesteps: Int64[Tensor, " batch"],
        text: TextCondition | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        if text is None:
            return self.unet(noisy, timesteps).sample
        tokens, mask = text.tokens.to(noisy.dtype), text.mask
        return self.unet(noisy, timesteps, encoder_hidden_states=tokens, encoder_attention_mask=mask).sample


class MLPDenoiser(nn.Module):
    """Noisy latent and timestep to the prediction, of the latent's shape; the timestep, and what it attends to where
    there is text, modulate every block.
    """

    def __init__(self, cfg: MLP, latent_shape: tuple[int, ...], text_dim: int | None) -> None:
        super().__init__()
        import_torchvision()
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        size = math.prod(latent_shape)
        self.wave = Timesteps(TIME_DIM, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(TIME_DIM, TIME_DIM)
        self.text = None if text_dim is None else TextAttention(TIME_DIM, text_dim)
        self.stem = nn.Linear(size, cfg.width)
        self.blocks = nn.ModuleList(MLPBlock(cfg.width) for _ in range(cfg.num_blocks))
        self.norm = nn.LayerNorm(cfg.width)
        self.out = nn.Linear(cfg.width, size)
        for parameter in self.out.parameters():  # the first prediction is zero
            nn.init.zeros_(parameter)

    def forward(
        self,
        noisy: Float[Tensor, "batch *latent"],
        timesteps: Int64[Tensor, " batch"],
        text: TextCondition | None = None,
    ) -> Float[Tensor, "batch *latent"]:
        time = self.time(self.wave(timesteps))
        if self.text is not None:
            assert text is not None, "a prompt for each sample, if only the empty one"
            time = self.text(time, text)
        time = F.silu(time)
        hidden = self.stem(noisy.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.out(F.silu(self.norm(hidden))).view_as(noisy)


class MLPBlock(nn.Module):
    """LayerNorm, modulation by the timestep, and two linear layers around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(TIME_DIM, 2 * width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        for parameter in (*self.modulation.parameters(), *self.second.parameters()):
            nn.init.zeros_(parameter)  # the block starts as its shortcut

    def forward(
        self, x: Float[Tensor, "batch width"], time: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch width"]:
        scale, shift = self.modulation(time).chunk(2, dim=-1)
        hidden = F.silu(self.norm(x) * (1 + scale) + shift)
        return x + self.second(F.silu(self.first(hidden)))
