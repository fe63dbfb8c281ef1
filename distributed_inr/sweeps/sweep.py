"""Sweeps: Ray Tune over whole runs. Each trial is `pipeline.run` with some options varied, in a folder of its own.

What trials find lies in their folders (trial.json), so the report is made from these alone; Tune draws the settings,
places the trials, stops the hopeless ones, and remembers where it was. A stage that all trials share is made once.
"""

import importlib.util
import json
import logging
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from distributed_inr import pipeline
from distributed_inr.config import Parser, config, differences, leaves, override, parse, to_dict
from distributed_inr.console import signals
from distributed_inr.data import storage
from distributed_inr.experiment import Experiment
from distributed_inr.launch import in_ray_job, launcher
from distributed_inr.presets import PRESETS
from distributed_inr.run_folder import locked, settle_checkpoints, settle_output, write_text
from distributed_inr.sweeps import report
from distributed_inr.sweeps.space import Space, load_space, shares_autoencoder
from distributed_inr.sweeps.study import Study
from distributed_inr.sweeps.table import Table
from distributed_inr.sweeps.trial import Trials
from distributed_inr.training.background import Background

logger = logging.getLogger(__name__)

_DRAWN = 8
"""Settings drawn from a space that is no grid, unless told otherwise."""
_RUNGS = 9
"""Checkpoints of a trial that may be stopped early. At the first, and at the third, two in three are."""
_POLL_SECONDS = 2.0


@config
class Sweep:
    """How a sweep goes about it."""

    name: str
    """Name of the sweep; its folder is <output>/sweeps/<name>."""
    space: Path
    """Python file that defines SPACE: dotted field paths to distributions."""
    preset: str
    """Preset that trials start from."""
    num_samples: PositiveInt | None = None
    """Settings drawn from the space; of a grid, times that all of it is tried. none: once for a grid, otherwise 8."""
    seeds: PositiveInt = 1
    """Trials of each setting, with seeds from --seed on; measures are then means with error bars."""
    scheduler: Literal["none", "asha"] = "none"
    """none: every trial runs to its end. asha: stop trials that lag behind the others at the same number of samples."""
    search: Literal["random", "optuna"] = "random"
    """random: independent draws. optuna: draws that learn from earlier trials (needs the extra `optuna`)."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time. none: as many as the cluster has room for now; set it where nodes come as they are needed."""


def main(argv: Sequence[str], study: Study, *, description: str) -> Path:
    """Run the sweep that a command line asks for; returns the path of its report."""
    sweep = Sweep(name=study.space.stem.replace("_", "-"), space=study.space, preset=study.preset)
    parser = Parser(usage=f"{sys.argv[0]} [--option value ...] [--field value ...]", add_help=False, allow_abbrev=False)
    for name, (_, value, text) in leaves(Sweep, sweep).items():
        shown = "none" if value is None else value
        value, shown = (None, "that of the space") if name == "name" else (value, shown)
        parser.add_argument("--" + name.replace("_", "-"), default=value, metavar="", help=f"{text} (default: {shown})")
    parser.add_argument("--resume", action="store_true", help="Go on with a sweep; an error where there is none.")
    options, flags = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(flags):
        print(description, parser.format_help(), sep="\n")
    given = vars(options)
    resume = given.pop("resume")
    given["name"] = given["name"] or Path(given["space"]).stem.replace("_", "-")
    optional = ("num_samples", "max_concurrent")
    sweep = override(sweep, {k: None if k in optional and value == "none" else value for k, value in given.items()})
    experiment = parse([sweep.preset, *flags], PRESETS[study.family], default=study.preset, description="Fields:")
    return run(sweep, experiment, study, resume=resume)


