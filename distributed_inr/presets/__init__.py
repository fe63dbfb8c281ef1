"""Named experiments, by family: the bundled ones, and the papers' own.

A preset is a function that returns a complete `Experiment`; its docstring gives the command, the hardware and the
number to reach. Any field can be overridden on the command line.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from distributed_inr.experiment import Experiment
from distributed_inr.presets import chinr, ddmi, motions, scenes, shapes, texts, videos

PRESETS: Mapping[str, Mapping[str, Callable[[], Experiment]]] = MappingProxyType(
    {
        "ddmi": ddmi.PRESETS | shapes.DDMI | videos.DDMI | scenes.DDMI | motions.DDMI | texts.DDMI,
        "chinr": chinr.PRESETS | shapes.CHINR | videos.CHINR | scenes.CHINR | motions.CHINR | texts.CHINR,
    }
)
"""By family, then by name."""
