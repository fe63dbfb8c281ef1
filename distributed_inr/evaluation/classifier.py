"""A small classifier of a domain's renderings, trained on real training signals that have a class.

Logistic regression on EfficientNet-Lite0's features of their pictures and on their thumbnails: both together tell more
than either, and as much as a network on the cells themselves. It serves every domain, draws nothing and takes seconds.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from distributed_inr.data.shards import records
from distributed_inr.domains.domain import Record, caption, captions
from distributed_inr.evaluation.distances import Observer, Traits
from distributed_inr.evaluation.splits import Advance, Split, spread
from distributed_inr.generation import FieldModel

MIN_SIGNALS = 4
"""Training signals that a class needs to be told."""
MAX_SIGNALS = 1024
"""Labelled training signals that a classifier is trained on, as its time grows as their cube: of more, as many of each
class, evenly spaced."""
MAX_CLASSES = 32
"""Classes that are told, those of the most training signals first."""
NAME = "logistic regression on EfficientNet-Lite0's features of pictures and on thumbnails"

_PENALTY = 1e-3
_FOLDS = 5
_ITERATIONS = 200


@dataclass(frozen=True)
class Labelled:
    """What a sample's record tells of it beside the signal.

    Attributes:
        number: in its set's own order.
        name: of its class; empty where it has none.
        text: as `Signal.text`.
    """

    number: int
    name: str
    text: str


def labelled(model: FieldModel, split: Split) -> list[Labelled]:
    """Class and text of every sample of a set, without decoding them; those of unreadable text are left out."""
    cache, found = model.experiment.data.cache(), []
    for number, record in records(split.dataset.index, cache, only=("json", "txt")):
        with contextlib.suppress(ValueError):
            found.append(Labelled(number, _class_of(record), caption(record)))
    return found


def _class_of(record: Record) -> str:
    """Empty where the record says none."""
    try:
        tree = json.loads(record.get("json", b"{}"))
    except (ValueError, RecursionError):
        return ""
    name = tree.get("class") if isinstance(tree, dict) else None
    return " ".join(name.split()) if isinstance(name, str) else ""


def unseen_captions(
    known: Sequence[Labelled], others: Sequence[Labelled], names: Sequence[str]
) -> list[tuple[str, str]]:
    """Captions, each once, that only held-out signals have, with their class; of those classes, where any are given."""
    seen = {line.strip().lower() for one in known for line in captions(one.text)}
    found = {}
    for one in others:
        for line in captions(one.text):
            if line.strip().lower() not in seen and (not names or one.name in names):
                found.setdefault(line.strip().lower(), (line.strip(), one.name))
    return list(found.values())


@dataclass(frozen=True)
class Classifier:
    """A linear map of standardised features and thumbnails to the log odds of classes.

    Attributes:
        centres, scales: of each of the two.
    """

    classes: tuple[str, ...]
    centres: list[Float[Tensor, " _"]]
    scales: list[Float[Tensor, " _"]]
    weights: Float[Tensor, "numbers classes"]
    offsets: Float[Tensor, " classes"]

    def predict(self, traits: Traits) -> Int64[Tensor, " count"]:
        """The class of each rendering, as an index into `classes`."""
        rows = _standardised(_numbers(traits), self.centres, self.scales)
        return (rows @ self.weights + self.offsets).argmax(1)


def train_classifier(traits: Traits, labels: Int64[Tensor, " count"], classes: Sequence[str]) -> Classifier:
    """Minimise the cross-entropy, in which all classes weigh the same, plus the squared weights times 1e-3.

    The weights are a combination of the signals' rows, so they are sought in that space: its dimensions are at most the
    signals'. The problem is convex, so there is nothing to draw.

    Args:
        traits: of training signals, with EfficientNet-Lite0's features first.
        labels: indices into `classes`.
    """
    numbers = _numbers(traits)
    centres = [part.mean(0) for part in numbers]
    scales = [(part.std(0) + 0.05 * part.std()).clamp(min=1e-6) * part.shape[1] ** 0.5 for part in numbers]
    rows = _standardised(numbers, centres, scales)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > 1e-6 * values[-1].clamp(min=1e-6)
    lengths, vectors = values[kept].sqrt(), vectors[:, kept]
    inputs = vectors * lengths
    count = torch.bincount(labels, minlength=len(classes)).clamp(min=1)
    weight = len(labels) / len(classes) / count.double()
    with torch.enable_grad():
        weights = torch.zeros(inputs.shape[1], len(classes), dtype=torch.float64, requires_grad=True)
        offsets = torch.zeros(len(classes), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights, offsets], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> float:
            optimizer.zero_grad()
            found = F.cross_entropy(inputs @ weights + offsets, labels, weight=weight)
            (found + _PENALTY * weights.square().sum()).backward()
            return (found + _PENALTY * weights.square().sum()).item()

        optimizer.step(loss)
    own = rows.T @ (vectors / lengths) @ weights.detach()
    return Classifier(tuple(classes), centres, scales, own, offsets.detach())


def cross_validated(
    traits: Traits, labels: Int64[Tensor, " count"], classes: Sequence[str], groups: Sequence[str]
) -> Int64[Tensor, " count"]:
    """What classifiers trained on the other four fifths say of each fifth of the signals.

    Args:
        groups: signals of one group are in the same fifth.
    """
    sizes, fold_of, places = [[0] * _FOLDS for _ in classes], {}, {}
    for row, group in enumerate(groups):
        places.setdefault(group, []).append(row)
    for group in sorted(places, key=lambda group: (-len(places[group]), group)):
        own = sizes[int(labels[places[group][0]])]
        total = [sum(column) for column in zip(*sizes, strict=True)]
        fold_of[group] = min(range(_FOLDS), key=lambda fold: (own[fold], total[fold]))
        own[fold_of[group]] += len(places[group])
    folds = torch.tensor([fold_of[group] for group in groups])
    found = torch.zeros_like(labels)
    for fold in folds.unique().tolist():
        inside = folds == fold
        classifier = train_classifier(rows_of(traits, ~inside), labels[~inside], classes)
        found[inside] = classifier.predict(rows_of(traits, inside))
    return found


def classify(
    observer: Observer,
    training: Split,
    known: Sequence[Labelled],
    held_out: Split | None,
    others: Sequence[Labelled],
    classes: Sequence[str],
    advance: Advance,
) -> tuple[Classifier, dict[str, Any]]:
    """A classifier of these classes, and how good it is on signals that it was not trained on.

    Args:
        observer: with EfficientNet-Lite0 alone.
        known: what the records of the training set tell; `others`: of the held-out set.
    """
    signals = [one for one in known if one.name in classes]
    if len(signals) > MAX_SIGNALS:
        signals = [one for name in classes for one in _thinned(signals, name, MAX_SIGNALS // len(classes))]
    traits, rows = _observe(observer, training, signals, advance, copies=True)
    labels = torch.tensor([classes.index(one.name) for one in rows])
    told, found = train_classifier(traits, labels, classes), {"network": NAME, "classes": list(classes)}
    own = [one for one in others if one.name in classes]
    if held_out is not None and own:
        seen, rows_seen = _observe(observer, held_out, own, advance, copies=False)
        right = told.predict(seen) == torch.tensor([classes.index(one.name) for one in rows_seen])
        found |= {"held_out_accuracy": right.double().mean().item(), "held_out_signals": len(right)}
    names = [next(iter(captions(one.text.lower())), "") for one in rows]
    by_text = all(len({n for n, one in zip(names, rows, strict=True) if one.name == own}) > 1 for own in classes)
    groups = [n if by_text and n else f"number {one.number}" for n, one in zip(names, rows, strict=True)]
    again = cross_validated(traits, labels, classes, groups) == labels
    return told, found | {
        "cross_validated_accuracy": again.double().mean().item(),
        "cross_validated_by_class": {n: again[labels == i].double().mean().item() for i, n in enumerate(classes)},
        "training_accuracy": (told.predict(traits) == labels).double().mean().item(),
        "folds": f"{_FOLDS}, each first caption in one" if by_text else f"{_FOLDS}",
        "training_signals": {name: sum(one.name == name for one in signals) for name in classes},
    }


def _thinned(signals: Sequence[Labelled], name: str, most: int) -> list[Labelled]:
    """At most so many signals of a class, evenly spaced."""
    own = [one for one in signals if one.name == name]
    return [own[i] for i in spread(len(own), most)]


def _observe(
    observer: Observer, split: Split, signals: Sequence[Labelled], advance: Advance, *, copies: bool
) -> tuple[Traits, list[Labelled]]:
    """The traits of signals, and perhaps of their augmented copies, and whose they are; without the bad ones."""
    domain, of_number, rows = observer.domain, {one.number: one for one in signals}, []

    def renderings() -> Iterator[Tensor]:
        for numbers, signal in split.numbered_batches(list(of_number)):
            for copy in domain.copies(signal) if copies else (signal,):
                rows.extend(of_number[number] for number in numbers)
                yield domain.truth(copy)

    return observer.traits(renderings(), advance), rows


def rows_of(traits: Traits, rows: Tensor) -> Traits:
    """The traits of some of the renderings."""
    surfaces = None if traits.surfaces is None else traits.surfaces[rows]
    return Traits(traits.thumbnails[rows], [part[rows] for part in traits.features], surfaces)


def _numbers(traits: Traits) -> list[Tensor]:
    return [traits.features[0].double(), traits.thumbnails.double()]


def _standardised(numbers: list[Tensor], centres: list[Tensor], scales: list[Tensor]) -> Tensor:
    """Side by side, each of about unit length in all."""
    return torch.cat([(n - c) / s for n, c, s in zip(numbers, centres, scales, strict=True)], dim=1)
