"""A run from data to evaluation: fit the autoencoder -> write latents (-> embed captions) -> fit the prior -> evaluate.

Each stage keeps a `stage.json`: the options and inputs that its output depends on, marked complete last. A complete
stage is skipped; a stage begun with other options is refused. How fast and how often things are done (`scale`, batch
sizes, checkpoints, logging) may change between two calls.
"""

import contextlib
import functools
import json
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from distributed_inr.config import differences, from_json, override, to_dict, to_json
from distributed_inr.console import signals
from distributed_inr.data import storage
from distributed_inr.data.reader import ShardDataset, read_latent
from distributed_inr.data.shards import ShardIndex
from distributed_inr.data.text_table import TextTable, identity, read_captioned_latent
from distributed_inr.evaluation import evaluate
from distributed_inr.experiment import Experiment
from distributed_inr.generation import read_experiment
from distributed_inr.latents import LatentShards, refuse_foreign_latents, write_latents
from distributed_inr.launch import Observe, Worker, in_ray_job, launcher
from distributed_inr.models import LayersOfExperts
from distributed_inr.run_folder import (
    Stage,
    check_space,
    link_autoencoder,
    locked,
    settle_checkpoints,
    settle_output,
    write_text,
)
from distributed_inr.texts import check_captions, refuse_other_encoder, weights_of, write_texts
from distributed_inr.training import checkpoint, ledger
from distributed_inr.training.bank import MAPPED_ABOVE, Bank, num_bytes
from distributed_inr.training.checkpoint_reader import BANK
from distributed_inr.training.ledger import Account
from distributed_inr.training.loop import Training, train

_MAY_CHANGE = frozenset(
    ("batch_size", "micro_batch_size", "keep_checkpoints", "ledger", "on_nonfinite", "max_nonfinite_steps")
    + ("log_every_samples", "evaluate_every_samples", "checkpoint_every_samples")
)
"""Options that may differ between two calls: how fast and how often, not how long, which counts samples."""

_ORDER = ("num_streams", "shuffle_shards")
"""Options of `data` that the order of the samples depends on."""

_MODEL = "model.safetensors"


StageName = Literal["autoencoder", "latents", "text", "prior", "evaluation"]
STAGES: tuple[StageName, ...] = typing.get_args(StageName)


