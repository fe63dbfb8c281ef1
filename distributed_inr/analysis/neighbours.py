"""Signals beside signals: which are near, whether samples are copies, and one prior against another."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distributed_inr.analysis.sources import (
    Latents,
    check_layers,
    draw,
    held_out_split,
    hierarchical,
    num_layers,
    render,
    training_batches,
    z_scores,
)
from distributed_inr.config import differences, to_dict
from distributed_inr.domains import Domain, Signal
from distributed_inr.domains.domain import seeds_for
from distributed_inr.evaluation import metrics
from distributed_inr.evaluation.evaluate import check_pipe, why_incomparable
from distributed_inr.evaluation.splits import Split
from distributed_inr.generation import FieldModel

SHOWN = 8
"""Samples that are shown beside their nearest training pictures."""


@dataclass(frozen=True)
class Retrieved:
    """The training latents nearest to each query, nearest first.

    Attributes:
        layer: the one that was compared, counted from 1; None is all.
        keys: of each query's neighbours; an augmented copy's ends in "#1".
        distances: L2 between z-scored latents, unsquared.
        values: the neighbours' latents, not z-scored.
    """

    query: Latents
    layer: int | None
    keys: list[list[str]]
    distances: Float[Tensor, "queries neighbours"]
    values: Float[Tensor, "queries neighbours *latent_shape"]


def retrieval(model: FieldModel, query: Latents, *, layer: int | None = None, count: int = 5) -> Retrieved:
    """Find the training signals whose latents are nearest, by all layers or by one (CHINR, section B.5).

    A training signal is not its own neighbour, nor are its augmented copies.

    Args:
        query: as from `choose` or `file_latents`.
        layer: counted from 1; None compares whole latents, of any shape.
        count: neighbours of each.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if layer is not None:
        check_layers([layer], num_layers(model, "retrieval by one layer"))
    part = slice(None) if layer is None else slice(layer - 1, layer)
    wanted = z_scores(model, query.values)[:, part].flatten(1)
    best = torch.full((len(query), 0), torch.inf)
    keys: list[list[str]] = [[] for _ in range(len(query))]
    values = query.values[:, None][:, :0]
    for known in training_batches(model):
        scores = z_scores(model, known.values)[:, part].flatten(1)
        # Without matrix products, whose rounding hides what is very near.
        distances = torch.cdist(wanted, scores, compute_mode="donot_use_mm_for_euclid_dist")
        if query.source == "training":
            own = [[signal == of for signal in known.signals] for of in query.signals]
            distances[torch.tensor(own)] = torch.inf
        together = torch.cat([best, distances], dim=1)
        best, order = together.sort(dim=1, stable=True)
        best, order = best[:, :count], order[:, :count]
        names = [[*kept, *known.keys] for kept in keys]
        keys = [[row[i] for i in places] for row, places in zip(names, order.tolist(), strict=True)]
        pool = [torch.cat([kept, known.values]) for kept in values]
        values = torch.stack([row[places] for row, places in zip(pool, order, strict=True)])
    if not best.isfinite().all() or best.shape[1] < count:
        raise ValueError(
            f"count={count}: {model.folder}/latents has {int(best.isfinite().sum(1).min())} training signals besides "
            "the query's own; ask for so many or fewer"
        )
    return Retrieved(query, layer, keys, best, values)


@dataclass(frozen=True)
class Memorisation:
    """Distances to the nearest training picture: L2 over all pixels and colours in [0, 1], unsquared.

    Attributes:
        samples: of each sample. Their mean is the paper's figure; the lower, the likelier samples are copies.
        held_out: of held-out pictures: what new pictures of that kind have. None where nothing is held out.
        held_out_functions: of the same after the autoencoder, which smooths them as it does the samples.
        training_pictures: how many there are, without augmented copies, which are compared with too.
        resolution: pixels a side.
        shown: the first samples, and the nearest training picture of each.
    """

    samples: Float[Tensor, " samples"]
    held_out: Float[Tensor, " held_out"] | None
    held_out_functions: Float[Tensor, " held_out"] | None
    training_pictures: int
    resolution: int
    shown: list[tuple[Float[Tensor, "3 height width"], Float[Tensor, "3 height width"]]]


