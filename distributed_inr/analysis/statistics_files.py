"""Measured runs as files: figures, and the numbers in them. Functions return what they wrote.

`out` None is `analysis/<name>` inside the run folder, or in the working directory where the run is read-only. Other
arguments are those of the analysis; layers are counted from 1.
"""

from pathlib import Path
from typing import Any

from distributed_inr import analysis
from distributed_inr.analysis import figures
from distributed_inr.analysis.neighbours import Memorisation
from distributed_inr.analysis.output import Files, codes
from distributed_inr.analysis.sources import MOST, Latents, hierarchical, num_layers, render, training_latents
from distributed_inr.generation import FieldModel
from distributed_inr.models.noising import Sampler


def correlation_files(
    model: FieldModel,
    out: Path | None = None,
    *,
    variance: float = 0.99,
    permutations: int = 200,
    seed: int = 0,
    most: int = MOST,
) -> list[Path]:
    """svcca.png: the matrix, and adjacent layers beside chance; svcca.json."""
    num_layers(model, "SVCCA")
    latents = training_latents(model, most=most).values
    found = analysis.correlations(latents, variance=variance, permutations=permutations, seed=seed)
    files = Files(model, "svcca", out)
    files.picture("svcca.png", figures.correlations(found, title=files.run))
    files.json(
        "svcca.json",
        {"variance": variance, "permutations": permutations, "seed": seed, "signals": found.signals},
        adjacent=[
            {
                "layers": [index + 1, index + 2],
                "mean": one.mean,
                "k": one.components,
                "p_value": one.p_value,
                "chance": one.chance,
            }
            for index, one in enumerate(found.adjacent)
        ],
        matrix=found.matrix.tolist(),
    )
    return files.paths


def clusters_files(
    model: FieldModel,
    out: Path | None = None,
    *,
    count: int = 10,
    neighbours: int = 20,
    seed: int = 0,
    most: int = MOST,
) -> list[Path]:
    """clusters.png: each layer's latents; clusters.csv: its clusters; clusters.json: how they agree with codes."""
    found = analysis.clusters(model, count=count, neighbours=neighbours, seed=seed, most=most)
    files = Files(model, "clusters", out)
    files.picture("clusters.png", figures.clusters(found, title=files.run))
    files.table(
        "clusters.csv",
        [
            {
                "layer": layer.layer,
                "cluster": cluster,
                "size": int((layer.clusters.labels == cluster).sum()),
                "code": codes(layer.cluster_codes)[cluster],
                "bits_from_code_within": layer.within[cluster].item(),
                "bits_from_code_overall": layer.overall[cluster].item(),
            }
            for layer in found
            for cluster in range(count)
        ],
    )
    names = ("layer", "codes_of", "purity", "chance_purity", "adjusted_rand")
    files.json(
        "clusters.json",
        {"count": count, "neighbours": neighbours, "seed": seed, "signals": len(found[0].points)},
        layers=[{n: getattr(layer, n) for n in names} | {"inertia": layer.clusters.inertia} for layer in found],
    )
    return files.paths


def conditions_files(
    model: FieldModel,
    out: Path | None = None,
    *,
    count: int = 5,
    samples: int = 200,
    seed: int = 0,
    sampler: Sampler | None = None,
    steps: int | None = None,
    most: int = MOST,
) -> list[Path]:
    """conditions.png: draws under each condition; signals.png: the signals they come from; conditions.csv."""
    found = analysis.conditions(model, count=count, samples=samples, seed=seed, sampler=sampler, steps=steps, most=most)
    files = Files(model, "conditions", out)
    files.picture("conditions.png", figures.conditions(found, title=files.run))
    shown = render(model, found.signals)
    title = f"{files.run}: the drawn signals whose conditions are shown"
    names = [f"condition {index + 1}" for index in range(count)]
    files.picture("signals.png", figures.pictures(shown[None], title=title, column_titles=names))
    files.table(
        "conditions.csv",
        [
            {
                "layer": layer.layer,
                "condition": index + 1,
                "bits": codes(layer.bits)[index] if layer.layer > 1 else "",
                "spread_over_training": layer.spread[index].item(),
                "mean_1": layer.samples[index, :, 0].mean().item(),
                "mean_2": layer.samples[index, :, 1].mean().item(),
            }
            for layer in found.layers
            for index in range(count)
        ],
    )
    return files.paths


