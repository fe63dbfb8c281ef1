"""What a field autoencoder is: signals to latents, latents to fields."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from distributed_inr.domains import Domain, Signal
from distributed_inr.field import Field


class FieldAutoencoder(nn.Module, ABC):
    """Signals to latents and latents to fields; `forward` is the training objective."""

    cfg: Any
    """The config that builds it."""
    domain: Domain
    latent_shape: tuple[int, ...]
    """Shape of one latent: planes [channels, height, width], or vectors [layers, latent_dim]."""
    is_variational: ClassVar[bool]
    """Whether latents have a deviation, or are points."""

    @abstractmethod
    def forward(self, signal: Signal) -> dict[str, Tensor]:
        """Weighted scalar losses of a batch, each a mean over its samples; their sum is minimised."""

    @abstractmethod
    def posterior(
        self, signal: Signal
    ) -> tuple[Float[Tensor, "batch *latent_shape"], Float[Tensor, "batch *latent_shape"] | None]:
        """Mean and standard deviation of the latent of each signal; no deviation where the latent is a point."""

    @abstractmethod
    def decode(self, latent: Float[Tensor, "batch *latent_shape"]) -> Field:
        """The fields that latents stand for."""

    @abstractmethod
    def for_sampling(self) -> "FieldAutoencoder":
        """The same functions in the form that is the cheapest to decode; perhaps itself. It is not to be trained."""

    def encode(self, signal: Signal) -> Float[Tensor, "batch *latent_shape"]:
        """The latent of each signal: the posterior mean."""
        return self.posterior(signal)[0]
