"""Where the latents that are analysed come from: the training set, the held-out set, the prior, or one's own files."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distributed_inr.data import storage
from distributed_inr.data.reader import read_latent
from distributed_inr.evaluation.evaluate import check_pipe
from distributed_inr.evaluation.splits import Split, spread
from distributed_inr.files import check_resolution
from distributed_inr.generation import FieldModel
from distributed_inr.models.hierarchical_diffusion import HierarchicalDiffusionModel
from distributed_inr.models.noising import Sampler
from distributed_inr.randomness import sample_seed

Source = Literal["training", "held-out", "samples"]
"""The training set's written latents, held-out signals encoded, or draws from the prior."""

MOST = 20_000
"""Training latents, evenly spaced, that statistics are taken from unless asked otherwise: they are held in memory."""

_READ_TOGETHER = 1024


@dataclass(frozen=True)
class Latents:
    """Latents of some signals.

    Attributes:
        keys: the signals' keys; an augmented copy's ends in "#1", a sample's is "seed 0, sample 3".
        signals: the same without the "#1": equal for a signal and its copies.
        values: float32 on the CPU, as the autoencoder made them: not z-scored.
    """

    keys: list[str]
    signals: list[str]
    values: Float[Tensor, "count *latent_shape"]
    source: Source | Literal["files"]

    def __len__(self) -> int:
        return len(self.keys)


def choose(
    model: FieldModel,
    source: Source = "training",
    *,
    count: int = 1,
    numbers: Sequence[int] | None = None,
    seed: int = 0,
    steps: int | None = None,
    allow_pipe: bool = False,
) -> Latents:
    """Latents of some signals of one source.

    Args:
        count: evenly spaced ones of a set, or the first draws of the prior.
        numbers: these ones in their place, counted from 0 in the set's own order or from the seed's first draw.
        seed: of the prior's draws; the other sources draw nothing.
        steps: network evaluations a sample; None takes the run's own.
        allow_pipe: read held-out signals from `pipe:` addresses, which run a shell command.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if source == "training":
        return training_latents(model, most=count, numbers=numbers)
    if source == "held-out":
        return held_out_latents(model, most=count, numbers=numbers, allow_pipe=allow_pipe)
    numbers = range(count) if numbers is None else numbers
    if min(numbers, default=0) < 0:
        raise ValueError(f"numbers: {min(numbers)} is negative; a seed's draws are counted from 0")
    seeds = torch.tensor([sample_seed(seed, number) for number in numbers])
    keys = [f"seed {seed}, sample {number}" for number in numbers]
    return Latents(keys, keys, draw(model, seeds, steps=steps), source)


@torch.no_grad()
def draw(
    model: FieldModel, seeds: Int64[Tensor, " count"], *, steps: int | None = None, sampler: Sampler | None = None
) -> Float[Tensor, "count *latent_shape"]:
    """One latent from the prior for each seed, `sampling.batch_size` at a time, on the CPU; None is the run's own."""
    prior, how = model.trained_prior, model.sampling_settings(steps, sampler)
    parts = seeds.split(model.experiment.sampling.batch_size)
    return torch.cat([prior.sample(part.to(model.device), **how).cpu() for part in parts])


def training_latents(model: FieldModel, *, most: int = MOST, numbers: Sequence[int] | None = None) -> Latents:
    """The latents that the prior was trained on: the mean where a latent has a deviation.

    Args:
        most: at most so many, evenly spaced over the set, in which augmented copies count too.
        numbers: these ones in their place.
    """
    parts = list(training_batches(model, most=most, numbers=numbers))
    return Latents(
        [key for part in parts for key in part.keys],
        [signal for part in parts for signal in part.signals],
        torch.cat([part.values for part in parts]),
        "training",
    )


def training_batches(
    model: FieldModel, *, most: int | None = None, numbers: Sequence[int] | None = None
) -> Iterator[Latents]:
    """`training_latents` piece by piece, so that a set of any size can be gone through. Bad records are left out."""
    folder = check_latents(model)
    data = model.experiment.data
    index = data.index(str(folder))
    dataset = data.dataset(index, read=read_latent, seed=model.experiment.seed)
    has_copies = index.protocol.get("copies", 1) > 1
    if numbers is None:
        numbers = spread(len(dataset), len(dataset) if most is None else most)
    _check_numbers(numbers, len(dataset), f"training latents of {model.folder}")
    for first in range(0, len(numbers), _READ_TOGETHER):
        read = [dataset.signal(number) for number in numbers[first : first + _READ_TOGETHER]]
        good = [signal for signal, is_good in read if is_good]
        if good:
            keys = [str(signal.key) for signal in good]
            signals = [re.sub(r"#\d+$", "", key) for key in keys] if has_copies else keys
            yield Latents(keys, signals, torch.stack([signal.inputs[0] for signal in good]), "training")


