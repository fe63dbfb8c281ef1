"""What the measures of text say: a section of the report, and the classifier's answers by prompted class."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

SETS = ("class words", "held-out captions")
"""Of prompts, in the order of the report."""


def write_confusion(result: dict[str, Any], folder: Path) -> list[str]:
    """Write confusion.png where there is a classifier; returns the names of what was written."""
    if "classifier" not in result:
        return []
    confusion_figure(result).savefig(folder / "confusion.png")
    return ["confusion.png"]


def confusion_figure(result: dict[str, Any]) -> Figure:
    """Counts of samples: a row for each prompted class, a column for each class that the classifier finds."""
    classifier, shown = result["classifier"], [what for what in SETS if what in result]
    classes, size = classifier["classes"], 2.4 + 0.55 * len(classifier["classes"])
    figure = Figure(figsize=(max(7.0, size * len(shown) + 0.6), size + 1.1), dpi=110, layout="constrained")
    title = "What a classifier takes samples for, by the class of their text"
    figure.suptitle(f"{title}\nof real signals it tells {_right(classifier)}", fontsize=11)
    for panel, what in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        found = result[what]
        counts = torch.tensor(found["confusion"])
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        panel.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
        for row, line in enumerate(found["confusion"]):
            for column, count in enumerate(line):
                colour = "white" if shares[row, column] > 0.6 else "black"
                panel.text(column, row, str(count) if count else "", ha="center", va="center", color=colour)
        panel.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        panel.set_yticks(range(len(classes)), classes)
        panel.set(xlabel="taken for", ylabel="prompted")
        panel.set_title(f"{what}: {found['accuracy']:.0%} right (chance {found['chance']:.0%})", fontsize=10)
    return figure


def text_section(result: dict[str, Any]) -> list[str]:
    """Lines of the report about the result of `measure_text`; none where nothing could be measured."""
    shown = [what for what in SETS if what in result]
    if not shown:
        return []
    count, lines = result["samples_per_prompt"], ["## Text", ""]
    if "classifier" in result:
        classifier = result["classifier"]
        lines += [
            f"Accuracy is that of {classifier['network']}, trained on {sum(classifier['training_signals'].values())} "
            f"training signals of {len(classifier['classes'])} classes. Of real signals it "
            f"tells {_right(classifier)}, but {classifier['training_accuracy']:.0%} of those that it was trained on: "
            "it tells samples that copy them more surely than others. Chance: the same texts against samples drawn "
            "without text.",
            "",
        ]
    columns = ["accuracy", "chance"] if "classifier" in result else []
    columns += ["CLIP-S"] if "clip_s" in result[shown[0]] else []
    columns += ["total mutual difference", "nearest training signal (median)"]
    lines += [f"| {count} samples each of | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for what in (*shown, "without text"):
        found = result[what]
        cells = [
            f"{found[name]:.3f}" if name in found else "" for name in columns[:2] if name in ("accuracy", "chance")
        ]
        if "CLIP-S" in columns:
            cells.append(f"{found['clip_s']['value']:.1f}" if "clip_s" in found else "")
        tmd = found["tmd"]["value"]
        cells.append("none" if tmd is None else f"{tmd:.4f}")
        cells.append(f"{result['nearest_training'][what]['median']:.3f}")
        name = f"{len(found['prompts'])} {what}" if "prompts" in found else what
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if "held out" in result["nearest_training"]:
        median = f"{result['nearest_training']['held out']['median']:.3f}"
        lines.append(f"| real held-out signals | {' | '.join([''] * (len(columns) - 1) + [median])} |")
    first, nearest = result[shown[0]], result["nearest_training"]["measure"]
    lines += [
        "",
        f"Total mutual difference: of each text's {count} samples, the sum of each one's mean distance to the others "
        f"({first['tmd']['distance']}); higher is more diverse. Nearest training signal: {nearest}.",
        "",
    ]
    if "clip_s" in first:
        lines += [f"CLIP-S on {first['clip_s']['encoder']}.", ""]
    return lines


def _right(classifier: dict[str, Any]) -> str:
    """How many signals the classifier tells that it was not trained on."""
    again = f"{classifier['cross_validated_accuracy']:.0%} in cross-validation"
    if "held_out_accuracy" not in classifier:
        return again
    return f"{classifier['held_out_accuracy']:.0%} of {classifier['held_out_signals']} held-out ones and {again}"
