"""Controlled and retrieved signals as files: pictures, and the numbers behind them. Functions return what they wrote.

`out` None is `analysis/<name>` inside the run folder, or in the working directory where the run is read-only. Other
arguments are those of the analysis; layers are counted from 1.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from distributed_inr.analysis import control, figures, neighbours
from distributed_inr.analysis.output import Files, codes
from distributed_inr.analysis.sources import Latents, num_layers, render
from distributed_inr.generation import FieldModel
from distributed_inr.models.noising import Sampler


def tree_files(
    model: FieldModel,
    out: Path | None = None,
    *,
    fix_layers: Sequence[int] | None = None,
    branches: int = 2,
    seed: int = 0,
    sampler: Sampler | None = None,
    steps: int | None = None,
    resolution: int | None = None,
) -> list[Path]:
    """tree.png; tree.json with every node's seed and bits; latents.safetensors in the order of its nodes."""
    found = control.tree(model, fix_layers=fix_layers, branches=branches, seed=seed, sampler=sampler, steps=steps)
    files = Files(model, "tree", out)
    nodes = list(found.nodes.values())
    latents = torch.stack([node.latent for node in nodes])
    shown = dict(zip(found.nodes, render(model, latents, resolution), strict=True))
    # How far siblings' pictures lie apart, generation by generation: the more layers are held, the less.
    apart = []
    for depth in range(len(found.levels) - 1):
        families = [found.children(node.path) for node in nodes if len(node.path) == depth]
        pairs = [_differences([shown[child.path] for child in family]) for family in families]
        mean = torch.cat(pairs).mean().item() if found.branches > 1 else None
        apart.append({"layers_of_siblings_held": found.levels[depth], "rms_between_siblings": mean})
    lines = ", ".join(
        f"{row['rms_between_siblings']:.3f} ({row['layers_of_siblings_held']})" for row in apart if found.branches > 1
    )
    title = (
        f"{files.run}, seed {seed}\nRMS difference of siblings in [0, 1] (layers they share): {lines or 'no siblings'}"
    )
    files.picture("tree.png", figures.tree(found, shown, title=title))
    files.json(
        "tree.json",
        {"seed": seed, "levels": found.levels, "branches": branches, "sampler": found.sampler, "steps": found.steps},
        seeds="a node's seed is randomness.sample_seed(parent's seed, its last number in path)",
        latents="row of latents.safetensors: the node's layers, then their completion with its own seed",
        siblings=apart,
        nodes=[
            {
                "path": node.path,
                "seed": node.seed,
                "fixed": node.fixed,
                "latents": row,
                "bits": codes(node.bits),
            }
            for row, node in enumerate(nodes)
        ],
    )
    files.tensors("latents.safetensors", latents=latents)
    return files.paths


def composition_files(
    model: FieldModel,
    latents: Latents,
    out: Path | None = None,
    *,
    layers: Sequence[int] | None = None,
    resolution: int | None = None,
) -> list[Path]:
    """composition.png: the signals, then the first of them with one layer of each; composition.csv, how much changed.

    Args:
        latents: of two or more signals, as from `choose`.
    """
    num_layers(model, "composition")
    _check_count(latents, 2)
    values = control.composition(latents.values, layers=layers)
    files = Files(model, "composition", out)
    plain, swapped = render(model, latents.values, resolution), _render_rows(model, values, resolution)
    names = list(layers or range(1, len(values) + 1))
    files.picture(
        "composition.png",
        figures.pictures(
            torch.cat([plain[None], swapped]),
            title=f"{files.run}: the first signal with one layer of each of the others",
            row_titles=["signals", *(f"layer {layer}\nexchanged" for layer in names)],
            column_titles=[_short(key) for key in latents.keys],
        ),
    )
    rows = [
        {
            "layer": layer,
            "of": latents.keys[0],
            "with_layer_of": key,
            "rms_from_first": _rms(swapped[row, column], plain[0]),
            "rms_from_other": _rms(swapped[row, column], plain[column]),
            "rms_between_signals": _rms(plain[0], plain[column]),
        }
        for row, layer in enumerate(names)
        for column, key in enumerate(latents.keys)
        if column > 0
    ]
    files.table("composition.csv", rows)
    return files.paths


def interpolation_files(
    model: FieldModel,
    corners: Latents,
    out: Path | None = None,
    *,
    count: int = 7,
    resolution: int | None = None,
) -> list[Path]:
    """interpolation.png: the grid between four signals; interpolation.csv: how much each step changes the picture."""
    if len(corners) != 4:
        raise ValueError(f"{len(corners)} signals; an interpolation has 4 corners: give four")
    values = control.interpolation(corners.values, count=count)
    files = Files(model, "interpolation", out)
    shown = _render_rows(model, values, resolution)
    title = (
        f"{files.run}: between {', '.join(_short(key) for key in corners.keys)}\n(top left, top right, bottom left, "
    )
    files.picture("interpolation.png", figures.pictures(shown, title=title + "bottom right)"))
    rows = [
        {
            "row": row,
            "column": column,
            "rms_from_left": _rms(shown[row, column], shown[row, column - 1]) if column else None,
            "rms_from_above": _rms(shown[row, column], shown[row - 1, column]) if row else None,
        }
        for row in range(count)
        for column in range(count)
    ]
    files.table("interpolation.csv", rows)
    return files.paths


