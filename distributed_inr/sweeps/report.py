"""What a sweep has found: trials.csv, figures and report.md, made from the trials' folders."""

import csv
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distributed_inr.run_folder import write_text
from distributed_inr.sweeps.figures import write_figures
from distributed_inr.sweeps.setting import Setting, fields_of, settings_of, short
from distributed_inr.sweeps.study import PUBLISHED_DEVIATIONS
from distributed_inr.sweeps.trial import Trial, Trials, read_trials, samples_seen


def write(folder: Path, trials: Trials, *, sweep_name: str, command: Sequence[str]) -> Path:
    """Write trials.csv, the figures and report.md; raises RuntimeError where no trial has finished.

    Args:
        command: that trains what all trials share.
    """
    study, found = trials.study, read_trials(trials.experiment)
    _write_csv(folder / "trials.csv", trials, found)
    settings = settings_of(found)
    measured = [setting for setting in settings if setting.has(study.objective)]
    if not measured:
        first = next((trial for trial in found if trial.status == "failed"), None)
        why = f"; the first to fail was {first.name}: {_last_line(first.error)}" if first else ""
        raise RuntimeError(f"{folder}: no trial has finished{why}")
    ranked = sorted(measured, key=lambda setting: -study.score(setting.mean(study.objective)))
    best, number = ranked[0], len(ranked[0].trials)
    flags = [part for path, value in best.values.items() for part in _flag(path, value)]
    pictures = write_figures(folder, study, measured, title=f"{sweep_name}: {study.about}")
    paragraphs = [
        f"# Sweep {sweep_name}: {study.about}",
        f"Best by {study.objective} ({'most' if study.mode == 'max' else 'least'}): **{best.label}**, "
        f"{best.shown(study.objective)} over {number} seed{'s' * (number > 1)}.\n{_evidence(study.objective, ranked)}",
        f"```\n{shlex.join([*command, *flags, '--name', f'{sweep_name}-best'])}\n```",
        _table(settings),
        *_remarks(trials, found, settings),
        *([_deviations(measured)] if best.has("deviation_1") else []),
        "\n".join(f"![{path.stem}]({path.name})" for path in pictures),
    ]
    path = folder / "report.md"
    write_text(path, "\n\n".join(paragraphs) + "\n")
    return path


def _evidence(objective: str, ranked: Sequence[Setting]) -> str:
    """How sure it is that the first is better than the second."""
    if len(ranked) < 2:
        return "Nothing to compare it with."
    best, second = ranked[:2]
    gap = abs(best.mean(objective) - second.mean(objective))
    error = math.hypot(*(setting.spread(objective) / math.sqrt(len(setting.trials)) for setting in (best, second)))
    text = f"Next: {second.label}, {second.shown(objective)}; the difference is {short(gap)}"
    if error == 0:
        return f"{text}, with one seed: its own chance is not known."
    whose = "of the means over seeds" if len(best.trials) > 1 else f"of {objective}, with one seed"
    return f"{text}, {gap / error:.1f} standard errors {whose}" + (
        ": too little to tell them apart." * (gap < 2 * error) or "."
    )


def _table(settings: Sequence[Setting]) -> str:
    paths = fields_of(trial for setting in settings for trial in setting.trials)
    measures = _measures([trial for setting in settings for trial in setting.trials])
    rows = [[*paths, "trials", *measures], ["---"] * (len(paths) + 1 + len(measures))]
    for setting in settings:
        values = [str(setting.values.get(path, "")) for path in paths]
        rows.append([*values, _counts(setting), *map(setting.shown, measures)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _remarks(trials: Trials, found: Sequence[Trial], settings: Sequence[Setting]) -> list[str]:
    several = any(len(setting.trials) > 1 for setting in settings)
    remarks = ["± is the deviation over seeds." if several else "One seed: differences may be its chance; see --seeds."]
    stopped = [f"{t.name}: {short(t.early)}" for t in found if t.status == "running" and t.early is not None]
    if stopped:
        remarks.append(f"{len(stopped)} trials were stopped early, at {', '.join(stopped)} ({trials.study.objective}).")
    seen = {
        stage: sum(samples_seen(trials.experiment, trial.name, stage) for trial in found) for stage in trials.fitted
    }
    remarks.append("Trained with " + " and ".join(f"{count:,} samples ({name})" for name, count in seen.items()) + ".")
    remarks += [f"**Failed**: {t.name}: {_last_line(t.error)}" for t in found if t.status == "failed"]
    return remarks


def _deviations(settings: Sequence[Setting]) -> str:
    """Deviations within one condition beside the paper's."""
    names = _measures([trial for setting in settings for trial in setting.trials])
    layers = [name for name in names if name.startswith("deviation_")]
    path = "prior.condition_bits"
    rows = [
        "Deviation of a z-scored number of a layer within one condition (CHINR, table 2). The paper's are of",
        "CelebA-HQ: other data, another size, and 5,000 samples of each condition, so only the trend can be compared.",
        "",
        "| bits | whose | " + " | ".join(f"layer {name.removeprefix('deviation_')}" for name in layers) + " |",
        "| --- | --- | " + " | ".join(["---"] * len(layers)) + " |",
    ]
    for setting in settings:
        bits = setting.values.get(path)
        rows.append(f"| {bits} | ours | " + " | ".join(setting.shown(name) for name in layers) + " |")
        if isinstance(bits, int) and bits in PUBLISHED_DEVIATIONS:
            published = [f"{value:.4f}" for value in PUBLISHED_DEVIATIONS[bits]] + [""] * len(layers)
            rows.append(f"| {bits} | paper | " + " | ".join(published[: len(layers)]) + " |")
    return "\n".join(rows)


def _write_csv(path: Path, trials: Trials, found: Sequence[Trial]) -> None:
    fields = fields_of(found)
    measures, stages = _measures(found), trials.fitted
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["trial", *fields, "seed", "status", *(f"{stage}_samples" for stage in stages), *measures, "early", "error"]
        )
        for trial in found:
            status = "stopped" if trial.status == "running" else trial.status
            seen = [samples_seen(trials.experiment, trial.name, stage) for stage in stages]
            values = [trial.values.get(name, "") for name in fields]
            writer.writerow(
                [
                    trial.name,
                    *values,
                    trial.seed,
                    status,
                    *seen,
                    *(trial.measures.get(name, "") for name in measures),
                    "" if trial.early is None else trial.early,
                    _last_line(trial.error),
                ]
            )


def _measures(found: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(name for trial in found for name in trial.measures))


def _flag(path: str, value: Any) -> list[str]:
    parts = [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]
    return ["--" + path.replace("_", "-"), *parts]


def _counts(setting: Setting) -> str:
    words = {"finished": "finished", "failed": "failed", "running": "stopped"}
    counts = [
        f"{number} {word}"
        for status, word in words.items()
        if (number := sum(t.status == status for t in setting.trials))
    ]
    return ", ".join(counts)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""
