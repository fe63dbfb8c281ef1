"""What a sweep has found: trials.csv, figures and report.md, made from the trials' folders."""

import csv
import math
import shlex
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from distributed_inr.config import differences, leaves, override
from distributed_inr.experiment import Experiment
from distributed_inr.presets import PRESETS
from distributed_inr.run_folder import write_text
from distributed_inr.sweeps.figures import write_figures
from distributed_inr.sweeps.setting import Setting, fields_of, settings_of, short
from distributed_inr.sweeps.study import PUBLISHED_DEVIATIONS
from distributed_inr.sweeps.trial import Trial, Trials


def write(folder: Path, trials: Trials, *, sweep_name: str, preset: str, experiment: Experiment) -> Path:
    """Write trials.csv, the figures and report.md; raises RuntimeError where no trial has finished.

    Args:
        preset: that trials start from.
        experiment: what the person who began the sweep has made of it.
    """
    study, found = trials.study, trials.known()
    _write_csv(folder / "trials.csv", trials, found)
    settings = settings_of(found)
    measured = [setting for setting in settings if setting.has(study.objective)]
    if not measured:
        first = next((trial for trial in found if trial.status == "failed"), None)
        why = f"; the first to fail was {first.name}: {_last_line(first.error)}" if first else ""
        raise RuntimeError(f"{folder}: no trial has finished{why}")
    ranked = sorted(measured, key=lambda setting: -study.score(setting.mean(study.objective)))
    best, number = ranked[0], ranked[0].count(study.objective)
    about = study.about if trials.space.path.name == study.space.name else ", ".join(trials.space.fields)
    pictures = write_figures(folder, study, measured, title=f"{sweep_name}: {about}")
    wanted = override(experiment, {**best.values, "name": f"{sweep_name}-best"})
    paragraphs = [
        f"# Sweep {sweep_name}: {about}",
        f"Best by {study.objective} ({'most' if study.mode == 'max' else 'least'}): **{best.label}**, "
        f"{best.shown(study.objective)} over {number} seed{'s' * (number > 1)}.\n{_evidence(study.objective, ranked)}",
        f"```\n{_command(study.family, preset, wanted)}\n```",
        _table(settings),
        *_remarks(trials, found, settings),
        *([_deviations(measured, experiment)] if best.has("deviation_1") else []),
        "\n".join(f"![{path.stem}]({path.name})" for path in pictures),
    ]
    path = folder / "report.md"
    write_text(path, "\n\n".join(paragraphs) + "\n")
    return path


def _command(family: str, preset: str, wanted: Experiment) -> str:
    """The command line that trains an experiment: what differs from the preset."""
    words = ["python", f"jobs/train_{family}.py", preset]
    given = leaves(Experiment, wanted)
    for path in differences(PRESETS[family][preset](), wanted):
        if path in given:
            value = given[path][1]
            words.append("--" + path.replace("_", "-"))
            words += map(_word, value) if isinstance(value, tuple) else [_word(value)]
    return shlex.join(words)


def _word(value: Any) -> str:
    """A value as the command line reads it, which takes -1e-05 for a flag."""
    if isinstance(value, float) and value < 0:
        return format(Decimal(repr(value)), "f")
    return "none" if value is None else str(value)


def _evidence(objective: str, ranked: Sequence[Setting]) -> str:
    """How sure it is that the first is better than the second."""
    if len(ranked) < 2:
        return "Nothing to compare it with."
    best, second = ranked[:2]
    gap = abs(best.mean(objective) - second.mean(objective))
    text = f"Next: {second.label}, {second.shown(objective)}; the difference is {short(gap)}"
    errors = [setting.error(objective) for setting in (best, second)]
    error = math.hypot(*(one for one in errors if one is not None))
    if None in errors or error == 0:
        return f"{text}; how much chance there is in it is not known: see --seeds."
    several = min(setting.count(objective) for setting in (best, second)) > 1
    whose = "of the means over seeds" if several else f"of {objective}, with one seed"
    end = ": too little to tell them apart." if gap < 2 * error else "."
    return f"{text}, {gap / error:.1f} standard errors {whose}{end}"


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
    stopped = [f"{t.name}: {short(t.early[-1][1])}" for t in found if t.status == "stopped" and t.early]
    if stopped:
        remarks.append(f"Stopped early, at {', '.join(stopped)} ({trials.study.objective}).")
    seen = {stage: sum(trials.samples_seen(trial.name, stage) for trial in found) for stage in trials.fitted}
    remarks.append("Trained with " + " and ".join(f"{count:,} samples ({name})" for name, count in seen.items()) + ".")
    remarks += [f"**Failed**: {t.name}: {_last_line(t.error)}" for t in found if t.status == "failed"]
    return remarks


def _deviations(settings: Sequence[Setting], experiment: Experiment) -> str:
    """Deviations within one condition beside the paper's."""
    names = _measures([trial for setting in settings for trial in setting.trials])
    layers = [name for name in names if name.startswith("deviation_")]
    rows = [
        "Deviation of a z-scored number of a layer within one condition (CHINR, table 2). The paper's are of",
        "CelebA-HQ: other data, another size, and 5,000 samples of each condition, so only the trend can be compared.",
        "",
        "| bits | whose | " + " | ".join(f"layer {name.removeprefix('deviation_')}" for name in layers) + " |",
        "| --- | --- | " + " | ".join(["---"] * len(layers)) + " |",
    ]
    for setting in settings:
        bits = getattr(override(experiment, setting.values).prior, "condition_bits", None)
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
            values = [trial.values.get(name, "") for name in fields]
            seen = [trials.samples_seen(trial.name, stage) for stage in stages]
            measured = [trial.measures.get(name, "") for name in measures]
            early = trial.early[-1][1] if trial.early else ""
            row = [trial.name, *values, trial.seed, trial.status, *seen, *measured, early, _last_line(trial.error)]
            writer.writerow(row)


def _measures(found: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(name for trial in found for name in trial.measures))


def _counts(setting: Setting) -> str:
    states = [trial.status for trial in setting.trials]
    return ", ".join(f"{states.count(status)} {status}" for status in dict.fromkeys(states))


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""
