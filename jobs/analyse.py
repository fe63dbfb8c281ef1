"""Analyse a finished run: control over what it makes, and what its latents and its prior are like.

python jobs/analyse.py runs/chinr/furniture-image tree --fix-layers 1 2 --branches 4 --seed 7
python jobs/analyse.py runs/chinr/furniture-image retrieval --from held-out --layers 2 3
python jobs/analyse.py runs/chinr/furniture-image ANALYSIS --help              # what it does, and its options

Pictures and tables go to RUN/analysis/ANALYSIS. Layers are counted from 1.
"""

import argparse
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distributed_inr.analysis import Latents, choose, control_files, file_latents, statistics_files
from distributed_inr.analysis.sources import MOST, Source
from distributed_inr.config import Parser, command
from distributed_inr.files import make_folder
from distributed_inr.generation import FieldModel, load
from distributed_inr.models.noising import Sampler

OPTIONS: dict[str, dict[str, Any]] = {
    "branches": {"type": int, "help": "children of a node"},
    "count": {"type": int},
    "fix_layers": {"type": int, "nargs": "+", "help": "rising numbers of first layers that the generations hold"},
    "layers": {"type": int, "nargs": "+", "help": "which ones"},
    "most": {"type": int, "help": "training latents used, evenly spaced"},
    "neighbours": {"type": int, "help": "signals of the nearest codes that are marked"},
    "permutations": {"type": int, "help": "of the signals, for the p-value"},
    "resolution": {"type": int, "help": "pixels a side that functions are read out at"},
    "samples": {"type": int, "help": "draws under each condition"},
    "sampler": {"choices": typing.get_args(Sampler), "help": "of the prior"},
    "seed": {"type": int, "help": "of everything random"},
    "steps": {"type": int, "help": "network evaluations a sample"},
    "variance": {"type": float, "help": "part of each layer's variance that is kept"},
}
DRAWING = {"seed": 0, "sampler": "the run's", "steps": "the run's"}
ALL = "all"
BASE = "the run's base resolution"


@dataclass(frozen=True)
class Analysis:
    """One of the analyses.

    Attributes:
        options: of `write`, with the defaults that --help shows.
        signals: how many it is about, unless asked otherwise; 0 where none are chosen.
        count: what its --count counts.
        needs: what it is given besides.
    """

    write: Callable[..., list[Path]]
    about: str
    options: dict[str, Any]
    signals: int = 0
    fixed_signals: bool = False
    count: str = ""
    needs: tuple[Literal["other", "allow_pipe"], ...] = ()


