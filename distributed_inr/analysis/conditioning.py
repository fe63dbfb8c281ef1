"""What the conditions of hierarchical diffusion leave open: a layer's latents under one condition, beside all others.

Layers are counted from 1, as in the paper.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from distributed_inr.analysis.sources import MOST, hierarchical, training_latents, z_scores
from distributed_inr.analysis.statistics import principal_components
from distributed_inr.domains.domain import seeds_for
from distributed_inr.generation import FieldModel
from distributed_inr.models.hierarchical_diffusion import HierarchicalDiffusionModel
from distributed_inr.models.noising import Sampler

logger = logging.getLogger(__name__)

_DRAWN_TOGETHER = 1024
"""Draws of one layer at a time: they are single vectors, so more of them fit than whole signals."""


@dataclass(frozen=True)
class ConditionalDistribution:
    """One layer's latents along the two main components of its training latents, z-scored.

    Attributes:
        layer: counted from 1.
        explained: part of the training latents' variance along each component.
        training: the training latents: all conditions together.
        chosen: the latents of the signals that the conditions come from.
        samples: draws under each condition.
        bits: the conditions, in {0, 1}; all zeros in layer 1, which has none.
        spread: of each condition, the root of its samples' variance along both components over the training latents'.
    """

    layer: int
    explained: Float64[Tensor, "2"]
    training: Float64[Tensor, "count 2"]
    chosen: Float64[Tensor, "conditions 2"]
    samples: Float64[Tensor, "conditions samples 2"]
    bits: Float[Tensor, "conditions condition_bits"]
    spread: Float64[Tensor, " conditions"]


@dataclass(frozen=True)
class ConditionalDistributions:
    """Of every layer, and the drawn signals whose conditions they are, as latents [conditions, layers, dim]."""

    layers: list[ConditionalDistribution]
    signals: Float[Tensor, "conditions layers dim"]


@torch.no_grad()
def conditions(
    model: FieldModel,
    *,
    count: int = 5,
    samples: int = 200,
    seed: int = 0,
    sampler: Sampler | None = None,
    steps: int | None = None,
    most: int = MOST,
) -> ConditionalDistributions:
    """Draws of each layer under the conditions of some drawn signals, beside its training latents (CHINR, figure 7).

    Args:
        count: signals drawn, each of which gives one condition to every layer.
        samples: draws of each layer under each condition.
        sampler, steps: None takes the run's own.
        most: training latents shown, evenly spaced.
    """
    prior = hierarchical(model, "conditions")
    _check_counts(count, samples)
    draw = _Draws(prior, model.sampling_settings(steps, sampler), seed)
    training = z_scores(model, training_latents(model, most=most).values)
    signals = draw.signals(count)
    bits = prior.bits(signals)
    found = []
    for layer in range(1, signals.shape[1] + 1):
        logger.info("layer %d of %d", layer, signals.shape[1])
        under = bits[:, layer - 1]
        drawn = draw.layer(layer, under.repeat_interleave(samples, dim=0), start=count)
        components = principal_components(training[:, layer - 1])
        points = components.project(drawn.unflatten(0, (count, samples)))
        shown = components.project(training[:, layer - 1])
        spread = (points.var(1).sum(1) / shown.var(0).sum()).sqrt()
        chosen = components.project(prior.normalise(signals)[:, layer - 1].cpu())
        found.append(ConditionalDistribution(layer, components.explained, shown, chosen, points, under.cpu(), spread))
    return ConditionalDistributions(found, signals.cpu())


@dataclass(frozen=True)
class LayerDeviations:
    """Standard deviations of one layer's draws, per number of the latent (CHINR, table 2).

    Attributes:
        layer: counted from 1; layer 1 has no condition.
        within: of each condition's draws, z-scored.
        unconditional: of draws over the conditions of the training latents, z-scored.
        scale: the training latents' deviation: raw deviations are the z-scored ones times this.
        alone: part of the training latents used whose condition no other of them has, in [0, 1].
    """

    layer: int
    within: Float64[Tensor, "conditions dim"]
    unconditional: Float64[Tensor, " dim"]
    scale: Float64[Tensor, " dim"]
    alone: float

    @property
    def figures(self) -> dict[str, float]:
        """Means over numbers and conditions; `ratio` is that of the two z-scored means."""
        within, unconditional = self.within.mean().item(), self.unconditional.mean().item()
        return {
            "within": within,
            "within_smallest_condition": self.within.mean(1).min().item(),
            "within_largest_condition": self.within.mean(1).max().item(),
            "unconditional": unconditional,
            "ratio": within / unconditional,
            "within_raw": (self.within * self.scale).mean().item(),
            "unconditional_raw": (self.unconditional * self.scale).mean().item(),
            "alone": self.alone,
        }


@torch.no_grad()
def deviations(
    model: FieldModel,
    *,
    count: int = 10,
    samples: int = 500,
    seed: int = 0,
    sampler: Sampler = "ddim",
    steps: int = 50,
    most: int = MOST,
) -> list[LayerDeviations]:
    """How much each layer varies within one condition (CHINR, section 4.4 and table 2).

    The conditions are those of `count` drawn signals. They are compared with as many draws in all, each under the
    condition of one training latent. Without conditions (prior.condition_bits=0) the two are alike.

    Args:
        samples: draws under each condition.
        most: training latents used, evenly spaced.
    """
    prior = hierarchical(model, "deviations")
    _check_counts(count, samples)
    draw, total = _Draws(prior, model.sampling_settings(steps, sampler), seed), count * samples
    latents = training_latents(model, most=most).values.to(model.device)
    training_bits, drawn_bits = prior.bits(latents), prior.bits(draw.signals(count))
    of = torch.arange(total, device=model.device) * len(latents) // total  # evenly spaced
    found = []
    for layer in range(1, latents.shape[1] + 1):
        logger.info("layer %d of %d", layer, latents.shape[1])
        under = drawn_bits[:, layer - 1].repeat_interleave(samples, dim=0)
        within = draw.layer(layer, under, start=count).unflatten(0, (count, samples)).double().std(1)
        overall = draw.layer(layer, training_bits[of, layer - 1], start=count + total).double().std(0)
        scale = prior.latent_deviation[layer - 1].double().cpu()
        found.append(LayerDeviations(layer, within, overall, scale, share_alone(training_bits[:, layer - 1].cpu())))
    return found


def share_alone(codes: Float[Tensor, "count bits"]) -> float:
    """The part of the rows that no other row equals, in [0, 1]. Where it is large, a condition names one signal."""
    if codes.shape[1] == 0:
        return float(len(codes) == 1)
    counts = torch.unique(codes, dim=0, return_counts=True)[1]
    return (counts == 1).sum().item() / len(codes)


class _Draws:
    """Draws whose seeds are positions of one seed: every position is used once in a layer."""

    def __init__(self, prior: HierarchicalDiffusionModel, how: Mapping[str, Any], seed: int) -> None:
        self.prior, self.how, self.seed = prior, how, seed

    def signals(self, count: int) -> Float[Tensor, "count layers dim"]:
        """Whole latents, at the positions from 0."""
        return torch.cat([self.prior.sample(part, **self.how) for part in self._seeds(count, 0)])

    def layer(
        self, layer: int, bits: Float[Tensor, "count condition_bits"], *, start: int
    ) -> Float[Tensor, "count dim"]:
        """z-scores of one layer under each of `bits`, at the positions from `start`, on the CPU."""
        parts = zip(self._seeds(len(bits), start), bits.split(_DRAWN_TOGETHER), strict=True)
        drawn = [self.prior.sample_layer(layer - 1, under, seeds, **self.how).cpu() for seeds, under in parts]
        return torch.cat(drawn)

    def _seeds(self, count: int, start: int) -> tuple[Int64[Tensor, " count"], ...]:
        return seeds_for(self.seed, count, start).to(self.prior.latent_mean.device).split(_DRAWN_TOGETHER)


def _check_counts(count: int, samples: int) -> None:
    if count < 1:
        raise ValueError(f"count={count} must be at least 1: the conditions")
    if samples < 2:
        raise ValueError(
            f"samples={samples} must be at least 2: the draws under each condition, whose deviation is taken"
        )
