"""One trial of a sweep: a whole run with some options varied, its folder, and what it leaves for the report."""

import json
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distributed_inr import pipeline
from distributed_inr.config import override
from distributed_inr.experiment import Experiment
from distributed_inr.launch import Observe
from distributed_inr.run_folder import InUse, write_text
from distributed_inr.sweeps.space import Space, trial_name
from distributed_inr.sweeps.study import Measures, Study

_RECORD = "trial.json"


@dataclass(frozen=True)
class Trial:
    """What is known of a trial; kept in its run folder.

    Attributes:
        values: of the varied fields.
        status: "running" also where it was stopped early, or killed.
        measures: of a finished trial.
        early: the newest estimate of the objective while it ran.
        error: why it failed.
        session: in which the error was met; another one tries again.
    """

    name: str
    values: Mapping[str, Any]
    seed: int
    status: Literal["running", "finished", "failed"] = "running"
    measures: Measures = field(default_factory=dict)
    early: float | None = None
    error: str = ""
    session: str = ""


@dataclass(frozen=True)
class Trials:
    """How the trials of a sweep are made.

    Attributes:
        experiment: what all share; its output is the sweep's own folder.
        session: this call of the sweep.
    """

    experiment: Experiment
    space: Space
    study: Study
    session: str = ""

    @property
    def fitted(self) -> list[str]:
        """The stages that each trial trains."""
        own = self.experiment.autoencoder_from is None
        return [stage for stage in ("autoencoder", "prior") if stage in self.study.stages and (own or stage == "prior")]

    def experiment_of(self, drawn: Mapping[str, Any], seed: int) -> tuple[Experiment, dict[str, Any]]:
        """The experiment of a trial, in a folder of its own, and the values that apply to it."""
        values = self.space.applicable(drawn)
        place = {"name": trial_name(values, seed), "seed": seed}
        return override(self.experiment, {**values, **place}), values

    def run(self, drawn: Mapping[str, Any], seed: int, *, observe: Observe) -> Trial:
        """Make a trial complete, from where it is. `observe` is called with {"samples", "score"} as it goes on.

        A trial that has failed in this session fails again at once, with the same error.
        """
        experiment, values = self.experiment_of(drawn, seed)
        folder = experiment.folder
        before = read_trial(folder)
        if before is not None and before.status == "finished":
            return before
        if before is not None and before.status == "failed" and before.session == self.session:
            raise RuntimeError(before.error)
        trial = Trial(experiment.name, values, seed, session=self.session)
        early = before.early if before is not None else None

        def watch(metrics: dict[str, Any]) -> None:
            nonlocal early
            found = self.study.early(metrics) if self.study.early is not None else None
            if found is not None:
                early = found
                _write(folder, replace(trial, early=early))
                observe({"samples": metrics["samples"], "score": self.study.score(early)})

        _write(folder, replace(trial, early=early))
        try:
            while True:
                try:
                    pipeline.run(experiment, stages=self.study.stages, observe=watch)
                    break
                except InUse:  # by the driver of a killed sweep, which the system is about to end, or by an equal trial
                    time.sleep(1.0)
            measures = self.study.measure(experiment)
        except Exception as error:
            mistake = isinstance(error, ValueError)
            text = str(error) if mistake else "".join(traceback.format_exception(error))
            _write(folder, replace(trial, early=early, status="failed", error=text))
            raise
        trial = replace(trial, early=early, status="finished", measures=measures)
        _write(folder, trial)
        return trial


def read_trial(folder: Path) -> Trial | None:
    try:
        return Trial(**json.loads((folder / _RECORD).read_text()))
    except FileNotFoundError:
        return None


def read_trials(experiment: Experiment) -> list[Trial]:
    """Of a sweep, by name."""
    folders = sorted(path.parent for path in (Path(experiment.output) / experiment.family).glob(f"*/{_RECORD}"))
    return [trial for folder in folders if (trial := read_trial(folder)) is not None]


def samples_seen(experiment: Experiment, name: str, stage: str) -> int:
    """That a trial's stage has been trained with."""
    try:
        lines = (Path(experiment.output) / experiment.family / name / stage / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["samples"])
    except (OSError, IndexError, ValueError):
        return 0


def _write(folder: Path, trial: Trial) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _RECORD, json.dumps(asdict(trial), indent=1) + "\n")
