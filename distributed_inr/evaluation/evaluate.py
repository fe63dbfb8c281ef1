"""Evaluation of a finished run, from held-out data: `evaluation.json`, pictures and `report.md`.

Everything runs in the calling process, on the GPU where there is one, with the weights that the run ended with.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distributed_inr.data import storage
from distributed_inr.evaluation import metrics, report
from distributed_inr.evaluation.reconstructions import kept_back, reconstructions
from distributed_inr.evaluation.splits import MAX_TRAINING_SIGNALS, SHOWN, Known, Split, survey
from distributed_inr.field import Field
from distributed_inr.files import make_folder
from distributed_inr.generation import FieldModel, load, set_weights
from distributed_inr.models import LatentPrior
from distributed_inr.training import checkpoint
from distributed_inr.training.checkpoint_reader import BANK

Progress = Callable[[int, int, dict[str, float]], None]
"""Called with (signals done, of how many, {})."""

CHECKPOINT_SAMPLES = 64
"""Samples drawn from each kept checkpoint of the prior, for the course of KID through training."""


@torch.no_grad()
def evaluate(
    run: str | Path, *, out: Path | None = None, allow_pipe: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure a run and write evaluation.json, four pictures and report.md; returns what evaluation.json holds.

    Args:
        run: a run folder.
        out: where to write; None is the run folder.
        allow_pipe: read data from `pipe:` addresses, which run a shell command; the run's own config.json is not asked.
    """
    begin = time.monotonic()
    model = load(run)
    check_pipe(model, allow_pipe=allow_pipe)
    experiment, folder = model.experiment, make_folder(out or model.folder)
    training = Split(model, experiment.data.train)
    held_out = None if experiment.data.val is None else Split(model, experiment.data.val)
    bar = Bar(progress, model, training, held_out)
    pictures = report.Pictures(domain=experiment.domain)
    result: dict[str, Any] = {"run": f"{experiment.family}/{experiment.name}"}
    left_out: dict[str, str] = {}

    known = survey(training, bar.advance)
    if held_out is None:
        left_out["val"] = "data.val is not set: there is nothing held out to reconstruct"
    else:
        result["val"] = reconstructions(model, training, held_out, known, pictures, bar.advance)
    if experiment.domain.kept_back:
        bank = model.folder / "autoencoder" / BANK
        if experiment.bank is not None and not bank.is_file():
            left_out["train"] = f"{bank} does not exist: exported runs are without the latents of their training set"
        else:
            result["train"] = kept_back(model, training, bar.advance)
    if model.prior is None:
        left_out["samples"] = f"{model.folder}/prior/model.safetensors does not exist: the prior is not trained"
    else:
        samples = _render_samples(model, model.sample_latents(_num_samples(model), seed=experiment.seed), pictures, bar)
        result["samples"] = _neighbours(samples, training, held_out, known, pictures)
        result["samples"] |= _distances(model, samples, training, held_out, bar, left_out)

    result |= {"left_out": left_out, "seconds": round(time.monotonic() - begin, 1)}
    names = pictures.write(folder)
    storage.write_atomic(str(folder / "evaluation.json"), json.dumps(result, indent=2).encode() + b"\n")
    (folder / "report.md").write_text(report.markdown(experiment, result, names))
    bar.finish()
    return result


def _render_samples(model: FieldModel, latents: Tensor, pictures: report.Pictures, bar: "Bar") -> Tensor:
    """Renderings of samples at the base resolution; the first few also at a finer one, for the sheets."""
    domain, few = model.domain, model.experiment.sampling.count
    base = torch.cat([fields.render(domain.size).cpu() for fields in _decode(model, latents)])
    fine = domain.fine * domain.size
    shown = [domain.pictures(fields.render(fine)).cpu() for fields in _decode(model, latents[:few])]
    pictures.samples = {domain.size: domain.pictures(base[:few]), fine: torch.cat(shown)}
    bar.advance(len(latents))
    return base


