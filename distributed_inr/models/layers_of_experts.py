"""Layers of experts: an implicit network whose layers each mix experts by their own latent (CHINR, section 3.1)."""

import logging
import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from jaxtyping import Float
from torch import Tensor, nn

from distributed_inr import randomness
from distributed_inr.config import config
from distributed_inr.domains import Domain, Queries, Signal
from distributed_inr.field import Field
from distributed_inr.models.field_autoencoder import FieldAutoencoder
from distributed_inr.models.latent_fitting import (
    RATE_RANGE,
    AnyFitting,
    AutoDecoding,
    MetaLearning,
    chunked_mean,
    descend,
    optimise,
)

logger = logging.getLogger(__name__)

Measurements = tuple[Queries, Tensor]
"""Queries, and their true values [batch, points, value_dim]."""


@config
class LayersOfExperts:
    """An implicit network with sine activations, whose weights a latent chooses layer by layer."""

    kind: Literal["layers-of-experts"] = "layers-of-experts"
    num_layers: Annotated[int, pydantic.Field(ge=2)] = 7
    """L: linear layers, the first and the last included."""
    num_experts: Annotated[int, pydantic.Field(gt=0)] = 384
    """K: experts of each layer."""
    width: Annotated[int, pydantic.Field(gt=0)] = 128
    """C: hidden units of each layer."""
    latent_dim: Annotated[int, pydantic.Field(gt=0)] = 128
    """H: numbers of one latent: of each layer's, or of the only one."""
    modulation: Literal["layerwise", "flat", "shift"] = "layerwise"
    """layerwise: each layer mixes its experts by its own latent (CHINR). flat: one latent gates the experts of all
    layers (mNIF). shift: one latent moves the biases of one network (Functa), which has no experts."""
    omega: Annotated[float, pydantic.Field(gt=0)] = 30.0
    """omega_0, the sine's frequency."""
    expert_scale: Literal["one", "sqrt"] = "one"
    """Initial scale of the experts over SIREN's. one: as the public precursor, whose mixtures at equal gates are
    smaller than SIREN's weights by the root of the number of experts. sqrt: times that root."""
    num_points: Annotated[int, pydantic.Field(gt=0)] = 4096
    """Measurements a signal and step that the loss is estimated from."""
    fitting: AnyFitting = MetaLearning()
    """How latents are found."""
    folded: bool = False
    """Hold theta_0 and M in place of experts and gates: the same functions, cheaper to decode; not to be trained."""

    def check(self, domain: Domain) -> None:
        """Raise ValueError where the network does not fit the domain's signals; it takes those of any."""

    def build(self, domain: Domain) -> "LayersOfExpertsModel":
        return LayersOfExpertsModel(self, domain)


