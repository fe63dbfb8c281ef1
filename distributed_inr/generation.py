"""Generation: a finished run as a model whose samples are functions, and those functions as files.

    model = load("runs/ddmi/furniture-image")
    fields = model.sample(4, seed=0)             # four functions
    fields = model.encode("chair.png")           # one's own picture as a function
    fields.render(resolution=256)

Needs neither Ray nor DeepSpeed nor webdataset.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from distributed_inr.config import from_json, to_json
from distributed_inr.domains import AnyDomain, Signal
from distributed_inr.domains.domain import seeds_for
from distributed_inr.experiment import DEFAULT_OUTPUT, Experiment
from distributed_inr.field import Field
from distributed_inr.models import FieldAutoencoder, LatentPrior
from distributed_inr.models.hierarchical_diffusion import HierarchicalDiffusionModel
from distributed_inr.models.noising import Sampler
from distributed_inr.randomness import sample_seed
from distributed_inr.sheets import fit, in_rows, sheet

_SHEET_PICTURES = 64
_SHEET_CELL = 256


@dataclass(frozen=True)
class FieldModel:
    """The domain, autoencoder and prior of a finished run, in evaluation mode.

    Attributes:
        prior: None while a run has only its autoencoder; such a model encodes but does not sample.
    """

    experiment: Experiment
    folder: Path
    autoencoder: FieldAutoencoder
    prior: LatentPrior | None
    device: torch.device

    @property
    def domain(self) -> AnyDomain:
        return self.experiment.domain

    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        start: int = 0,
        steps: int | None = None,
        sampler: Sampler | None = None,
    ) -> Field:
        """Draw functions. The i-th depends on (seed, start + i) only: large numbers can be drawn piece by piece.

        Args:
            steps: network evaluations a sample; None takes the run's own, as for `sampler`.
        """
        return self.decode(self.sample_latents(count, seed=seed, start=start, steps=steps, sampler=sampler))

    @torch.no_grad()
    def sample_latents(
        self,
        count: int,
        *,
        seed: int = 0,
        start: int = 0,
        steps: int | None = None,
        sampler: Sampler | None = None,
    ) -> Float[Tensor, "count *latent_shape"]:
        """The latents of `sample`, drawn `sampling.batch_size` at a time."""
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        prior, settings = self.trained_prior, self.sampling_settings(steps, sampler)
        seeds = seeds_for(seed, count, start).split(self.experiment.sampling.batch_size)
        return torch.cat([prior.sample(part.to(self.device), **settings) for part in seeds])

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
        """Hold the first layers of each latent and draw the others anew, several times (CHINR, section 3.3).

        Returns the latents and the seed of each: branch j of a latent has `sample_seed(seed, j)`, and
        `prior.sample(seed, prefix=latent[:, :fix_layers])` draws it again.

        Args:
            seeds: of the latents, which the branches' own are made from (`seeds_for` for those of `sample_latents`).
        """
        prior, settings = self.branching_prior(fix_layers, branches), self.sampling_settings(steps, sampler)
        own = torch.tensor([[sample_seed(int(seed), j) for j in range(branches)] for seed in seeds])
        held = latents[:, :fix_layers].repeat_interleave(branches, dim=0)
        size = self.experiment.sampling.batch_size
        parts = [
            prior.sample(part.to(self.device), prefix=prefix, **settings)
            for part, prefix in zip(own.flatten().split(size), held.split(size), strict=True)
        ]
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
    def trained_prior(self) -> LatentPrior:
        """The prior. Raises ValueError where the run has not come that far."""
        if self.prior is None:
            raise ValueError(f"{self.folder}/prior/model.safetensors does not exist: {_UNFINISHED}")
        return self.prior

    def sampling_settings(self, steps: int | None, sampler: Sampler | None) -> dict[str, Any]:
        """How `prior.sample` is told to draw; None takes the run's own."""
        sampling = self.experiment.sampling
        return {"steps": sampling.steps if steps is None else steps, "sampler": sampler or sampling.sampler}

    @torch.no_grad()
    def encode(self, source: str | Path | Sequence[str | Path] | Signal) -> Field:
        """One's own files, or a batch of signals, as functions (the posterior mean)."""
        if not isinstance(source, Signal):
            paths = [source] if isinstance(source, str | Path) else list(source)
            source = _batch([self.domain.open(Path(path)) for path in paths])
        return self.decode(self.autoencoder.encode(source.to(self.device)))

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
    return FieldModel(experiment, folder, autoencoder.to(device).for_sampling(), prior, device)


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


