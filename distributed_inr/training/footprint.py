"""What one rank holds and sends, without allocating it: the states of training by ZeRO stage, and activations.

States are what lies in memory from the end of a step's backward passes to its update. They are exact: counted as
DeepSpeed 0.19 and DDP lay them out (`Tensors.held`). Activations are measured on tensors without contents
(`activations`). What passes through buffers meanwhile is estimated from above (`Tensors.passing`).
"""

import dataclasses
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from distributed_inr.domains.domain import Signal
from distributed_inr.training.engine import BUCKET, Scale, recompute_blocks
from distributed_inr.training.gradients import total

STAGES = (0, 1, 2, 3)

_FLOAT32 = 4
_ALIGNMENT = 2  # elements: stages 1 and 2 pad the joined weights to a multiple of it times the ranks
_PERSISTENT = 100_000  # elements up to which stage 3 leaves a gathered parameter where it is
_REUSE = 500_000_000  # elements to the end of the network, within which it keeps one for the backward pass
_PREFETCH = 50_000_000  # elements that it gathers ahead
_ALL_REDUCE = 500_000_000  # elements that stage 0 copies together

_SMALL = 1 << 12  # elements of tensors whose values are computed
_ITEM, _NONZERO = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default


@dataclass(frozen=True)
class Held:
    """Bytes of a rank's states."""

    weights: int
    """Parameters, or the rank's parts of them, and the module's buffers."""
    gradients: int
    """After the backward pass. Stages 1 and 2 keep whole those that the rank owns a part of."""
    moments: int
    """AdamW's running means and step counts."""
    masters: int
    """DeepSpeed's own copy of the weights that the rank updates, from stage 1 on."""
    average: int
    """The running average of the weights that the rank owns, where there is one."""
    buffers: int
    """Stage 3's bucket for gradients, which stays."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Tensors:
    """Sizes of a module's tensors."""

    trainable: tuple[int, ...]
    """Elements of each parameter, in the module's order."""
    frozen: tuple[int, ...]
    """Elements of each parameter without gradient."""
    buffer_bytes: int

    @staticmethod
    def of(module: nn.Module) -> "Tensors":
        parameters = list(module.parameters())
        return Tensors(
            tuple(p.numel() for p in parameters if p.requires_grad),
            tuple(p.numel() for p in parameters if not p.requires_grad),
            sum(b.numel() * b.element_size() for b in module.buffers()),
        )

    @property
    def num_trainable(self) -> int:
        return sum(self.trainable)

    @property
    def num_parameters(self) -> int:
        return sum(self.trainable) + sum(self.frozen)

    @property
    def bucket(self) -> int:
        """Elements of one collective, as the engine sets it."""
        return min(BUCKET, 2 * self.num_parameters)

    def held(self, stage: int, *, world: int, rank: int, with_average: bool) -> Held:
        """The states of a rank. Accelerate's are those of stage 0: DDP's buckets are the gradients themselves."""
        count, joined = self.num_trainable, self._joined(world)
        own = joined // world  # of all trainable parameters, joined and padded
        if stage == 0:
            average = sum(_share(size, world, rank) for size in self.trainable + self.frozen)
            weights, gradients, masters, buffers = self.num_parameters, count, 0, 0
            moments = 2 * count + len(self.trainable)
        elif stage in (1, 2):
            average = _part(count, own, rank) + sum(_share(size, world, rank) for size in self.frozen)
            weights, masters, buffers = joined + sum(self.frozen), own, 0
            gradients = self._owned_gradients(own, rank)
            moments = 2 * own + 1
        else:
            parts = [-(-size // world) for size in self.trainable]
            frozen = [-(-size // world) for size in self.frozen]
            average = sum(_part(s, -(-s // world), rank) for s in self.trainable + self.frozen)
            # On a single rank, what is gathered is the part itself.
            persistent = [world * part for part in self._persistent(world)] if world > 1 else []
            weights, masters, gradients = sum(parts + frozen + persistent), sum(parts), sum(parts)
            moments, buffers = 2 * sum(parts) + 1, self.bucket
        sizes = (weights, gradients, moments, masters, average if with_average else 0, buffers)
        found = Held(*(_FLOAT32 * size for size in sizes))
        return dataclasses.replace(found, weights=found.weights + self.buffer_bytes)

    def passing(self, stage: int, *, world: int, rank: int, is_cuda: bool) -> tuple[int, int]:
        """At most as many bytes beyond the states: while activations are held, and after them.

        Stage 0 joins the gradients to reduce them. Stages 1 and 2 hold those of others until they are reduced, stage 1
        all, stage 2 a bucket; they join a bucket to reduce it, on a GPU in a place of its own, and the rank's part to
        update with it. Stage 3 keeps gathered weights of as many parameters, counted from the network's end, as its
        reuse distance and the prefetched ones allow, and copies a bucket of gradients to reduce it.
        """
        count, own, largest = self.num_trainable, self._joined(world) // world, max(self.trainable, default=0)
        bucket = min(self.bucket, count)
        if stage == 0:
            during, after = 0, min(count, _ALL_REDUCE + largest)
        elif stage in (1, 2):
            waiting = max(0, count - self._owned_gradients(own, rank))
            if stage == 1:
                during = waiting + (self.bucket if is_cuda else 0)
            elif is_cuda:
                during = waiting = self.bucket + largest
            else:
                waiting = min(waiting, bucket + largest)
                during = waiting + (bucket if bucket < count else 0)
            after = max(waiting + bucket, own)
        else:
            gathered = 0
            if world > 1:
                gathered = sum(size for size in self.trainable + self.frozen if size > _PERSISTENT)
                gathered = min(gathered, _REUSE + _PREFETCH + largest) + 2 * min(gathered, largest)
            during, after = gathered + bucket + largest, bucket
        return _FLOAT32 * during, _FLOAT32 * after

    def sent(self, stage: int, *, world: int, num_micro_batches: int) -> int:
        """Bytes that each rank sends in an optimizer step, by ring algorithms.

        Reducing or gathering n bytes takes (W - 1) / W n, and reducing for all ranks twice that (Thakur et al., 2005).
        With gradients of G bytes, weights of P, and m micro-batches, over (W - 1) / W:

            stage 0    2 G              one all-reduce; so is DDP's
            stage 1    2 G + P          DeepSpeed reduces for all ranks by default (its
                                        `use_multi_rank_bucket_allreduce`), not G as in ZeRO (Rajbhandari et al., 2020)
            stage 2    2 m G + P        at every micro-batch
            stage 3    m (P + Q + G) + R   gathers for the forward pass, of what was freed since (Q) for the backward
                                        pass, and once those kept on all ranks (R); reduces
        """
        count, ring = self.num_trainable, (world - 1) / world
        joined = self._joined(world)
        if stage == 0:
            elements = 2 * count
        elif stage in (1, 2):
            elements = 2 * count * (num_micro_batches if stage == 2 else 1) + joined
        else:
            padded = [world * -(-size // world) for size in self.trainable + self.frozen]
            kept = sum(world * part for part in self._persistent(world))
            gathered = sum(padded) - kept
            reduced = sum(world * -(-size // world) for size in self.trainable)
            elements = num_micro_batches * (gathered + max(0, gathered - _REUSE) + reduced) + kept
        return round(_FLOAT32 * ring * elements)

    def _joined(self, world: int) -> int:
        unit = _ALIGNMENT * world
        return -(-self.num_trainable // unit) * unit

    def _owned_gradients(self, own: int, rank: int) -> int:
        """Of the parameters that a rank owns a part of, and the padding after the last one's."""
        ends = list(itertools.accumulate(self.trainable))
        start, stop = rank * own, (rank + 1) * own
        whole = sum(size for size, end in zip(self.trainable, ends, strict=True) if end > start and end - size < stop)
        return whole + own - _part(self.num_trainable, own, rank)

    def _persistent(self, world: int) -> list[int]:
        return [-(-size // world) for size in self.trainable + self.frozen if size <= _PERSISTENT]


def _part(size: int, length: int, rank: int) -> int:
    """Elements of `size` that lie in a rank's part of `length`."""
    return max(0, min(length, size - rank * length))


def _share(size: int, world: int, rank: int) -> int:
    """Elements of a rank's part where parts are nearly equal, as `Fragment.share` cuts them."""
    return (rank + 1) * size // world - rank * size // world


def activations(
    build: Callable[[], nn.Module], make_batch: Callable[[], Signal], *, scale: Scale, is_cuda: bool
) -> int:
    """Bytes that the passes of one micro-batch hold at their fullest, beyond weights and their gradients.

    The module's forward and backward pass are run on tensors without contents. What only a compiled program saves is
    not taken off; what is recomputed is counted at its fullest; workspaces of the device's kernels are not seen.

    Args:
        build: makes the module.
        make_batch: the micro-batch, which counts too.
        is_cuda: follow the precision and the casts that a GPU has.
    """
    half = scale.precision == "bfloat16" or (scale.precision == "auto" and is_cuda)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        module = build()
    if is_cuda and half:
        for part in module.modules():
            for block in part if isinstance(part, nn.ModuleList) else ():  # also when they are recomputed
                block.forward = _CudaCasts.around(block.forward)
        module.forward = _CudaCasts.around(module.forward)
    if scale.activation_checkpointing:
        recompute_blocks(module)
    live = _Live(module)
    with fake, live:
        batch = make_batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = module(batch)
        total(losses).backward()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, but those of a module's tensors and their gradients.

    The values of small tensors are computed as well: the shapes of others may depend on them.

    Attributes:
        peak: the most bytes at once.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._storages: dict[int, tuple[int, weakref.ref]] = {}  # by identity: bytes, and what tells of their end
        self._values = WeakTensorKeyDictionary()
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            self._leave_out(tensor)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self._leave_out(p.grad))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = all(self._value(tensor) is not None for tensor in inputs)
        if func is _ITEM:  # where it is not known, a value that means nothing special
            return self._compute(func, args, kwargs) if known else args[0].dtype is torch.bool or 1
        if func is _NONZERO:
            count = len(self._compute(func, args, kwargs)) if known else args[0].numel()
            found = args[0].new_empty(count, args[0].dim(), dtype=torch.int64)
        else:
            found = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        known = known and all(tensor.numel() <= _SMALL for tensor in outputs)
        values = tree_leaves(self._compute(func, args, kwargs)) if known and outputs else []
        for tensor, value in itertools.zip_longest(outputs, values):
            self._count(tensor)
            self._values[tensor] = value
        return found

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        with unset_fake_temporarily():
            args, kwargs = tree_map_only(Tensor, self._value, (args, kwargs))
            return func(*args, **kwargs)

    def _value(self, tensor: Tensor) -> Tensor | None:
        return self._values.get(tensor) if isinstance(tensor, FakeTensor) else tensor

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._forget(key))
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)

    def _leave_out(self, tensor: Tensor | None) -> None:
        assert tensor is not None
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._now -= self._storages.get(key, (0, None))[0]
        self._storages[key] = 0, weakref.ref(storage, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        self._now -= self._storages.pop(key)[0]


class _CudaCasts(TorchFunctionMode):
    """Autocast's rules of a GPU where the CPU's differ: norms and resizing in float32, reading planes at points not."""

    FLOAT32 = {F.group_norm, torch.group_norm, F.layer_norm, torch.layer_norm, F.interpolate}

    @staticmethod
    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with _CudaCasts():
                return forward(*args, **kwargs)

        return wrapped

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))
        elif func not in (F.grid_sample, torch.grid_sampler):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)
