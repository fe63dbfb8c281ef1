"""The latent bank of auto-decoding: a row for each training signal, trained with the network (CHINR, section 3.2).

A batch's rows enter the module as a leaf tensor. The gradients that a step leaves there are gathered from all ranks and
summed for each row, and every rank applies the same row-sparse Adam to a copy of its own.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distributed_inr import randomness
from distributed_inr.data import storage
from distributed_inr.domains.domain import Signal, seeds_for
from distributed_inr.models.latent_fitting import AutoDecoding
from distributed_inr.training.checkpoint_reader import Reader
from distributed_inr.training.fragments import gather_objects, is_first, join_ranks, rank_and_world

MAPPED_ABOVE = 2**30
"""Bytes of rows and running means above which they lie in files that are mapped into memory."""

_ROWS_AT_ONCE = 4096

_EPSILON = 1e-8
"""Adam's, added to the root of the mean square."""


class Bank:
    """Latents by their signals' numbers in the set's own order. They start as normal numbers that belong to the rows.

    Attributes:
        rows: float32 [num_signals, *latent_shape].
        exp_avg, exp_avg_sq: Adam's running means of the gradient and of its square, of the same shape.
        steps: int64 [num_signals]; how many steps have touched each row.
        copies: where the first rank is to copy the tensors of a mapped bank, by name; empty otherwise.

    Args:
        seed: of the run.
        folder: for the files of a mapped bank, which are gone when the process ends.
        mapped_above: bytes of rows and running means above which they are mapped.
    """

    def __init__(
        self,
        num_signals: int,
        latent_shape: tuple[int, ...],
        *,
        fitting: AutoDecoding,
        seed: int,
        folder: Path,
        mapped_above: int = MAPPED_ABOVE,
    ) -> None:
        self.fitting, shape = fitting, (num_signals, *latent_shape)
        is_mapped = num_bytes(num_signals, latent_shape) > mapped_above
        self.rows, self.exp_avg, self.exp_avg_sq = (
            _map_zeros(folder, shape) if is_mapped else torch.zeros(shape) for _ in range(3)
        )
        self.steps = torch.zeros(num_signals, dtype=torch.int64)
        self.copies: dict[str, Tensor] = {}
        if is_mapped and is_first():
            self.copies = {name: _map_zeros(folder, shape) for name in self.tensors if name != "steps"}
        for start in range(0, num_signals, _ROWS_AT_ONCE):
            seeds = seeds_for(seed, min(_ROWS_AT_ONCE, num_signals - start), start)
            noise = randomness.normal(seeds, "bank", latent_shape)
            self.rows[start : start + len(seeds)] = fitting.deviation * noise

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training, by the names of a checkpoint."""
        return {name: getattr(self, name) for name in ("rows", "exp_avg", "exp_avg_sq", "steps")}

    def attach(self, batch: Signal, device: torch.device) -> Signal:
        """The batch with its rows as `latent`, a leaf on `device` that gradients are asked for."""
        assert batch.number is not None
        return dataclasses.replace(batch, latent=self.rows[batch.number].to(device).requires_grad_())

    @torch.no_grad()
    def update(self, batches: Sequence[Signal], *, factor: float) -> None:
        """Adam on the rows that a step's micro-batches were attached to; every rank calls it with its own.

        The gradient is that of the mean over all ranks' samples. The terms of a row are added in the order of the run,
        whichever ranks they come from. Raises FloatingPointError, on every rank and instead, if it is not finite.

        Args:
            factor: of the schedule, times the learning rate of `fitting`.
        """
        own = torch.cat([_gradient(batch) for batch in batches])
        places = torch.cat([_places(batch) for batch in batches]).to(own.device)
        places, gradients = join_ranks(places).cpu(), join_ranks(own).cpu()
        if not gradients.isfinite().all():
            bad = (~own.flatten(1).isfinite().all(dim=1)).tolist()
            suspects = [key for key, is_bad in zip((k for b in batches for k in b.key), bad, strict=True) if is_bad]
            keys = [key for part in gather_objects(suspects) for key in part]
            shown = f"{', '.join(keys[:16])}{' ...' if len(keys) > 16 else ''}"
            raise FloatingPointError(f"a step was not applied: the gradient of latents is not finite, of {shown}")
        order = places[:, 0].argsort()
        numbers, index = places[order, 1].unique(return_inverse=True)
        summed = torch.zeros(len(numbers), *self.rows.shape[1:]).index_add_(0, index, gradients[order])
        self._adam(numbers, summed / rank_and_world()[1], lr=self.fitting.lr * factor)

    def load(self, reader: Reader) -> None:
        """Set everything from a checkpoint. Raises ValueError if it has no bank, or one of another shape."""
        if reader.bank is None:
            raise ValueError(f"{reader.path} holds no bank of latents; choose another --name or --output")
        there, here = reader.bank.get_slice("rows").get_shape(), list(self.rows.shape)
        if there != here:
            raise ValueError(f"{reader.path} holds a bank {there}, this run needs {here}; choose another --name")
        for name, tensor in self.tensors.items():
            tensor.copy_(reader.bank.get_tensor(name))

    def _adam(self, numbers: Int64[Tensor, " rows"], gradient: Float[Tensor, "rows *latent_shape"], lr: float) -> None:
        """One step on some rows, as if each had an optimizer of its own."""
        self.steps[numbers] += 1
        taken = self.steps[numbers].double().view(-1, *[1] * (gradient.dim() - 1))
        beta, beta_sq = self.fitting.betas
        mean = self.exp_avg[numbers].lerp_(gradient, 1 - beta)
        square = self.exp_avg_sq[numbers].mul_(beta_sq).addcmul_(gradient, gradient, value=1 - beta_sq)
        self.exp_avg[numbers], self.exp_avg_sq[numbers] = mean, square
        scale = (square / (1 - beta_sq**taken).float()).sqrt_().add_(_EPSILON)
        self.rows[numbers] -= lr * (mean / (1 - beta**taken).float()) / scale


def num_bytes(num_signals: int, latent_shape: tuple[int, ...]) -> int:
    """Of a bank's rows and running means."""
    return 3 * 4 * num_signals * math.prod(latent_shape)


def read_rows(path: Path) -> Float[Tensor, "num_signals *latent_shape"]:
    """The rows that a training ended with, mapped into memory."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("rows")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}; delete {path.parent} to train again") from None


def _gradient(batch: Signal) -> Float[Tensor, "batch *latent_shape"]:
    assert batch.latent is not None and batch.latent.grad is not None, "the module has to use Signal.latent"
    return batch.latent.grad


def _places(batch: Signal) -> Int64[Tensor, "batch position_and_number"]:
    assert batch.number is not None
    return torch.stack([batch.position, batch.number], dim=1)


def _map_zeros(folder: Path, shape: tuple[int, ...]) -> Tensor:
    """Zeros in a file without a name, which a kill leaves nothing of; its space is taken at once."""
    path, size = folder / f"bank-{rank_and_world()[0]:05d}.mapped", math.prod(shape)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * size)
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)
    except OSError as error:
        raise storage.explain(error, str(folder)) from None
    finally:
        path.unlink(missing_ok=True)