def check_latents(model: FieldModel) -> Path:
    """The folder of the run's training latents. Raises ValueError where they are not whole, or not its autoencoder's.

    Latents of other weights look like latents, and every figure taken from them would be wrong without showing it.
    """
    folder, weights = model.folder / "latents", model.folder / "autoencoder" / "model.safetensors"
    remedy = "run the training job to the end, or give the folder that it wrote (an exported run has no latents)"
    try:
        record = json.loads((folder / "stage.json").read_text())
        complete, made_by = record["complete"], record["inputs"]["autoencoder"]
    except FileNotFoundError:
        raise ValueError(f"{folder}/stage.json does not exist: there are no training latents; {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/stage.json cannot be read: {error!r}; delete {folder} and {remedy}") from None
    if not complete:
        raise ValueError(f"{folder} is not complete; {remedy}")
    present = storage.sha256_of(weights)
    if made_by != present:
        raise ValueError(
            f"{folder} was written by another autoencoder: sha256 {str(made_by)[:12]} there, {present[:12]} in "
            f"{weights}; delete {folder} and run the training job again"
        )
    return folder


def held_out_latents(
    model: FieldModel, *, most: int, numbers: Sequence[int] | None = None, allow_pipe: bool = False
) -> Latents:
    """Held-out signals encoded by the run's autoencoder (posterior means); arguments as for `choose`."""
    held_out = held_out_split(model, allow_pipe=allow_pipe)
    numbers = held_out.spread(most) if numbers is None else numbers
    _check_numbers(numbers, len(held_out.dataset), f"held-out signals of {model.folder}")
    keys, values = [], []
    for signal in held_out.batches(numbers):
        keys += signal.key
        with torch.no_grad():
            values.append(model.autoencoder.encode(signal).cpu())
    return Latents(keys, keys, torch.cat(values), "held-out")


def file_latents(model: FieldModel, files: Sequence[str | Path]) -> Latents:
    """One's own files encoded."""
    if not files:
        raise ValueError("files are none; give one or more")
    signals = [model.domain.open(Path(file)).to(model.device) for file in files]
    with torch.no_grad():
        values = [model.autoencoder.encode(signal).cpu() for signal in signals]
    keys = [Path(file).name for file in files]
    return Latents(keys, keys, torch.cat(values), "files")


def held_out_split(model: FieldModel, *, allow_pipe: bool = False) -> Split:
    """The held-out set. Raises ValueError where the run has none."""
    url = model.experiment.data.val
    if url is None:
        raise ValueError(f"data.val of {model.folder} is not set: nothing is held out; analyse training latents")
    check_pipe(model, allow_pipe=allow_pipe)
    return Split(model, url)


def hierarchical(model: FieldModel, analysis: str) -> HierarchicalDiffusionModel:
    """The prior of a run that draws its layers one after the other. Raises ValueError where it does not."""
    prior = model.trained_prior
    if not isinstance(prior, HierarchicalDiffusionModel):
        raise ValueError(
            f"prior.kind={model.experiment.prior.kind} of {model.folder} draws all layers at once, and {analysis} "
            "needs them drawn one after the other; give a run with prior.kind hierarchical-diffusion"
        )
    return prior


def num_layers(model: FieldModel, analysis: str) -> int:
    """How many layers have latents of their own. Raises ValueError where not two or more have."""
    shape = model.autoencoder.latent_shape
    if len(shape) != 2 or shape[0] < 2:
        what = "planes" if len(shape) == 3 else "one for all layers"
        raise ValueError(
            f"autoencoder.kind={model.experiment.autoencoder.kind} of {model.folder} has latents of shape "
            f"{list(shape)} ({what}), and {analysis} needs one for each of several layers; give a run with "
            "autoencoder.kind layers-of-experts and autoencoder.modulation layerwise"
        )
    return shape[0]


def check_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    """Layers counted from 1; None is all of them. Raises ValueError for those that there are not."""
    for layer in layers or ():
        if not 1 <= layer <= count:
            raise ValueError(f"layer={layer} must lie in 1..{count}, the run's layers")
    return list(range(1, count + 1)) if layers is None else list(layers)


def statistics(model: FieldModel) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the training latents, as the prior keeps them, on the CPU; they broadcast over a latent."""
    prior = model.trained_prior
    return prior.latent_mean.cpu(), prior.latent_deviation.cpu()


def z_scores(model: FieldModel, values: Float[Tensor, "count *latent_shape"]) -> Float[Tensor, "count *latent_shape"]:
    """Latents less the training latents' mean, over their deviation: per number of vectors, per channel of planes."""
    mean, deviation = statistics(model)
    return (values - mean) / deviation


@torch.no_grad()
def render(
    model: FieldModel, values: Float[Tensor, "count *latent_shape"], resolution: int | None = None
) -> Float[Tensor, "count 3 height width"]:
    """The functions of latents as pictures in [0, 1] on the CPU, decoded a batch at a time.

    Args:
        resolution: of the renderings that are pictured; None takes the domain's base resolution.
    """
    resolution = check_resolution(model, resolution)
    parts = values.split(model.experiment.evaluation.batch_size)
    return torch.cat([model.domain.pictures(model.decode(part).render(resolution)).cpu() for part in parts])


def _check_numbers(numbers: Sequence[int], count: int, what: str) -> None:
    for number in numbers:
        if not 0 <= number < count:
            raise ValueError(f"number {number} must lie in 0..{count - 1}: there are {count} {what}")