def run(sweep: Sweep, experiment: Experiment, study: Study, *, resume: bool = False) -> Path:
    """Make a sweep complete, or go on with one that was interrupted. Returns the path of its report.

    Args:
        experiment: what all trials share.
        resume: raise ValueError where there is nothing to go on with.

    Raises:
        ValueError: the options do not fit each other, the space, the cluster or the sweep's folder.
        RuntimeError: no trial has finished.
    """
    space = load_space(sweep.space)
    space.check(experiment)
    _check(sweep, experiment, study, space)
    with signals(stoppable=False), launcher(experiment.scale) as place:
        shared = place.num_nodes > 1 or in_ray_job()
        experiment = settle_checkpoints(settle_output(experiment, shared=shared), shared=shared)
        folder = Path(experiment.output).expanduser() / "sweeps" / sweep.name
        if resume and not (folder / "sweep.json").exists():
            raise ValueError(f"--resume: {folder} holds no sweep; leave it out to begin one")
        workers, resources, most = _resources(sweep, experiment)
        with locked(folder):
            _begin(folder, sweep, experiment, space)
            _check_shared(folder)
            base = _as_trial(experiment, sweep, folder, workers)
            if shares_autoencoder(space.fields):
                base = _share(base, experiment, folder)
                experiment = override(experiment, {"autoencoder_from": base.autoencoder_from})
            trials = Trials(base, space, study, session=uuid.uuid4().hex)
            _tune(trials, sweep, folder, resources=resources, most=most)
            return report.write(folder, trials, sweep_name=sweep.name, preset=sweep.preset, experiment=experiment)


def _check(sweep: Sweep, experiment: Experiment, study: Study, space: Space) -> None:
    if "/" in sweep.name or sweep.name in ("", ".", ".."):
        raise ValueError(f"name={sweep.name!r} must be that of one folder; --output says where the sweeps lie")
    if experiment.scale.launcher == "none":
        raise ValueError("scale.launcher=none does not run a sweep, whose trials Ray places; leave it out")
    if experiment.data.val is None:
        raise ValueError("data.val is not set: there is nothing held out to measure trials by; set --data.val")
    study.check(experiment, space.fields)
    if sweep.scheduler == "asha":
        if "autoencoder_training.num_samples" in space.fields:
            raise ValueError(
                f"{space.path}: autoencoder_training.num_samples cannot be varied with scheduler=asha, which compares "
                "trials at equal parts of it; use --scheduler none"
            )
        if study.early is None:
            raise ValueError(
                f"scheduler=asha stops trials by what they are worth half-way, and {study.about} is judged by finished "
                f"samples ({study.objective}); use --scheduler none"
            )
        if getattr(experiment.domain, "likelihood", "gaussian") != "gaussian":
            raise ValueError(
                "scheduler=asha takes the held-out PSNR from the Gaussian loss; set --domain.likelihood gaussian, or "
                "--scheduler none"
            )
        if sweep.search == "optuna" and sweep.seeds > 1:
            raise ValueError(
                f"seeds={sweep.seeds} with search=optuna judges a setting by the mean of its seeds, which "
                "scheduler=asha would stop one by one; use --scheduler none or --seeds 1"
            )
    if sweep.search == "optuna":
        if functions := space.functions:
            raise ValueError(f"{space.path}: {functions[0]} is tune.sample_from, which search=optuna does not take")
        if importlib.util.find_spec("optuna") is None:
            raise ValueError("search=optuna needs Optuna: pip install 'distributed_inr[optuna]'")


