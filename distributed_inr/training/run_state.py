"""Where a run stands: what its checkpoints hold besides weights and optimizer state."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from distributed_inr.training.gradients import Metrics


@dataclasses.dataclass
class RunState:
    """As written to state.json.

    Attributes:
        data: fingerprint of the shards.
        samples: seen.
        seconds: spent.
        lr: learning rate of the last step.
        num_nonfinite: steps that were not applied because of values that are not finite.
        sums, num_summed: of the metrics of the steps since the last line of the log.
        is_unevaluated: whether the evaluation that is due at these samples is still to be made.
        score: the validation loss at these very samples, where it was measured.
    """

    seed: int
    data: str
    samples: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    num_nonfinite: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    num_summed: int = 0
    is_unevaluated: bool = False
    score: float | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "RunState":
        """From a checkpoint's state.json."""
        return cls(**{field.name: state[field.name] for field in dataclasses.fields(cls)})

    def add(self, metrics: Metrics) -> None:
        """Count a step's metrics for the next line of the log; none of a step that was not applied."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in metrics.items()} or self.sums
        self.num_summed += bool(metrics)

    def means(self) -> Metrics:
        """Over the steps since the last line of the log."""
        return {name: value / self.num_summed for name, value in self.sums.items()}

    def clear(self) -> None:
        """Begin with the next line."""
        self.sums, self.num_summed = {}, 0