def run(
    experiment: Experiment, *, stages: Collection[StageName] = STAGES, observe: Observe | None = None
) -> dict[str, Path]:
    """Make a run complete, or go on with one that was interrupted. Returns what it made, by name.

    Args:
        stages: to make complete; of a run without a prior, the autoencoder alone is evaluated.
        observe: called with the metrics of each checkpoint, the newest losses on the held-out set among them.

    Raises ValueError, before any work, where the options do not fit each other, the data or the run folder.
    """
    if isinstance(experiment.autoencoder, LayersOfExperts) and experiment.autoencoder.folded:
        raise ValueError(
            "autoencoder.folded=True holds a trained network's weights without its experts, and cannot be trained; "
            "leave it out"
        )
    experiment = settle_output(experiment, shared=in_ray_job())
    train_index, val_index = indexes(experiment)
    experiment = experiment.settle(train_index.num_samples, train_index.protocol)
    weights = ""
    if "text" in stages and experiment.text is not None:
        weights = weights_of(experiment, _stages(experiment)[2])
    with torch.device("meta"):  # shapes only: what does not fit is found before anything is trained
        autoencoder = experiment.autoencoder.build(experiment.domain)
        prior = experiment.prior.build(autoencoder.latent_shape)
    latents = LatentShards.of(experiment, train_index, autoencoder)

    with contextlib.ExitStack() as stack:
        stack.enter_context(signals(stoppable=False))  # between the stages; those that train hear for themselves
        place = stack.enter_context(launcher(experiment.scale))
        shared = place.num_nodes > 1 or in_ray_job()
        experiment = settle_output(experiment, shared=shared)
        experiment = settle_checkpoints(experiment, shared=shared)
        folder = experiment.folder
        stack.enter_context(locked(folder))
        if experiment.autoencoder_from is not None:
            link_autoencoder(experiment, shared=shared)
        fit, encode, embed, fit_prior, evaluation = _stages(experiment)
        for stage in (fit, encode, fit_prior):
            stage.refuse_other_options()
        _refuse_other_checkpoints(experiment)
        if "text" in stages and experiment.text is not None:
            refuse_other_encoder(experiment, fit_prior, identity(experiment.text.label, weights))
            if not encode.was_finished:
                check_captions(experiment, train_index)
        for stage, path in ((fit, "autoencoder_training"), (fit_prior, "prior_training")):
            if stage.folder.name in stages and not stage.was_finished:
                getattr(experiment, path).num_micro_batches(place.num_workers, path=path)
        elsewhere = experiment.checkpoints is not None
        needed = {
            fit.folder: training_bytes(autoencoder, experiment.autoencoder_training, elsewhere=elsewhere)
            + bank_bytes(experiment, latents, place.num_workers),
            encode.folder: latents.num_bytes,
            fit_prior.folder: training_bytes(prior, experiment.prior_training, elsewhere=elsewhere),
        }
        own = [stage for stage in stages if experiment.autoencoder_from is None or stage in ("text", "prior")]
        check_space(folder, {part: size for part, size in needed.items() if part.name in own})
        write_text(folder / "config.json", to_json(experiment) + "\n")

        inputs = {"train": train_index.fingerprint}
        if "autoencoder" in stages and not fit.is_complete(inputs):
            fit.begin(inputs)
            work = functools.partial(fit_autoencoder, experiment=experiment, stage=fit)
            place.run(work, title="autoencoder", folder=fit.folder, stoppable=True, observe=observe)
            fit.finish(inputs)

        if "latents" in stages:
            inputs = {"autoencoder": storage.sha256_of(fit.folder / _MODEL), "train": train_index.fingerprint}
            if experiment.bank is not None:
                inputs["bank"] = storage.sha256_of(fit.folder / BANK)
            if not encode.is_complete(inputs):
                encode.begin(inputs)
                work = functools.partial(write_latents, experiment=experiment, stage=encode, shards=latents)
                place.run(work, title="latents", folder=encode.folder)
                encode.finish(inputs)

        if "text" in stages and experiment.text is not None:
            inputs = {"latents": experiment.data.index(str(encode.folder)).fingerprint, "weights": weights}
            inputs["val"] = val_index.fingerprint if val_index else ""
            if not (embed.is_current(inputs) and TextTable.is_whole(embed.folder)):
                embed.begin(inputs)
                work = functools.partial(write_texts, experiment=experiment, stage=embed)
                place.run(work, title="text", folder=embed.folder, num_workers=1)
                embed.finish(inputs)

        if "prior" in stages:
            written = experiment.data.index(str(encode.folder))
            refuse_foreign_latents(written, encode.folder, fit.folder / _MODEL)
            inputs = {"latents": written.fingerprint}
            if experiment.text is not None:
                inputs["encoder"] = TextTable.open(embed.folder).identity
                refuse_other_encoder(experiment, fit_prior, inputs["encoder"])
            if not fit_prior.is_complete(inputs):
                fit_prior.begin(inputs)
                work = functools.partial(
                    fit_latent_prior, experiment=experiment, stage=fit_prior, latents=encode.folder
                )
                place.run(work, title="prior", folder=fit_prior.folder, stoppable=True, observe=observe)
                fit_prior.finish(inputs)

        if "evaluation" in stages:
            models = [name for name in ("autoencoder", "prior") if name in stages]
            inputs = {name: storage.sha256_of(folder / name / _MODEL) for name in models}
            inputs["val"] = val_index.fingerprint if val_index else ""
            if "prior" in stages and experiment.text is not None:
                inputs["text"] = TextTable.open(embed.folder).fingerprint
            if not evaluation.is_current(inputs):
                evaluation.begin(inputs)
                work = functools.partial(evaluate_run, experiment=experiment, stage=evaluation)
                place.run(work, title="evaluation", folder=evaluation.folder, num_workers=1)
                evaluation.finish(inputs)

    names = ["config.json", "evaluation.json", "report.md", *sorted(path.name for path in folder.glob("*.png"))]
    models = {name: folder / name / _MODEL for name in ("autoencoder", "prior") if name in stages}
    return {"run": folder} | models | {name: folder / name for name in names if (folder / name).exists()}