def layerwise_files(
    model: FieldModel,
    ends: Latents,
    out: Path | None = None,
    *,
    count: int = 7,
    layers: Sequence[int] | None = None,
    resolution: int | None = None,
) -> list[Path]:
    """layerwise.png: from the first signal to the second in one layer alone, a row a layer; layerwise.csv."""
    num_layers(model, "layerwise interpolation")
    if len(ends) != 2:
        raise ValueError(f"{len(ends)} signals; an interpolation by layers has 2 ends: give two")
    values = control.layerwise(ends.values[0], ends.values[1], count=count, layers=layers)
    files = Files(model, "layerwise", out)
    shown, (start, end) = _render_rows(model, values, resolution), render(model, ends.values, resolution)
    names = list(layers or range(1, len(values) + 1))
    rows = torch.cat([shown, end.expand(len(shown), 1, -1, -1, -1)], dim=1)
    files.picture(
        "layerwise.png",
        figures.pictures(
            rows,
            title=f"{files.run}: from {_short(ends.keys[0])} to {_short(ends.keys[1])} in one layer",
            row_titles=[f"layer {layer}" for layer in names],
            column_titles=[*(f"{index / (count - 1):.2f}" for index in range(count)), "the end, all layers"],
        ),
    )
    files.table(
        "layerwise.csv",
        [
            {
                "layer": layer,
                "part": index / (count - 1),
                "rms_from_start": _rms(shown[row, index], start),
                "rms_from_end": _rms(shown[row, index], end),
            }
            for row, layer in enumerate(names)
            for index in range(count)
        ],
    )
    return files.paths


def retrieval_files(
    model: FieldModel,
    query: Latents,
    out: Path | None = None,
    *,
    layers: Sequence[int] | None = None,
    count: int = 5,
    resolution: int | None = None,
) -> list[Path]:
    """For each query a sheet, a row for all layers and for each of `layers`; retrieval.csv with keys and distances.

    Args:
        layers: None is each of them, where they have latents of their own.
    """
    shape = model.autoencoder.latent_shape
    if layers is None:
        layers = range(1, shape[0] + 1) if len(shape) == 2 and shape[0] > 1 else ()
    found = [neighbours.retrieval(model, query, layer=layer, count=count) for layer in (None, *layers)]
    files = Files(model, "retrieval", out)
    plain = render(model, query.values, resolution)
    near = [_render_rows(model, one.values, resolution) for one in found]
    blank = ["", *(f"neighbour {rank}" for rank in range(1, count + 1))]
    for index, key in enumerate(query.keys):
        rows = torch.stack([torch.cat([plain[index : index + 1], neighbours[index]]) for neighbours in near])
        texts = [
            [
                "",
                *(f"{_short(k)}\n{d:.2f}" for k, d in zip(one.keys[index], one.distances[index].tolist(), strict=True)),
            ]
            for one in found
        ]
        title = f"{files.run}: training signals nearest to {_short(key)} ({query.source}), as functions\n"
        files.picture(
            f"retrieval-{index:02d}.png",
            figures.pictures(
                rows,
                title=title + "below each: its key, and the L2 distance of z-scored latents",
                row_titles=["whole\nlatent" if one.layer is None else f"layer {one.layer}" for one in found],
                column_titles=["query", *blank[1:]],
                labels=texts,
            ),
        )
    files.table(
        "retrieval.csv",
        [
            {"query": key, "layer": one.layer or "all", "rank": rank + 1, "key": name, "distance": distance.item()}
            for one in found
            for index, key in enumerate(query.keys)
            for rank, (name, distance) in enumerate(zip(one.keys[index], one.distances[index], strict=True))
        ],
    )
    return files.paths


def _render_rows(
    model: FieldModel, values: Float[Tensor, "rows columns *latent_shape"], resolution: int | None
) -> Float[Tensor, "rows columns 3 height width"]:
    return render(model, values.flatten(0, 1), resolution).unflatten(0, values.shape[:2])


def _rms(first: Tensor, second: Tensor) -> float:
    """Root mean square difference of two pictures in [0, 1]."""
    return (first - second).square().mean().sqrt().item()


def _differences(pictures: Sequence[Tensor]) -> Float[Tensor, " pairs"]:
    return torch.tensor([_rms(a, b) for index, a in enumerate(pictures) for b in pictures[index + 1 :]])


def _short(key: str) -> str:
    """The end of a key, which tells signals apart."""
    return key if len(key) <= 18 else "..." + key[-15:]


def _check_count(latents: Latents, least: int) -> None:
    if len(latents) < least:
        raise ValueError(f"{len(latents)} signals; give at least {least}")
