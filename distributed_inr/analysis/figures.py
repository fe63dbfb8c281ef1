"""Figures of analyses: matplotlib without its global state, and sheets of pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from distributed_inr.analysis.conditioning import ConditionalDistributions, LayerDeviations
from distributed_inr.analysis.control import Tree
from distributed_inr.analysis.neighbours import Ablation, Memorisation
from distributed_inr.analysis.spectra import Spectra
from distributed_inr.analysis.statistics import Correlations, LayerClusters
from distributed_inr.sheets import fit, sheet

_CELL = (128, 512)
"""Least and most pixels a side of a picture on a sheet."""

_GREY = "#c8c8c8"


def pictures(
    rows: Sequence[Float[Tensor, "_ 3 height width"]] | Float[Tensor, "rows columns 3 height width"],
    *,
    title: str,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    labels: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """A grid of pictures in [0, 1]."""
    images = [[fit(picture, _cell(picture)) for picture in row] for row in rows]
    return sheet(images, title=title, row_titles=row_titles, column_titles=column_titles, labels=labels)


def tree(found: Tree, shown: dict[tuple[int, ...], Float[Tensor, "3 height width"]], *, title: str) -> Image.Image:
    """The tree from left to right, a generation a column, each node beside the middle of its children.

    Above a generation stands what each of it shares with its parent and its siblings.
    """
    cell = _cell(shown[()])
    depths, leaves = len(found.levels), [path for path in found.nodes if len(path) == len(found.levels) - 1]
    step_x, step_y, top, margin = cell + 90, cell + 10, 84, 12
    middles = {path: top + index * step_y + cell / 2 for index, path in enumerate(sorted(leaves))}
    for path in sorted(found.nodes, key=len, reverse=True):
        if path not in middles:
            below = [middles[child.path] for child in found.children(path)]
            middles[path] = sum(below) / len(below)
    canvas = Image.new("RGB", (max(640, margin + depths * step_x), top + len(leaves) * step_y), "white")
    draw = ImageDraw.Draw(canvas)
    for path in found.nodes:
        if path:
            left, right = margin + (len(path) - 1) * step_x + cell, margin + len(path) * step_x
            bend = (left + right) / 2
            points = [(left, middles[path[:-1]]), (bend, middles[path[:-1]]), (bend, middles[path])]
            draw.line([*points, (right, middles[path])], fill="#707070", width=2)
    for path, picture in shown.items():
        canvas.paste(fit(picture, cell), (margin + len(path) * step_x, round(middles[path] - cell / 2)))
    draw.text((margin, 10), title, fill="black", font_size=14)
    draw.text((margin, 58), "root", fill="black", font_size=14)
    for depth, held in enumerate(found.levels[:-1], start=1):  # those of the generation before
        shared = "nothing" if held == 0 else "layer 1" if held == 1 else f"layers 1-{held}"
        draw.text((margin + depth * step_x, 58), f"shared: {shared}", fill="black", font_size=14)
    return canvas


def correlations(found: Correlations, *, title: str) -> Figure:
    """The matrix of mean coefficients, and adjacent layers beside chance (CHINR, figures 7a and 17)."""
    layers = len(found.matrix)
    names = [str(layer) for layer in range(1, layers + 1)]
    figure = _figure(11.0, 4.9)
    figure.suptitle(title, fontsize=11)
    matrix, bars = figure.subplots(1, 2)
    shown = matrix.imshow(found.matrix.numpy(), vmin=0, vmax=1, cmap="Blues")
    for row in range(layers):
        for column in range(layers):
            value = found.matrix[row, column].item()
            colour = "white" if value > 0.6 else "black"
            matrix.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    figure.colorbar(shown, ax=matrix, label="mean canonical correlation")
    matrix.set(title=f"SVCCA of the latents of {found.signals} signals", xlabel="layer", ylabel="layer")
    matrix.set_xticks(range(layers), names)
    matrix.set_yticks(range(layers), names)

    places = range(len(found.adjacent))
    bars.bar([p - 0.2 for p in places], [c.mean for c in found.adjacent], 0.4, label="observed", color="C0")
    label = f"chance (mean of {found.permutations} permutations)"
    bars.bar([p + 0.2 for p in places], [c.chance for c in found.adjacent], 0.4, label=label, color=_GREY)
    for place, one in zip(places, found.adjacent, strict=True):
        text = f"k = {one.components[0]}, {one.components[1]}\np = {one.p_value:.3f}"
        _above(bars, place, max(one.mean, one.chance), text)
    bars.set_xticks(list(places), [f"{place + 1}-{place + 2}" for place in places])
    bars.set(title="Adjacent layers", xlabel="layers", ylabel="mean canonical correlation", ylim=(0, 1.25))
    bars.legend(loc="upper right", fontsize=9)
    return figure


def clusters(found: Sequence[LayerClusters], *, title: str) -> Figure:
    """Each layer's latents along their main components, coloured by cluster, with the signals of nearest codes as
    black marks (CHINR, figure 19); the outermost 1 % lie outside.
    """
    figure, panels = _panels(
        len(found),
        f"{title}: each layer's z-scored latents, coloured by cluster, against the codes made from it\n"
        "purity: the part of signals in the commonest cluster of their code; black: some signals (large), and the "
        f"{found[0].nearest.shape[1]} of the nearest codes to each (small)",
    )
    for panel, layer in zip(panels, found, strict=True):
        x, y = layer.points.T.numpy()
        panel.scatter(x, y, c=layer.clusters.labels.numpy() % 10, cmap="tab10", vmin=0, vmax=9, s=8, alpha=0.5, lw=0)
        for index, (anchor, nearest) in enumerate(zip(layer.anchors, layer.nearest, strict=True)):
            style: dict[str, Any] = {"marker": "*s^"[index % 3], "color": "black"}
            panel.scatter(x[nearest], y[nearest], s=50, edgecolor="white", lw=0.4, **style)
            panel.scatter(x[anchor], y[anchor], s=240, edgecolor="white", lw=0.8, **style)
        _frame(panel, layer.points)
        codes = f"the codes of layer {layer.codes_of}" + (", its own" if layer.codes_of == layer.layer else "")
        figures = (
            f"purity {layer.purity:.2f} (chance {layer.chance_purity:.2f}), adjusted Rand {layer.adjusted_rand:.2f}"
        )
        panel.set_title(f"layer {layer.layer}, {codes}\n{figures}", fontsize=10)
        _name_components(panel, layer.explained)
    return figure


def conditions(found: ConditionalDistributions, *, title: str) -> Figure:
    """Each layer's draws under some conditions, over all its training latents (CHINR, figures 7 and 18); the outermost
    1 % lie outside.
    """
    conditions, samples, _ = found.layers[0].samples.shape
    title += f": {samples} draws of each layer under {conditions} conditions, over the training latents (grey)\n"
    figure, panels = _panels(len(found.layers), title + "stars: the signals that the conditions come from")
    for panel, layer in zip(panels, found.layers, strict=True):
        panel.scatter(*layer.training.T.numpy(), s=10, color=_GREY, lw=0)
        for index, (points, chosen) in enumerate(zip(layer.samples, layer.chosen, strict=True)):
            colour = f"C{index % 10}"
            panel.scatter(*points.T.numpy(), s=7, color=colour, alpha=0.45, lw=0)
            star: dict[str, Any] = {"marker": "*", "color": colour, "edgecolor": "black", "lw": 0.8, "zorder": 3}
            panel.scatter(*chosen.numpy(), s=190, label=f"condition {index + 1}", **star)
        _frame(panel, torch.cat([layer.training, layer.samples.flatten(0, 1)]))
        what = "no condition" if layer.layer == 1 else f"under bits of layer{'s 1-' if layer.layer > 2 else ' '}"
        what += "" if layer.layer == 1 else str(layer.layer - 1)
        spread = layer.spread.mean().item()
        panel.set_title(f"layer {layer.layer}, {what}\nspread over the training latents' {spread:.2f}", fontsize=10)
        _name_components(panel, layer.explained)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(conditions, 5))
    return figure


def deviations(found: Sequence[LayerDeviations], *, condition_bits: int, title: str) -> Figure:
    """Within one condition against over all, and how many codes have one signal (CHINR, table 2)."""
    figure = _figure(12.0, 4.6)
    figure.suptitle(title, fontsize=11)
    bars, alone = figure.subplots(1, 2, width_ratios=(2, 1))
    figures, places = [layer.figures for layer in found], list(range(len(found)))
    within, overall = ([one[name] for one in figures] for name in ("within", "unconditional"))
    low = [one["within"] - one["within_smallest_condition"] for one in figures]
    high = [one["within_largest_condition"] - one["within"] for one in figures]
    label = "within one condition (mean; smallest to largest condition)"
    bars.bar([p - 0.2 for p in places], within, 0.4, yerr=(low, high), capsize=3, color="C0", label=label)
    bars.bar([p + 0.2 for p in places], overall, 0.4, color=_GREY, label="over the training latents' conditions")
    for place, one in zip(places, figures, strict=True):
        _above(bars, place, max(one["within_largest_condition"], one["unconditional"]), f"ratio {one['ratio']:.2f}")
    names = [str(layer.layer) for layer in found]
    bars.set_xticks(places, names)
    bars.set(xlabel="layer", ylabel="standard deviation of a z-scored number")
    bars.set_ylim(0, 1.35 * max(one[name] for one in figures for name in ("within_largest_condition", "unconditional")))
    bars.legend(loc="upper right", fontsize=9)

    alone.bar(places, [100 * one["alone"] for one in figures], 0.5, color="C1")
    for place, one in zip(places, figures, strict=True):
        _above(alone, place, 100 * one["alone"], f"{100 * one['alone']:.1f} %")
    alone.set_xticks(places, names)
    alone.set(xlabel="layer", ylabel="training latents alone in their code, %", ylim=(0, 110))
    alone.set_title(f"condition bits: {condition_bits}", fontsize=10)
    return figure


def memorisation(found: Memorisation, *, title: str) -> Figure:
    """Distances of samples and of held-out pictures to their nearest training pictures, and some of the pairs."""
    figure = _figure(11.0, 7.0)
    upper, lower = _halves(figure, (3.0, 2.0))
    axes = upper.subplots()
    sets = [("samples", found.samples, "C0")]
    if found.held_out is not None and found.held_out_functions is not None:
        sets += [("held-out pictures", found.held_out, "C1"), ("held-out functions", found.held_out_functions, "C2")]
    highest = max(values.max().item() for _, values, _ in sets)
    bins = torch.linspace(0, 1.05 * highest + 1e-6, 41).tolist()
    for name, values, colour in sets:
        weights = [100 / len(values)] * len(values)
        mean, label = values.mean().item(), f"{len(values)} {name}, mean {values.mean():.2f}"
        axes.hist(values.numpy(), bins, weights=weights, histtype="stepfilled", alpha=0.35, color=colour, label=label)
        axes.axvline(mean, color=colour, lw=1.5, ls="--")
    axes.set(title=title, ylabel="part of the set, %", xlim=(0, None))
    axes.set_xlabel(
        f"L2 distance to the nearest of {found.training_pictures} training pictures: all pixels, in [0, 1], at "
        f"{found.resolution} x {found.resolution}"
    )
    axes.legend(fontsize=9)

    panels = lower.subplots(2, len(found.shown), squeeze=False)
    lower.suptitle("samples, and the nearest training picture of each with its distance", fontsize=10)
    for column, (pair, distance) in enumerate(zip(found.shown, found.samples, strict=False)):
        for panel, picture in zip(panels[:, column], pair, strict=True):
            panel.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
            panel.set_axis_off()
        panels[1, column].set_title(f"{distance:.2f}", fontsize=9, pad=2)
    return figure


def ablation(found: Ablation, *, title: str) -> Image.Image:
    """Samples of the same seeds side by side, under their figures."""
    arms = (found.conditional, found.unconditional)
    rows = [row for pair in zip(*(arm.pictures.split(8) for arm in arms), strict=True) for row in pair]
    names = [f"{arm.name}\n{arm.condition_bits} bits" for arm in arms]
    lines = [
        f"{arm.name}: kernel distance {arm.kid:.4f} (error {arm.kid_error:.4f}), distance to the nearest training "
        f"picture {arm.memorisation.samples.mean():.2f}"
        for arm in arms
    ]
    if found.held_out_kid is not None and found.conditional.memorisation.held_out is not None:
        distance = found.conditional.memorisation.held_out.mean()
        lines.append(f"held-out pictures: kernel distance {found.held_out_kid:.4f}, distance {distance:.2f}")
    return pictures(rows, title="\n".join([title, *lines]), row_titles=names * (len(rows) // 2))


def frequencies(found: Spectra, *, title: str) -> Figure:
    """The share of power by frequency, and basis fields with their spectra (DDMI, section 4.4)."""
    count, shown = len(found.fields), len(found.fields[0].fields)
    figure = _figure(1.8 * (2 * shown) + 1, 4 + 1.9 * count)
    upper, lower = _halves(figure, (4.0, 1.9 * count))
    axes = upper.subplots()
    for index, field in enumerate(found.fields):
        label = f"field {index + 1}, {field.cells} x {field.cells} cells: mean {field.centre:.1f}, 90 % below "
        label += f"{field.below(0.9)} cycles a side"
        axes.plot(range(1, len(field.power)), 100 * field.shares[1:].numpy(), marker=".", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [2**power for power in range(0, max(f.cells for f in found.fields).bit_length())]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="spatial frequency, cycles a side", ylabel="part of the field's power, %")
    axes.set(title=f"{title}: power of basis fields, coarse to fine, over {len(found.latents)} signals")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)

    panels = lower.subplots(count, 2 * shown, squeeze=False)
    for row, field in zip(panels, found.fields, strict=True):
        for column in range(shown):
            row[2 * column].imshow(field.fields[column].numpy(), cmap="gray")
            low, high = -field.cells / 2 - 0.5, field.cells / 2 - 0.5
            row[2 * column + 1].imshow(field.maps[column].numpy(), cmap="magma", extent=(low, high, high, low))
            row[2 * column].set(xticks=[], yticks=[])
            row[2 * column + 1].tick_params(labelsize=7)
        row[0].set_ylabel(f"{field.cells} x {field.cells}")
    for column in range(shown):
        panels[0, 2 * column].set_title("main component", fontsize=9)
        panels[0, 2 * column + 1].set_title("log power", fontsize=9)
    lower.supxlabel("log power: cycles a side, across and down; frequency 0 in the middle", fontsize=9)
    return figure


def _cell(picture: Float[Tensor, "3 height width"]) -> int:
    return min(max(picture.shape[-1], _CELL[0]), _CELL[1])


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _halves(figure: Figure, heights: tuple[float, float]) -> tuple[Any, Any]:
    upper, lower = figure.add_gridspec(2, 1, height_ratios=heights)
    return figure.add_subfigure(upper), figure.add_subfigure(lower)


def _panels(count: int, title: str) -> tuple[Figure, list[Any]]:
    """Square panels in rows of at most four."""
    columns = min(count, 4 if count > 6 or count == 4 else 3)
    rows = -(-count // columns)
    figure = _figure(4.0 * columns, 4.1 * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in panels[count:]:
        unused.set_axis_off()
    figure.suptitle(title, fontsize=11, wrap=True)
    return figure, panels[:count]


def _frame(panel: Any, points: Tensor) -> None:
    """Show the middle 99 % of points: the few beyond would leave the others no room."""
    low, high = points.quantile(torch.tensor([0.005, 0.995], dtype=points.dtype), dim=0)
    margin = 0.15 * (high - low).clamp(min=1e-6)
    panel.set(xlim=[(low - margin)[0].item(), (high + margin)[0].item()])
    panel.set(ylim=[(low - margin)[1].item(), (high + margin)[1].item()])


def _above(panel: Any, place: int, height: float, text: str) -> None:
    panel.annotate(text, (place, height), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=9)


def _name_components(panel: Any, explained: Tensor) -> None:
    first, second = (100 * explained).tolist()
    panel.set(xlabel=f"component 1 ({first:.0f} % of variance)", ylabel=f"component 2 ({second:.0f} %)")
