"""What a latent prior is: a distribution over an autoencoder's latents."""

from abc import ABC, abstractmethod
from typing import Literal

from jaxtyping import Float, Int64
from torch import Tensor, nn

from distributed_inr.domains import Signal

Sampler = Literal["ancestral", "ddim", "dpm-solver++"]


class LatentPrior(nn.Module, ABC):
    """A distribution over latents; `forward` is the training objective."""

    latent_shape: tuple[int, ...]
    """Shape of one latent, channels first."""

    @abstractmethod
    def forward(self, signal: Signal) -> dict[str, Tensor]:
        """Weighted scalar losses of a batch, each a mean over its samples.

        Args:
            signal: `inputs` holds each latent's posterior mean and deviation, [batch, 2, *latent_shape].
        """

    @abstractmethod
    def normalise_from(self, mean: Float[Tensor, " channels"], deviation: Float[Tensor, " channels"]) -> None:
        """Set the statistics of the training latents, which the prior removes before, and restores after, diffusion."""

    @abstractmethod
    def sample(
        self, seeds: Int64[Tensor, " count"], *, sampler: Sampler, steps: int
    ) -> Float[Tensor, "count *latent_shape"]:
        """Draw one latent for each seed; a sample depends on its own seed alone, not on its neighbours in the batch."""
