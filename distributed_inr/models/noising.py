"""The noising chain of a diffusion model: how much noise each timestep has, what a network predicts, and sampling."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from distributed_inr import randomness
from distributed_inr.models.torchvision_cpu import import_torchvision

Prediction = Literal["epsilon", "v", "x0"]
"""What a network predicts: the noise, the velocity, or the clean latent."""

Sampler = Literal["ancestral", "ddim", "dpm-solver++"]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(noisy [batch, ...], timesteps [batch]) to the prediction [batch, ...]."""


class NoisingChain(nn.Module):
    """A Markov chain of Gaussian noise (Ho et al., 2020), forwards and backwards.

    Attributes:
        betas: [timesteps] noise variance of each step.
        signal_level: [timesteps] the part of a noisy latent's variance that is signal.
    """

    betas: Tensor
    signal_level: Tensor

    def __init__(self, betas: Float64[Tensor, " timesteps"], prediction: Prediction) -> None:
        super().__init__()
        self.prediction: Prediction = prediction
        # Derived from the config, so not part of the checkpoint.
        self.register_buffer("betas", betas, persistent=False)
        self.register_buffer("signal_level", (1 - betas).cumprod(0).float(), persistent=False)

    def add_noise(
        self,
        clean: Float[Tensor, "batch *latent"],
        timesteps: Int64[Tensor, " batch"],
        noise: Float[Tensor, "batch *latent"],
    ) -> tuple[Float[Tensor, "batch *latent"], Float[Tensor, "batch *latent"]]:
        """Noisy latents, and what the network should predict from them."""
        level = self.signal_level[timesteps].view(-1, *[1] * (clean.dim() - 1))
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        targets = {"epsilon": noise, "x0": clean, "v": level.sqrt() * noise - (1 - level).sqrt() * clean}
        return noisy, targets[self.prediction]

    def sample(
        self,
        denoise: Denoise,
        seeds: Int64[Tensor, " count"],
        shape: tuple[int, ...],
        *,
        sampler: Sampler,
        steps: int,
        purpose: str = "",
    ) -> Float[Tensor, "count *latent"]:
        """Ancestral sampling, DDIM, or DPM-Solver++(2M), with `steps` network evaluations.

        Args:
            purpose: makes the draws of several chains with the same seeds differ.
        """
        if not 0 < steps <= len(self.betas):
            raise ValueError(f"sampling.steps={steps} must lie in 1..{len(self.betas)} (prior.num_timesteps); try 50")
        scheduler = self._scheduler(sampler)
        scheduler.set_timesteps(steps)
        noisy = randomness.normal(seeds, f"{purpose}initial", shape)
        for index, timestep in enumerate(scheduler.timesteps):
            predicted = denoise(noisy, timestep.to(seeds.device).expand(len(seeds)))
            extra: dict[str, Any] = {}
            if sampler == "ancestral":
                # DDIM with eta = 1 is the DDPM posterior; the noise comes from each sample's seed.
                extra = {"eta": 1.0, "variance_noise": randomness.normal(seeds, f"{purpose}step {index}", shape)}
            noisy = scheduler.step(predicted.float(), timestep, noisy, **extra).prev_sample
        return noisy

    def _scheduler(self, sampler: Sampler) -> Any:
        import_torchvision()
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        shared: dict[str, Any] = dict(
            num_train_timesteps=len(self.betas),
            trained_betas=self.betas.tolist(),
            prediction_type={"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[self.prediction],
            timestep_spacing="trailing",
        )
        if sampler == "dpm-solver++":
            return DPMSolverMultistepScheduler(**shared)
        return DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=True)


def scaled_linear_betas(num_timesteps: int, *, start: float, end: float) -> Float64[Tensor, " timesteps"]:
    """Noise variances whose square roots rise linearly (Rombach et al., 2022)."""
    return torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float64).square()


def cosine_betas(num_timesteps: int) -> Float64[Tensor, " timesteps"]:
    """Noise variances whose signal level falls along a squared cosine (Nichol and Dhariwal, 2021, eq. 17)."""
    times = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    level = ((times + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)
