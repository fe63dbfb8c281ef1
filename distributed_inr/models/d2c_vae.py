"""D2C-VAE: an autoencoder from discrete signals to continuous functions (DDMI, section 3.1)."""

from typing import Annotated, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distributed_inr import randomness
from distributed_inr.config import config
from distributed_inr.domains import Domain, Signal
from distributed_inr.field import Field
from distributed_inr.models.encoders import AnyEncoder, PixelEncoder
from distributed_inr.models.field_autoencoder import FieldAutoencoder
from distributed_inr.models.perceptual import Network, lpips
from distributed_inr.models.planes import PlaneDecoder, interpolate, plane_axes


@config
class D2CVAE:
    """Encoder, latent planes, decoder to basis fields, and read-out MLP."""

    kind: Literal["d2c-vae"] = "d2c-vae"
    encoder: AnyEncoder = PixelEncoder()
    """What turns a signal into a feature map."""
    latent_channels: Annotated[int, pydantic.Field(gt=0)] = 64
    """Channels of each latent plane."""
    decoder_channels: Annotated[int, pydantic.Field(gt=0)] = 128
    """Channels of the decoder's finest level."""
    decoder_multipliers: tuple[int, ...] = (1, 2, 4)
    """Channels of each decoder level over `decoder_channels`, finest first; every finer level has twice the cells."""
    decoder_blocks: Annotated[int, pydantic.Field(ge=0)] = 2
    """Residual blocks a decoder level, beside the one that every level has."""
    conditioning: Literal["single", "concatenate", "coarse-to-fine"] = "coarse-to-fine"
    """How the read-out meets the basis fields (DDMI, table 8): the finest field alone; all, concatenated; CFC."""
    num_fields: Annotated[int, pydantic.Field(gt=0)] = 3
    """Scales of basis fields; "single" always has one."""
    field_channels: Annotated[int, pydantic.Field(gt=0)] = 64
    """Channels of each basis field."""
    readout_width: Annotated[int, pydantic.Field(gt=0)] = 256
    """Hidden units of the read-out MLP."""
    readout_blocks: Annotated[int, pydantic.Field(gt=0)] = 4
    """Residual blocks of the read-out MLP; at least `num_fields` for coarse-to-fine conditioning."""
    num_points: Annotated[int, pydantic.Field(gt=0)] = 4096
    """Measurements a signal and step that the likelihood is estimated from."""
    kl_weight: Annotated[float, pydantic.Field(ge=0)] = 1e-6
    """beta_z of eq. 9: weight of the KL divergence (summed over the latent) against the mean likelihood of a
    measurement. A weight w of a summed KL against a summed error over N values, as in the public configs, is w / N
    here."""
    kl_start: Annotated[float, pydantic.Field(ge=0, le=1)] = 1e-4
    """Fraction of `kl_weight` that training starts with."""
    kl_anneal_samples: Annotated[int, pydantic.Field(ge=0)] = 0
    """Samples over which the KL weight rises linearly to its full value."""
    perceptual_weight: Annotated[float, pydantic.Field(ge=0)] = 0.0
    """Weight of LPIPS between the drawn crop and its reconstruction; the paper's image models use 1. Images only."""
    perceptual_network: Network = "vgg"
    """Network whose features LPIPS compares."""
    perceptual_checkpoint: str | None = None
    """Path of torchvision's checkpoint of that network."""

    def __post_init__(self) -> None:
        if self.conditioning == "coarse-to-fine" and self.readout_blocks < self.num_fields:
            raise ValueError(
                f"autoencoder.readout_blocks={self.readout_blocks} must be at least autoencoder.num_fields="
                f"{self.num_fields}: coarse-to-fine conditioning gives each field a block of its own"
            )
        if self.perceptual_weight and self.perceptual_checkpoint is None:
            raise ValueError(
                f"autoencoder.perceptual_weight={self.perceptual_weight} needs autoencoder.perceptual_checkpoint: "
                "torchvision's checkpoint of autoencoder.perceptual_network, such as vgg16-397923af.pth"
            )
        if self.num_fields > len(self.decoder_multipliers):
            raise ValueError(
                f"autoencoder.num_fields={self.num_fields} exceeds the {len(self.decoder_multipliers)} levels of "
                "autoencoder.decoder_multipliers; add levels or lower num_fields"
            )

    def check(self, domain: Domain) -> None:
        """Raise ValueError where the encoder does not fit the domain's signals."""
        if self.encoder.input_kind != domain.input_kind:
            raise ValueError(
                f"autoencoder.encoder.kind={self.encoder.kind} reads {self.encoder.input_kind}, but the {domain.kind} "
                f"domain gives {domain.input_kind}; choose an encoder of {domain.input_kind}"
            )
        if domain.size % self.encoder.reduction:
            raise ValueError(
                f"domain.size={domain.size} must be a multiple of the encoder's reduction {self.encoder.reduction}; "
                f"try {max(1, domain.size // self.encoder.reduction) * self.encoder.reduction}"
            )
        if self.perceptual_weight and self.num_points < domain.size**2:
            raise ValueError(
                f"autoencoder.num_points={self.num_points} must be at least domain.size^2 = {domain.size**2} with "
                "autoencoder.perceptual_weight > 0: LPIPS compares whole crops"
            )

    def build(self, domain: Domain) -> "D2CVAEModel":
        return D2CVAEModel(self, domain)