def _neighbours(
    samples: Tensor, training: Split, held_out: Split | None, known: Known, pictures: report.Pictures
) -> dict[str, Any]:
    """How far samples are from the training signals, beside how far held-out signals are."""
    domain = training.domain
    distances, places = known.nearest(domain.thumbnails(samples.to(training.device)))
    found: dict[str, Any] = {
        "median": distances.median().item(),
        "smallest": distances.min().item(),
        "distance": f"root mean square difference of {known.copies[0].shape[1]} numbers of each {domain.noun}, to the "
        f"nearest training {domain.noun}" + " or its augmented copy" * (len(known.copies) > 1),
        "samples": len(samples),
        "training_signals": len(known.numbers),
    }
    if held_out is not None:
        batches = held_out.batches(held_out.spread(len(samples)))
        thumbnails = (domain.thumbnails(domain.truth(signal)) for signal in batches)
        calibration = torch.cat([known.nearest(part)[0] for part in thumbnails])
        found |= {"held_out_median": calibration.median().item(), "held_out_signals": len(calibration)}
        pictures.held_out_distance = found["held_out_median"]
    for sample, distance, (number, copy) in list(zip(samples, distances.tolist(), places, strict=True))[:SHOWN]:
        neighbour = domain.truth(domain.copies(training.one(number))[copy]).cpu()
        shown, near = (domain.pictures(rendered)[0] for rendered in (sample[None], neighbour))
        pictures.neighbours.append((shown, near, distance))
    return {"neighbours": found}


def _distances(
    model: FieldModel, samples: Tensor, training: Split, held_out: Split | None, bar: "Bar", left_out: dict[str, str]
) -> dict[str, Any]:
    """Distances between samples and training signals: on networks' features of their pictures, and of surfaces."""
    evaluation, domain = model.experiment.evaluation, model.domain
    if evaluation.num_samples < 2:
        reason = f"evaluation.num_samples={evaluation.num_samples}: distances between distributions need 2 or more"
        left_out |= {"kid_efficientnet_lite0": reason, "fid, precision, recall": reason}
        return {}
    samples = samples[: evaluation.num_samples]
    numbers = training.spread(2 * len(samples))
    sampled = [domain.pictures(part) for part in samples.split(evaluation.batch_size)]

    def pictures_of(split: Split, chosen: Sequence[int]) -> Iterator[Tensor]:
        return (domain.pictures(domain.truth(signal)) for signal in split.batches(chosen))

    network = metrics.EfficientNetLite0().to(model.device)
    reference = _features(network, pictures_of(training, numbers), bar)
    features = _features(network, sampled, bar)
    value, error = metrics.kid(features, reference)
    kid = {
        "value": value,
        "standard_error": error,
        "network": f"EfficientNet-Lite0 (ImageNet), pictures of {sampled[0].shape[-1]} px brought to "
        f"{metrics.EFFICIENTNET_PIXELS}",
        "samples": len(samples),
        "training_signals": len(reference),
    }
    if held_out is not None:
        held_out_pictures = pictures_of(held_out, held_out.spread(len(samples)))
        value, error = metrics.kid(_features(network, held_out_pictures, bar), reference)
        kid |= {"held_out_value": value, "held_out_standard_error": error}
    course, few = [], min(CHECKPOINT_SAMPLES, len(samples))
    for seen, path in _checkpoints(model).items():
        then = features[:few]
        if path is not None:
            try:
                prior = _prior_of(model, path)
            except ValueError as error:
                left_out[f"kid_efficientnet_lite0_by_checkpoint of {seen}"] = str(error)
                bar.advance(few)
                continue
            latents = replace(model, prior=prior).sample_latents(few, seed=model.experiment.seed)
            then = _features(
                network, (domain.pictures(fields.render(domain.size)) for fields in _decode(model, latents)), bar
            )
        value, error = metrics.kid(then, reference)
        course.append({"samples_seen": seen, "value": value, "standard_error": error, "samples": few})
    found: dict[str, Any] = {"kid_efficientnet_lite0": kid, "kid_efficientnet_lite0_by_checkpoint": course}
    if (surface := _surfaces(samples, training, held_out, numbers, evaluation.surface_points)) is not None:
        found["surfaces"] = surface

    if evaluation.inception_weights is None:
        left_out["fid, precision, recall"] = "evaluation.inception_weights is not set; no package brings these weights"
    else:
        inception = metrics.Inception(Path(evaluation.inception_weights).expanduser()).to(model.device)
        reference = _features(inception, pictures_of(training, numbers), bar)
        measured = metrics.frechet_precision_recall(_features(inception, sampled, bar), reference)
        found["inception"] = {
            **measured,
            "weights_sha256": inception.sha256,
            "samples": len(samples),
            "training_signals": len(reference),
        }
    return found


