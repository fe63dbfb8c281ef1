"""What a latent prior is: a distribution over an autoencoder's latents."""

from abc import ABC, abstractmethod

from jaxtyping import Float, Int64
from torch import Tensor, nn

from distributed_inr import randomness
from distributed_inr.domains import Signal
from distributed_inr.models.noising import Sampler
from distributed_inr.models.text_conditioning import Guidance


class LatentPrior(nn.Module, ABC):
    """A distribution over latents; `forward` is the training objective."""

    latent_shape: tuple[int, ...]
    """Shape of one latent: planes [channels, height, width], or vectors [layers, latent_dim]."""
    latent_mean: Tensor
    latent_deviation: Tensor
    """Statistics of the training latents, of `statistics_shape(latent_shape)`."""

    @abstractmethod
    def forward(self, signal: Signal) -> dict[str, Tensor]:
        """Weighted scalar losses of a batch, each a mean over its samples.

        Args:
            signal: `inputs` holds each latent's mean and, where it has one, its deviation: [batch, 1 or 2,
                *latent_shape]; of a prior with text, `text_tokens` and `text_mask` its embedded caption.
        """

    @abstractmethod
    def normalise_from(self, mean: Float[Tensor, "*statistics"], deviation: Float[Tensor, "*statistics"]) -> None:
        """Set the statistics of the training latents, which the prior removes before, and restores after, diffusion."""

    @abstractmethod
    def sample(
        self, seeds: Int64[Tensor, " count"], *, sampler: Sampler, steps: int, guidance: Guidance | None = None
    ) -> Float[Tensor, "count *latent_shape"]:
        """Draw one latent for each seed; a sample depends on its own seed, and prompt, alone, not on its neighbours in
        the batch.

        Args:
            guidance: of a prior with text, which needs one, if only with the empty prompt; a row for each seed, or one.
        """


def statistics_shape(latent_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a latent's mean and deviation: one a channel of planes, one for each number of vectors."""
    return (latent_shape[0], 1, 1) if len(latent_shape) == 3 else latent_shape


def draw_latent(signal: Signal) -> Float[Tensor, "batch *latent_shape"]:
    """A draw from each latent's posterior, from the sample's seed; the latent itself where it has no deviation."""
    mean, *deviation = signal.inputs.float().unbind(1)
    return mean + deviation[0] * randomness.normal(signal.seed, "posterior", mean.shape[1:]) if deviation else mean
