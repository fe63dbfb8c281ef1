"""Hierarchical controllable diffusion: a chain of diffusion models over a network's layers, each told the earlier ones.

The latent of layer l is drawn under c^l, the signs of a projection of the latents of layers 1 to l - 1 (CHINR,
section 3.3). Holding the first layers' latents holds the conditions of all that follow from them.
"""

import logging
import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import pydantic
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from distributed_inr import randomness
from distributed_inr.config import config
from distributed_inr.domains import Signal
from distributed_inr.models.latent_prior import LatentPrior, draw_latent
from distributed_inr.models.layer_denoisers import AnyLayerDenoiser, MLPUNet
from distributed_inr.models.noising import NoisingChain, Prediction, Sampler, cosine_betas
from distributed_inr.models.text_conditioning import Guidance, TextCondition, guided

logger = logging.getLogger(__name__)


@config
class HierarchicalDiffusion:
    """Denoising diffusion over each layer's latent, conditioned on bits of the earlier layers' latents."""

    kind: Literal["hierarchical-diffusion"] = "hierarchical-diffusion"
    denoiser: AnyLayerDenoiser = MLPUNet()
    """The network."""
    networks: Literal["shared", "per-layer"] = "shared"
    """shared: one network for all layers, told which. per-layer: one for each."""
    prediction: Prediction = "x0"
    """What the network predicts; eq. 6 is the posterior mean from the clean latent."""
    num_timesteps: Annotated[int, pydantic.Field(gt=0)] = 1000
    """Length T of each layer's noising chain; its signal level falls along a squared cosine."""
    condition_bits: Annotated[int, pydantic.Field(ge=0)] | None = None
    """C: bits of a condition, at most (layers - 1) * latent_dim. none: log2 of the number of signals less 3, in 1..12;
    with more, most signals would be alone under their code, and the chain a lookup table. 0: no conditions; layers are
    independent (the ablation)."""
    projection: Literal["fixed", "straight-through"] = "fixed"
    """fixed: a Gaussian matrix from the run's seed. straight-through: learned, with the gradient of a sigmoid in place
    of the sign's."""
    text_dim: Annotated[int, pydantic.Field(gt=0)] | None = None
    """Numbers of a text token, which the network attends to. Set from the run's `text`; none: without text."""

    def settle(self, num_signals: int, text_dim: int | None = None) -> "HierarchicalDiffusion":
        """With what depends on the number of training signals, and on the text encoder, set."""
        fitting = max(1, min(12, math.floor(math.log2(num_signals)) - 3))
        if self.condition_bits is None:
            return replace(self, condition_bits=fitting, text_dim=text_dim)
        if self.condition_bits > fitting:
            logger.warning(
                "prior.condition_bits=%d is much for %d signals: many are alone under their code, and later layers "
                "then repeat what they have seen; %d is the default",
                *(self.condition_bits, num_signals, fitting),
            )
        return replace(self, text_dim=text_dim)

    def build(self, latent_shape: tuple[int, ...]) -> "HierarchicalDiffusionModel":
        return HierarchicalDiffusionModel(self, latent_shape)


