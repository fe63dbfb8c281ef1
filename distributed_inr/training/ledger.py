"""The sample ledger: which rank has seen which sample at which position of the run, through all kills and resizes.

    ledger/<attempt>-from-<samples>/rank-<rank>-of-<world>.tsv     lines of position, key as JSON, and what became of it

An attempt begins with each start or restart, at the samples that its checkpoint had seen. What an attempt has logged
counts up to where a later one begins: beyond that, its steps were lost with the weights they led to, and taken again.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_inr.domains.domain import Signal
from distributed_inr.training.fragments import gather_objects, rank_and_world


class Ledger:
    """Appends what one rank sees; every line is with the system before the next step begins."""

    def __init__(self, folder: Path, *, samples: int) -> None:
        attempt = gather_objects(len(list(folder.glob("*-from-*"))))[0]
        rank, world = rank_and_world()
        path = folder / f"{attempt:05d}-from-{samples:012d}"
        path.mkdir(parents=True, exist_ok=True)
        self._file = (path / f"rank-{rank:05d}-of-{world:05d}.tsv").open("a")

    def write(self, batches: Sequence[Signal], *, outcome: str) -> None:
        """Log the samples of a step, and whether it was "applied" or what else."""
        for batch in batches:
            for position, key in zip(batch.position.tolist(), batch.key, strict=True):
                self._file.write(f"{position}\t{json.dumps(key)}\t{outcome}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Account:
    """What a ledger shows of a finished run.

    Attributes:
        num_samples: positions that should have been seen, each once.
        num_attempts: starts of the run.
        num_redone: entries of steps that a kill undid and that were taken again.
        num_unapplied: positions of steps that were skipped or rolled back from, as their values were not finite.
        lost, repeated: positions seen never, or more than once.
        other_keys: positions that showed another sample than the order says, as where a bad one was replaced.
        max_bad_fraction: how many of these the run accepted.
    """

    num_samples: int
    num_attempts: int
    num_redone: int
    num_unapplied: int
    lost: list[int]
    repeated: list[int]
    other_keys: list[int]
    max_bad_fraction: float

    def __str__(self) -> str:
        return (
            f"{self.num_samples} positions: {len(self.lost)} lost, {len(self.repeated)} repeated, "
            f"{len(self.other_keys)} of another sample than the order's, {self.num_unapplied} not applied; "
            f"{self.num_attempts} starts, {self.num_redone} seen again after a kill"
        )

    @property
    def problems(self) -> list[str]:
        """What the run should not have done."""
        limit = self.max_bad_fraction * self.num_samples
        found = {"lost": self.lost, "repeated": self.repeated}
        if len(self.other_keys) > limit:
            found[f"of another sample than the order's, above data.max_bad_fraction={self.max_bad_fraction}"] = (
                self.other_keys
            )
        return [f"positions {shorten(positions)} were {what}" for what, positions in found.items() if positions]


def shorten(positions: Sequence[int]) -> str:
    return ", ".join(map(str, positions[:8])) + (f" and {len(positions) - 8} more" if len(positions) > 8 else "")


def check(folder: Path, *, num_samples: int, key: Callable[[int], str], max_bad_fraction: float) -> Account:
    """Account for the positions 0 to `num_samples` - 1 of a finished run.

    Args:
        key: the sample key that the run's order has at a position.
    """
    attempts = sorted(folder.glob("*-from-*"))
    if not attempts:
        raise ValueError(f"{folder} holds no ledger; it must be logged from the beginning: ...training.ledger true")
    starts = [int(attempt.name.rpartition("-")[2]) for attempt in attempts]
    if min(starts) > 0:
        raise ValueError(f"{folder} begins at position {min(starts)}: of those before nothing is known")
    seen: Counter[int] = Counter()
    other_keys, num_redone, num_unapplied = [], 0, 0
    for number, attempt in enumerate(attempts):
        end = min(starts[number + 1 :], default=num_samples)
        for path in sorted(attempt.iterdir()):
            for line in path.read_text().splitlines(keepends=True):
                if not line.endswith("\n"):
                    continue  # cut by a kill, before its step counted
                position, found, outcome = line.rstrip("\n").split("\t")
                if int(position) >= end:
                    num_redone += 1
                    continue
                seen[int(position)] += 1
                num_unapplied += outcome != "applied"
                if json.loads(found) != key(int(position)):
                    other_keys.append(int(position))
    return Account(
        num_samples=num_samples,
        num_attempts=len(attempts),
        num_redone=num_redone,
        num_unapplied=num_unapplied,
        lost=[position for position in range(num_samples) if not seen[position]],
        repeated=sorted(position for position, count in seen.items() if count > 1),
        other_keys=sorted(other_keys),
        max_bad_fraction=max_bad_fraction,
    )
