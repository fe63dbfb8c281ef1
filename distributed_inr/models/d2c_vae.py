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
from distributed_inr.models.planes import PlaneDecoder, PlaneLayout, interpolate, plane_axes


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
    plane_mixing: Literal["sum", "concatenate"] = "sum"
    """How the embeddings of several planes become one; with one plane, such as of images, both are the same."""
    use_view: bool = True
    """Tell the read-out what a measurement knows beside the place: of images the scale, of scenes the direction."""
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
        PlaneLayout.of(self.latent_channels, self.encoder.cells(domain))
        if self.perceptual_weight and (domain.input_kind != "pixels" or domain.value_dim != 3):
            raise ValueError(
                f"autoencoder.perceptual_weight={self.perceptual_weight} compares coloured pictures, which the "
                f"{domain.kind} domain does not have; set it to 0"
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
        num_fields = 1 if cfg.conditioning == "single" else cfg.num_fields
        self.layout = PlaneLayout.of(cfg.latent_channels, cfg.encoder.cells(domain))
        self.latent_shape = self.layout.latent_shape
        self.encoder = cfg.encoder.build(domain, 2 * cfg.latent_channels)
        self.decoder = PlaneDecoder(
            cfg.latent_channels,
            channels=cfg.decoder_channels,
            multipliers=cfg.decoder_multipliers,
            num_blocks=cfg.decoder_blocks,
            num_fields=num_fields,
            field_channels=cfg.field_channels,
        )
        embedding_dim = cfg.field_channels * (len(self.axes) if cfg.plane_mixing == "concatenate" else 1)
        self.readout = ReadOut(cfg, domain, num_fields, embedding_dim)

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
        planes = tuple(plane for planes in self.basis(latent) for plane in planes)
        return Field(self._evaluate, planes, self.domain)

    def basis(self, latent: Float[Tensor, "batch channels height width"]) -> list[list[Tensor]]:
        """Basis fields by scale, coarse to fine, and by plane: each [batch, field_channels, height, width]."""
        batch = len(latent)
        stacks = [x.contiguous(memory_format=torch.channels_last) for x in self.layout.stacks(latent)]
        return [self.layout.planes(fields, batch) for fields in self.decoder(stacks, batch)]

    def for_sampling(self) -> "D2CVAEModel":
        return self

    def _statistics(self, signal: Signal) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, of the latent's shape."""
        halves = [_at_least_float32(x).chunk(2, dim=1) for x in self.encoder(signal.inputs)]
        mean, log_variance = (self.layout.join(half, len(signal)) for half in zip(*halves, strict=True))
        return mean, log_variance.clamp(-30.0, 20.0)

    def _lpips(self, observed: Tensor, values: Tensor) -> Tensor:
        assert self.cfg.perceptual_checkpoint is not None
        side = self.domain.size  # the points are a whole crop, row by row
        a, b = (points.transpose(1, 2).unflatten(2, (side, side)) for points in (observed, values))
        return lpips(a, b, network=self.cfg.perceptual_network, weights=self.cfg.perceptual_checkpoint)

    def _kl_weight(self, position: Tensor) -> Tensor:
        rise = (position / max(1, self.cfg.kl_anneal_samples)).clamp(max=1.0)
        return self.cfg.kl_weight * (self.cfg.kl_start + (1 - self.cfg.kl_start) * rise)

    def _evaluate(self, planes: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
        """Positional embeddings, summed or concatenated over planes, through the read-out MLP (DDMI, section 3.1)."""
        embeddings = []
        for start in range(0, len(planes), len(self.axes)):  # coarse to fine
            scale = planes[start : start + len(self.axes)]
            own = [interpolate(p, coords[..., list(axes)]) for p, axes in zip(scale, self.axes, strict=True)]
            embeddings.append(torch.cat(own, dim=-1) if self.cfg.plane_mixing == "concatenate" else sum(own))
        return _at_least_float32(self.readout(embeddings, view))


class ReadOut(nn.Module):
    """MLP from positional embeddings to the value, with coarse-to-fine conditioning (CFC; DDMI, section 3.1).

    The view of a measurement goes in beside the embeddings. Where the domain has values that must not depend on it, it
    goes to a head of the other values instead: of a scene, to the colour's and not to the density's.
    """

    def __init__(self, cfg: D2CVAE, domain: Domain, num_fields: int, embedding_dim: int) -> None:
        super().__init__()
        self.coarse_to_fine = cfg.conditioning == "coarse-to-fine"
        self.view_dim = domain.view_dim if cfg.use_view else 0
        self.num_unviewed = domain.num_unviewed
        width, beside = cfg.readout_width, 0 if domain.num_unviewed else self.view_dim
        first = (embedding_dim if self.coarse_to_fine else embedding_dim * num_fields) + beside
        joins = [
            embedding_dim + beside if self.coarse_to_fine and i < num_fields else 0 for i in range(cfg.readout_blocks)
        ]
        self.blocks = nn.ModuleList(
            ReadOutBlock(first if i == 0 else width + join, width) for i, join in enumerate(joins)
        )
        self.out = nn.Linear(width, domain.num_unviewed or domain.value_dim)
        self.viewed = None
        if domain.num_unviewed:
            self.viewed = nn.Sequential(
                nn.Linear(width + self.view_dim, width // 2),
                nn.SiLU(),
                nn.Linear(width // 2, domain.value_dim - domain.num_unviewed),
            )

    def forward(
        self,
        embeddings: list[Float[Tensor, "batch points channels"]],
        view: Float[Tensor, "batch points view_dim"] | None,
    ) -> Float[Tensor, "batch points value_dim"]:
        given = [] if view is None or not self.view_dim else [view.to(embeddings[0].dtype)]
        beside = [] if self.viewed is not None else given
        if not self.coarse_to_fine:
            embeddings = [torch.cat(embeddings, dim=-1)]
        hidden = self.blocks[0](torch.cat([embeddings[0], *beside], dim=-1))
        for index, block in enumerate(list(self.blocks)[1:], start=1):
            if index < len(embeddings):
                hidden = torch.cat([hidden, embeddings[index], *beside], dim=-1)
            hidden = block(hidden)
        hidden = F.silu(hidden)
        if self.viewed is None:
            return self.out(hidden)
        return torch.cat([self.out(hidden), self.viewed(torch.cat([hidden, *given], dim=-1))], dim=-1)


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
