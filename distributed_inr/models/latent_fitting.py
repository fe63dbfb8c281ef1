"""How latents are found that have no encoder: by gradient steps on the signal's own error (CHINR, section 3.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

Weights = tuple[Tensor, ...]
"""Of each layer, for each signal: [batch, ...]."""

Mix = Callable[[Tensor], Weights]
"""From latents [batch, layers, latent_dim] to the weights they choose: affine in them."""


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


@dataclass(frozen=True)
class Descent:
    """Gradient steps on latents, and the error's slopes that they followed."""

    latents: Tensor
    """Before each step and after the last, [steps + 1, batch, layers, latent_dim]."""
    slopes: tuple[Tensor, ...]
    """The error's derivative by each layer's weights at each step, [steps, batch, ...]."""

    def detach(self) -> "Descent":
        return Descent(self.latents.detach(), tuple(slope.detach() for slope in self.slopes))


@dataclass(frozen=True)
class Probes:
    """Zeros to be added along a descent: a loss's derivatives by them are those by what they were added to."""

    gradients: Tensor
    """Added to the error's derivative by the latent at each step, [steps, batch, layers, latent_dim]."""
    weights: tuple[Tensor, ...]
    """Added to each layer's weights at each step and after the last, [steps + 1, batch, ...]."""


def descend(
    mix: Mix,
    error: Callable[[Weights], Tensor],
    latent: Float[Tensor, "batch layers latent_dim"],
    *,
    rates: Tensor | float,
    steps: int,
    order: Literal["first", "second"] = "second",
    probes: Probes | None = None,
) -> Descent:
    """Gradient steps on latents; the result can be differentiated again, by whatever `mix` and `error` depend on.

    Written with `torch.func`: a compiled error under `torch.autograd.grad(create_graph=True)` silently gives
    first-order gradients. Compile the function that calls this one as a whole, or nothing.
    """
    latents, slopes = [latent], []
    for step in range(steps):
        weights, pull = torch.func.vjp(mix, latent)  # type: ignore[misc]  # three values only where it is asked to
        slope = torch.func.grad(lambda weights: error(weights).sum())(probed(weights, probes, step))
        (gradient,) = pull(slope)
        gradient = gradient if probes is None else gradient + probes.gradients[step]
        latent = latent - rates * (gradient if order == "second" else gradient.detach())
        latents.append(latent)
        slopes.append(slope)
    return Descent(torch.stack(latents), tuple(map(torch.stack, zip(*slopes, strict=True))))


def probed(weights: Weights, probes: Probes | None, step: int) -> Weights:
    if probes is None:
        return weights
    return tuple(theta + probe[step] for theta, probe in zip(weights, probes.weights, strict=True))


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

    Arguments: `differentiate(part)`, which gives the losses of a slice's signals, and the gradients of their sum by
    the tensors; the number of signals; how many a chunk; and the tensors. Returns the mean, and the losses of all,
    without gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        differentiate: Callable[[slice], tuple[Tensor, Sequence[Tensor]]],
        count: int,
        chunk: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        found, gradients = [], []
        for start in range(0, count, chunk):
            with torch.enable_grad():
                losses, added = differentiate(slice(start, start + chunk))
            found.append(losses)
            # Not in place: autograd's results may share their memory.
            gradients = [a + b for a, b in zip(gradients, added, strict=True)] if start else added
        ctx.count = count
        ctx.save_for_backward(*gradients)
        together = torch.cat(found)
        ctx.mark_non_differentiable(together)
        return together.mean(), together

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        each = gradient / ctx.count
        return None, None, None, *(each * saved for saved in ctx.saved_tensors)
