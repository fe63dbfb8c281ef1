"""Spatial frequencies of basis fields (DDMI, section 4.4): whether coarse and fine fields share the work as meant."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from distributed_inr.analysis.sources import Latents
from distributed_inr.generation import FieldModel
from distributed_inr.models.d2c_vae import D2CVAEModel

SHOWN = 4
"""Signals whose basis fields are shown."""


@dataclass(frozen=True)
class Spectrum:
    """The spatial frequencies of one basis field, over signals, planes and channels.

    Attributes:
        cells: a side of its planes; half of it is the highest frequency along an axis.
        power: mean square at 0, 1, 2, ... cycles a side, all directions together.
        fields: of the first signals, the first plane's main component over its channels, in [0, 1].
        maps: of the same, log10 of the plane's power by direction, the mean over channels, down to a millionth of the
            largest; frequency 0 is at cells / 2.
    """

    cells: int
    power: Float64[Tensor, " frequencies"]
    fields: Float[Tensor, "shown height width"]
    maps: Float[Tensor, "shown height width"]

    @property
    def shares(self) -> Float64[Tensor, " frequencies"]:
        """Part of the power at each frequency."""
        return self.power / self.power.sum().clamp(min=1e-300)

    @property
    def centre(self) -> float:
        """Mean frequency, in cycles a side, weighted by power."""
        return (self.shares * torch.arange(len(self.power))).sum().item()

    def below(self, part: float) -> int:
        """The frequency, in cycles a side, that `part` of the power does not exceed."""
        return int((self.shares.cumsum(0) < part).sum())


@dataclass(frozen=True)
class Spectra:
    """Of each basis field, coarse to fine, and the signals that were looked at."""

    fields: list[Spectrum]
    latents: Latents


@torch.no_grad()
def frequencies(model: FieldModel, latents: Latents) -> Spectra:
    """Power spectra of the basis fields that a D2C-VAE decodes latents to.

    Args:
        latents: as from `choose` or `file_latents`; tens of them make smooth curves.
    """
    if not isinstance(model.autoencoder, D2CVAEModel):
        raise ValueError(
            f"autoencoder.kind={model.experiment.autoencoder.kind} of {model.folder} has no basis fields, whose "
            "frequencies these are; give a run with autoencoder.kind d2c-vae"
        )
    if len({side for size in model.autoencoder.layout.sizes for side in size}) > 1:
        raise ValueError(
            f"domain.kind={model.domain.kind} of {model.folder} has planes of unequal sides, and radial frequencies "
            "are those of square ones; give a run whose planes are square"
        )
    powers: list[list[Tensor]] = []
    shown: list[tuple[Tensor, Tensor]] = []
    for part in latents.values.split(model.experiment.evaluation.batch_size):
        basis = model.autoencoder.basis(part.to(model.device))
        powers.append(
            [radial_power(torch.cat([p.flatten(0, 1) for p in planes])).cpu() * len(part) for planes in basis]
        )
        if not shown:
            shown = [(_main_component(p[:SHOWN]).cpu(), _map(p[:SHOWN]).cpu()) for p, *_ in basis]
    found = []
    for index, (fields, maps) in enumerate(shown):
        power = torch.stack([part[index] for part in powers]).sum(0) / len(latents)
        found.append(Spectrum(fields.shape[-1], power, fields, maps))
    return Spectra(found, latents)


def radial_power(planes: Float[Tensor, "count side side"]) -> Float64[Tensor, " frequencies"]:
    """Mean square of planes by spatial frequency, in whole cycles a side, summed over directions.

    A plane's mean is removed, so that nothing is left at frequency 0, and a Hann window laid over it: planes do not go
    on beyond their edges, and the jump there would look like high frequencies.
    """
    power = _power(planes).mean(0)
    side = planes.shape[-1]
    cycles = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64, device=planes.device)
    radius = torch.hypot(cycles[:, None], cycles).round().long()
    return power.new_zeros(int(radius.max()) + 1).index_add_(0, radius.flatten(), power.flatten())


def _power(planes: Float[Tensor, "count side side"]) -> Float64[Tensor, "count side side"]:
    side = planes.shape[-1]
    window = torch.hann_window(side, dtype=torch.float64, device=planes.device)
    window = torch.outer(window, window) / window.square().mean()  # which keeps the power of what it lies over
    mean = (planes * window).sum((1, 2), keepdim=True) / window.sum()
    return torch.fft.fft2((planes - mean) * window).abs().square() / side**4


def _main_component(planes: Float[Tensor, "count channels side side"]) -> Float[Tensor, "count side side"]:
    """Each signal's channels as one: along their main direction, stretched to [0, 1]."""
    cells = planes.flatten(2) - planes.flatten(2).mean(2, keepdim=True)  # [count, channels, cells]
    directions = torch.linalg.eigh(cells @ cells.transpose(1, 2))[1][..., -1:]
    directions = directions * torch.where(directions.sum(1, keepdim=True) < 0, -1.0, 1.0)
    along = (directions * cells).sum(1)
    low, high = along.min(1, keepdim=True).values, along.max(1, keepdim=True).values
    return ((along - low) / (high - low).clamp(min=1e-12)).unflatten(1, planes.shape[2:])


def _map(planes: Float[Tensor, "count channels side side"]) -> Float[Tensor, "count side side"]:
    power = _power(planes.flatten(0, 1)).unflatten(0, planes.shape[:2]).mean(1)
    floor = power.new_tensor(1e-20).maximum(1e-6 * power.amax((1, 2), keepdim=True))  # frequency 0 has nothing left
    return torch.fft.fftshift(power, dim=(1, 2)).maximum(floor).log10().float()
