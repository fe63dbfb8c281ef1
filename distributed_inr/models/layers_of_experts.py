"""Layers of experts: an implicit network whose layers each mix experts by their own latent (CHINR, section 3.1)."""

import itertools
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
    ChunkedMean,
    Descent,
    MetaLearning,
    Probes,
    Weights,
    descend,
    optimise,
    probed,
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
    """Hold theta_0 and M in place of experts and gates, as exports do: the same functions, cheaper to decode. Not to be
    trained."""

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
        self.weight_shapes = [(in_dim + 1, out_dim) for in_dim, out_dim in itertools.pairwise(dims)]
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
            loss, losses = self._mean_loss(latent, seen, drawn)
        for key, is_finite in zip(signal.key, losses.isfinite().tolist(), strict=True):
            if not is_finite:
                remedy = "rate" if isinstance(fitting, MetaLearning) else "lr"
                logger.warning("%s: its loss is not finite; try a smaller autoencoder.fitting.%s", key, remedy)
        return {"reconstruction": loss} | self._penalties(latent)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the inner loop and the loss as one graph. Compiling less gives first-order gradients, silently."""
        self._losses = torch.compile(self._losses_uncompiled, *args, fullgraph=True, dynamic=False, **kwargs)

    def posterior(self, signal: Signal) -> tuple[Tensor, None]:
        """The latents fitted to all measurements from zero. Raises FloatingPointError where one is not finite."""
        fitting, measurements = self.cfg.fitting, self.domain.measurements(signal)
        start = self._example.new_zeros(len(signal), *self.latent_shape)

        def nll(weights: Weights) -> Tensor:
            return self._nll(weights, measurements)

        with torch.autocast(start.device.type, enabled=False):
            if isinstance(fitting, MetaLearning):
                latent = descend(self._mix, nll, start, rates=self._rates(), steps=fitting.steps).latents[-1]
            else:
                latent = optimise(
                    lambda h: nll(self._mix(h)) + fitting.penalty * squared_length(h),
                    start,
                    lr=fitting.encode_lr,
                    steps=fitting.encode_steps,
                )
        finite = latent.flatten(1).isfinite().all(dim=1).tolist()
        if not all(finite):
            keys = ", ".join(key for key, is_finite in zip(signal.key, finite, strict=True) if not is_finite)
            remedy = "train with a smaller autoencoder.fitting.rate"
            if isinstance(fitting, AutoDecoding):
                remedy = "encode with a smaller autoencoder.fitting.encode_lr"
            raise FloatingPointError(f"{keys}: the latent's fit is not finite; {remedy}")
        return latent.detach(), None

    def decode(self, latent: Float[Tensor, "batch layers latent_dim"]) -> Field:
        return self._field(self._mix(latent))

    @torch.no_grad()
    def for_sampling(self) -> "LayersOfExpertsModel":
        """The same functions with theta_0 and M in each layer: exact, because the gates are linear in the latent.

        Itself where M, with a row for each number of the latent, would be larger than the experts.
        """
        if self.cfg.folded or self.cfg.modulation == "shift" or self.cfg.latent_dim > self.cfg.num_experts:
            return self
        model = replace(self.cfg, folded=True).build(self.domain).to(self._example)
        for layer, folded in zip(self.layers, model.layers, strict=True):
            assert isinstance(layer, ExpertLayer) and isinstance(folded, FoldedLayer)
            base, basis = layer.fold()
            folded.base.copy_(base)
            folded.basis.copy_(basis)
        if self.rates is not None and model.rates is not None:
            model.rates.copy_(self.rates)
        return model.train(self.training).requires_grad_(False)

    def _mean_loss(self, latent: Tensor, seen: Measurements, drawn: Measurements) -> tuple[Tensor, Tensor]:
        """The mean loss, and the loss of each signal; the mean can be differentiated if gradients are enabled."""
        num_signals = len(latent)
        chunk = self.cfg.fitting.chunk or num_signals

        def of(part: slice) -> tuple[Tensor, Measurements, Measurements]:
            return latent[part], _rows(seen, part), _rows(drawn, part)

        tensors = [tensor for tensor in (*self.parameters(), latent) if tensor.requires_grad]
        if torch.is_grad_enabled() and tensors:
            return ChunkedMean.apply(lambda part: self._differentiate(*of(part), tensors), num_signals, chunk, *tensors)
        # Uncompiled: evaluations come in other shapes, and each would be compiled for.
        parts = [slice(start, start + chunk) for start in range(0, num_signals, chunk)]
        losses = torch.cat([self._losses_uncompiled(*of(part))[0] for part in parts])
        return losses.mean(), losses

    def _differentiate(
        self, latent: Tensor, seen: Measurements, drawn: Measurements, tensors: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of each signal, and the gradients of their sum by the tensors.

        Second-order meta-learning uses the experts 2 * steps + 1 times. Plain autograd makes a gradient of their size
        for each, and adds. Here the experts are constants to autograd, and `ExpertLayer.experts_gradient` makes the sum
        at once.
        """
        fitting = self.cfg.fitting
        layers: dict[Tensor, int] = {}
        if isinstance(fitting, MetaLearning) and fitting.order == "second":
            layers = {layer.experts: i for i, layer in enumerate(self.layers) if isinstance(layer, ExpertLayer)}
        if not layers:
            losses, _ = self._losses(latent, seen, drawn)
            return losses.detach(), list(torch.autograd.grad(losses.sum(), tensors, materialize_grads=True))
        probes = self._probes(latent)
        losses, descent = self._losses(latent, seen, drawn, probes)
        wanted = [probes.gradients, *probes.weights, *(tensor for tensor in tensors if tensor not in layers)]
        by_gradients, *rest = torch.autograd.grad(losses.sum(), wanted, materialize_grads=True)
        by_weights, others = rest[: len(self.layers)], iter(rest[len(self.layers) :])

        def experts_gradient(index: int) -> Tensor:
            layer, own = self.layers[index], index % self.latent_shape[0]  # the latent: one for all, or each its own
            assert isinstance(layer, ExpertLayer)
            return layer.experts_gradient(
                descent.latents[:, :, own], by_weights[index], by_gradients[:, :, own], descent.slopes[index]
            )

        return losses.detach(), [experts_gradient(layers[t]) if t in layers else next(others) for t in tensors]

    def _probes(self, latent: Tensor) -> Probes:
        assert isinstance(self.cfg.fitting, MetaLearning)
        steps, count = self.cfg.fitting.steps, len(latent)
        weights = (latent.new_zeros(steps + 1, count, *shape).requires_grad_() for shape in self.weight_shapes)
        return Probes(latent.new_zeros(steps, *latent.shape).requires_grad_(), tuple(weights))

    def _losses_uncompiled(
        self, latent: Tensor, seen: Measurements, drawn: Measurements, probes: Probes | None = None
    ) -> tuple[Float[Tensor, " batch"], Descent]:
        """The error of each signal on the drawn measurements, after its latent was fitted to the seen ones."""
        fitting = self.cfg.fitting
        if isinstance(fitting, AutoDecoding):
            return self._nll(self._mix(latent), drawn), Descent(latent[None], ())
        frozen = probes is not None
        descent = descend(
            lambda h: self._mix(h, frozen=frozen),
            lambda weights: self._nll(weights, seen),
            latent,
            rates=self._rates(),
            steps=fitting.steps,
            order=fitting.order,
            probes=probes,
        )
        weights = self._mix(descent.latents[-1], frozen=frozen)
        return self._nll(probed(weights, probes, fitting.steps), drawn), descent.detach()

    def _penalties(self, latent: Tensor) -> dict[str, Tensor]:
        fitting = self.cfg.fitting
        if isinstance(fitting, MetaLearning) or not fitting.penalty:
            return {}
        return {"penalty": fitting.penalty * squared_length(latent).mean()}

    def _mix(self, latent: Tensor, *, frozen: bool = False) -> Weights:
        """Each layer's weights [batch, in_dim_and_bias, out_dim]. frozen: with experts that autograd does not see."""
        latents = latent.expand(-1, self.cfg.num_layers, -1).unbind(1)
        return tuple(
            layer(h, frozen=frozen) if isinstance(layer, ExpertLayer) else layer(h)
            for layer, h in zip(self.layers, latents, strict=True)
        )

    def _field(self, weights: Weights) -> Field:
        *hidden, last = weights
        return Field(_evaluate, (*(self.cfg.omega * theta for theta in hidden), last), self.domain)

    def _nll(self, weights: Weights, measurements: Measurements) -> Float[Tensor, " batch"]:
        queries, values = measurements
        return self.domain.nll(self.domain.observe(self._field(weights), queries), values)

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

    def forward(
        self, latent: Float[Tensor, "batch latent_dim"], *, frozen: bool = False
    ) -> Float[Tensor, "batch in_dim_and_bias out_dim"]:
        experts = self.experts.detach() if frozen else self.experts
        return (self.gate(latent) @ experts).unflatten(1, self.shape)

    @torch.no_grad()
    def experts_gradient(
        self,
        latents: Float[Tensor, "uses batch latent_dim"],
        by_weights: Float[Tensor, "uses batch in_dim_and_bias out_dim"],
        by_gradients: Float[Tensor, "steps batch latent_dim"],
        slopes: Float[Tensor, "steps batch in_dim_and_bias out_dim"],
    ) -> Float[Tensor, "num_experts size"]:
        """The gradient by the experts of a loss that uses them to mix, and backwards in gradient steps on the latent.

        With gates g = h W + b over experts E, mixing is theta = g E, and the loss's derivative by E through it is
        g^T d theta. A step's gradient is s E^T W^T, and if the loss's derivative by it is d, that by E is (d W)^T s.
        Both are sums of outer products, so one matrix product makes all.

        Args:
            latents: h at each mixing.
            by_weights: d theta, the loss's derivative by the mixed weights at each mixing.
            by_gradients: d, the loss's derivative by each step's gradient on the latent.
            slopes: s, the error's derivative by the mixed weights at each step.
        """
        gates = nn.functional.linear(latents, self.gate.weight, self.gate.bias)
        back = nn.functional.linear(by_gradients, self.gate.weight)
        rows = torch.cat([by_weights, slopes]).flatten(2).flatten(0, 1)
        return torch.cat([gates, back]).flatten(0, 1).T @ rows

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


def squared_length(latent: Float[Tensor, "batch layers latent_dim"]) -> Float[Tensor, " batch"]:
    return latent.square().flatten(1).sum(1)


def _rows(measurements: Measurements, part: slice) -> Measurements:
    queries, values = measurements
    return queries.rows(part), values[part]
