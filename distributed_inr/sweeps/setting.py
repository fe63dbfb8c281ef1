"""Settings: the trials of a sweep that differ in their seed alone, and means over these."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed_inr.sweeps.trial import Trial


@dataclass(frozen=True)
class Setting:
    """The trials that differ in their seed alone."""

    values: Mapping[str, Any]
    trials: Sequence[Trial]

    def count(self, measure: str) -> int:
        """Of the seeds that were measured."""
        return len(self._all(measure))

    def has(self, measure: str) -> bool:
        return self.count(measure) > 0

    def mean(self, measure: str) -> float:
        return statistics.mean(self._all(measure))

    def deviation(self, measure: str) -> float:
        """Over the seeds; 0 for a single one."""
        found = self._all(measure)
        return statistics.stdev(found) if len(found) > 1 else 0.0

    def error(self, measure: str) -> float | None:
        """Standard error of the mean: by the seeds, of a single one its own where it has one; None if not known."""
        if self.count(measure) > 1:
            return self.deviation(measure) / math.sqrt(self.count(measure))
        own = f"{measure}_standard_error"
        return self.mean(own) if self.has(own) else None

    def bar(self, measure: str) -> float:
        """Half an error bar: the deviation over seeds, or the error of a single one."""
        return self.deviation(measure) if self.count(measure) > 1 else self.error(measure) or 0.0

    def shown(self, measure: str) -> str:
        if not self.has(measure):
            return ""
        spread = f" ± {short(self.deviation(measure))}" if self.count(measure) > 1 else ""
        return short(self.mean(measure)) + spread

    @property
    def label(self) -> str:
        return ", ".join(f"{path} = {value}" for path, value in self.values.items())

    def _all(self, measure: str) -> list[float]:
        return [trial.measures[measure] for trial in self.trials if measure in trial.measures]


def settings_of(found: Sequence[Trial]) -> list[Setting]:
    """Trials by their values, in the order of these where they are numbers."""
    by_values: dict[str, list[Trial]] = {}
    for trial in found:
        by_values.setdefault(repr(sorted(trial.values.items())), []).append(trial)
    settings = [Setting(group[0].values, group) for group in by_values.values()]
    return sorted(settings, key=lambda setting: [_sortable(value) for value in setting.values.values()])


def fields_of(found: Iterable[Trial]) -> list[str]:
    """Varied in any of the trials."""
    return list(dict.fromkeys(path for trial in found for path in trial.values))


def short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _sortable(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))
