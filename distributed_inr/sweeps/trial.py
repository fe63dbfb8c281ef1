"""One trial of a sweep: a whole run with some options varied, its folder, and what it leaves for the report."""

import json
import logging
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
from distributed_inr.run_folder import InUse, locked, write_text
from distributed_inr.sweeps.space import Space, trial_name
from distributed_inr.sweeps.study import Measures, Study

logger = logging.getLogger(__name__)

_RECORD = "trial.json"


@dataclass(frozen=True)
class Trial:
    """What is known of a trial; kept in its run folder.

    Attributes:
        drawn: of the varied fields, what was drawn for them.
        values: those whose conditions hold.
        status: "running" also where the sweep was killed.
        measures: of a finished trial.
        early: estimates of the objective while it ran: [samples, estimate].
        error: why it failed.
        session: in which the error was met; another one tries again.
    """

    name: str
    drawn: Mapping[str, Any]
    values: Mapping[str, Any]
    seed: int
    status: Literal["running", "finished", "stopped", "failed"] = "running"
    measures: Measures = field(default_factory=dict)
    early: list[list[float]] = field(default_factory=list)
    error: str = ""
    session: str = ""


@dataclass(frozen=True)
class Trials:
    """How the trials of a sweep are made.

    Attributes:
        experiment: what all share; its output is the folder of the trials.
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

    def folder(self, name: str) -> Path:
        return Path(self.experiment.output) / self.experiment.family / name

    def begin(self, drawn: Mapping[str, Any], seed: int) -> Trial:
        """What is known of the trial of these draws: what its folder says, or that it has not run."""
        values = self.space.applicable(drawn)
        name = trial_name(values, seed)
        return read_trial(self.folder(name)) or Trial(name, dict(drawn), values, seed)

    def run(self, drawn: Mapping[str, Any], seed: int, *, observe: Observe) -> Trial:
        """Make a trial complete, from where it is. `observe` is called with {"samples", "score"} as it goes on, and
        with what it had seen before.

        A trial that has failed in this call of the sweep fails again at once, with the same error.
        """
        trial = self.begin(drawn, seed)
        folder = self.folder(trial.name)
        _wait_for(folder)
        trial = self.begin(drawn, seed)
        if trial.status == "failed" and trial.session == self.session:
            raise RuntimeError(trial.error)
        for samples, early in trial.early:
            observe({"samples": int(samples), "score": self.study.score(early)})
        if trial.status == "finished":
            return trial
        trial = replace(trial, status="running", error="", session=self.session)

        def watch(metrics: dict[str, Any]) -> None:
            nonlocal trial
            found = self.study.early(metrics) if self.study.early is not None else None
            if found is not None and metrics["samples"] not in [samples for samples, _ in trial.early]:
                trial = replace(trial, early=[*trial.early, [float(metrics["samples"]), found]])
                self.record(trial)
                observe({"samples": metrics["samples"], "score": self.study.score(found)})

        self.record(trial)
        try:
            place = {"name": trial.name, "seed": seed}
            experiment = override(self.experiment, {**trial.values, **place})
            pipeline.run(experiment, stages=self.study.stages, observe=watch)
            measures = self.study.measure(experiment)
        except Exception as error:
            mistake = isinstance(error, ValueError)
            self.fail(trial, str(error) if mistake else "".join(traceback.format_exception(error)))
            raise
        trial = replace(trial, status="finished", measures=measures)
        self.record(trial)
        return trial

    def fail(self, trial: Trial, error: str) -> None:
        self.record(replace(trial, status="failed", error=error))

    def record(self, trial: Trial) -> None:
        folder = self.folder(trial.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _RECORD, json.dumps(asdict(trial), indent=1) + "\n")

    def known(self) -> list[Trial]:
        """All that have begun, by name."""
        folders = sorted(path.parent for path in self.folder("").glob(f"*/{_RECORD}"))
        return [trial for folder in folders if (trial := read_trial(folder)) is not None]

    def samples_seen(self, name: str, stage: str) -> int:
        """That a trial's stage has been trained with."""
        try:
            lines = (self.folder(name) / stage / "metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["samples"])
        except (OSError, IndexError, ValueError):
            return 0


def read_trial(folder: Path) -> Trial | None:
    try:
        return Trial(**json.loads((folder / _RECORD).read_text()))
    except FileNotFoundError:
        return None


def _wait_for(folder: Path) -> None:
    """Until nobody holds a folder: the driver of a killed sweep, which is about to end, or an equal trial."""
    waited = False
    while True:
        try:
            with locked(folder):
                return
        except InUse as error:
            if not waited:
                logger.warning("waiting: %s", error)
            waited = True
            time.sleep(1.0)
