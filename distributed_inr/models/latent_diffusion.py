"""Latent diffusion: a denoising diffusion model over latents (DDMI, section 3.2, eq. 10)."""

from typing import Annotated, Any, Literal

import pydantic
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distributed_inr import randomness
from distributed_inr.config import config
from distributed_inr.domains import Signal
from distributed_inr.models.denoisers import AnyDenoiser, UNet
from distributed_inr.models.latent_prior import LatentPrior, Sampler
from distributed_inr.models.torchvision_cpu import import_torchvision


@config
class LatentDiffusion:
    """Denoising diffusion over an autoencoder's latents, normalised by their measured statistics."""

    kind: Literal["latent-diffusion"] = "latent-diffusion"
    denoiser: AnyDenoiser = UNet()
    """The network."""
    prediction: Literal["epsilon", "v", "x0"] = "epsilon"
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

    def build(self, latent_shape: tuple[int, ...]) -> "LatentDiffusionModel":
        return LatentDiffusionModel(self, latent_shape)


class LatentDiffusionModel(LatentPrior):
    """Diffusion over latents of one shape.

    Attributes:
        signal_level: [num_timesteps] the part of a noisy latent's variance that is signal.
        latent_mean, latent_deviation: [channels, 1, ...] statistics of the training latents.
    """

    signal_level: Tensor
    latent_mean: Tensor
    latent_deviation: Tensor

    def __init__(self, cfg: LatentDiffusion, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.cfg, self.latent_shape = cfg, latent_shape
        self.denoiser = cfg.denoiser.build(latent_shape)
        betas = torch.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, cfg.num_timesteps, dtype=torch.float64).square()
        # Derived from the config, so not part of the checkpoint.
        self.register_buffer("signal_level", (1 - betas).cumprod(0).float(), persistent=False)
        per_channel = (latent_shape[0], *[1] * (len(latent_shape) - 1))
        self.register_buffer("latent_mean", torch.zeros(per_channel))
        self.register_buffer("latent_deviation", torch.ones(per_channel))

    def forward(self, signal: Signal) -> dict[str, Tensor]:
        """Eq. 10, as a mean over the latent's elements; w(t) is the density that timesteps are drawn with."""
        mean, deviation = signal.inputs.float().unbind(1)
        latent = mean + deviation * randomness.normal(signal.seed, "posterior", self.latent_shape)
        clean = (latent - self.latent_mean) / self.latent_deviation
        timesteps = self._timesteps(signal.seed)
        noise = randomness.normal(signal.seed, "noise", self.latent_shape)

        level = self.signal_level[timesteps].view(-1, *[1] * len(self.latent_shape))
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        targets = {"epsilon": noise, "x0": clean, "v": level.sqrt() * noise - (1 - level).sqrt() * clean}
        predicted = self.denoiser(noisy, timesteps)
        return {"diffusion": (predicted.float() - targets[self.cfg.prediction]).square().mean()}

    def normalise_from(self, mean: Float[Tensor, " channels"], deviation: Float[Tensor, " channels"]) -> None:
        self.latent_mean.copy_(mean.view_as(self.latent_mean))
        self.latent_deviation.copy_(deviation.view_as(self.latent_deviation))

    def sample(
        self, seeds: Int64[Tensor, " count"], *, sampler: Sampler = "ddim", steps: int = 50
    ) -> Float[Tensor, "count *latent_shape"]:
        """Ancestral sampling (DDMI, section 3.2), DDIM, or DPM-Solver++(2M), with `steps` network evaluations."""
        if not 0 < steps <= self.cfg.num_timesteps:
            raise ValueError(
                f"sampling.steps={steps} must lie in 1..{self.cfg.num_timesteps} (prior.num_timesteps); try 50"
            )
        scheduler = self._scheduler(sampler)
        scheduler.set_timesteps(steps)
        device = self.latent_mean.device
        noisy = randomness.normal(seeds.to(device), "initial", self.latent_shape)
        for index, timestep in enumerate(scheduler.timesteps):
            predicted = self.denoiser(noisy, timestep.to(device).expand(len(seeds)))
            extra: dict[str, Any] = {}
            if sampler == "ancestral":
                # DDIM with eta = 1 is the DDPM posterior; the noise comes from each sample's seed.
                noise = randomness.normal(seeds.to(device), f"step {index}", self.latent_shape)
                extra = {"eta": 1.0, "variance_noise": noise}
            noisy = scheduler.step(predicted.float(), timestep, noisy, **extra).prev_sample
        return noisy * self.latent_deviation + self.latent_mean

    def _timesteps(self, seeds: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        if self.cfg.timestep_logit is None:
            return randomness.integers(seeds, "timestep", (), self.cfg.num_timesteps)
        mean, deviation = self.cfg.timestep_logit
        part = torch.sigmoid(mean + deviation * randomness.normal(seeds, "timestep", ()))
        return (part * self.cfg.num_timesteps).long().clamp(max=self.cfg.num_timesteps - 1)

    def _scheduler(self, sampler: Sampler) -> Any:
        import_torchvision()
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        shared: dict[str, Any] = dict(
            num_train_timesteps=self.cfg.num_timesteps,
            beta_start=self.cfg.beta_start,
            beta_end=self.cfg.beta_end,
            beta_schedule="scaled_linear",
            prediction_type={"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[self.cfg.prediction],
        )
        if sampler == "dpm-solver++":
            return DPMSolverMultistepScheduler(**shared, timestep_spacing="trailing")
        return DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