def _resources(sweep: Sweep, experiment: Experiment) -> tuple[int, Mapping[str, float], int]:
    """Workers of a trial, what its driver takes, and how many trials run at a time (0: as Ray can place).

    A single worker is the trial's driver itself. Of several, placed by Ray Train, the driver takes no CPU; something it
    must take.
    """
    import ray

    have = ray.cluster_resources()
    kind = "GPU" if have.get("GPU", 0) > 0 else "CPU"
    workers, number = experiment.scale.num_workers or 1, int(have.get(kind, 0))
    if number == 0:
        raise ValueError("the cluster has neither CPUs nor GPUs for trials now; start one node of workers first")
    if workers > number and (sweep.max_concurrent is None or kind == "CPU"):
        raise ValueError(
            f"scale.num_workers={workers} for each trial, but the cluster has {number} {kind}s: {workers - number} are "
            "missing. Lower it or add nodes; where nodes with GPUs come as they are needed, set --max-concurrent"
        )
    if workers == 1:
        return 1, {"CPU": 1} | ({"GPU": 1} if kind == "GPU" else {}), sweep.max_concurrent or 0
    return workers, {"CPU": 0, "memory": 2**20}, sweep.max_concurrent or number // workers


def _begin(folder: Path, sweep: Sweep, experiment: Experiment, space: Space) -> None:
    """Record what the sweep is, or refuse another one in its place."""
    tree = to_dict(experiment)
    options = {name: value for name, value in to_dict(sweep).items() if name not in ("max_concurrent", "space")}
    record = {
        "sweep": options,
        "experiment": {name: value for name, value in tree.items() if name not in ("output", "scale")},
        "space": space.path.read_text(),
    }
    path = folder / "sweep.json"
    if path.exists():
        there = json.loads(path.read_text())
        if changed := differences(there, record):
            shown = "; ".join(
                f"what {space.path} holds" if name == "space" else f"{name} is {old} there and {new} here"
                for name, (old, new) in changed.items()
            )
            raise ValueError(
                f"{folder} is another sweep: {shown}. Set them back, choose another --name or --output, or delete it"
            )
    write_text(path, json.dumps(record, indent=1) + "\n")