def sample_files(
    model: FieldModel,
    out: Path | None = None,
    *,
    count: int = 16,
    resolution: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    sampler: Sampler | None = None,
    fix_layers: int | None = None,
    branches: int | None = None,
) -> list[Path]:
    """Write `count` samples, each to a file of its own, and one sheet of them. Returns their paths, the sheet last.

    Args:
        out: None takes `samples` inside the run folder, or in the working directory where the run is read-only.
        resolution: pixels a side; None takes the domain's base resolution.
        fix_layers: of each sample, hold the latents of so many first layers and draw the others anew, `branches` times:
            a row of the sheet for each sample, itself first. A .json beside the sheet says each one's seed.
        branches: None takes 4.
    """
    resolution = check_resolution(model, resolution)
    if fix_layers is None and branches is not None:
        raise ValueError(f"branches={branches} redraws layers after held ones; say how many with fix_layers")
    branches = 4 if branches is None else branches
    if fix_layers is not None:
        model.branching_prior(fix_layers, branches)
    latents = model.sample_latents(count, seed=seed, steps=steps, sampler=sampler)
    seeds, columns = seeds_for(seed, count), None
    if fix_layers is not None:
        columns = 1 + branches
        drawn, own = model.sample_branches(
            latents, seeds, fix_layers=fix_layers, branches=branches, steps=steps, sampler=sampler
        )
        latents = torch.cat([latents[:, None], drawn], dim=1).flatten(0, 1)
        seeds = torch.cat([seeds[:, None], own], dim=1).flatten()
    out = make_folder(out or default_folder(model.folder, "samples"))
    held = "" if fix_layers is None else f"-fix{fix_layers}"
    domain = model.domain
    stem, digits = f"seed{seed}{held}-{resolution}{domain.unit}", max(3, len(str(len(latents) - 1)))
    row = columns or 1
    most = _SHEET_PICTURES // row * row or row
    title = f"the first {most // row} of {count} samples" if len(latents) > most else ""
    paths, shown = [], []
    for latent in latents:
        rendered = model.decode(latent[None]).render(resolution).cpu()
        paths.append(out / f"{stem}-{len(paths):0{digits}d}{domain.suffix}")
        domain.save(rendered[0], paths[-1])
        if len(shown) < most:
            shown.append(fit(domain.pictures(rendered)[0], min(_SHEET_CELL, max(resolution, 128))))
    if columns is None:
        paths.append(out / f"{stem}-sheet.png")
        sheet(in_rows(shown), title=title).save(paths[-1])
        return paths
    nodes = [
        {
            "file": path.name,
            "seed": int(own),
            "sample": i // columns,
            "branch": i % columns - 1 if i % columns else None,
        }
        for i, (path, own) in enumerate(zip(paths, seeds, strict=True))
    ]
    paths.append(out / f"{stem}-seeds.json")
    paths[-1].write_text(json.dumps({"fix_layers": fix_layers, "nodes": nodes}, indent=1) + "\n")
    rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    titles = ["sample", *[f"branch {j}" for j in range(branches)]]
    along = f"the first {fix_layers} of {model.autoencoder.latent_shape[0]} layers held along each row"
    title = f"{along}; {title}" if title else along
    paths.append(out / f"{stem}-sheet.png")
    sheet(rows, column_titles=titles[: len(rows[0])], title=title).save(paths[-1])
    return paths


