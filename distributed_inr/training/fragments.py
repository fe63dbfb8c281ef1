"""Fragments: views of the weights and AdamW's state that a rank owns, for running averages and checkpoints."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Fragment:
    """The part of one flattened parameter that a rank owns; the ranks' fragments cover each parameter exactly once.

    Attributes:
        name: the parameter's name in the module.
        shape: of the whole parameter.
        offset: where the part starts in the flattened parameter.
        weight: the float32 weights of the part [length]; a view that stays valid while training. Perhaps empty.
        moments: AdamW's running means by name, each [length]; views too. Empty for frozen parameters.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    weight: Tensor
    moments: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def share(self, rank: int, world: int) -> "Fragment":
        """One of `world` nearly equal parts of this part."""
        length = self.weight.numel()
        start, stop = rank * length // world, (rank + 1) * length // world
        moments = {key: value[start:stop] for key, value in self.moments.items()}
        return dataclasses.replace(self, offset=self.offset + start, weight=self.weight[start:stop], moments=moments)


Read = Callable[[str, str, int, int], Tensor]
"""read(kind, name, start, stop): that part of a flattened tensor; kind is "weight" or the name of a moment."""


def view(
    name: str,
    shape: Sequence[int],
    held: Tensor,
    adamw: torch.optim.AdamW,
    *,
    length: int,
    offset: int = 0,
    address: int = 0,
) -> Fragment:
    """A parameter's `length` elements from `offset` on, which a tensor (one of AdamW's) holds from `address` on."""
    moments = {}
    if held.requires_grad:
        state = adamw.state[held]
        if not state:  # what AdamW itself makes at its first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=held.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(held.data), torch.zeros_like(held.data)
        moments = {key: state[key].view(-1)[address : address + length] for key in ("exp_avg", "exp_avg_sq")}
    return Fragment(name, tuple(shape), offset, held.data.view(-1)[address : address + length], moments)


def load_state(
    fragments: Iterable[Fragment], adamw: torch.optim.AdamW, module: nn.Module, read: Read, steps: int
) -> None:
    """Set AdamW's state and the module's buffers; the weights are the engine's to set."""
    for f in fragments:
        for key, moment in f.moments.items():
            moment.copy_(read(key, f.name, f.offset, f.offset + moment.numel()))
    for state in adamw.state.values():
        state["step"].fill_(steps)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, buffer in module.state_dict().items():
        if name not in parameters:
            buffer.copy_(read("weight", name, 0, buffer.numel()).view(buffer.shape))


def average(values: Sequence[Fragment], fragments: Sequence[Fragment], decay: float) -> None:
    """Move a running average of the weights one step, on this rank's fragments: v = decay v + (1 - decay) w."""
    pairs = [(v.weight, f.weight) for v, f in zip(values, fragments, strict=True) if f.weight.numel()]
    if pairs:
        torch._foreach_lerp_([v for v, _ in pairs], [w for _, w in pairs], 1 - decay)


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_objects(value: T) -> list[T]:
    """Every rank's value, by rank."""
    values = [value]
    if dist.is_initialized():
        values = [value] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def join_ranks(values: Tensor) -> Tensor:
    """Every rank's values, of the same shape on each, one after the other by rank."""
    if not dist.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def is_first() -> bool:
    """Whether this process writes the run's files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def sum_over_ranks(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
