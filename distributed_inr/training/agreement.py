"""What the ranks agree on between micro-batches: that each has data to go on with, to save or to stop, what is written.

A rank may wait for its data for long, while the others wait for it. So before each micro-batch all ranks say whether
they have theirs, again and again until all do or one of them is asked to stop: a stop is never out of step, and never
waits for data.
"""

import datetime
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait

import torch
import torch.distributed as dist

from distributed_inr.domains.domain import Signal
from distributed_inr.training.background import Background

_PATIENCE_SECONDS = 0.1
"""How long a rank waits for its data before it tells the others that it has none yet."""


class Agreement:
    """Goes through batches together with the other ranks.

    Attributes:
        stopping: whether any rank was asked to stop. All ranks learn it at the same micro-batch.
        saving: whether any rank was asked for a checkpoint; stays until it is set to False.
        written: whether every rank said, at the last micro-batch, that its part of a checkpoint is written.

    Args:
        stop: whether this rank is asked to stop.
        save: whether this rank is asked for a checkpoint, since it was last called.
        has_written: whether this rank has written its part.
        timeout_seconds: how long a rank may wait for the others, or for its data.
    """

    def __init__(
        self,
        *,
        stop: Callable[[], bool],
        save: Callable[[], bool],
        has_written: Callable[[], bool],
        timeout_seconds: int,
    ) -> None:
        self.stopping = self.saving = self.written = False
        self._questions, self._timeout_seconds = (stop, save, has_written), timeout_seconds
        self._world, self._group = 1, None
        if dist.is_initialized() and dist.get_world_size() > 1:
            # A group of its own, on the CPU: a GPU need not be waited for.
            self._world = dist.get_world_size()
            timeout = datetime.timedelta(seconds=timeout_seconds)
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def batches(self, batches: Iterator[Signal]) -> Iterator[Signal]:
        """The same batches, each as soon as every rank has its own; ends when `stopping`."""
        thread = Background("reader")
        try:
            while True:
                coming: Future[Signal | None] = thread.submit(lambda: next(batches, None))
                if not self._wait(coming) or (batch := coming.result()) is None:
                    return
                yield batch
        finally:
            thread.stop()

    def _wait(self, coming: "Future[Signal | None]") -> bool:
        """Wait until every rank has its batch; False when it is time to stop instead."""
        begin = time.monotonic()
        while True:
            wait([coming], _PATIENCE_SECONDS)
            here = coming.done()
            ready, stopping, saving, written = self._count(here, *(question() for question in self._questions))
            self.stopping, self.written = stopping > 0, written == self._world
            self.saving |= saving > 0
            if self.stopping or ready == self._world:
                return not self.stopping
            if not here and time.monotonic() - begin > self._timeout_seconds:
                raise TimeoutError(
                    f"no data for scale.timeout_seconds={self._timeout_seconds}; see whether the shards can be read"
                )

    def _count(self, *answers: bool) -> list[int]:
        """How many ranks say yes, to each of several questions."""
        if self._group is None:
            return [int(answer) for answer in answers]
        counts = torch.tensor(answers, dtype=torch.int32)
        dist.all_reduce(counts, group=self._group)
        return counts.tolist()
