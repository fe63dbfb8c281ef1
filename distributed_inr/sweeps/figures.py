"""Figures of a sweep: measures against the varied fields, and against each other."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distributed_inr.sweeps.setting import Setting, fields_of
from distributed_inr.sweeps.study import Study

_UNITS = {
    "psnr": "held-out PSNR, dB",
    "kl": "KL of held-out posteriors, nats",
    "kid": "KID of samples (EfficientNet-Lite0)",
    "parameters": "parameters of the autoencoder",
    "seconds": "training of the autoencoder, s",
    "deviation": "deviation within one condition, layers 2 on",
    "alone": "training signals alone under their condition",
}


def write_figures(folder: Path, study: Study, settings: Sequence[Setting], *, title: str) -> list[Path]:
    """measures.png: the study's measures against each varied field; curves.png: measures against each other."""
    fields = fields_of(trial for setting in settings for trial in setting.trials)
    figure = Figure(figsize=(4.4 * len(study.panels), 3.6 * len(fields)), layout="constrained", dpi=120)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(fields), len(study.panels), squeeze=False)
    for row, path in enumerate(fields):
        for panel, measure in zip(grid[row], study.panels, strict=True):
            _against_field(panel, settings, path, measure)
    paths = [folder / "measures.png"]
    figure.savefig(paths[0])
    if study.curves:
        figure = Figure(figsize=(5.2 * len(study.curves), 4.0), layout="constrained", dpi=120)
        for panel, (x, y) in zip(figure.subplots(1, len(study.curves), squeeze=False)[0], study.curves, strict=True):
            _against_measure(panel, settings, x, y)
        paths.append(folder / "curves.png")
        figure.savefig(paths[1])
    return paths


def _against_field(panel: Axes, settings: Sequence[Setting], path: str, measure: str) -> None:
    shown = [setting for setting in settings if path in setting.values and setting.has(measure)]
    values = [setting.values[path] for setting in shown]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    places = values if numbers else [str(value) for value in values]
    means = [setting.mean(measure) for setting in shown]
    bars = [setting.bar(measure) for setting in shown]
    alone = all(len(setting.values) == 1 for setting in settings)
    panel.errorbar(places, means, yerr=bars, fmt="o-" if alone and numbers else "o", capsize=3, color="C0")
    if numbers and len(values) > 1 and min(values) > 0 and max(values) >= 30 * min(values):
        panel.set_xscale("log")
    panel.set(xlabel=path, ylabel=_UNITS.get(measure, measure))
    panel.grid(alpha=0.3)


def _against_measure(panel: Axes, settings: Sequence[Setting], x: str, y: str) -> None:
    shown = [setting for setting in settings if setting.has(x) and setting.has(y)]
    shown = sorted(shown, key=lambda setting: setting.mean(x))
    if all(len(setting.values) == 1 for setting in settings):
        panel.plot([setting.mean(x) for setting in shown], [setting.mean(y) for setting in shown], color="#c8c8c8")
    for index, setting in enumerate(shown):
        where = (setting.mean(x), setting.mean(y))
        wide, high = setting.bar(x), setting.bar(y)
        panel.errorbar(*where, xerr=wide, yerr=high, fmt="o", capsize=3, color=f"C{index % 10}")
        text = ", ".join(str(value) for value in setting.values.values())
        panel.annotate(text, where, xytext=(5, 5), textcoords="offset points", fontsize=8)
    panel.set(xlabel=_UNITS.get(x, x), ylabel=_UNITS.get(y, y))
    panel.margins(0.15)
    panel.grid(alpha=0.3)
