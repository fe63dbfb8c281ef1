"""The trials of a running sweep, as a table."""

import shutil
import sys
import time

from distributed_inr.sweeps.trial import Trial, Trials

_LINE_SECONDS = 30.0


class Table:
    """The trials: drawn again in place on a terminal, now and then in a file."""

    def __init__(self, trials: Trials, sweep_name: str) -> None:
        self.trials, self.title, self.drawn = trials, sweep_name, sys.stderr.isatty()
        self.begin, self.shown, self.height, self.ended = time.monotonic(), 0.0, 0, 0

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *error: object) -> None:
        self.show(last=True)

    def show(self, *, last: bool = False) -> None:
        now, text = time.monotonic(), self._text()
        ended = sum(text.count(f"  {status} ") for status in ("finished", "failed"))
        text = f"{self.title}, {now - self.begin:.0f} s\n{text}"
        if self.drawn:
            columns = shutil.get_terminal_size().columns
            text = "".join(
                line[: columns - 1] + "\n" for line in text.splitlines()
            )  # a wrapped line would not be undone
            up = f"\x1b[{self.height}A\x1b[J" if self.height else ""
            self.height = text.count("\n")
            print(up + text, end="", file=sys.stderr, flush=True)
        elif last or now - self.shown > _LINE_SECONDS or ended > self.ended:
            self.shown, self.ended = now, ended
            print(text, end="", file=sys.stderr, flush=True)

    def _text(self) -> str:
        trials = self.trials
        rows = [("trial", "status", "progress", trials.study.objective)]
        for trial in trials.known():
            value = trial.measures.get(trials.study.objective, trial.early[-1][1] if trial.early else None)
            shown = "" if value is None else f"{value:.4g}"
            rows.append((trial.name, trial.status, _progress(trials, trial), shown))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + "\n" for row in rows)


def _progress(trials: Trials, trial: Trial) -> str:
    if trial.status != "running":
        return ""
    for stage in reversed(trials.fitted):
        if seen := trials.samples_seen(trial.name, stage):
            length = getattr(trials.experiment, f"{stage}_training").num_samples
            return f"{stage} {min(100, 100 * seen / length):.0f} %"
    return "begun"
