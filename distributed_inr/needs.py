"""What a run needs, in numbers and as a table to read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from distributed_inr.training.footprint import STAGES, Held

Device = Literal["cuda", "cpu"]

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on the worker that holds the most."""

    held: Held
    """From the backward passes to the update; exact."""
    activations: int
    """What the passes of a micro-batch hold at their fullest, its signals included."""
    passing: int
    """At most as many in collectives, beyond what the activations have left free."""

    @property
    def total(self) -> int:
        return self.held.total + self.activations + self.passing


@dataclass(frozen=True)
class TrainingPlan:
    """One of the two trainings of a run."""

    name: Literal["autoencoder", "prior"]
    model: str
    """Class of the trained module."""
    num_parameters: int
    num_trainable: int
    num_workers: int
    num_micro_batches: int
    micro_batch_size: int
    num_steps: int
    passes: float | None
    """Over the data; None where their size is not known."""
    zero_stage: int
    """The one in use; 0 for Accelerate, which holds and sends the same."""
    memory: tuple[Memory | None, ...]
    """By ZeRO stage; None where the experiment cannot have it."""
    sent: tuple[int, ...]
    """Bytes that each worker sends for an optimizer step, by ZeRO stage."""
    checkpoint_bytes: int
    num_checkpoints: int
    """How many lie on the disk at most: the newest ones, the best, and the one being written."""
    disk_bytes: int
    """Of the final model and, unless they lie elsewhere, the checkpoints."""

    @property
    def needed(self) -> int:
        """Bytes on a worker, at the stage in use."""
        found = self.memory[self.zero_stage]
        assert found is not None
        return found.total

    def __str__(self) -> str:
        unit, size = ("GiB", GIB) if self.needed >= GIB else ("MiB", 2**20)

        def row(title: str, of: Callable[[Memory], int]) -> str:
            cells = ("-" if m is None else f"{of(m) / size:,.3f}" for m in self.memory)
            return f"    {title:24}" + "".join(f"{cell:>13}" for cell in cells)

        batch = self.num_workers * self.num_micro_batches * self.micro_batch_size
        stages = (f"ZeRO {stage}{' *' if stage == self.zero_stage else ''}" for stage in STAGES)
        sent = (f"{value / size:,.3f}" if m else "-" for value, m in zip(self.sent, self.memory, strict=True))
        return "\n".join(
            [
                f"{self.name}: {self.model}, {self.num_parameters / 1e6:,.3f} M parameters, "
                f"{self.num_trainable / 1e6:,.3f} M of them trained",
                f"    {batch:,} samples a step = {self.num_workers} workers x {self.num_micro_batches} micro-batches x "
                f"{self.micro_batch_size}; {self.num_steps:,} steps"
                + ("" if self.passes is None else f", {self.passes:,.1f} passes over the data"),
                f"    {f'{unit} on a worker':24}" + "".join(f"{title:>13}" for title in stages),
                row("  weights", lambda m: m.held.weights),
                row("  gradients", lambda m: m.held.gradients),
                row("  moments", lambda m: m.held.moments),
                row("  masters", lambda m: m.held.masters),
                row("  average", lambda m: m.held.average),
                row("  buffers", lambda m: m.held.buffers),
                row("  activations", lambda m: m.activations),
                row("  passing, at most", lambda m: m.passing),
                row("  together", lambda m: m.total),
                f"    {f'{unit} sent a step':24}" + "".join(f"{cell:>13}" for cell in sent),
                f"    disk: {self.disk_bytes / GIB:,.3f} GiB: the model, and {self.num_checkpoints} checkpoints of "
                f"{self.checkpoint_bytes / GIB:,.3f} GiB at most",
            ]
        )


@dataclass(frozen=True)
class Reading:
    """How many shards of a set are read in an epoch."""

    num_samples: int
    num_shards: int
    on_worker: int
    on_node: int

    def __str__(self) -> str:
        return (
            f"{self.num_samples:,} samples in {self.num_shards:,} shards; an epoch takes {self.on_worker:,} of them to "
            f"a worker, {self.on_node:,} to a node"
        )


@dataclass(frozen=True)
class Plan:
    """What a run needs."""

    name: str
    """<family>/<name> of the experiment."""
    num_workers: int
    workers_per_node: int
    device: Device
    precision: str
    trainings: tuple[TrainingPlan, ...]
    """The autoencoder's, unless it is another run's, and the prior's."""
    data: Reading | None
    """None where the data's shards are not known."""
    latents: Reading | None
    latents_bytes: int | None
    """On the disk; None where the number of samples is not known."""
    bank_bytes: int
    """Of a bank of latents, in each worker's own memory, not the GPU's; 0 without one."""
    notes: tuple[str, ...]
    """What is assumed, and what to look at."""

    def __str__(self) -> str:
        return "\n\n".join(
            [
                f"{self.name} on {self.num_workers} workers, {self.workers_per_node} a node; {self.device}, "
                f"{self.precision}",
                *map(str, self.trainings),
                "\n".join(self._data_lines()),
            ]
        )

    def _data_lines(self) -> Iterator[str]:
        if self.data is not None:
            yield f"data: {self.data}"
        if self.latents is not None and self.latents_bytes is not None:
            yield f"latents: {self.latents_bytes / GIB:,.3f} GiB on the disk; {self.latents}"
        if self.bank_bytes:
            yield f"bank of latents: {self.bank_bytes / GIB:,.3f} GiB of each worker's memory, not the GPU's"
        yield from (f"note: {note}" for note in self.notes)
