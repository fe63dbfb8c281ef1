"""How well the functions of signals reproduce them, beside what one would have without a model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distributed_inr.evaluation import metrics
from distributed_inr.evaluation.report import Pictures
from distributed_inr.evaluation.splits import SHOWN, Advance, Known, Split, spread
from distributed_inr.generation import FieldModel
from distributed_inr.training.bank import read_rows
from distributed_inr.training.checkpoint_reader import BANK


class Measured:
    """Measures of each signal by what was measured and by metric; "" is the model itself."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.values: dict[str, dict[str, list[Tensor]]] = {}

    def add(self, what: str, found: Tensor, truth: Tensor, only: Sequence[str] | None = None) -> None:
        of_metrics = self.values.setdefault(what, {})
        for name in self.names if only is None else only:
            of_metrics.setdefault(name, []).append(metrics.METRICS[name](found, truth).cpu())

    def means(self) -> dict[str, dict[str, float]]:
        return {
            what: {name: torch.cat(parts).double().mean().item() for name, parts in of_metrics.items()}
            for what, of_metrics in self.values.items()
        }


def reconstructions(
    model: FieldModel, training: Split, held_out: Split, known: Known | None, pictures: Pictures, advance: Advance
) -> dict[str, Any]:
    """Measures of held-out signals' functions, and of what one would have without a model: means over signals.

    Args:
        known: of the training signals; None where their renderings are not comparable with others'.
    """
    domain = model.domain
    numbers = held_out.spread(model.experiment.evaluation.max_reconstructions)
    latent_numbers = torch.Size(model.autoencoder.latent_shape).numel()
    shown, done = set(spread(len(numbers), SHOWN)), 0
    measured = Measured(domain.metrics)
    finest = 0
    for signal in held_out.batches(numbers):
        fields, truth = model.encode(signal), domain.truth(signal)
        found = domain.reproduce(fields, signal)
        measured.add("", found, truth)
        naive = domain.naive(signal, numbers=latent_numbers)
        for name, rendered in naive.items():
            measured.add(name, rendered, truth)
        if known is not None:
            mean, (_, places) = known.mean.expand_as(truth), known.nearest(domain.thumbnails(truth))
            measured.add(f"the mean of {len(known.numbers)} training {domain.noun}s", mean, truth)
            near = torch.cat([domain.truth(domain.copies(training.one(number))[copy]) for number, copy in places])
            measured.add(f"the nearest training {domain.noun}", near, truth)
        columns = {"held out": truth, "its function": found, **naive}
        if (finer := domain.finer_truth(signal)) is not None:  # which the encoder never saw
            finest, fine_truth = finer
            read_out = fields.render(finest)
            measured.add("finer", read_out, fine_truth, domain.metrics[:1])
            measured.add("enlarged", domain.enlarge(found, finest), fine_truth, domain.metrics[:1])
            columns |= {
                f"held out, {finest} {domain.unit}": fine_truth,
                f"its function, {finest} {domain.unit}": read_out,
            }
        for row in range(len(signal)):
            if done + row in shown:
                one = {name: domain.pictures(column[row : row + 1])[0].cpu() for name, column in columns.items()}
                pictures.reconstructions.append(one)
        done += len(signal)
        advance(len(signal))
    means = measured.means()
    result: dict[str, Any] = {**means.pop(""), "signals": done, "latent_numbers": latent_numbers}
    if finest:
        read_out, enlarged = (means.pop(name)[domain.metrics[0]] for name in ("finer", "enlarged"))
        result["finer"] = {"resolution": finest, domain.metrics[0]: read_out, "enlarged": enlarged}
    return result | {"baselines": means}


def kept_back(model: FieldModel, training: Split, advance: Advance) -> dict[str, Any]:
    """Measures of what was kept back of training signals, from the latents that the run has for them."""
    domain, measured, done = model.domain, Measured(model.domain.metrics), 0
    experiment = model.experiment
    rows = None if experiment.bank is None else read_rows(model.folder / "autoencoder" / BANK)
    numbers = training.spread(experiment.evaluation.max_reconstructions)
    latent_numbers = torch.Size(model.autoencoder.latent_shape).numel()
    for signal in training.batches(numbers):
        assert signal.number is not None
        fields = model.encode(signal) if rows is None else model.decode(rows[signal.number.cpu()])
        truth = domain.truth(signal)
        measured.add("", domain.reproduce(fields, signal), truth)
        for name, rendered in domain.naive(signal, numbers=latent_numbers).items():
            measured.add(name, rendered, truth)
        done += len(signal)
        advance(len(signal))
    means = measured.means()
    return {**means.pop(""), "signals": done, "what": domain.kept_back, "baselines": means}