def reconstruct_files(
    model: FieldModel, files: Sequence[str | Path], out: Path | None = None, *, resolution: int | None = None
) -> list[Path]:
    """Write each file as its function, read out at any resolution, and a sheet with the original beside it.

    Args:
        out: None takes `reconstructions` inside the run folder, or in the working directory where the run is read-only.
        resolution: pixels a side; None takes the domain's base resolution.
    """
    resolution = check_resolution(model, resolution)
    domain = model.domain
    signals = [domain.open(Path(file)) for file in files]  # all are read before anything is written
    out = make_folder(out or default_folder(model.folder, "reconstructions"))
    paths: list[Path] = []
    for file, signal in zip(files, signals, strict=True):
        rendered = model.encode(signal).render(resolution).cpu()
        stem = f"{Path(file).stem}-{resolution}{domain.unit}"
        while out / f"{stem}{domain.suffix}" in paths:
            stem += "-again"
        paths.append(out / f"{stem}{domain.suffix}")
        domain.save(rendered[0], paths[-1])

        row = domain.shown(signal) | {f"its function, {resolution} {domain.unit}": domain.pictures(rendered)[0]}
        paths.append(out / f"{stem}-beside.png")
        cell = min(max(resolution, 256), 1024)
        sheet([[fit(picture, cell) for picture in row.values()]], column_titles=list(row)).save(paths[-1])
    return paths


def export(run: str | Path, out: Path) -> None:
    """Copy what `load` needs of a finished run to a new folder, with float16 weights, and its report and pictures.

    The report is the run's own, of its float32 weights. Addresses of data and caches stay in config.json as they are.
    """
    model = load(run, device="cpu")
    prior = model.trained_prior
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder with --out, or delete it")
    for name, module in (("autoencoder", model.autoencoder), ("prior", prior)):
        state = module.state_dict()
        weights = {key: (t.half() if t.is_floating_point() else t).contiguous() for key, t in state.items()}
        if not all(t.isfinite().all() for t in weights.values()):
            raise ValueError(f"{model.folder}/{name}: weights beyond 65504 do not fit float16; share the run as it is")
        (make_folder(out / name) / "model.safetensors").write_bytes(serialise(weights))  # with the user's own mode
    experiment = replace(model.experiment, output=DEFAULT_OUTPUT, autoencoder=model.autoencoder.cfg)
    (out / "config.json").write_text(to_json(experiment) + "\n")
    for path in [*model.folder.glob("*.png"), *model.folder.glob("report.md"), *model.folder.glob("evaluation.json")]:
        shutil.copyfile(path, out / path.name)


def default_folder(run: Path, name: str) -> Path:
    """`name` inside the run folder, or in the working directory where the run is read-only."""
    return run / name if os.access(run, os.W_OK) else Path(name)


def make_folder(folder: Path) -> Path:
    """`folder`, made if need be. Raises ValueError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made: {error.strerror}; choose another folder with --out") from None
    return folder


_UNFINISHED = "the run has not come that far; run its training job to the end, or give another run folder"


def _batch(signals: Sequence[Signal]) -> Signal:
    """Batches of one as one batch, without the targets, which may differ in size."""
    return Signal(
        key=[key for signal in signals for key in signal.key],
        seed=torch.cat([signal.seed for signal in signals]),
        position=torch.cat([signal.position for signal in signals]),
        inputs=torch.cat([signal.inputs for signal in signals]),
        text=[text for signal in signals for text in signal.text],
    )


def check_resolution(model: FieldModel, resolution: int | None) -> int:
    """What to read out at; None takes the domain's own. Raises ValueError where no file can be that large."""
    resolution = model.domain.size if resolution is None else resolution
    if not 1 <= resolution <= model.domain.max_resolution:
        raise ValueError(
            f"resolution={resolution} must lie in 1..{model.domain.max_resolution} {model.domain.unit} a side"
        )
    return resolution
