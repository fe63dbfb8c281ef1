"""Generation: a finished run as a model whose samples are functions, and those functions as files.

    model = load("runs/ddmi/furniture-image")
    fields = model.sample(4, seed=0)             # four functions
    fields = model.sample(4, text="a round table", guidance=3.0)      # of a run with text
    fields = model.encode("chair.png")           # one's own picture as a function
    fields.render(resolution=256)

Needs neither Ray nor DeepSpeed nor webdataset.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distributed_inr.config import from_json, override
from distributed_inr.data.text_table import TextTable, embedded, identity
from distributed_inr.domains import AnyDomain, Signal
from distributed_inr.domains.domain import seeds_for
from distributed_inr.experiment import Experiment
from distributed_inr.field import Field
from distributed_inr.models import FieldAutoencoder, LatentPrior
from distributed_inr.models.hierarchical_diffusion import HierarchicalDiffusionModel
from distributed_inr.models.noising import Sampler
from distributed_inr.models.text import NoWeights, OpenCLIP, TextEncoder, one_line
from distributed_inr.models.text_conditioning import Guidance, TextCondition
from distributed_inr.randomness import sample_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FieldModel:
    """The domain, autoencoder and prior of a finished run, in evaluation mode.

    Attributes:
        prior: None while a run has only its autoencoder; such a model encodes but does not sample.
        texts: of a run with text, the embeddings of its captions.
    """

    experiment: Experiment
    folder: Path
    autoencoder: FieldAutoencoder
    prior: LatentPrior | None
    device: torch.device
    texts: TextTable | None = None
    _encoders: dict[bool, TextEncoder] = field(default_factory=dict, repr=False, compare=False)

    @property
    def domain(self) -> AnyDomain:
        return self.experiment.domain

    def sample(
        self,
        count: int = 1,
        *,
        text: str | Sequence[str] | None = None,
        negative_text: str | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        seed: int = 0,
        start: int = 0,
        steps: int | None = None,
        sampler: Sampler | None = None,
    ) -> Field:
        """Draw functions. The i-th depends on (seed, start + i), and its prompt, only: large numbers can be drawn piece
        by piece.

        Args:
            count: how many; with text, of each prompt: those of the first prompt come first.
            text: prompts, of a run with text; None, like the empty prompt, draws whatever there is.
            negative_text: what samples are to be unlike; None is the empty prompt.
            guidance: scale w of classifier-free guidance, e(negative) + w (e(text) - e(negative)); None takes the run's
                own, as for all that follow. 1 follows the prompt as training did, 0 leaves it out.
            guidance_interval: of the noising chain, from 0 (clean) to 1, where there is guidance.
            guidance_rescale: in [0, 1], how far guided predictions keep the deviation of unguided ones.
            steps: network evaluations a sample.
        """
        guide = self.guide(
            text,
            negative_text=negative_text,
            guidance=guidance,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
        )
        return self.decode(
            self.sample_latents(count, guide=guide, seed=seed, start=start, steps=steps, sampler=sampler)
        )

    @torch.no_grad()
    def sample_latents(
        self,
        count: int = 1,
        *,
        guide: Guidance | None = None,
        seed: int = 0,
        start: int = 0,
        steps: int | None = None,
        sampler: Sampler | None = None,
    ) -> Float[Tensor, "drawn *latent_shape"]:
        """The latents of `sample`, drawn `sampling.batch_size` at a time.

        Args:
            guide: what `guide` gives of the prompts; None is the empty prompt, in a run with text.
        """
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        prior, settings = self.trained_prior, self.sampling_settings(steps, sampler)
        seeds = seeds_for(seed, count * (1 if guide is None else len(guide)), start)
        parts = []
        for rows in torch.arange(len(seeds)).split(self.experiment.sampling.batch_size):
            if guide is not None:
                settings["guidance"] = guide.rows(rows // count).to(self.device)
            parts.append(prior.sample(seeds[rows].to(self.device), **settings))
        return torch.cat(parts)

    def guide(
        self,
        text: str | Sequence[str] | None = None,
        *,
        negative_text: str | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
    ) -> Guidance | None:
        """Prompts as what samples are guided towards, one row for each; None of a run without text.

        Raises ValueError where there is nothing to guide, or a number lies outside its range. Arguments as for
        `sample`.
        """
        given = {"text": text, "negative_text": negative_text, "guidance": guidance}
        given |= {"guidance_interval": guidance_interval, "guidance_rescale": guidance_rescale}
        named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        if self.experiment.text is None:
            if named:
                raise ValueError(
                    f"{named[0]}: {self.folder} was trained without text; leave it out, or give a run of a preset with "
                    "text, such as furniture-shape-text"
                )
            return None
        if text is None and named:
            raise ValueError(f"{named[0]} has no prompt that it could guide towards; give text, or leave it out")
        prompts = [text] if isinstance(text, str) else [""] if text is None else list(text)
        if not prompts:
            raise ValueError("text=[] holds no prompt; give one or more, or leave it out")
        own = {name: value for name, value in given.items() if value is not None and name.startswith("guidance")}
        settings = override(self.experiment, {f"sampling.{name}": value for name, value in own.items()}).sampling
        for name in _IDLE_AT.get(settings.guidance, ()):
            if given[name]:
                logger.warning("%s=%r has no influence at guidance=%g", name, given[name], settings.guidance)
        embedded = self.embed([*prompts, negative_text or ""])
        last = torch.full((len(prompts),), len(prompts))
        return Guidance(
            embedded.rows(slice(len(prompts))),
            embedded.rows(last),
            scale=settings.guidance if text is not None else 1.0,
            interval=settings.guidance_interval,
            rescale=settings.guidance_rescale,
        )

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> TextCondition:
        """Prompts as the run's text encoder embeds them: from the table of its captions, and by the encoder, which is
        loaded for them, where they are not in there.

        Raises ValueError where the encoder is not the one that the prior was trained with.
        """
        table = self.text_table
        prompts = [one_line(prompt) for prompt in prompts]
        others = [prompt for prompt in dict.fromkeys(prompts) if prompt not in table]
        known = {prompt: table.tokens(prompt) for prompt in prompts if prompt in table}
        if others:
            encoder = self.load_text_encoder()
            known |= {
                prompt: torch.from_numpy(own).float()
                for prompt, own in zip(others, embedded(others, encoder), strict=True)
            }
        return TextCondition.of_rows([known[prompt] for prompt in prompts])

    def load_text_encoder(self, *, with_images: bool = False) -> TextEncoder:
        """The text encoder of the run, loaded once, with its image tower if it has one and that is asked for.

        Raises ValueError where it cannot be had, or is not the one that the prior was trained with.
        """
        cfg, table = self.experiment.text, self.text_table
        assert cfg is not None
        with_images = with_images and isinstance(cfg, OpenCLIP)
        for kept in (True,) if with_images else (True, False):
            if kept in self._encoders:
                return self._encoders[kept]
        try:
            encoder = cfg.build(with_images=True) if with_images and isinstance(cfg, OpenCLIP) else cfg.build()
        except NoWeights as error:  # of a path on another machine, perhaps
            raise NoWeights(f"{self.folder}/config.json: {error}") from None
        if encoder.sha256 != table.sha256:
            raise ValueError(
                f"{self.folder} was trained with text embedded by {table.identity}, and text.kind={cfg.kind} now "
                f"loads {identity(encoder.name, encoder.sha256)}; bring those weights back"
            )
        self._encoders[with_images] = encoder.to(self.device)
        return encoder

    @torch.no_grad()
    def sample_branches(
        self,
        latents: Float[Tensor, "count layers latent_dim"],
        seeds: Int64[Tensor, " count"],
        *,
        fix_layers: int,
        branches: int,
        steps: int | None = None,
        sampler: Sampler | None = None,
    ) -> tuple[Float[Tensor, "count branches layers latent_dim"], Int64[Tensor, "count branches"]]:
        """Hold the first layers of each latent and draw the others anew, without a prompt, several times (CHINR,
        section 3.3).

        Returns the latents and the seed of each: branch j of a latent has `sample_seed(seed, j)`, and
        `prior.sample(seed, prefix=latent[:, :fix_layers])` draws it again.

        Args:
            seeds: of the latents, which the branches' own are made from (`seeds_for` for those of `sample_latents`).
        """
        prior, settings = self.branching_prior(fix_layers, branches), self.sampling_settings(steps, sampler)
        own = torch.tensor([[sample_seed(int(seed), j) for j in range(branches)] for seed in seeds])
        parts = []
        for rows in torch.arange(own.numel()).split(self.experiment.sampling.batch_size):
            held = latents[rows // branches, :fix_layers]
            parts.append(prior.sample(own.flatten()[rows].to(self.device), prefix=held, **settings))
        return torch.cat(parts).unflatten(0, own.shape), own

    def branching_prior(self, fix_layers: int, branches: int) -> HierarchicalDiffusionModel:
        """The prior. Raises ValueError where `sample_branches` cannot be had of it."""
        prior = self.trained_prior
        if not isinstance(prior, HierarchicalDiffusionModel):
            raise ValueError(
                f"fix_layers={fix_layers}: this run's prior, {self.experiment.prior.kind}, draws a latent as a whole; "
                "give a run of hierarchical-diffusion (jobs/train_chinr.py)"
            )
        num_layers = prior.latent_shape[0]
        if not 0 <= fix_layers <= num_layers:
            raise ValueError(f"fix_layers={fix_layers} must lie in 0..{num_layers}, the layers of this run's network")
        if branches < 1:
            raise ValueError(f"branches={branches} must be at least 1")
        return prior

    @property
    def text_table(self) -> TextTable:
        """The embeddings of its captions. Raises ValueError where the run has not come that far."""
        if self.texts is None:
            raise ValueError(f"{self.folder}/text/table.json does not exist: {_UNFINISHED}")
        return self.texts

    @property
    def trained_prior(self) -> LatentPrior:
        """The prior. Raises ValueError where the run has not come that far."""
        if self.prior is None:
            raise ValueError(f"{self.folder}/prior/model.safetensors does not exist: {_UNFINISHED}")
        return self.prior

    def sampling_settings(self, steps: int | None, sampler: Sampler | None) -> dict[str, Any]:
        """How `prior.sample` is told to draw, without a prompt; None takes the run's own."""
        sampling, guide = self.experiment.sampling, self.guide()
        return {
            "steps": sampling.steps if steps is None else steps,
            "sampler": sampler or sampling.sampler,
            "guidance": None if guide is None else guide.to(self.device),
        }

    @torch.no_grad()
    def encode(self, source: str | Path | Sequence[str | Path] | Signal) -> Field:
        """One's own files, or a batch of signals, as functions (the posterior mean)."""
        if isinstance(source, Signal):
            return self.decode(self.autoencoder.encode(source.to(self.device)))
        paths = [source] if isinstance(source, str | Path) else list(source)
        signals = [self.domain.open(Path(path)) for path in paths]  # of whatever sizes: encoded one by one
        return self.decode(torch.cat([self.autoencoder.encode(signal.to(self.device)) for signal in signals]))

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "batch *latent_shape"]) -> Field:
        """The functions that latents stand for."""
        return self.autoencoder.decode(latent.to(self.device))


