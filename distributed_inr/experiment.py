"""Experiment: every option of every verb, in one frozen config."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import pydantic

from distributed_inr.config import config
from distributed_inr.data import storage
from distributed_inr.data.reader import Data, ShardDataset
from distributed_inr.data.shards import ShardIndex
from distributed_inr.domains import AnyDomain
from distributed_inr.models import AnyAutoencoder, AnyPrior, LayersOfExperts
from distributed_inr.models.latent_fitting import AutoDecoding
from distributed_inr.models.noising import Sampler
from distributed_inr.models.text import AnyTextEncoder
from distributed_inr.training.engine import Scale
from distributed_inr.training.loop import Training

DEFAULT_OUTPUT = "./runs"

_Part = Annotated[float, pydantic.Field(ge=0, le=1)]


@config
class Sampling:
    """How latents are drawn from the trained prior."""

    count: Annotated[int, pydantic.Field(gt=0)] = 16
    """Samples drawn for the pictures at the end of a run."""
    sampler: Sampler = "ddim"
    """Ancestral sampling, DDIM, or DPM-Solver++."""
    steps: Annotated[int, pydantic.Field(gt=0)] = 50
    """Network evaluations a sample."""
    batch_size: Annotated[int, pydantic.Field(gt=0)] = 64
    """Samples drawn together; changes the memory needed, not the result."""
    guidance: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = 3.0
    """Guidance scale w of samples with a prompt: 1 follows it as training did, more exaggerates it, 0 leaves it out."""
    guidance_interval: tuple[_Part, _Part] = (0.0, 1.0)
    """Of the noising chain, from 0 (clean) to 1, where there is guidance; elsewhere w = 1."""
    guidance_rescale: _Part = 0.0
    """How far the deviation of the guided prediction is brought back to that of the conditional one; 0.7 is usual."""

    def __post_init__(self) -> None:
        first, last = self.guidance_interval
        if first > last:
            raise ValueError(f"sampling.guidance_interval={first} {last} must rise; try {last} {first}")


@config
class Evaluation:
    """What a finished run is measured by."""

    num_samples: Annotated[int, pydantic.Field(ge=0)] = 256
    """Samples drawn for the distances between distributions (KID); 0 leaves them out."""
    max_reconstructions: Annotated[int, pydantic.Field(gt=0)] = 1000
    """Held-out signals reconstructed at most."""
    batch_size: Annotated[int, pydantic.Field(gt=0)] = 32
    """Signals or samples a step."""
    surface_points: Annotated[int, pydantic.Field(gt=0)] = 2048
    """Points on each surface that Chamfer distances are taken between, of domains whose signals have one."""
    inception_weights: str | None = None
    """Path of Inception weights for FID, precision and recall; without it they are left out and said to be."""


@config
class Experiment:
    """One model, its data and how it is trained, sampled and measured."""

    name: str
    """Name of the run; with `family` and `output` it makes the run folder <output>/<family>/<name>."""
    family: Literal["ddmi", "chinr"] = "ddmi"
    """Model family: ddmi trains a d2c-vae, chinr layers-of-experts."""
    output: str = DEFAULT_OUTPUT
    """Folder that holds the run folders; absolute, and shared by all nodes, inside a Ray job and on several nodes."""
    checkpoints: str | None = None
    """Folder or object store (s3://, gs://) that all nodes share, to keep checkpoints under, as
    <checkpoints>/<family>/<name>. none: in the run folder."""
    seed: int = 0
    """Seed of everything random: initial weights, order of the data, noise, samples."""
    domain: AnyDomain
    """What the functions are about."""
    data: Data
    """Shards to train on and to measure on."""
    autoencoder: AnyAutoencoder
    """From signals to latents to fields."""
    autoencoder_from: str | None = None
    """Run folder whose trained autoencoder and latents are used, by links to them; `autoencoder_training` is then not.
    none: trained here."""
    text: AnyTextEncoder | None = None
    """What embeds captions, which the prior is then conditioned on. none: without text."""
    text_dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.1
    """Share of the prior's training samples whose caption is replaced by the empty prompt, which guidance needs."""
    prior: AnyPrior
    """Distribution over latents."""
    autoencoder_training: Training
    """How the autoencoder is fitted."""
    prior_training: Training
    """How the prior is fitted."""
    scale: Scale = Scale()
    """How the work is spread over processes and nodes."""
    sampling: Sampling = Sampling()
    """How samples are drawn."""
    evaluation: Evaluation = Evaluation()
    """How the run is measured."""

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or "/" in self.name or "\\" in self.name:
            raise ValueError(f"name={self.name!r} must be that of one folder; --output says where the run folders lie")
        self.autoencoder.check(self.domain)
        if self.sampling.steps > self.prior.num_timesteps:
            raise ValueError(
                f"sampling.steps={self.sampling.steps} must be at most prior.num_timesteps={self.prior.num_timesteps}, "
                "the length of the chain; try 50"
            )
        family = "chinr" if isinstance(self.autoencoder, LayersOfExperts) else "ddmi"
        if self.family != family:
            raise ValueError(
                f"family={self.family} does not train autoencoder.kind={self.autoencoder.kind}; use "
                f"jobs/train_{family}.py, whose presets have it"
            )
        if isinstance(self.autoencoder, LayersOfExperts):
            self._check_scale()
        if self.bank is not None:
            self._check_bank()

    def _check_scale(self) -> None:
        if self.scale.engine == "deepspeed" and self.scale.zero_stage == 3:
            raise ValueError(
                "scale.zero_stage=3 does not work with autoencoder.kind=layers-of-experts, which takes gradients "
                "inside its forward pass: they fail where weights are divided among the workers; use scale.zero_stage 2"
            )
        if self.scale.precision == "bfloat16":
            raise ValueError(
                "scale.precision=bfloat16 does not work with autoencoder.kind=layers-of-experts: it puts 21 % error "
                "into second derivatives, and its sines need more digits; use auto, which keeps to float32"
            )
        if self.scale.activation_checkpointing:
            raise ValueError(
                "scale.activation_checkpointing=True does not work with autoencoder.kind=layers-of-experts: torch.func "
                "cannot recompute; bound the memory with autoencoder.fitting.chunk"
            )

    def _check_bank(self) -> None:
        if (num_copies := self.domain.num_copies) > 1:
            raise ValueError(
                f"domain.kind={self.domain.kind} trains on {num_copies} copies of each signal, and "
                "autoencoder.fitting.kind=auto-decoding keeps one latent for each; leave the copies out (such as by "
                "domain.flip false), or use meta-learning"
            )
        if half_life := self.autoencoder_training.ema_half_life_samples:
            raise ValueError(
                f"autoencoder_training.ema_half_life_samples={half_life} averages weights over time, and the latents "
                "of autoencoder.fitting.kind=auto-decoding fit the last ones; set it to 0"
            )
        if self.data.accept_changed:
            raise ValueError(
                "data.accept_changed=True does not work with autoencoder.fitting.kind=auto-decoding, whose latents "
                "belong to the samples of the data it began with; restore them, or choose another --name"
            )

    def settle(self, num_signals: int, protocol: Mapping[str, Any] = MappingProxyType({})) -> "Experiment":
        """With what depends on the training set, by its size or its protocol, set if it was left open."""
        text_dim = None if self.text is None else self.text.width
        return replace(self, prior=self.prior.settle(num_signals, text_dim), domain=self.domain.settle(protocol))

    @property
    def bank(self) -> AutoDecoding | None:
        """How a bank with a latent for each training signal is trained, where there is one."""
        fitting = self.autoencoder.fitting if isinstance(self.autoencoder, LayersOfExperts) else None
        return fitting if isinstance(fitting, AutoDecoding) else None

    @property
    def folder(self) -> Path:
        """Where the run keeps everything it makes."""
        return Path(self.output).expanduser() / self.family / self.name

    def checkpoints_of(self, stage: str) -> str:
        """Where the checkpoints of a stage lie."""
        if self.checkpoints is None:
            return str(self.folder / stage / "checkpoints")
        root = str(Path(self.checkpoints).expanduser()) if storage.is_local(self.checkpoints) else self.checkpoints
        return storage.join(root, f"{self.family}/{self.name}/{stage}")

    def dataset(self, index: ShardIndex) -> ShardDataset:
        """The domain's signals of a set of shards, in this run's order."""
        return self.data.dataset(index, read=self.domain.read, seed=self.seed)
