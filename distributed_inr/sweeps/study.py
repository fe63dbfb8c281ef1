"""What a sweep is about: which stages a trial runs, what is measured of it, and which measure decides.

What decides is never the training loss: that of a D2C-VAE contains beta_z, and would always choose the smallest.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from distributed_inr import analysis
from distributed_inr.experiment import Experiment
from distributed_inr.generation import load
from distributed_inr.models import D2CVAE, HierarchicalDiffusion
from distributed_inr.pipeline import STAGES, StageName
from distributed_inr.sweeps.space import shares_autoencoder

Measures = dict[str, float]

_CONDITIONS, _DRAWS = 10, 100
"""Conditions, and samples of each, that deviations are taken from: a fifth of the analysis's own, for its minutes."""

PUBLISHED_DEVIATIONS: Mapping[int, tuple[float, ...]] = {
    8: (0.7766, 0.9153, 0.9363, 0.8772, 0.8631),
    12: (0.7766, 0.9092, 0.9292, 0.8663, 0.8550),
    15: (0.7766, 0.5344, 0.5478, 0.3257, 0.2570),
    20: (0.7766, 0.1032, 0.1121, 0.0853, 0.0766),
}
"""By bits: deviations of layers 1 to 5 on CelebA-HQ (CHINR, table 2)."""


@dataclass(frozen=True)
class Study:
    """A question that a sweep answers.

    Attributes:
        about: what is varied, in words.
        family: whose presets it takes.
        preset: the one it takes unless told otherwise.
        space: the file it takes unless told otherwise.
        stages: of a trial.
        check: raises ValueError where an experiment, or fields to vary, have nothing that it can measure.
        measure: measures of a finished trial.
        objective: the measure that decides.
        mode: whether less or more of it is better.
        curves: pairs of measures that are drawn against each other.
        panels: measures that are drawn against each varied field.
        early: an estimate of the objective from the metrics of a checkpoint, or None where they hold none; without it
            no trial can be stopped early.
    """

    about: str
    family: Literal["ddmi", "chinr"]
    preset: str
    space: Path
    stages: tuple[StageName, ...]
    check: Callable[[Experiment, Collection[str]], None]
    measure: Callable[[Experiment], Measures]
    objective: str
    mode: Literal["min", "max"]
    panels: tuple[str, ...]
    curves: tuple[tuple[str, str], ...] = ()
    early: Callable[[Mapping[str, Any]], float | None] | None = None

    def score(self, objective: float) -> float:
        """Larger is better."""
        return objective if self.mode == "max" else -objective


def check_samples(experiment: Experiment, fields: Collection[str]) -> None:
    """Are there samples to judge by?"""
    if experiment.evaluation.num_samples < 2:
        raise ValueError(
            f"evaluation.num_samples={experiment.evaluation.num_samples} leaves out the quality of samples, which a "
            "trial is judged by; set --evaluation.num-samples 256"
        )


def check_beta_z(experiment: Experiment, fields: Collection[str]) -> None:
    check_samples(experiment, fields)
    if not isinstance(experiment.autoencoder, D2CVAE):
        raise ValueError(f"autoencoder.kind={experiment.autoencoder.kind} has no KL term; take a preset with d2c-vae")


def check_experts(experiment: Experiment, fields: Collection[str]) -> None:
    if shares_autoencoder(fields):
        raise ValueError(
            f"trials train the autoencoder alone, and {', '.join(fields)} would change nothing of it; see "
            "jobs/tune_hcdm.py for fields of the prior"
        )


def check_conditions(experiment: Experiment, fields: Collection[str]) -> None:
    check_samples(experiment, fields)
    if not isinstance(experiment.prior, HierarchicalDiffusion):
        raise ValueError(
            f"prior.kind={experiment.prior.kind} has no conditions; take a preset with hierarchical-diffusion"
        )


def reconstruction(experiment: Experiment) -> Measures:
    """psnr and ssim of held-out signals, parameters of the autoencoder, and the seconds that its training took."""
    held_out = _evaluation(experiment)["val"]
    return {
        **{name: held_out[name] for name in experiment.domain.metrics},
        "parameters": float(_parameters(experiment)),
        "seconds": _last_metrics(experiment, "autoencoder")["seconds"],
    }


