"""What a sweep is about: which stages a trial runs, what is measured of it, and which measure decides.

What decides is never the training loss: that of a D2C-VAE contains beta_z, and would always choose the smallest.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from distributed_inr import analysis
from distributed_inr.experiment import Experiment
from distributed_inr.generation import load
from distributed_inr.models import D2CVAE
from distributed_inr.pipeline import STAGES, StageName

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
    measure: Callable[[Experiment], Measures]
    objective: str
    mode: Literal["min", "max"]
    panels: tuple[str, ...]
    curves: tuple[tuple[str, str], ...] = ()
    early: Callable[[Mapping[str, Any]], float | None] | None = None

    def score(self, objective: float) -> float:
        """Larger is better."""
        return objective if self.mode == "max" else -objective


def reconstruction(experiment: Experiment) -> Measures:
    """psnr and ssim of held-out signals, parameters of the autoencoder, and the seconds that its training took."""
    held_out = _evaluation(experiment).get("val")
    if held_out is None:
        raise ValueError("data.val is not set: there is nothing held out to measure a trial by; set --data.val")
    return {
        **{name: held_out[name] for name in experiment.domain.metrics},
        "parameters": float(_parameters(experiment)),
        "seconds": _last_metrics(experiment, "autoencoder")["seconds"],
    }


def sample_quality(experiment: Experiment) -> Measures:
    """kid of samples, with its standard error, beside `reconstruction`."""
    kid = _evaluation(experiment)["samples"].get("kid_efficientnet_lite0")
    if kid is None:
        raise ValueError(
            f"evaluation.num_samples={experiment.evaluation.num_samples} leaves out the quality of samples, which a "
            "trial is judged by; set --evaluation.num-samples 256"
        )
    return {"kid": kid["value"], "kid_standard_error": kid["standard_error"]} | reconstruction(experiment)


def rate_and_distortion(experiment: Experiment) -> Measures:
    """kl of held-out posteriors to N(0, 1), in nats a signal, beside `sample_quality` (DDMI, eq. 5)."""
    assert isinstance(experiment.autoencoder, D2CVAE)
    weight = experiment.autoencoder.kl_weight
    measures = sample_quality(experiment)
    if weight > 0:  # the loss is weighted, and fully risen at the end
        measures["kl"] = _last_metrics(experiment, "autoencoder")["val/kl"] / weight
    return measures


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