ANALYSES = {
    "tree": Analysis(
        control_files.tree_files,
        "hold the first layers and vary the others, generation by generation",
        {"fix_layers": "1 2 3", "branches": 2, **DRAWING, "resolution": BASE},
    ),
    "composition": Analysis(
        control_files.composition_files,
        "exchange one layer of a signal for that of others",
        {"layers": ALL, "resolution": BASE},
        signals=8,
    ),
    "interpolation": Analysis(
        control_files.interpolation_files,
        "blend four signals, in all layers",
        {"count": 7, "resolution": BASE},
        signals=4,
        fixed_signals=True,
        count="pictures a side",
    ),
    "layerwise": Analysis(
        control_files.layerwise_files,
        "go from one signal to another in one layer alone",
        {"count": 7, "layers": ALL, "resolution": BASE},
        signals=2,
        fixed_signals=True,
        count="pictures from one end to the other",
    ),
    "retrieval": Analysis(
        control_files.retrieval_files,
        "find the nearest training signals, by all layers and by one",
        {"count": 5, "layers": "each", "resolution": BASE},
        signals=4,
        count="neighbours of each signal",
    ),
    "svcca": Analysis(
        statistics_files.correlation_files,
        "correlation between the layers' latents, with p-values",
        {"variance": 0.99, "permutations": 200, "seed": 0, "most": MOST},
    ),
    "clusters": Analysis(
        statistics_files.clusters_files,
        "k-means of each layer's latents, beside their binary conditions",
        {"count": 10, "neighbours": 20, "seed": 0, "most": MOST},
        count="clusters of each layer",
    ),
    "conditions": Analysis(
        statistics_files.conditions_files,
        "draws of each layer under some conditions, in two dimensions",
        {"count": 5, "samples": 200, **DRAWING, "most": MOST},
        count="conditions",
    ),
    "memorisation": Analysis(
        statistics_files.memorisation_files,
        "distance of samples to the training pictures, beside that of held-out ones",
        {"count": 1000, "seed": 0, "steps": "the run's"},
        count="samples, and held-out pictures at most",
        needs=("allow_pipe",),
    ),
    "deviations": Analysis(
        statistics_files.deviations_files,
        "how much layers vary within one condition (CHINR, table 2)",
        {"count": 10, "samples": 500, "seed": 0, "sampler": "ddim", "steps": 50, "most": MOST},
        count="conditions",
    ),
    "ablation": Analysis(
        statistics_files.ablation_files,
        "this run against one without conditions",
        {"count": 256, "seed": 0, "steps": "the run's"},
        count="samples of each run",
        needs=("other", "allow_pipe"),
    ),
    "frequencies": Analysis(
        statistics_files.frequencies_files,
        "spatial frequencies of a D2C-VAE's basis fields (DDMI, section 4.4)",
        {},
        signals=64,
    ),
}


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run folder, such as runs/chinr/furniture-image")
    choices = parser.add_subparsers(dest="analysis", metavar="ANALYSIS", required=True, parser_class=Parser)
    for name, analysis in ANALYSES.items():
        add_options(choices.add_parser(name, help=analysis.about, description=analysis.about, allow_abbrev=False), name)
    given = parser.parse_args()
    analysis = ANALYSES[given.analysis]
    options = {name: value for name in analysis.options if (value := getattr(given, name)) is not None}
    model = load(given.run)
    subject: list[Any] = []
    if analysis.signals:
        subject = [chosen(model, given, analysis)]
    if "other" in analysis.needs:
        subject = [load(given.other)]
    if "allow_pipe" in analysis.needs:
        options["allow_pipe"] = given.allow_pipe
    if given.out is not None:
        make_folder(given.out)  # before the work, so that a folder that cannot be made does not waste it
    print(*analysis.write(model, *subject, given.out, **options), sep="\n")


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    analysis = ANALYSES[name]
    if "other" in analysis.needs:
        parser.add_argument("other", metavar="OTHER", help="run folder of the run without conditions")
    for option, default in analysis.options.items():
        settings: dict[str, Any] = {"help": analysis.count} | OPTIONS[option]
        settings["help"] += f" (default: {default})"
        parser.add_argument("--" + option.replace("_", "-"), **settings)
    if analysis.signals:
        sources = typing.get_args(Source)
        parser.add_argument(
            "--from", dest="source", choices=sources, help="where signals come from (default: training)"
        )
        parser.add_argument("--numbers", type=int, nargs="+", help="which of them, from 0 (default: evenly spaced)")
        parser.add_argument("--files", nargs="+", help="one's own pictures in place of these")
        if not analysis.fixed_signals:
            text = f"how many (default: {analysis.signals})"
            parser.add_argument("--signals", type=int, help=text)
        parser.add_argument("--seed", type=int, help="of samples (default: 0)")
        parser.add_argument("--steps", type=int, help="network evaluations a sample (default: the run's)")
    if analysis.signals or "allow_pipe" in analysis.needs:
        parser.add_argument(
            "--allow-pipe", action="store_true", help="run the commands in the run's pipe: data addresses"
        )
    parser.add_argument(
        "--out", type=Path, help=f"folder (default: analysis/{name} in RUN, or here if that is read-only)"
    )


def chosen(model: FieldModel, given: argparse.Namespace, analysis: Analysis) -> Latents:
    """The signals that an analysis is about."""
    names = {"source": "--from", "signals": "--signals", "numbers": "--numbers", "seed": "--seed", "steps": "--steps"}
    present = {name for name in names if getattr(given, name, None) is not None}
    if given.files:
        unused, why = present, "--files says which signals"
    elif given.source != "samples":
        unused, why = present & {"seed", "steps"}, "they are about --from samples"
    else:
        unused, why = set(), ""
    if "numbers" in present and not unused:
        unused, why = present & {"signals"}, "--numbers says how many"
    if unused:
        raise ValueError(f"{', '.join(names[name] for name in names if name in unused)} would change nothing: {why}")
    if given.files:
        return file_latents(model, given.files)
    return choose(
        model,
        given.source or "training",
        count=analysis.signals if getattr(given, "signals", None) is None else given.signals,
        numbers=given.numbers,
        seed=given.seed or 0,
        steps=given.steps,
        allow_pipe=given.allow_pipe,
    )


if __name__ == "__main__":
    main()