def _stages(experiment: Experiment) -> tuple[Stage, Stage, Stage, Stage, Stage]:
    """The stages' folders, each with the options that what it holds depends on."""
    tree, folder, accepted = to_dict(experiment), experiment.folder, experiment.data.accept_changed
    place: dict[str, Any] = {"data": {name: tree["data"][name] for name in _ORDER}}
    if experiment.checkpoints is not None:
        place["checkpoints"] = experiment.checkpoints
    fit = (
        {name: tree[name] for name in ("seed", "domain", "autoencoder")}
        | place
        | {"autoencoder_training": _lasting(tree["autoencoder_training"])}
    )
    if experiment.autoencoder_from is not None:  # how it was trained is its own affair
        there = Stage(folder / "autoencoder", {}).made_with
        fit = {name: fit[name] if name in ("domain", "autoencoder") else value for name, value in there.items()}
    fit_prior = {name: tree[name] for name in ("seed", "prior")} | place
    fit_prior |= {"prior_training": _lasting(tree["prior_training"])}
    if experiment.text is not None:
        fit_prior |= {"text": experiment.text.label, "text_dropout": experiment.text_dropout}
    evaluation = {name: _lasting(tree[name]) for name in ("sampling", "evaluation")} | {"seed": tree["seed"]}
    return (
        Stage(folder / "autoencoder", fit, accept_changed=accepted),
        Stage(folder / "latents", {"domain": tree["domain"]}, accept_changed=accepted),
        Stage(folder / "text", {"text": tree["text"]}),
        Stage(folder / "prior", fit_prior, accept_changed=accepted),
        Stage(folder / "evaluation", evaluation),
    )


def _refuse_other_checkpoints(experiment: Experiment) -> None:
    """Where checkpoints lie apart from the run folder, those of another run of that name must not be gone on from."""
    if experiment.checkpoints is None:
        return
    fit, _, _, fit_prior, _ = _stages(experiment)
    for stage in (fit, fit_prior):
        place = experiment.checkpoints_of(stage.folder.name)
        text = checkpoint.read_config(place)
        if text is None:
            continue
        others = {other.folder.name: other for other in _stages(from_json(Experiment, text))}
        changed = differences(others[stage.folder.name].options, stage.options)
        if changed:
            shown = "; ".join(f"{path} is {old} there and {new} here" for path, (old, new) in changed.items())
            raise ValueError(
                f"{place} was written with other options: {shown}. Set them back, choose another --name or "
                f"--checkpoints, or delete {place}"
            )


def check_ledgers(folder: Path) -> dict[str, Account]:
    """What the sample ledgers of a finished run show, by stage. Raises ValueError where there are none."""
    experiment = override(read_experiment(folder), {"output": str(folder.absolute().parents[1])})
    train_index, _ = indexes(experiment)
    sets: dict[str, ShardDataset] = {}
    if experiment.autoencoder_training.ledger:
        sets["autoencoder"] = experiment.dataset(train_index)
    if experiment.prior_training.ledger:
        sets["prior"] = _latent_dataset(experiment, folder / "latents")
    if not sets:
        raise ValueError(
            f"{folder} holds no ledger; train with --autoencoder-training.ledger true or --prior-training.ledger true"
        )
    accounts = {}
    for name, dataset in sets.items():
        newest = checkpoint.newest(experiment.checkpoints_of(name))
        if not Stage(folder / name, {}).was_finished or newest is None:
            raise ValueError(f"{folder / name} is not finished; train on with the command that began it")
        accounts[name] = ledger.check(
            folder / name / "ledger",
            num_samples=checkpoint.read_state(newest)["samples"],
            key=dataset.key,
            max_bad_fraction=experiment.data.max_bad_fraction,
        )
    return accounts


# --- stages: each runs on the workers


def fit_autoencoder(worker: Worker, *, experiment: Experiment, stage: Stage) -> None:
    """Train the autoencoder on the training shards."""
    stage.check_shared()
    torch.manual_seed(experiment.seed)  # the same initial weights on every rank
    module = experiment.autoencoder.build(experiment.domain)
    train_index, val_index = indexes(experiment)
    bank = None
    if experiment.bank is not None:
        shape = (train_index.num_samples, module.latent_shape)
        bank = Bank(*shape, fitting=experiment.bank, seed=experiment.seed, folder=stage.folder)
    _train(
        module,
        experiment.dataset(train_index),
        worker,
        experiment=experiment,
        training=experiment.autoencoder_training,
        folder=stage.folder,
        bank=bank,
        val_dataset=None if val_index is None else experiment.dataset(val_index),
    )