def memorisation_files(
    model: FieldModel,
    out: Path | None = None,
    *,
    count: int = 1000,
    seed: int = 0,
    steps: int | None = None,
    allow_pipe: bool = False,
) -> list[Path]:
    """memorisation.png: distances of samples and of held-out pictures to the training set; memorisation.json."""
    found = analysis.memorisation(model, count=count, seed=seed, steps=steps, allow_pipe=allow_pipe)
    files = Files(model, "memorisation", out)
    files.picture("memorisation.png", figures.memorisation(found, title=f"{files.run}, seed {seed}"))
    steps = model.experiment.sampling.steps if steps is None else steps
    files.json("memorisation.json", {"count": count, "seed": seed, "steps": steps}, **_distances(found))
    return files.paths


def deviations_files(
    model: FieldModel,
    out: Path | None = None,
    *,
    count: int = 10,
    samples: int = 500,
    seed: int = 0,
    sampler: Sampler = "ddim",
    steps: int = 50,
    most: int = MOST,
) -> list[Path]:
    """deviations.png and deviations.csv: a row a layer."""
    found = analysis.deviations(model, count=count, samples=samples, seed=seed, sampler=sampler, steps=steps, most=most)
    files = Files(model, "deviations", out)
    bits = hierarchical(model, "deviations").projection.shape[2]
    title = f"{files.run}: {count} conditions, {samples} samples of each, {sampler}, {steps} steps, seed {seed}"
    files.picture("deviations.png", figures.deviations(found, condition_bits=bits, title=title))
    rows = [{"layer": layer.layer, "condition_bits": bits if layer.layer > 1 else 0} | layer.figures for layer in found]
    files.table("deviations.csv", rows)
    return files.paths


def ablation_files(
    model: FieldModel,
    other: FieldModel,
    out: Path | None = None,
    *,
    count: int = 256,
    seed: int = 0,
    steps: int | None = None,
    allow_pipe: bool = False,
) -> list[Path]:
    """ablation.png: samples of the same seeds, with and without conditions; ablation.json."""
    found = analysis.ablation(model, other, count=count, seed=seed, steps=steps, allow_pipe=allow_pipe)
    files = Files(model, "ablation", out)
    title = f"{count} samples of each, seed {seed}" + (
        "" if found.same_autoencoder else "; the two runs' autoencoders differ"
    )
    files.picture("ablation.png", figures.ablation(found, title=title))
    arms = {
        name: {
            "run": arm.name,
            "condition_bits": arm.condition_bits,
            "kid_efficientnet_lite0": arm.kid,
            "kid_standard_error": arm.kid_error,
            "memorisation": _distances(arm.memorisation),
        }
        for name, arm in (("conditional", found.conditional), ("unconditional", found.unconditional))
    }
    files.json(
        "ablation.json",
        {"other": str(other.folder), "count": count, "seed": seed, "steps": steps},
        **arms,
        training_pictures_of_kid=found.training_pictures,
        held_out_kid=found.held_out_kid,
        held_out_kid_standard_error=found.held_out_kid_error,
        same_autoencoder=found.same_autoencoder,
    )
    return files.paths


def frequencies_files(model: FieldModel, latents: Latents, out: Path | None = None) -> list[Path]:
    """frequencies.png: spectra of basis fields, and some of the fields; frequencies.csv."""
    found = analysis.frequencies(model, latents)
    files = Files(model, "frequencies", out)
    files.picture("frequencies.png", figures.frequencies(found, title=files.run))
    files.table(
        "frequencies.csv",
        [
            {
                "field": index + 1,
                "cells": one.cells,
                "cycles_a_side": cycles,
                "power": power,
                "share": one.shares[cycles].item(),
            }
            for index, one in enumerate(found.fields)
            for cycles, power in enumerate(one.power.tolist())
        ],
    )
    return files.paths


def _distances(found: Memorisation) -> dict[str, Any]:
    sets = {
        "samples": found.samples,
        "held_out": found.held_out,
        "held_out_functions": found.held_out_functions,
    }
    values: dict[str, Any] = {}
    for name, distances in sets.items():
        if distances is not None:
            values[name] = {
                "count": len(distances),
                "mean": distances.mean().item(),
                "median": distances.median().item(),
                "smallest": distances.min().item(),
            }
    return values | {
        "distance": f"L2 over all pixels and colours in [0, 1] at {found.resolution} x {found.resolution}, unsquared, "
        "to the nearest training picture (or its augmented copy, where the run has some)",
        "training_pictures": found.training_pictures,
    }
