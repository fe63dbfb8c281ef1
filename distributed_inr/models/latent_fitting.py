"""How latents are found that have no encoder: by gradient steps on the signal's own error (CHINR, section 3.2)."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import pydantic
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from distributed_inr.config import config

RATE_RANGE = (0.005, 0.1)
"""Learned inner rates start uniformly in it, and are held in [0, 1] (Meta-SGD, as in mNIF)."""

Error = Callable[[Tensor], Tensor]
"""From the latents of a batch to the error of each signal, [batch]; a signal's depends on its own latent alone."""


@config
class MetaLearning:
    """A few gradient steps from zero, through which the network is trained (CAVIA; CHINR, section 3.2)."""

    kind: Literal["meta-learning"] = "meta-learning"
    steps: Annotated[int, pydantic.Field(gt=0)] = 3
    """Gradient steps on the latent."""
    rates: Literal["fixed", "learned"] = "fixed"
    """learned: one rate for each number of the latent, trained with the network (Meta-SGD)."""
    rate: Annotated[float, pydantic.Field(gt=0)] = 1 / 16
    """The fixed rate, on the mean negative log-likelihood of one signal's measurements. The paper's 1 is on the mean
    squared error over a batch of 32 signals: 1/32 for each signal, and 1/16 of half its squared error, which is its
    negative log-likelihood."""
    order: Literal["second", "first"] = "second"
    """second: differentiate through the steps. first: take them for constants; half the work, and not the gradient."""
    num_points: Annotated[int, pydantic.Field(gt=0)] | None = None
    """Measurements drawn for the steps in training. none: all that an encoder would see."""
    chunk: Annotated[int, pydantic.Field(gt=0)] | None = None
    """Signals whose graph is held at once; bounds the memory. none: those of a whole micro-batch."""
    deviation: Annotated[float, pydantic.Field(ge=0)] = 1e-4
    """Of the latents that training starts from; encoding starts from zero."""


@config
class AutoDecoding:
    """One latent for each training signal, trained with the network; new signals are fitted by an optimisation."""

    kind: Literal["auto-decoding"] = "auto-decoding"
    lr: Annotated[float, pydantic.Field(gt=0)] = 1e-4
    """Adam's learning rate for the latents of a batch's signals; it follows the schedule of the network's."""
    betas: tuple[Annotated[float, pydantic.Field(ge=0, lt=1)], Annotated[float, pydantic.Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay of Adam's running means, counted for each latent in the steps that touch it."""
    deviation: Annotated[float, pydantic.Field(ge=0)] = 1e-2
    """Of the latents that training starts from."""
    penalty: Annotated[float, pydantic.Field(ge=0)] = 0.0
    """Weight of the squared length of a latent in the loss."""
    encode_steps: Annotated[int, pydantic.Field(gt=0)] = 300
    """Adam steps from zero that find a new signal's latent, with the network fixed."""
    encode_lr: Annotated[float, pydantic.Field(gt=0)] = 1e-2
    """Their learning rate; it falls to zero along a cosine."""
    chunk: Annotated[int, pydantic.Field(gt=0)] | None = None
    """Signals whose graph is held at once; bounds the memory. none: those of a whole micro-batch."""


AnyFitting = Annotated[MetaLearning | AutoDecoding, pydantic.Field(discriminator="kind")]


def descend(
    error: Error,
    latent: Float[Tensor, "batch layers latent_dim"],
    *,
    rates: Tensor | float,
    steps: int,
    order: Literal["first", "second"] = "second",
) -> Float[Tensor, "batch layers latent_dim"]:
    """Gradient steps on latents; the result can be differentiated again, by whatever `error` depends on.

    Written with `torch.func.grad`: a compiled error under `torch.autograd.grad(create_graph=True)` silently gives
    first-order gradients. Compile the function that calls this one as a whole, or nothing.
    """
    for _ in range(steps):
        gradient = torch.func.grad(lambda h: error(h).sum())(latent)
        latent = latent - rates * (gradient if order == "second" else gradient.detach())
    return latent


def optimise(
    error: Error, latent: Float[Tensor, "batch layers latent_dim"], *, lr: float, steps: int
) -> Float[Tensor, "batch layers latent_dim"]:
    """Adam steps on latents, each signal for itself, with a rate that falls to zero."""
    latent = latent.clone().requires_grad_()
    adam = torch.optim.Adam([latent], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        with torch.enable_grad():
            (latent.grad,) = torch.autograd.grad(error(latent).sum(), latent)
        adam.step()
        schedule.step()
    return latent.detach()


class ChunkedMean(torch.autograd.Function):
    """The mean of the signals' losses, with its gradient: one chunk's graph is held at a time, and nothing is redone.

    Arguments: `losses(part)`, the losses of the signals of a slice; the number of signals; how many a chunk; and the
    tensors that gradients are taken with respect to. Returns the mean, and the losses of all, without gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, losses: Callable[[slice], Tensor], count: int, chunk: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        found, gradients = [], [torch.zeros_like(tensor) for tensor in tensors]
        for start in range(0, count, chunk):
            with torch.enable_grad():
                part = losses(slice(start, min(start + chunk, count)))
                added = torch.autograd.grad(part.sum() / count, tensors, allow_unused=True)
            for gradient, addend in zip(gradients, added, strict=True):
                if addend is not None:
                    gradient += addend
            found.append(part.detach())
        ctx.save_for_backward(*gradients)
        together = torch.cat(found)
        ctx.mark_non_differentiable(together)
        return together.mean(), together

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        return None, None, None, *(gradient * saved for saved in ctx.saved_tensors)


def chunked_mean(
    losses: Callable[[slice], Tensor], count: int, chunk: int | None, tensors: Sequence[Tensor]
) -> tuple[Float[Tensor, ""], Float[Tensor, " batch"]]:
    """`ChunkedMean`, or, where no gradient is asked for, the losses alone."""
    chunk = min(chunk or count, count)
    if torch.is_grad_enabled():
        return ChunkedMean.apply(losses, count, chunk, *tensors)  # type: ignore[return-value]
    parts = [losses(slice(start, min(start + chunk, count))) for start in range(0, count, chunk)]
    return torch.cat(parts).mean(), torch.cat(parts)
