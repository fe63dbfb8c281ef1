"""A step's losses and gradients over all ranks: means, norm, clipping, and the refusal of what is not finite."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_inr.training.fragments import gather_objects, sum_over_ranks

Metrics = dict[str, float]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def squared_norm(gradients: list[Tensor], *, shared: bool) -> Tensor:
    """This rank's part of the squared global norm; shared: every rank has the whole gradient."""
    squared = nn.utils.get_total_norm(gradients).double().square()
    return squared / dist.get_world_size() if shared and dist.is_initialized() else squared


def clip(gradients: list[Tensor], norm: float, max_norm: float | None) -> None:
    if max_norm is not None and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_


def agree(pending: Sequence[tuple[dict[str, Tensor], Sequence[str]]], squared_norm: Tensor, steps: int) -> Metrics:
    """Means of a step's losses over all ranks, and the gradient's norm; all ranks get the same."""
    names, world = list(pending[0][0]), dist.get_world_size() if dist.is_initialized() else 1
    means = [torch.stack([losses[name] for losses, _ in pending]).double().mean() for name in names]
    *values, squared = sum_over_ranks(torch.stack([*means, squared_norm])).tolist()
    metrics = {f"train/{name}": value / world for name, value in zip(names, values, strict=True)}
    metrics["train/total"] = sum(metrics.values())
    metrics["grad_norm"] = math.sqrt(squared) if squared >= 0 else squared
    if all(math.isfinite(value) for value in metrics.values()):
        return metrics

    suspects = [k for losses, keys in pending for k in keys if not torch.stack(list(losses.values())).isfinite().all()]
    keys = [key for part in gather_objects(suspects) for key in part]
    what = "samples" if keys else "only the gradient is not, of samples"
    keys = keys or [key for part in gather_objects([k for _, ks in pending for k in ks]) for key in part]
    shown = ", ".join(f"{name}={value:.4g}" for name, value in metrics.items())
    whose = f"{what} {', '.join(keys[:16])}{' ...' if len(keys) > 16 else ''}"
    raise FloatingPointError(f"step {steps + 1} is not finite and was not applied: {shown}; {whose}")
