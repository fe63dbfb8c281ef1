"""Denoising networks of hierarchical diffusion: one layer's noisy latent, told the layer and its condition."""

from typing import Annotated, Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from distributed_inr.config import config
from distributed_inr.models.denoisers import TIME_DIM, MLPBlock
from distributed_inr.models.text_conditioning import TextAttention, TextCondition
from distributed_inr.models.torchvision_cpu import import_torchvision


@config
class MLPUNet:
    """Residual blocks over the latent as one vector, the later ones joined to the earlier ones as in a U-Net."""

    kind: Literal["mlp-unet"] = "mlp-unet"
    width: Annotated[int, pydantic.Field(gt=0)] = 512
    """Numbers in the hidden state."""
    num_blocks: Annotated[int, pydantic.Field(gt=0)] = 3
    """Residual blocks on the way down, and as many on the way up."""

    def build(
        self, *, latent_dim: int, num_layers: int, condition_bits: int, text_dim: int | None = None
    ) -> "MLPUNetDenoiser":
        return MLPUNetDenoiser(self, latent_dim, Condition(num_layers, condition_bits, text_dim))


@config
class ConvolutionalUNet:
    """diffusers' 1-D U-Net along the latent's numbers, with the condition in further channels."""

    kind: Literal["conv-unet"] = "conv-unet"
    channels: Annotated[int, pydantic.Field(gt=0)] = 64
    """Channels of the finest level."""
    multipliers: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)] = (1, 2, 4)
    """Channels of each level over `channels`, finest first; every level halves the length."""

    def __post_init__(self) -> None:
        if self.channels * self.multipliers[-1] % 32:
            raise ValueError(
                f"prior.denoiser.channels={self.channels} times the last multiplier {self.multipliers[-1]} must be a "
                "multiple of 32, the size of an attention head; try 32"
            )

    def build(
        self, *, latent_dim: int, num_layers: int, condition_bits: int, text_dim: int | None = None
    ) -> "ConvolutionalDenoiser":
        return ConvolutionalDenoiser(self, latent_dim, Condition(num_layers, condition_bits, text_dim))


AnyLayerDenoiser = Annotated[MLPUNet | ConvolutionalUNet, pydantic.Field(discriminator="kind")]


class Condition(nn.Module):
    """One vector for the layer, its condition bits, the timestep and, where there is text, what these attend to."""

    def __init__(self, num_layers: int, condition_bits: int, text_dim: int | None) -> None:
        super().__init__()
        import_torchvision()
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        self.wave = Timesteps(TIME_DIM, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(TIME_DIM, TIME_DIM)
        self.layer = nn.Embedding(num_layers, TIME_DIM)
        self.bits = nn.Linear(condition_bits, TIME_DIM, bias=False) if condition_bits else None
        self.text = None if text_dim is None else TextAttention(TIME_DIM, text_dim)

    def forward(
        self,
        timesteps: Int64[Tensor, " batch"],
        layers: Int64[Tensor, " batch"],
        bits: Float[Tensor, "batch condition_bits"],
        text: TextCondition | None,
    ) -> Float[Tensor, "batch time"]:
        together = self.time(self.wave(timesteps)) + self.layer(layers)
        if self.bits is not None:
            together = together + self.bits(bits)
        if self.text is not None:
            assert text is not None, "a prompt for each sample, if only the empty one"
            together = self.text(together, text)
        return F.silu(together)


class MLPUNetDenoiser(nn.Module):
    """Noisy latents of any layers to the prediction, of their shape."""

    def __init__(self, cfg: MLPUNet, latent_dim: int, condition: Condition) -> None:
        super().__init__()
        self.condition = condition
        self.stem = nn.Linear(latent_dim, cfg.width)
        self.down = nn.ModuleList(MLPBlock(cfg.width) for _ in range(cfg.num_blocks))
        self.joins = nn.ModuleList(nn.Linear(2 * cfg.width, cfg.width) for _ in range(cfg.num_blocks))
        self.up = nn.ModuleList(MLPBlock(cfg.width) for _ in range(cfg.num_blocks))
        self.norm = nn.LayerNorm(cfg.width)
        self.out = nn.Linear(cfg.width, latent_dim)
        for parameter in self.out.parameters():  # the first prediction is zero
            nn.init.zeros_(parameter)

    def forward(
        self,
        noisy: Float[Tensor, "batch latent_dim"],
        timesteps: Tensor,
        layers: Tensor,
        bits: Tensor,
        text: TextCondition | None = None,
    ) -> Float[Tensor, "batch latent_dim"]:
        condition = self.condition(timesteps, layers, bits, text)
        hidden, skips = self.stem(noisy), []
        for block in self.down:
            hidden = block(hidden, condition)
            skips.append(hidden)
        for join, block in zip(self.joins, self.up, strict=True):
            hidden = block(join(torch.cat([hidden, skips.pop()], dim=-1)), condition)
        return self.out(F.silu(self.norm(hidden)))


class ConvolutionalDenoiser(nn.Module):
    """Noisy latents of any layers to the prediction, of their shape."""

    def __init__(self, cfg: ConvolutionalUNet, latent_dim: int, condition: Condition) -> None:
        super().__init__()
        import_torchvision()
        from diffusers import UNet1DModel

        factor = 2 ** len(cfg.multipliers)
        if latent_dim % factor or latent_dim < 3 * factor:  # resizing reflects two numbers at either end
            raise ValueError(
                f"prior.denoiser.multipliers has {len(cfg.multipliers)} levels, which need latents of a multiple of "
                f"{factor} numbers, {3 * factor} at least; this one has {latent_dim}: use fewer levels"
            )
        self.condition, self.latent_dim = condition, latent_dim
        self.place = nn.Linear(TIME_DIM, latent_dim)
        levels = len(cfg.multipliers)
        unet: Any = UNet1DModel(
            sample_size=latent_dim,
            in_channels=2,
            extra_in_channels=cfg.channels,
            time_embedding_type="positional",
            out_channels=1,
            block_out_channels=tuple(cfg.channels * m for m in cfg.multipliers),
            down_block_types=("DownBlock1DNoSkip", *["DownBlock1D"] * (levels - 1)),
            up_block_types=(*["UpBlock1D"] * (levels - 1), "UpBlock1DNoSkip"),
        )
        self.unet = unet

    def forward(
        self,
        noisy: Float[Tensor, "batch latent_dim"],
        timesteps: Tensor,
        layers: Tensor,
        bits: Tensor,
        text: TextCondition | None = None,
    ) -> Float[Tensor, "batch latent_dim"]:
        place = self.place(self.condition(timesteps, layers, bits, text))
        return self.unet(torch.stack([noisy, place], dim=1), timesteps).sample[:, 0]