class HierarchicalDiffusionModel(LatentPrior):
    """Hierarchical diffusion over latents [layers, latent_dim].

    Attributes:
        projection: [layers - 1, latent_dim, condition_bits] W, by the layer that it reads.
        latent_mean, latent_deviation: [layers, latent_dim] statistics of the training latents.
    """

    projection: Tensor

    def __init__(self, cfg: HierarchicalDiffusion, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(latent_shape) != 2:
            raise ValueError(
                f"prior.kind=hierarchical-diffusion needs one latent vector a layer, but this autoencoder's latent has "
                f"shape {list(latent_shape)}; use prior.kind latent-diffusion"
            )
        assert cfg.condition_bits is not None, "settle the number of bits first"
        num_layers, latent_dim = latent_shape
        if num_layers == 1 and cfg.condition_bits:
            raise ValueError(
                "prior.kind=hierarchical-diffusion needs latents of several layers, and this autoencoder gives one for "
                "all (autoencoder.modulation, autoencoder.num_layers); use prior.kind latent-diffusion, as the preset "
                "furniture-image-mnif does"
            )
        most = (num_layers - 1) * latent_dim
        if cfg.condition_bits > most:
            raise ValueError(
                f"prior.condition_bits={cfg.condition_bits} must be at most {most}, the numbers of the "
                f"{num_layers - 1} latents that conditions are made from; try {min(12, latent_dim, most)}"
            )
        if cfg.condition_bits == 0 and cfg.projection != "fixed":
            raise ValueError(
                f"prior.projection={cfg.projection} has nothing to learn without conditions (prior.condition_bits=0); "
                "use fixed"
            )
        self.cfg, self.latent_shape = cfg, latent_shape
        shared = cfg.networks == "shared"
        self.denoisers = nn.ModuleList(
            cfg.denoiser.build(
                latent_dim=latent_dim,
                num_layers=num_layers if shared else 1,
                condition_bits=cfg.condition_bits,
                text_dim=cfg.text_dim,
            )
            for _ in range(1 if shared else num_layers)
        )
        self.chain = NoisingChain(cosine_betas(cfg.num_timesteps), cfg.prediction)
        projection = torch.randn(num_layers - 1, latent_dim, cfg.condition_bits)
        if cfg.projection == "fixed":
            self.register_buffer("projection", projection)
        else:
            self.projection = nn.Parameter(projection)
        self.register_buffer("latent_mean", torch.zeros(latent_shape))
        self.register_buffer("latent_deviation", torch.ones(latent_shape))

    def forward(self, signal: Signal) -> dict[str, Tensor]:
        """The denoising error of every layer under the conditions of the clean latents (CHINR, eq. 6 and 7)."""
        clean = self.normalise(draw_latent(signal))
        batch, num_layers, _ = clean.shape
        timesteps = randomness.integers(signal.seed, "timestep", (num_layers,), self.cfg.num_timesteps).flatten()
        noise = randomness.normal(signal.seed, "noise", self.latent_shape).flatten(0, 1)
        noisy, target = self.chain.add_noise(clean.flatten(0, 1), timesteps, noise)

        codes = self._codes(clean[:, :-1])
        bits = (codes > 0).to(codes.dtype)
        if self.cfg.projection == "straight-through":
            soft = torch.sigmoid(codes)
            bits = bits + soft - soft.detach()
        layers = torch.arange(num_layers, device=clean.device).repeat(batch)
        text = TextCondition.of(signal)
        text = None if text is None else text.repeated(num_layers)
        predicted = self._denoise(noisy, timesteps, layers, bits.flatten(0, 1), text)
        return {"diffusion": (predicted.float() - target).square().mean()}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the networks; the noise is drawn by integer arithmetic that would be compiled anew for every name."""
        for denoiser in self.denoisers:
            denoiser.compile(*args, **kwargs)

    def normalise_from(self, mean: Float[Tensor, "layers dim"], deviation: Float[Tensor, "layers dim"]) -> None:
        self.latent_mean.copy_(mean)
        self.latent_deviation.copy_(deviation)

    def normalise(self, latent: Float[Tensor, "batch first dim"]) -> Float[Tensor, "batch first dim"]:
        """z-scores, per layer and dimension, of latents or of their first layers."""
        first = latent.shape[1]
        return (latent - self.latent_mean[:first]) / self.latent_deviation[:first]

    def restore(self, scores: Float[Tensor, "batch first dim"]) -> Float[Tensor, "batch first dim"]:
        """Latents from z-scores."""
        first = scores.shape[1]
        return scores * self.latent_deviation[:first] + self.latent_mean[:first]

    def bits(self, latent: Float[Tensor, "batch layers dim"]) -> Float[Tensor, "batch layers condition_bits"]:
        """The conditions c^1 = 0, c^2, ..., c^L in {0, 1} that latents give (CHINR, section 3.3)."""
        codes = self._codes(self.normalise(latent[:, :-1]))
        return (codes > 0).to(codes.dtype)

    def sample(
        self,
        seeds: Int64[Tensor, " count"],
        *,
        sampler: Sampler = "ddim",
        steps: int = 50,
        guidance: Guidance | None = None,
        prefix: Float[Tensor, "count fixed dim"] | None = None,
    ) -> Float[Tensor, "count layers dim"]:
        """Draw the layers one after the other, each by a whole chain of `steps` network evaluations.

        Args:
            prefix: latents of the first layers, to be held; the others are drawn.
        """
        seeds = seeds.to(self.latent_mean.device)
        scores = self.latent_mean.new_empty(len(seeds), 0, self.latent_shape[1])
        if prefix is not None:
            scores = self.normalise(prefix.to(seeds.device))
        for layer in range(scores.shape[1], self.latent_shape[0]):
            codes = self._codes(scores)[:, -1]
            bits = (codes > 0).to(codes.dtype)
            drawn = self.sample_layer(layer, bits, seeds, sampler=sampler, steps=steps, guidance=guidance)
            scores = torch.cat([scores, drawn[:, None]], dim=1)
        restored = self.restore(scores)
        return restored if prefix is None else torch.cat([prefix.to(restored), restored[:, prefix.shape[1] :]], dim=1)

    def sample_layer(
        self,
        layer: int,
        bits: Float[Tensor, "count condition_bits"],
        seeds: Int64[Tensor, " count"],
        *,
        sampler: Sampler = "ddim",
        steps: int = 50,
        guidance: Guidance | None = None,
    ) -> Float[Tensor, "count dim"]:
        """The z-scores of one layer's latent (counted from 0) under given conditions."""

        def predict(noisy: Tensor, timesteps: Tensor, text: TextCondition | None = None) -> Tensor:
            own = bits.repeat(len(noisy) // len(bits), 1)
            return self._denoise(noisy, timesteps, torch.full_like(timesteps, layer), own, text)

        denoise = guided(predict, guidance, count=len(bits), num_timesteps=self.cfg.num_timesteps)
        shape, purpose = self.latent_shape[1:], f"layer {layer} "
        return self.chain.sample(denoise, seeds, shape, sampler=sampler, steps=steps, purpose=purpose)

    def _codes(self, scores: Float[Tensor, "batch first dim"]) -> Float[Tensor, "batch first_and_next condition_bits"]:
        """v^1 = 0, and v^l = W concat(h^1 ... h^{l-1}, 0 ...) for the layers after each of the first."""
        first = scores.shape[1]
        with torch.autocast(scores.device.type, enabled=False):  # signs must be those that sampling finds
            summands = torch.einsum("bld,ldc->blc", scores, self.projection[:first])
        nothing = summands.new_zeros(len(scores), 1, summands.shape[2])
        return torch.cat([nothing, summands.cumsum(dim=1)], dim=1)

    def _denoise(
        self, noisy: Tensor, timesteps: Tensor, layers: Tensor, bits: Tensor, text: TextCondition | None
    ) -> Tensor:
        if self.cfg.networks == "shared":
            return self.denoisers[0](noisy, timesteps, layers, bits, text)
        predicted = torch.zeros_like(noisy)
        for index, denoiser in enumerate(self.denoisers):
            rows = (layers == index).nonzero().flatten()
            if len(rows):
                own = None if text is None else text.rows(rows)
                found = denoiser(noisy[rows], timesteps[rows], torch.zeros_like(rows), bits[rows], own)
                predicted = predicted.index_copy(0, rows, found.to(predicted.dtype))
        return predicted