def load(run: str | Path, *, device: str | torch.device | None = None) -> FieldModel:
    """Rebuild a run's model from its config.json and safetensors (float16 files become float32).

    Args:
        run: a run folder, such as runs/ddmi/furniture-image.
        device: None takes a GPU where there is one.
    """
    folder = Path(run).expanduser()
    experiment = read_experiment(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    autoencoder = experiment.autoencoder.build(experiment.domain)
    load_weights(autoencoder, folder / "autoencoder" / "model.safetensors")
    prior = None
    if (folder / "prior" / "model.safetensors").exists():
        prior = experiment.prior.build(autoencoder.latent_shape)
        load_weights(prior, folder / "prior" / "model.safetensors")
        prior = prior.to(device)
    texts = None
    if experiment.text is not None and (folder / "text" / "table.json").exists():
        texts = TextTable.open(folder / "text")
    return FieldModel(experiment, folder, autoencoder.to(device).for_sampling(), prior, device, texts)


def read_experiment(folder: Path) -> Experiment:
    """The resolved config of a run folder."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a run folder, such as runs/ddmi/furniture-image")
    if not path.is_file():
        inside = sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")])
        near = [f.parent for f in [*(p / "config.json" for p in list(folder.parents)[:3]), *inside] if f.is_file()]
        hint = f"did you mean {near[0]}?" if near else "give the folder that a training job wrote"
        raise ValueError(f"{folder} is not a run folder: it has no config.json; {hint}")
    try:
        return from_json(Experiment, path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def load_weights(module: nn.Module, path: Path) -> None:
    """Read weights into a freshly built module and set it to evaluation mode, without gradients."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {_UNFINISHED}")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}; copy the run again or retrain it") from None
    set_weights(module, weights, source=str(path))


def set_weights(module: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Set the weights of a freshly built module, and set it to evaluation mode, without gradients."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if expected != found:
        name = min(name for name in expected | found if expected.get(name) != found.get(name))
        shapes = [list(shape) if shape is not None else "absent" for shape in (found.get(name), expected.get(name))]
        raise ValueError(
            f"{source} does not fit the run's config.json: {name} is {shapes[0]} in the file and {shapes[1]} in the "
            "model; both must come from the same run"
        )
    module.load_state_dict(weights)  # into float32, whatever the file's precision
    module.eval().requires_grad_(False)


_IDLE_AT = {1.0: ("negative_text", "guidance_interval", "guidance_rescale"), 0.0: ("guidance_rescale",)}
"""Options without influence at some scales of guidance."""

_UNFINISHED = "the run has not come that far; run its training job to the end, or give another run folder"