class LayersOfExpertsModel(FieldAutoencoder):
    """The network of one domain. It does not use the view of a measurement.

    Attributes:
        rates: learned inner rates [layers, latent_dim]; None where they are fixed.
    """

    is_variational: ClassVar[bool] = False

    def __init__(self, cfg: LayersOfExperts, domain: Domain) -> None:
        super().__init__()
        self.cfg, self.domain = cfg, domain
        self.latent_shape = (cfg.num_layers if cfg.modulation == "layerwise" else 1, cfg.latent_dim)
        dims = [domain.coord_dim, *[cfg.width] * (cfg.num_layers - 1), domain.value_dim]
        kind = FoldedLayer if cfg.folded else ShiftLayer if cfg.modulation == "shift" else ExpertLayer
        self.layers = nn.ModuleList(kind(cfg, dims[i], dims[i + 1], is_first=i == 0) for i in range(cfg.num_layers))
        self.rates = None
        if isinstance(cfg.fitting, MetaLearning) and cfg.fitting.rates == "learned":
            self.rates = nn.Parameter(torch.empty(self.latent_shape).uniform_(*RATE_RANGE))
        self._losses = self._losses_uncompiled

    def forward(self, signal: Signal) -> dict[str, Tensor]:
        """The mean negative log-likelihood of drawn measurements under the fitted latents (CHINR, section 3.2)."""
        fitting = self.cfg.fitting
        with torch.autocast(signal.inputs.device.type, enabled=False):  # bfloat16 spoils second derivatives
            signal = self.domain.augment(signal)
            drawn = self.domain.supervise(signal, self.cfg.num_points)
            seen, latent = drawn, signal.latent
            if isinstance(fitting, MetaLearning):
                seen = self.domain.measurements(signal, fitting.num_points)
                noise = randomness.normal(signal.seed, "latent", self.latent_shape).to(self._example)
                latent = fitting.deviation * noise if self.training else torch.zeros_like(noise)
            elif latent is None:  # a signal that is not in the bank
                latent = self.posterior(signal)[0]
            tensors = [*self.parameters(), *([latent] if latent.requires_grad else [])]
            # Evaluations come in other shapes, and each would be compiled for.
            losses_of = self._losses if torch.is_grad_enabled() else self._losses_uncompiled
            loss, losses = chunked_mean(
                lambda part: losses_of(latent[part], _rows(seen, part), _rows(drawn, part)),
                len(signal),
                fitting.chunk,
                tensors,
            )
        for key, is_finite in zip(signal.key, losses.isfinite().tolist(), strict=True):
            if not is_finite:
                logger.warning("%s: fitting its latent ended in values that are not finite; try smaller rates", key)
        return {"reconstruction": loss}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the inner loop and the loss as one graph. Compiling less gives first-order gradients, silently."""
        self._losses = torch.compile(self._losses_uncompiled, *args, fullgraph=True, dynamic=False, **kwargs)

    def posterior(self, signal: Signal) -> tuple[Tensor, None]:
        """The latents fitted to all measurements from zero. Raises FloatingPointError where one is not finite."""
        fitting, measurements = self.cfg.fitting, self.domain.measurements(signal)
        start = self._example.new_zeros(len(signal), *self.latent_shape)

        def error(latent: Tensor) -> Tensor:
            return self._nll(latent, measurements)

        with torch.autocast(start.device.type, enabled=False):
            if isinstance(fitting, MetaLearning):
                latent = descend(error, start, rates=self._rates(), steps=fitting.steps)
            else:
                latent = optimise(error, start, lr=fitting.encode_lr, steps=fitting.encode_steps)
        finite = latent.flatten(1).isfinite().all(dim=1).tolist()
        if not all(finite):
            keys = ", ".join(key for key, is_finite in zip(signal.key, finite, strict=True) if not is_finite)
            raise FloatingPointError(f"{keys}: fitting the latent ended in values that are not finite; train again")
        return latent.detach(), None

    def decode(self, latent: Float[Tensor, "batch layers latent_dim"]) -> Field:
        latents = latent.expand(-1, self.cfg.num_layers, -1).unbind(1)
        *hidden, last = (layer(h) for layer, h in zip(self.layers, latents, strict=True))
        return Field(_evaluate, (*(self.cfg.omega * theta for theta in hidden), last), self.domain)

    @torch.no_grad()
    def for_sampling(self) -> "LayersOfExpertsModel":
        """The same functions with theta_0 and M in each layer: exact, because the gates are linear in the latent."""
        if self.cfg.folded:
            return self
        model = replace(self.cfg, folded=True).build(self.domain).to(self._example)
        for layer, folded in zip(self.layers, model.layers, strict=True):
            assert isinstance(layer, ExpertLayer | ShiftLayer) and isinstance(folded, FoldedLayer)
            base, basis = layer.fold()
            folded.base.copy_(base)
            folded.basis.copy_(basis)
        if self.rates is not None and model.rates is not None:
            model.rates.copy_(self.rates)
        return model.train(self.training).requires_grad_(False)

    def _losses_uncompiled(self, latent: Tensor, seen: Measurements, drawn: Measurements) -> Float[Tensor, " batch"]:
        """The error of each signal on the drawn measurements, after its latent was fitted to the seen ones."""
        fitting = self.cfg.fitting
        if isinstance(fitting, AutoDecoding):
            return self._nll(latent, drawn) + fitting.penalty * latent.square().flatten(1).sum(1)
        rates, order = self._rates(), fitting.order
        fitted = descend(lambda h: self._nll(h, seen), latent, rates=rates, steps=fitting.steps, order=order)
        return self._nll(fitted, drawn)

    def _nll(self, latent: Tensor, measurements: Measurements) -> Float[Tensor, " batch"]:
        queries, values = measurements
        return self.domain.nll(self.domain.observe(self.decode(latent), queries), values)

    def _rates(self) -> Tensor | float:
        assert isinstance(self.cfg.fitting, MetaLearning)
        return self.cfg.fitting.rate if self.rates is None else self.rates.clamp(0, 1)

    @property
    def _example(self) -> Tensor:
        """A tensor of the device and the precision that latents must have."""
        return next(self.parameters())


class ExpertLayer(nn.Module):
    """Weights and biases as a mixture of experts, gated by the layer's latent (CHINR, eq. 3).

    An expert is a row of `experts`: weights [in_dim, out_dim] and biases [out_dim], flattened together, so that one
    matrix product mixes both for the whole batch.
    """

    def __init__(self, cfg: LayersOfExperts, in_dim: int, out_dim: int, *, is_first: bool) -> None:
        super().__init__()
        self.shape = (in_dim + 1, out_dim)
        self.gate = nn.Linear(cfg.latent_dim, cfg.num_experts)
        nn.init.constant_(self.gate.bias, 1 / cfg.num_experts)
        experts = torch.empty(cfg.num_experts, *self.shape)
        init_siren(experts, is_first=is_first, omega=cfg.omega)
        if cfg.expert_scale == "sqrt":
            experts *= cfg.num_experts**0.5
        self.experts = nn.Parameter(experts.flatten(1))

    def forward(self, latent: Float[Tensor, "batch latent_dim"]) -> Float[Tensor, "batch in_dim_and_bias out_dim"]:
        return (self.gate(latent) @ self.experts).unflatten(1, self.shape)

    def fold(self) -> tuple[Tensor, Tensor]:
        """theta_0 = b E and M = W E, of gates h W + b over experts E."""
        return self.gate.bias @ self.experts, self.gate.weight.T @ self.experts


class ShiftLayer(nn.Module):
    """Weights of its own, and biases moved by the latent (Functa's shift modulations)."""

    def __init__(self, cfg: LayersOfExperts, in_dim: int, out_dim: int, *, is_first: bool) -> None:
        super().__init__()
        theta = torch.empty(in_dim + 1, out_dim)
        init_siren(theta, is_first=is_first, omega=cfg.omega)
        self.theta = nn.Parameter(theta)
        self.shift = nn.Linear(cfg.latent_dim, out_dim, bias=False)

    def forward(self, latent: Float[Tensor, "batch latent_dim"]) -> Float[Tensor, "batch in_dim_and_bias out_dim"]:
        weights = self.theta[:-1].expand(len(latent), -1, -1)
        return torch.cat([weights, (self.theta[-1] + self.shift(latent))[:, None]], dim=1)

    def fold(self) -> tuple[Tensor, Tensor]:
        basis = self.theta.new_zeros(self.shift.in_features, *self.theta.shape)
        basis[:, -1] = self.shift.weight.T
        return self.theta.flatten(), basis.flatten(1)


class FoldedLayer(nn.Module):
    """Weights and biases as theta_0 + h M."""

    def __init__(self, cfg: LayersOfExperts, in_dim: int, out_dim: int, *, is_first: bool) -> None:
        super().__init__()
        self.shape = (in_dim + 1, out_dim)
        size = math.prod(self.shape)
        self.base, self.basis = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(cfg.latent_dim, size))

    def forward(self, latent: Float[Tensor, "batch latent_dim"]) -> Float[Tensor, "batch in_dim_and_bias out_dim"]:
        return torch.addmm(self.base, latent, self.basis).unflatten(1, self.shape)


