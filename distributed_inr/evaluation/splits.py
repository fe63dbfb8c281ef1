"""The sets that an evaluation measures, and what it keeps of the training signals."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from distributed_inr.domains.domain import Signal, collate
from distributed_inr.evaluation import metrics
from distributed_inr.generation import FieldModel

Advance = Callable[[int], None]
"""Told how many more signals are done."""

MAX_TRAINING_SIGNALS = 2048
"""Training signals, evenly spaced, that the mean and the nearest neighbours are taken from."""
SHOWN = 8
"""Signals across `reconstructions.png` and `neighbours.png`."""


class Split:
    """The training or the held-out set of a run, in batches on the model's device."""

    def __init__(self, model: FieldModel, url: str) -> None:
        experiment = model.experiment
        self.dataset = experiment.dataset(experiment.data.index(url))
        self.domain, self.device = experiment.domain, model.device
        self.batch_size = experiment.evaluation.batch_size

    def spread(self, most: int) -> list[int]:
        """Numbers of at most `most` samples, evenly spaced over the set's own order."""
        return spread(len(self.dataset), most)

    def batches(self, numbers: Sequence[int]) -> Iterator[Signal]:
        """The samples of those numbers, without the bad ones."""
        return (signal for _, signal in self.numbered_batches(numbers))

    def numbered_batches(self, numbers: Sequence[int]) -> Iterator[tuple[list[int], Signal]]:
        for first in range(0, len(numbers), self.batch_size):
            part = [(number, *self.dataset.signal(number)) for number in numbers[first : first + self.batch_size]]
            good = {number: signal for number, signal, is_good in part if is_good}
            if good:
                yield list(good), collate(list(good.values())).to(self.device)

    def one(self, number: int) -> Signal:
        return collate([self.dataset.signal(number)[0]]).to(self.device)


class Known:
    """What is kept of the training signals: their mean, and thumbnails of them and of their augmented copies."""

    def __init__(self, numbers: list[int], mean: Tensor, copies: list[Tensor]) -> None:
        self.numbers, self.mean, self.copies = numbers, mean, copies

    def nearest(self, thumbnails: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        """Distance of each thumbnail to its nearest training signal, and that one's (number, copy)."""
        distances, indices = metrics.nearest(thumbnails, torch.cat(self.copies))
        places = [(self.numbers[i % len(self.numbers)], i // len(self.numbers)) for i in indices.tolist()]
        return distances, places


def survey(training: Split, advance: Advance) -> Known:
    """Go through the training signals once. `advance` is told how many are done."""
    domain, numbers = training.domain, training.spread(MAX_TRAINING_SIGNALS)
    total: Tensor | float = 0.0
    kept, copies = [], []
    for part, signal in training.numbered_batches(numbers):
        kept += part
        total = total + domain.truth(signal).double().sum(0)
        copies.append([domain.thumbnails(domain.truth(copy)) for copy in domain.copies(signal)])
        advance(len(part))
    together = [torch.cat(parts) for parts in zip(*copies, strict=True)]
    return Known(kept, torch.as_tensor(total).float() / len(kept), together)


def spread(length: int, most: int) -> list[int]:
    """At most `most` of `length` numbers, evenly spaced."""
    count = min(length, most)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]
