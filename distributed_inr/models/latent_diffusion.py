"""Latent diffusion: a denoising diffusion model over latents (DDMI, section 3.2, eq. 10)."""

from dataclasses import replace
from typing import Annotated, Any, Literal

import pydantic
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distributed_inr import randomness
from distributed_inr.config import config
from distributed_inr.domains import Signal
from distributed_inr.models.denoisers import AnyDenoiser, UNet
from distributed_inr.models.latent_prior import LatentPrior, draw_latent, statistics_shape
from distributed_inr.models.noising import NoisingChain, Prediction, Sampler, scaled_linear_betas
from distributed_inr.models.text_conditioning import Guidance, TextCondition, guided


@config
class LatentDiffusion:
    """Denoising diffusion over an autoencoder's latents, normalised by their measured statistics."""

    kind: Literal["latent-diffusion"] = "latent-diffusion"
    denoiser: AnyDenoiser = UNet()
    """The network."""
    prediction: Prediction = "epsilon"
    """What the network predicts: the noise (eq. 10), the velocity, or the clean latent."""
    timestep_logit: tuple[float, Annotated[float, pydantic.Field(gt=0)]] | None = None
    """Mean and deviation of the normal distribution that the logit of t / T is drawn from in training, which spends it
    where most is to be learned (Esser et al., 2024, section 3.1). none: t is uniform (eq. 10 with w(t) = 1)."""
    num_timesteps: Annotated[int, pydantic.Field(gt=0)] = 1000
    """Length T of the noising chain."""
    beta_start: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.0015
    """Noise variance of the first step; the schedule is linear in its square root."""
    beta_end: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.0195
    """Noise variance of the last step."""
    text_dim: Annotated[int, pydantic.Field(gt=0)] | None = None
    """Numbers of a text token, which the network attends to. Set from the run's `text`; none: without text."""

    def settle(self, num_signals: int, text_dim: int | None = None) -> "LatentDiffusion":
        """With what depends on the text encoder set; nothing does on the number of training signals."""
        return replace(self, text_dim=text_dim)

    def build(self, latent_shape: tuple[int, ...]) -> "LatentDiffusionModel":
        return LatentDiffusionModel(self, latent_shape)


class LatentDiffusionModel(LatentPrior):
    """Diffusion over latents of one shape.

    Attributes:
        latent_mean, latent_deviation: statistics of the training latents, of `statistics_shape(latent_shape)`.
    """

    def __init__(self, cfg: LatentDiffusion, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.cfg, self.latent_shape = cfg, latent_shape
        self.denoiser = cfg.denoiser.build(latent_shape, cfg.text_dim)
        betas = scaled_linear_betas(cfg.num_timesteps, start=cfg.beta_start, end=cfg.beta_end)
        self.chain = NoisingChain(betas, cfg.prediction)
        self.register_buffer("latent_mean", torch.zeros(statistics_shape(latent_shape)))
        self.register_buffer("latent_deviation", torch.ones(statistics_shape(latent_shape)))

    def forward(self, signal: Signal) -> dict[str, Tensor]:
        """Eq. 10, as a mean over the latent's elements; w(t) is the density that timesteps are drawn with."""
        clean = (draw_latent(signal) - self.latent_mean) / self.latent_deviation
        timesteps = self._timesteps(signal.seed)
        noise = randomness.normal(signal.seed, "noise", self.latent_shape)
        noisy, target = self.chain.add_noise(clean, timesteps, noise)
        predicted = self.denoiser(noisy, timesteps, TextCondition.of(signal))
        return {"diffusion": (predicted.float() - target).square().mean()}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network; the noise is drawn by integer arithmetic that would be compiled anew for every name."""
        self.denoiser.compile(*args, **kwargs)

    def normalise_from(self, mean: Float[Tensor, "*statistics"], deviation: Float[Tensor, "*statistics"]) -> None:
        self.latent_mean.copy_(mean.view_as(self.latent_mean))
        self.latent_deviation.copy_(deviation.view_as(self.latent_deviation))

    def sample(
        self,
        seeds: Int64[Tensor, " count"],
        *,
        sampler: Sampler = "ddim",
        steps: int = 50,
        guidance: Guidance | None = None,
    ) -> Float[Tensor, "count *latent_shape"]:
        seeds = seeds.to(self.latent_mean.device)
        denoise = guided(self.denoiser, guidance, count=len(seeds), num_timesteps=self.cfg.num_timesteps)
        drawn = self.chain.sample(denoise, seeds, self.latent_shape, sampler=sampler, steps=steps)
        return drawn * self.latent_deviation + self.latent_mean

    def _timesteps(self, seeds: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        if self.cfg.timestep_logit is None:
            return randomness.integers(seeds, "timestep", (), self.cfg.num_timesteps)
        mean, deviation = self.cfg.timestep_logit
        part = torch.sigmoid(mean + deviation * randomness.normal(seeds, "timestep", ()))
        return (part * self.cfg.num_timesteps).long().clamp(max=self.cfg.num_timesteps - 1)