@torch.no_grad()
def memorisation(
    model: FieldModel, *, count: int = 1000, seed: int = 0, steps: int | None = None, allow_pipe: bool = False
) -> Memorisation:
    """How near samples lie to the training set, beside how near held-out pictures do (CHINR, section 4.1).

    Args:
        count: samples, and held-out pictures at most.
        steps: network evaluations a sample; None takes the run's own.
        allow_pipe: read pictures from `pipe:` addresses, which run a shell command.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    _check_comparable(model, allow_pipe=allow_pipe)
    samples = render(model, draw(model, seeds_for(seed, count), steps=steps))
    return _compare(model, samples, allow_pipe=allow_pipe)


def _check_comparable(model: FieldModel, *, allow_pipe: bool) -> None:
    check_pipe(model, allow_pipe=allow_pipe)
    if (reason := why_incomparable(model)) is not None:
        raise ValueError(reason)


def _compare(model: FieldModel, samples: Float[Tensor, "count 3 height width"], *, allow_pipe: bool) -> Memorisation:
    sets = [samples]
    if model.experiment.data.val is not None:
        pairs = [_held_out(model, signal) for signal in _held_out_batches(model, len(samples), allow_pipe=allow_pipe)]
        sets += [torch.cat(parts) for parts in zip(*pairs, strict=True)]
    nearest = _Nearest(torch.cat(sets))
    training = Split(model, model.experiment.data.train)
    for signal in training.batches(range(len(training.dataset))):
        nearest.compare([true_pictures(training.domain, copy) for copy in training.domain.copies(signal)])
    distances = nearest.distances.split([len(part) for part in sets])
    held_out, functions = distances[1:] if len(sets) > 1 else (None, None)
    shown = list(zip(samples[:SHOWN], nearest.pictures, strict=False))
    return Memorisation(distances[0], held_out, functions, nearest.count, model.domain.size, shown)


def _held_out_batches(model: FieldModel, count: int, *, allow_pipe: bool) -> Iterable[Signal]:
    held_out = held_out_split(model, allow_pipe=allow_pipe)
    return held_out.batches(held_out.spread(count))


def _held_out(model: FieldModel, signal: Signal) -> tuple[Tensor, Tensor]:
    """Held-out pictures, and the functions that the autoencoder makes of them."""
    found = model.domain.pictures(model.domain.reproduce(model.encode(signal), signal))
    return true_pictures(model.domain, signal).cpu(), found.cpu()


def true_pictures(domain: Domain, signal: Signal) -> Float[Tensor, "batch 3 height width"]:
    """What perfect fields would look like."""
    return domain.pictures(domain.truth(signal))


class _Nearest:
    """Distances of some pictures to the nearest of many, which are gone through once."""

    def __init__(self, pictures: Float[Tensor, "count 3 height width"]) -> None:
        self.queries, self.count = pictures.flatten(1), 0
        self.distances = torch.full((len(pictures),), torch.inf)
        self.pictures = torch.zeros_like(pictures[:SHOWN])

    def compare(self, copies: list[Float[Tensor, "batch 3 height width"]]) -> None:
        self.count += len(copies[0])
        for batch in copies:
            self.queries = self.queries.to(batch.device)
            known = batch.flatten(1)
            nearest = torch.cdist(self.queries, known).argmin(1)
            # Exactly, where the product that found it rounds: a copy lies at 0.
            distances = torch.cat(
                [
                    (rows - known[places]).norm(dim=1)
                    for rows, places in zip(self.queries.split(256), nearest.split(256), strict=True)
                ]
            ).cpu()
            nearer = distances < self.distances
            self.distances = torch.where(nearer, distances, self.distances)
            for row in nearer[:SHOWN].nonzero().flatten().tolist():
                self.pictures[row] = batch[nearest[row]].cpu()


@dataclass(frozen=True)
class Arm:
    """One of two priors.

    Attributes:
        name: of its run.
        condition_bits: C.
        pictures: its first samples, at most 32.
        kid, kid_error: kernel distance on EfficientNet-Lite0's features to the training pictures, and its standard
            error; comparable only with figures of the same network, sizes and sets.
    """

    name: str
    condition_bits: int
    pictures: Float[Tensor, "shown 3 height width"]
    kid: float
    kid_error: float
    memorisation: Memorisation


@dataclass(frozen=True)
class Ablation:
    """A prior with conditions, and one without.

    Attributes:
        held_out_kid, held_out_kid_error: of held-out pictures to the training pictures: about the best to be had.
        same_autoencoder: whether the two runs' autoencoders are equal: else their latents differ too.
    """

    conditional: Arm
    unconditional: Arm
    samples: int
    training_pictures: int
    held_out_kid: float | None
    held_out_kid_error: float | None
    same_autoencoder: bool


@torch.no_grad()
def ablation(
    model: FieldModel,
    other: FieldModel,
    *,
    count: int = 256,
    seed: int = 0,
    steps: int | None = None,
    allow_pipe: bool = False,
) -> Ablation:
    """A run with conditions against one without, on the same data and the same seeds (CHINR, section 4.4, figure 8).

    Args:
        model: a run with prior.condition_bits of 1 or more.
        other: a run with prior.condition_bits=0, whose layers are drawn independently.
        count: samples of each.
    """
    experiments = (model.experiment, other.experiment)
    bits = [hierarchical(run, "ablation").projection.shape[2] for run in (model, other)]
    if bits[0] == 0 or bits[1] > 0:
        raise ValueError(
            f"prior.condition_bits is {bits[0]} in {model.folder} and {bits[1]} in {other.folder}, and an ablation "
            "compares conditions with none; give a run with prior.condition_bits 1 or more, then one with 0"
        )
    if count < 4:
        raise ValueError(f"count={count} must be at least 4: the kernel distance is one between sets; try 256")
    changed = differences(*({"domain": to_dict(e.domain), "data.train": e.data.train} for e in experiments))
    if changed:
        shown = "; ".join(f"{path} is {here} in {model.folder} and {there}" for path, (here, there) in changed.items())
        raise ValueError(
            f"{shown} in {other.folder}: an ablation compares priors on the same pictures; train one again"
        )
    _check_comparable(model, allow_pipe=allow_pipe)
    network = metrics.EfficientNetLite0().to(model.device)
    training = Split(model, model.experiment.data.train)
    reference = _features(
        network, (true_pictures(model.domain, s) for s in training.batches(training.spread(2 * count)))
    )
    arms = []
    for run, condition_bits in zip((model, other), bits, strict=True):
        pictures = render(run, draw(run, seeds_for(seed, count), steps=steps))
        features = _features(network, pictures.to(model.device).split(run.experiment.evaluation.batch_size))
        value, error = metrics.kid(features, reference)
        copied = _compare(run, pictures, allow_pipe=allow_pipe)
        arms.append(Arm(run.experiment.name, condition_bits, pictures[: 4 * SHOWN], value, error, copied))
    held_out, held_out_error = None, None
    if model.experiment.data.val is not None:
        batches = _held_out_batches(model, count, allow_pipe=allow_pipe)
        held_out, held_out_error = metrics.kid(
            _features(network, (true_pictures(model.domain, s) for s in batches)), reference
        )
    weights = [run.autoencoder.state_dict() for run in (model, other)]
    same = weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    return Ablation(arms[0], arms[1], count, len(reference), held_out, held_out_error, same)


def _features(network: nn.Module, batches: Iterable[Tensor]) -> Float[Tensor, "count features"]:
    return torch.cat([network(pictures).cpu() for pictures in batches])
