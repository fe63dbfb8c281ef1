"""Generative implicit neural representations: models whose samples are continuous functions.

import distributed_inr as dinr
model = dinr.load("runs/ddmi/furniture-image")
fields = model.sample(4, seed=0)
pictures = fields.render(resolution=256)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed_inr.evaluation import evaluate
    from distributed_inr.experiment import Experiment
    from distributed_inr.field import Field
    from distributed_inr.generation import FieldModel, load

__version__ = "0.1.0"

__all__ = ["Experiment", "Field", "FieldModel", "evaluate", "load"]

_MODULES = {
    "Experiment": "distributed_inr.experiment",
    "Field": "distributed_inr.field",
    "FieldModel": "distributed_inr.generation",
    "evaluate": "distributed_inr.evaluation",
    "load": "distributed_inr.generation",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: `import distributed_inr` stays light."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
