"""Search spaces: files that map dotted field paths to Ray Tune's distributions.

    SPACE = {
        "prior.denoiser.kind": tune.choice(["mlp", "unet"]),
        "prior.denoiser.width": tune.choice([256, 512]),
        "prior_training.optim.lr": tune.loguniform(1e-4, 1e-2),
    }
    ONLY_IF = {"prior.denoiser.width": {"prior.denoiser.kind": "mlp"}}

A field in ONLY_IF is varied only in trials that have all the values it names; elsewhere it keeps its default.
"""

import hashlib
import re
import runpy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_inr.config import override
from distributed_inr.experiment import Experiment

_TAKEN = ("name", "family", "output", "seed", "checkpoints", "autoencoder_from")
_DRAWS = 20
"""Trials drawn to find fields and values that do not exist before anything runs."""
_MAX_NAME = 100


@dataclass(frozen=True)
class Space:
    """Distributions of some fields of an experiment.

    Attributes:
        fields: by dotted path: a distribution of ray.tune, a grid, or one value.
        only_if: of some of these, the values of others that they are varied under.
    """

    path: Path
    fields: Mapping[str, Any]
    only_if: Mapping[str, Mapping[str, Any]]

    @property
    def is_grid(self) -> bool:
        """Whether it holds nothing to draw from."""
        return not any(_is_drawn(field) for field in self.fields.values())

    @property
    def functions(self) -> list[str]:
        """The fields that depend on others by tune.sample_from."""
        return [path for path, field in self.fields.items() if _is_function(field)]

    def without_grids(self, choice: Callable[[list[Any]], Any]) -> dict[str, Any]:
        """The fields, with a `choice` (of ray.tune) in place of each grid, for searches that learn as they go."""
        return {path: choice(field["grid_search"]) if _is_grid(field) else field for path, field in self.fields.items()}

    def applicable(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Of drawn values, those whose conditions hold among those that apply themselves."""

        def applies(path: str) -> bool:
            conditions = self.only_if.get(path, {})
            return all(drawn.get(other) == wanted and applies(other) for other, wanted in conditions.items())

        return {path: value for path, value in drawn.items() if applies(path)}

    def check(self, experiment: Experiment) -> None:
        """Raises ValueError for fields that the experiment lacks (naming the nearest), or that a sweep sets itself."""
        for path in self.fields:
            if path in _TAKEN or path.startswith("scale."):
                raise ValueError(f"{self.path}: {path} cannot be varied: the sweep itself sets it; remove it")
        for path, conditions in self.only_if.items():
            for name in (path, *conditions):
                if name not in self.fields:
                    raise ValueError(f"{self.path}: ONLY_IF names {name}, which SPACE does not hold; add or remove it")
        for number in range(_DRAWS):
            values = {path: _draw(field, number) for path, field in self.fields.items() if not _is_function(field)}
            try:
                override(experiment, self.applicable(values))
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from None


def load_space(path: Path) -> Space:
    """Run a file that defines SPACE, and perhaps ONLY_IF. Raises ValueError where it does not."""
    if not path.is_file():
        known = ", ".join(sorted(str(file) for file in Path("tune_spaces").glob("*.py")))
        raise ValueError(f"--space {path} is no file; give one that defines SPACE{', such as ' * bool(known)}{known}")
    try:
        found = runpy.run_path(str(path))
    except Exception as error:  # somebody's program: it may raise anything
        raise ValueError(f"--space {path} cannot be run: {type(error).__name__}: {error}") from error
    space = found.get("SPACE")
    if not isinstance(space, dict) or not space:
        raise ValueError(f"--space {path} must define SPACE, a dict from field paths to distributions; see tune_spaces")
    return Space(path, space, found.get("ONLY_IF", {}))


def trial_name(values: Mapping[str, Any], seed: int) -> str:
    """A folder's name that says what a trial is, the same for the same values.

    Fields are called by their last part where that is unique. Lists are called as tuples are: JSON knows no other.
    """
    values = {path: tuple(value) if isinstance(value, list) else value for path, value in values.items()}
    lasts = [path.rpartition(".")[2] for path in values]
    named = [
        f"{last if lasts.count(last) == 1 else path}={value}"
        for last, (path, value) in zip(lasts, values.items(), strict=True)
    ]
    name = ",".join([*named, f"seed={seed}"])
    safe = re.sub(r"[^\w.=+,-]", "_", name)
    if safe == name and len(name) <= _MAX_NAME:
        return name
    return f"{safe[:_MAX_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def shares_autoencoder(paths: Collection[str]) -> bool:
    """Whether trials that vary these fields can all use one autoencoder and its latents."""
    return all(path.split(".")[0] in ("prior", "prior_training", "sampling", "evaluation") for path in paths)


def _draw(field: Any, number: int) -> Any:
    if _is_grid(field):
        return field["grid_search"][number % len(field["grid_search"])]
    return field.sample() if hasattr(field, "sample") else field


def _is_grid(field: Any) -> bool:
    return isinstance(field, dict) and "grid_search" in field


def _is_function(field: Any) -> bool:
    """tune.sample_from: a value that depends on others."""
    return callable(getattr(field, "func", None))


def _is_drawn(field: Any) -> bool:
    return hasattr(field, "sample") and not _is_function(field)