def sample_quality(experiment: Experiment) -> Measures:
    """kid of samples, with its standard error, beside `reconstruction`."""
    found = _evaluation(experiment)
    kid = found["samples"].get("kid_efficientnet_lite0")
    if kid is None:
        reasons = "; ".join(reason for what, reason in found["left_out"].items() if "dist" in what or "kid" in what)
        raise ValueError(
            f"{experiment.folder} has no kid to judge by: {reasons}; judge by reconstruction, or mend that"
        )
    return {"kid": kid["value"], "kid_standard_error": kid["standard_error"]} | reconstruction(experiment)


def rate_and_distortion(experiment: Experiment) -> Measures:
    """kl of held-out posteriors to N(0, 1), in nats a signal, beside `sample_quality` (DDMI, eq. 5)."""
    cfg = experiment.autoencoder
    assert isinstance(cfg, D2CVAE)
    rise = min(1.0, experiment.autoencoder_training.num_samples / max(1, cfg.kl_anneal_samples))
    weight = cfg.kl_weight * (cfg.kl_start + (1 - cfg.kl_start) * rise)  # the loss is weighted, as at its end
    measures = sample_quality(experiment)
    return measures | ({"kl": _last_metrics(experiment, "autoencoder")["val/kl"] / weight} if weight > 0 else {})


def conditional_deviations(experiment: Experiment) -> Measures:
    """deviation_1 ...: of each layer's draws within one condition, z-scored; deviation: their mean from layer 2 on;
    alone: training signals whose condition for the last layer no other has, in [0, 1] (CHINR, table 2)."""
    model = load(experiment.folder)
    found = analysis.deviations(model, count=_CONDITIONS, samples=_DRAWS, seed=experiment.seed)
    layers = {f"deviation_{layer.layer}": layer.figures["within"] for layer in found}
    later = [layer.figures["within"] for layer in found[1:]]
    together = {"deviation": sum(later) / len(later), "alone": found[-1].alone}
    return sample_quality(experiment) | together | layers


def held_out_psnr(metrics: Mapping[str, Any]) -> float | None:
    """From the held-out Gaussian loss, 0.5 (x - y)^2 with values in [-1, 1]: of the mean error, not a mean over
    pictures."""
    loss = metrics.get("val/reconstruction")
    return None if loss is None else 10 * math.log10(2.0**2 / (2 * loss))


BETA_Z = Study(
    about="beta_z, the weight of the KL term",
    family="ddmi",
    preset="furniture-image-short",
    space=Path("tune_spaces/beta_z.py"),
    stages=STAGES,
    check=check_beta_z,
    measure=rate_and_distortion,
    objective="kid",
    mode="min",
    panels=("psnr", "kl", "kid"),
    curves=(("kl", "psnr"),),
)
NUM_EXPERTS = Study(
    about="the number of experts",
    family="chinr",
    preset="furniture-image-short",
    space=Path("tune_spaces/num_experts.py"),
    stages=("autoencoder", "evaluation"),
    check=check_experts,
    measure=reconstruction,
    objective="psnr",
    mode="max",
    panels=("psnr", "parameters", "seconds"),
    curves=(("parameters", "psnr"),),
    early=held_out_psnr,
)
CONDITION_BITS = Study(
    about="the length of the binary conditions",
    family="chinr",
    preset="furniture-image-short",
    space=Path("tune_spaces/condition_bits.py"),
    stages=STAGES,
    check=check_conditions,
    measure=conditional_deviations,
    objective="kid",
    mode="min",
    panels=("deviation", "alone", "kid"),
)


def _evaluation(experiment: Experiment) -> dict[str, Any]:
    return json.loads((experiment.folder / "evaluation.json").read_text())


def _last_metrics(experiment: Experiment, stage: str) -> dict[str, Any]:
    return json.loads((experiment.folder / stage / "metrics.jsonl").read_text().splitlines()[-1])


def _parameters(experiment: Experiment) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in experiment.autoencoder.build(experiment.domain).parameters())