def _surfaces(
    samples: Tensor, training: Split, held_out: Split | None, numbers: Sequence[int], points: int
) -> dict[str, Any] | None:
    """Minimum matching distance and coverage of samples' surfaces against training surfaces, by Chamfer distance."""
    domain = training.domain
    found = domain.surface(samples, points)
    if found is None:
        return None

    def of(split: Split, chosen: Sequence[int]) -> Tensor:
        parts = [domain.surface(domain.truth(signal), points) for signal in split.batches(chosen)]
        return torch.cat([part.cpu() for part in parts if part is not None])  # where the samples are

    reference = of(training, numbers)
    distance, coverage = metrics.matching(found, reference)
    result: dict[str, Any] = {
        "mmd": distance,
        "coverage": coverage,
        "points": points,
        "samples": len(found),
        "training_signals": len(reference),
        "empty_samples": int(found.isnan().flatten(1).any(1).sum()),
    }
    if held_out is not None:
        other = of(held_out, held_out.spread(len(samples)))
        distance, coverage = metrics.matching(other, reference)
        result |= {"held_out_mmd": distance, "held_out_coverage": coverage, "held_out_signals": len(other)}
    return result


class Bar:
    """Counts signals against how many there will be."""

    def __init__(self, progress: Progress | None, model: FieldModel, training: Split, held_out: Split | None) -> None:
        self.progress, self.done = progress, 0
        evaluation = model.experiment.evaluation
        self.total = len(training.spread(MAX_TRAINING_SIGNALS))
        if held_out is not None:
            self.total += len(held_out.spread(evaluation.max_reconstructions))
        if model.domain.kept_back:
            self.total += len(training.spread(evaluation.max_reconstructions))
        if model.prior is not None:
            self.total += _num_samples(model)
            if evaluation.num_samples >= 2:
                networks = 1 if evaluation.inception_weights is None else 2
                self.total += networks * (evaluation.num_samples + len(training.spread(2 * evaluation.num_samples)))
                self.total += 0 if held_out is None else len(held_out.spread(evaluation.num_samples))
                earlier = [path for path in _checkpoints(model).values() if path is not None]
                self.total += min(CHECKPOINT_SAMPLES, evaluation.num_samples) * len(earlier)

    def advance(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, {})

    def finish(self) -> None:
        self.advance(self.total - self.done)


def check_pipe(model: FieldModel, *, allow_pipe: bool) -> None:
    """Refuse to run commands that a run folder, perhaps somebody else's, names as its data."""
    data = model.experiment.data
    if data.allow_pipe and not allow_pipe:
        raise ValueError(
            f"{model.folder}/config.json has data.allow_pipe=true: reading its data could run the commands in "
            f"data.train={data.train!r} or data.val={data.val!r}; give --allow-pipe if you trust them"
        )


def _num_samples(model: FieldModel) -> int:
    return max(model.experiment.evaluation.num_samples, model.experiment.sampling.count)


def _decode(model: FieldModel, latents: Tensor) -> Iterator[Field]:
    """The functions of many latents, a batch at a time: basis fields are much larger than latents."""
    for part in latents.split(model.experiment.evaluation.batch_size):
        yield model.decode(part)


def _features(network: nn.Module, batches: Iterator[Tensor] | Sequence[Tensor], bar: Bar) -> Tensor:
    parts = []
    for pictures in batches:
        device = next(network.buffers()).device
        parts.append(network(pictures.to(device)).cpu())
        bar.advance(len(pictures))
    return torch.cat(parts)


def _checkpoints(model: FieldModel) -> dict[int, str | None]:
    """By samples seen, oldest first: the prior's kept checkpoints; None for the last of a finished run, which is the
    model itself.
    """
    experiment = model.experiment
    place = str(model.folder / "prior" / "checkpoints")  # the run may have been moved
    if experiment.checkpoints is not None:
        place = experiment.checkpoints_of("prior")
    paths = {int(name): storage.join(place, name) for name in checkpoint.committed(place)}
    return {seen: None if seen >= experiment.prior_training.num_samples else path for seen, path in paths.items()}


def _prior_of(model: FieldModel, path: str) -> LatentPrior:
    """The prior as a checkpoint has it, averaged where an average was kept."""
    prior = model.experiment.prior.build(model.autoencoder.latent_shape)
    average = model.experiment.prior_training.ema_half_life_samples > 0
    set_weights(prior, checkpoint.weights(path, average=average), source=path)
    return prior.to(model.device)