class D2CVAEModel(FieldAutoencoder):
    """The D2C-VAE of one domain."""

    is_variational: ClassVar[bool] = True

    def __init__(self, cfg: D2CVAE, domain: Domain) -> None:
        super().__init__()
        cfg.check(domain)
        self.cfg, self.domain = cfg, domain
        self.axes = plane_axes(domain.coord_dim)
        planes, num_fields = len(self.axes), 1 if cfg.conditioning == "single" else cfg.num_fields
        side = domain.size // cfg.encoder.reduction
        self.latent_shape = (planes * cfg.latent_channels, side, side)
        self.encoder = cfg.encoder.build(2 * planes * cfg.latent_channels)
        self.decoder = PlaneDecoder(
            cfg.latent_channels,
            channels=cfg.decoder_channels,
            multipliers=cfg.decoder_multipliers,
            num_blocks=cfg.decoder_blocks,
            num_fields=num_fields,
            field_channels=cfg.field_channels,
        )
        self.readout = ReadOut(cfg, num_fields, domain.view_dim, domain.value_dim)

    def forward(self, signal: Signal) -> dict[str, Tensor]:
        """Eq. 9, negated: mean negative log-likelihood of drawn measurements, and beta_z times the KL divergence."""
        signal = self.domain.augment(signal)
        mean, log_variance = self._statistics(signal)
        noise = randomness.normal(signal.seed, "posterior", self.latent_shape)
        field = self.decode(mean + noise * (0.5 * log_variance).exp())
        queries, values = self.domain.supervise(signal, self.cfg.num_points)
        observed = self.domain.observe(field, queries)
        nll = self.domain.nll(observed, values)

        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
        losses = {"reconstruction": nll.mean(), "kl": (self._kl_weight(signal.position) * kl).mean()}
        if self.cfg.perceptual_weight:
            losses["perceptual"] = self.cfg.perceptual_weight * self._lpips(observed, values).mean()
        return losses

    def posterior(self, signal: Signal) -> tuple[Tensor, Tensor]:
        mean, log_variance = self._statistics(signal)
        return mean, (0.5 * log_variance).exp()

    def decode(self, latent: Float[Tensor, "batch channels height width"]) -> Field:
        planes = latent.unflatten(1, (len(self.axes), -1)).flatten(0, 1)  # [batch * planes, latent_channels, h, w]
        basis = self.decoder(planes.contiguous(memory_format=torch.channels_last))
        return Field(self._evaluate, tuple(b.unflatten(0, (len(latent), -1)) for b in basis), self.domain)

    def for_sampling(self) -> "D2CVAEModel":
        return self

    def _statistics(self, signal: Signal) -> tuple[Tensor, Tensor]:
        inputs = signal.inputs.contiguous(memory_format=torch.channels_last)
        mean, log_variance = _at_least_float32(self.encoder(inputs)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def _lpips(self, observed: Tensor, values: Tensor) -> Tensor:
        assert self.cfg.perceptual_checkpoint is not None
        side = self.domain.size  # the points are a whole crop, row by row
        a, b = (points.transpose(1, 2).unflatten(2, (side, side)) for points in (observed, values))
        return lpips(a, b, network=self.cfg.perceptual_network, weights=self.cfg.perceptual_checkpoint)

    def _kl_weight(self, position: Tensor) -> Tensor:
        rise = (position / max(1, self.cfg.kl_anneal_samples)).clamp(max=1.0)
        return self.cfg.kl_weight * (self.cfg.kl_start + (1 - self.cfg.kl_start) * rise)

    def _evaluate(self, basis: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
        """Positional embeddings, summed over planes, through the read-out MLP (DDMI, section 3.1)."""
        embeddings = []
        for fields in basis:  # [batch, planes, channels, height, width], coarse to fine
            sums = sum(interpolate(fields[:, i], coords[..., list(axes)]) for i, axes in enumerate(self.axes))
            embeddings.append(sums)
        return _at_least_float32(self.readout(embeddings, view))


class ReadOut(nn.Module):
    """MLP from positional embeddings to the value, with coarse-to-fine conditioning (CFC; DDMI, section 3.1)."""

    def __init__(self, cfg: D2CVAE, num_fields: int, view_dim: int, value_dim: int) -> None:
        super().__init__()
        self.coarse_to_fine = cfg.conditioning == "coarse-to-fine"
        width, channels = cfg.readout_width, cfg.field_channels
        first = (channels if self.coarse_to_fine else channels * num_fields) + view_dim
        joins = [
            channels + view_dim if self.coarse_to_fine and i < num_fields else 0 for i in range(cfg.readout_blocks)
        ]
        self.blocks = nn.ModuleList(
            ReadOutBlock(first if i == 0 else width + join, width) for i, join in enumerate(joins)
        )
        self.out = nn.Linear(width, value_dim)

    def forward(
        self,
        embeddings: list[Float[Tensor, "batch points channels"]],
        view: Float[Tensor, "batch points view_dim"] | None,
    ) -> Float[Tensor, "batch points value_dim"]:
        seen = [] if view is None else [view.to(embeddings[0].dtype)]
        if not self.coarse_to_fine:
            embeddings = [torch.cat(embeddings, dim=-1)]
        hidden = self.blocks[0](torch.cat([embeddings[0], *seen], dim=-1))
        for index, block in enumerate(list(self.blocks)[1:], start=1):
            if index < len(embeddings):
                hidden = torch.cat([hidden, embeddings[index], *seen], dim=-1)
            hidden = block(hidden)
        return self.out(F.silu(hidden))


class ReadOutBlock(nn.Module):
    """Two linear layers around a shortcut."""

    def __init__(self, in_dim: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_dim, width)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)  # the block starts as its shortcut
        self.shortcut = nn.Linear(in_dim, width, bias=False) if in_dim != width else nn.Identity()

    def forward(self, x: Float[Tensor, "batch points in_dim"]) -> Float[Tensor, "batch points width"]:
        return self.shortcut(x) + self.second(F.silu(self.first(x)))


def _at_least_float32(values: Tensor) -> Tensor:
    """Leave autocast's half precision; float64, in which gradients are checked, stays as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