def fit_latent_prior(worker: Worker, *, experiment: Experiment, stage: Stage, latents: Path) -> None:
    """Train the prior on the written latents; neither the autoencoder nor its data are read."""
    stage.check_shared()
    try:
        statistics = json.loads((latents / "statistics.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{latents}/statistics.json cannot be read: {error}; delete {latents} to make it again"
        ) from None
    torch.manual_seed(experiment.seed)
    module = experiment.prior.build(tuple(statistics["latent_shape"]))
    module.normalise_from(torch.tensor(statistics["mean"]), torch.tensor(statistics["deviation"]))
    dataset = _latent_dataset(experiment, latents)
    if experiment.text is not None:  # for whoever finds its checkpoints
        sha256 = TextTable.open(latents.parent / "text").sha256
        experiment = override(experiment, {"text.sha256": sha256})
    _train(module, dataset, worker, experiment=experiment, training=experiment.prior_training, folder=stage.folder)


def evaluate_run(worker: Worker, *, experiment: Experiment, stage: Stage) -> None:
    """Sample from the run and measure it."""
    stage.check_shared()
    evaluate(experiment.folder, allow_pipe=experiment.data.allow_pipe, progress=worker.progress)


def _train(
    module: nn.Module,
    dataset: ShardDataset,
    worker: Worker,
    *,
    experiment: Experiment,
    training: Training,
    folder: Path,
    bank: Bank | None = None,
    val_dataset: ShardDataset | None = None,
) -> None:
    train(
        module,
        dataset,
        training=training,
        scale=experiment.scale,
        seed=experiment.seed,
        folder=folder,
        config_json=to_json(experiment),
        checkpoints=experiment.checkpoints_of(folder.name),
        bank=bank,
        val_dataset=val_dataset,
        num_loaders=experiment.data.num_loaders,
        accept_changed=experiment.data.accept_changed,
        report=worker.report,
        progress=worker.progress,
        stop=worker.stop,
        save=worker.save,
    )


def _latent_dataset(experiment: Experiment, latents: Path) -> ShardDataset:
    read = read_latent
    if experiment.text is not None:
        texts = TextTable.open(latents.parent / "text")
        read = functools.partial(read_captioned_latent, texts=texts, dropout=experiment.text_dropout)
    return experiment.data.dataset(experiment.data.index(str(latents)), read=read, seed=experiment.seed)


def indexes(experiment: Experiment) -> tuple[ShardIndex, ShardIndex | None]:
    """The training and the held-out set, checked."""
    data, kind = experiment.data, experiment.domain.kind
    found = {name: data.index(url) for name, url in (("train", data.train), ("val", data.val)) if url is not None}
    for name, index in found.items():
        if index.domain not in (None, kind):
            raise ValueError(
                f"data.{name}={getattr(data, name)!r} holds a set of {index.domain}, domain.kind={kind}; "
                "give a set of that domain"
            )
    return found["train"], found.get("val")


def training_bytes(module: nn.Module, training: Training, *, elsewhere: bool) -> int:
    """What the final model and, unless they lie elsewhere, the checkpoints take."""
    kept = 0 if elsewhere else training.keep_checkpoints + 2  # the best, and the one being written
    return _state_bytes(module) + kept * checkpoint_bytes(module, training)


def checkpoint_bytes(module: nn.Module, training: Training) -> int:
    """What a checkpoint takes: float32 weights, moments and, where one is kept, their average."""
    return _state_bytes(module) * (3 + (training.ema_half_life_samples > 0))


def _state_bytes(module: nn.Module) -> int:
    return 4 * sum(tensor.numel() for tensor in module.state_dict().values())


def bank_bytes(experiment: Experiment, latents: LatentShards, num_workers: int) -> int:
    """What a bank's final rows, its copies in checkpoints and, where it is mapped, those of the workers take."""
    if experiment.bank is None:
        return 0
    size = num_bytes(latents.num_samples, latents.shape)
    kept = 0 if experiment.checkpoints is not None else experiment.autoencoder_training.keep_checkpoints + 2
    mapped = num_workers + 1 if size > MAPPED_ABOVE else 0  # the first one copies it for checkpoints
    return size // 3 + size * (kept + mapped)


def _lasting(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name not in _MAY_CHANGE}