def init_siren(theta: Float[Tensor, "*experts in_dim_and_bias out_dim"], *, is_first: bool, omega: float) -> None:
    """SIREN's initialisation (Sitzmann et al., 2020, section 3.2), of weights over biases; biases as nn.Linear's."""
    in_dim = theta.shape[-2] - 1
    bound = 1 / in_dim if is_first else math.sqrt(6 / in_dim) / omega
    nn.init.uniform_(theta[..., :-1, :], -bound, bound)
    nn.init.uniform_(theta[..., -1:, :], -(in_dim**-0.5), in_dim**-0.5)


def _evaluate(mixed: tuple[Tensor, ...], coords: Tensor, view: Tensor | None) -> Tensor:
    """y_{l+1} = sin(omega_0 (theta_l y_l)); the last layer is linear. omega_0 is in the weights already."""
    hidden = coords.to(mixed[0].dtype)
    for theta in mixed[:-1]:
        hidden = torch.sin(_affine(hidden, theta))
    return _affine(hidden, mixed[-1])


def _affine(x: Tensor, theta: Tensor) -> Tensor:
    return torch.baddbmm(theta[:, -1:], x, theta[:, :-1])


def _rows(measurements: Measurements, part: slice) -> Measurements:
    queries, values = measurements
    view = None if queries.view is None else queries.view[part]
    return Queries(queries.coords[part], view), values[part]