def _check_shared(folder: Path) -> None:
    """Raises ValueError where a node of the cluster does not see the sweep's folder."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mark = folder / f".seen-{uuid.uuid4().hex}"
    mark.touch()

    @ray.remote(num_cpus=0, max_retries=0)
    def look(path: str) -> tuple[str, bool]:
        return socket.gethostname(), Path(path).exists()

    try:
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        seen = ray.get([look.options(scheduling_strategy=place).remote(str(mark.absolute())) for place in places])
    finally:
        mark.unlink()
    blind = sorted({host for host, sees in seen if not sees})
    if blind:
        raise ValueError(
            f"{folder} is not shared: node {blind[0]} does not see it ({len(blind)} of {len(nodes)} nodes); set "
            "--output to a folder that all nodes share"
        )


def _as_trial(experiment: Experiment, sweep: Sweep, folder: Path, workers: int) -> Experiment:
    """What trials share, with their place, their workers and, where they may be stopped early, their checkpoints."""
    changes: dict[str, Any] = {"output": str(folder.absolute() / "trials"), "scale.num_workers": workers}
    if workers == 1:
        changes["scale.launcher"] = "none"  # in the process that Tune has placed
    if experiment.checkpoints is not None:
        changes["checkpoints"] = storage.join(experiment.checkpoints, f"sweeps/{sweep.name}")
    if sweep.scheduler == "asha":
        every = _first_rung(experiment)
        names = ("evaluate_every_samples", "checkpoint_every_samples")
        changes |= {f"autoencoder_training.{name}": every for name in names}
    return override(experiment, changes)


def _first_rung(experiment: Experiment) -> int:
    training = experiment.autoencoder_training
    return min(training.num_samples, max(training.batch_size, training.num_samples // _RUNGS))


def _share(base: Experiment, experiment: Experiment, folder: Path) -> Experiment:
    """Fit the autoencoder and write its latents, once, with all that the cluster has."""
    scale = {"scale.launcher": "ray", "scale.num_workers": experiment.scale.num_workers}
    shared = override(base, {"name": "shared", "output": str(folder.absolute() / "shared"), **scale})
    pipeline.run(shared, stages=("autoencoder", "latents"))
    return override(base, {"autoencoder_from": str(shared.folder)})


def _tune(trials: Trials, sweep: Sweep, folder: Path, *, resources: Mapping[str, float], most: int) -> None:
    """Have Tune begin all trials, also those of earlier sessions: finished ones answer at once.

    Its own way to go on would bring back the placement of the first session, and forget what it has stopped.
    """
    from ray import tune

    end, directory = trials.experiment.autoencoder_training.num_samples, os.getcwd()

    def trial(config: dict[str, Any]) -> None:
        if os.path.isdir(directory):
            os.chdir(directory)  # that relative paths refer to

        def observe(found: dict[str, Any]) -> None:
            if found["samples"] < end:  # a trial that has got there is to be measured, not stopped
                tune.report(found)

        finished = trials.run(*_drawn(config, trials), observe=observe)
        tune.report({"samples": end, "score": trials.study.score(finished.measures[trials.study.objective])})

    shutil.rmtree(folder / "tune", ignore_errors=True)
    tuner = _tuner(tune.with_resources(trial, dict(resources)), trials, sweep, folder, most=most)
    with Table(trials, sweep.name) as table:
        fitted = Background("tune").submit(tuner.fit)
        while wait([fitted], _POLL_SECONDS).not_done:
            table.show()
        for result in fitted.result():
            one = trials.begin(*_drawn(result.config, trials))
            if result.error is not None and one.status != "failed":
                trials.fail(one, f"its process died, also after scale.max_failures restarts: {result.error}")
            elif one.status == "running":
                trials.record(replace(one, status="stopped"))


def _drawn(config: Mapping[str, Any], trials: Trials) -> tuple[dict[str, Any], int]:
    """What Tune has drawn for a trial, and its seed."""
    values = dict(config)
    index = values.pop("__trial_index__", 0)  # of Optuna's repetitions
    return values, values.pop("seed", trials.experiment.seed + index)


def _tuner(trainable: Callable[..., Any], trials: Trials, sweep: Sweep, folder: Path, *, most: int) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search import BasicVariantGenerator, Repeater

    experiment, space = trials.experiment, trials.space
    num_samples = sweep.num_samples or (1 if space.is_grid and sweep.search == "random" else _DRAWN)
    seeds = list(range(experiment.seed, experiment.seed + sweep.seeds))
    if sweep.search == "optuna":
        search: Any = _optuna(trials, num_samples)
        fields, limit = space.without_grids(tune.choice), most or None
        if sweep.seeds > 1:
            search, num_samples = Repeater(search, repeat=sweep.seeds), num_samples * sweep.seeds
    else:
        fields, limit = {**space.fields, "seed": tune.grid_search(seeds)}, None
        search = BasicVariantGenerator(
            constant_grid_search=True, random_state=experiment.seed, max_concurrent=most or 0
        )
    scheduler = FIFOScheduler()
    if sweep.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="samples",
            grace_period=_first_rung(experiment),
            max_t=experiment.autoencoder_training.num_samples,
            reduction_factor=3,
        )
    return tune.Tuner(
        trainable,
        param_space=fields,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=num_samples,
            search_alg=search,
            scheduler=scheduler,
            max_concurrent_trials=limit,
        ),
        run_config=tune.RunConfig(
            name="state",
            storage_path=str((folder / "tune").absolute()),
            failure_config=tune.FailureConfig(max_failures=experiment.scale.max_failures),
            verbose=0,
        ),
    )


def _optuna(trials: Trials, num_samples: int) -> Any:
    """The search, which begins with the settings of an earlier session."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    known: list[dict[str, Any]] = []
    for trial in trials.known():
        drawn = {path: value for path, value in trial.drawn.items() if hasattr(trials.space.fields[path], "sample")}
        known += [drawn] if drawn not in known else []
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=max(1, num_samples // 3), seed=trials.experiment.seed + len(known)
    )
    return OptunaSearch(sampler=sampler, points_to_evaluate=known or None)
