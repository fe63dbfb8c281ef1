"""A batch of functions: coordinates in, values out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from distributed_inr.domains.domain import Domain


class Field:
    """A batch of functions from coordinates in [-1, 1]^coord_dim to values.

    Args:
        function: maps (parameters, coords, view) to values; it is shared by the whole batch.
        parameters: tensors whose first axis is the batch: what makes one function of the batch differ from another.
        domain: whose signals these functions are; used only by `render`.
    """

    def __init__(self, function: Callable[..., Tensor], parameters: tuple[Tensor, ...], domain: Domain) -> None:
        self.function, self.parameters, self.domain = function, parameters, domain

    def __call__(
        self,
        coords: Float[Tensor, "batch points coord_dim"],
        view: Float[Tensor, "batch points view_dim"] | None = None,
    ) -> Float[Tensor, "batch points value_dim"]:
        """Values at coordinates (x, y, ...); `view` is what the measurement knows beside the place (scale, direction).

        None stands for zeros: for images, pixels of the base resolution. Raises ValueError where the shapes do not fit.
        """
        if view is None and self.domain.view_dim:
            view = coords.new_zeros(*coords.shape[:2], self.domain.view_dim)
        for name, given, dim in (("coords", coords, self.domain.coord_dim), ("view", view, self.domain.view_dim)):
            shape = [len(self), coords.shape[1] if coords.dim() == 3 else "points", dim]
            if given is not None and list(given.shape) != shape:
                raise ValueError(
                    f"{name} of shape {list(given.shape)} must be [{', '.join(map(str, shape))}]: functions, points, "
                    "and the numbers of each; reshape or expand it"
                )
        return self.function(self.parameters, coords, view)

    def __getitem__(self, index: int | slice | Tensor) -> Field:
        """The functions at `index`, still a batch (an integer gives a batch of one)."""
        index = slice(index, index + 1 or None) if isinstance(index, int) else index
        return Field(self.function, tuple(p[index] for p in self.parameters), self.domain)

    def __len__(self) -> int:
        return len(self.parameters[0])

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def render(self, resolution: int, **view: Any) -> Tensor:
        """What the domain's sensor sees of each function, at any resolution (`Domain.render`)."""
        return self.domain.render(self, resolution, **view)
