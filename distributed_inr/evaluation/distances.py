"""How far samples are from training signals: the nearest, features of networks, and surfaces."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distributed_inr.data import storage
from distributed_inr.domains import AnyDomain
from distributed_inr.evaluation import metrics
from distributed_inr.evaluation.report import Pictures
from distributed_inr.evaluation.splits import SHOWN, Advance, Known, Split
from distributed_inr.field import Field
from distributed_inr.generation import FieldModel, set_weights
from distributed_inr.models import LatentPrior
from distributed_inr.training import checkpoint

CHECKPOINT_SAMPLES = 64
"""Samples drawn from each kept checkpoint of the prior, for the course of KID through training."""


@dataclass(frozen=True)
class Traits:
    """What distances need of many renderings, on the CPU.

    Attributes:
        thumbnails: as `Domain.thumbnails`.
        features: of their pictures, by each network.
        surfaces: points, where they were asked for and the domain has surfaces.
    """

    thumbnails: Float[Tensor, "count numbers"]
    features: list[Float[Tensor, "count _"]]
    surfaces: Float[Tensor, "count points 3"] | None


@dataclass(frozen=True)
class Observer:
    """Takes the traits of renderings batch by batch: all of them might not fit the memory.

    Attributes:
        surface_points: of each surface; 0 takes none.
    """

    domain: AnyDomain
    networks: Sequence[nn.Module]
    surface_points: int

    def traits(self, renderings: Iterable[Tensor], advance: Advance) -> Traits:
        thumbnails, features, surfaces = [], [], []
        for rendered in renderings:
            pictures = self.domain.pictures(rendered) if self.networks else None
            thumbnails.append(self.domain.thumbnails(rendered).cpu())
            features.append([network(pictures).cpu() for network in self.networks])
            if self.surface_points and (surface := self.domain.surface(rendered, self.surface_points)) is not None:
                surfaces.append(surface.cpu())
            advance(len(rendered))
        return Traits(
            torch.cat(thumbnails),
            [torch.cat(parts) for parts in zip(*features, strict=True)],
            torch.cat(surfaces) if surfaces else None,
        )

    def of(self, split: Split, most: int, advance: Advance) -> Traits:
        """The traits of at most so many signals of a set, evenly spaced."""
        signals = split.batches(split.spread(most))
        return self.traits((self.domain.truth(signal) for signal in signals), advance)


def distances(
    model: FieldModel,
    training: Split,
    held_out: Split | None,
    known: Known | None,
    pictures: Pictures,
    advance: Advance,
    left_out: dict[str, str],
) -> dict[str, Any]:
    """Draw samples and measure them beside the training signals, and held-out signals beside the same.

    Args:
        known: of the training signals; None where their renderings are not comparable with samples'.
    """
    evaluation, domain = model.experiment.evaluation, model.domain
    drawn = num_samples(model) if known is not None else model.experiment.sampling.count
    latents = model.sample_latents(drawn, seed=model.experiment.seed)
    pictures.samples = _sheets(model, latents)
    if known is None:
        return {}
    networks: list[nn.Module] = []
    if evaluation.num_samples < 2:
        reason = f"evaluation.num_samples={evaluation.num_samples}: distances between distributions need 2 or more"
        left_out |= {"kid_efficientnet_lite0": reason, "fid, precision, recall": reason}
    else:
        networks = [metrics.EfficientNetLite0().to(model.device)]
        if evaluation.inception_weights is not None:
            networks.append(metrics.Inception(Path(evaluation.inception_weights).expanduser()).to(model.device))
    observer = Observer(domain, networks, evaluation.surface_points if networks else 0)
    sampled = observer.traits(_renderings(model, latents), advance)
    of_held_out = replace(observer, networks=networks[:1])  # no other network's features are compared
    other = None if held_out is None else of_held_out.of(held_out, num_held_out(model), advance)
    found = _neighbours(model, latents, sampled, other, training, known, pictures)
    if not networks:
        return found

    count = evaluation.num_samples
    surfaces = None if sampled.surfaces is None else sampled.surfaces[:count]
    sampled = Traits(sampled.thumbnails[:count], [rows[:count] for rows in sampled.features], surfaces)
    reference = observer.of(training, 2 * count, advance)
    found["kid_efficientnet_lite0"] = _kid(sampled, other, reference, pictures)
    few = replace(observer, networks=networks[:1], surface_points=0)
    found["kid_efficientnet_lite0_by_checkpoint"] = _course(model, few, sampled, reference, advance, left_out)
    if sampled.surfaces is not None:
        found["surfaces"] = _surfaces(sampled, other, reference)
    if evaluation.inception_weights is None:
        left_out["fid, precision, recall"] = "evaluation.inception_weights is not set; no package brings these weights"
    else:
        inception = networks[1]
        assert isinstance(inception, metrics.Inception)
        found["inception"] = {
            **metrics.frechet_precision_recall(sampled.features[1], reference.features[1]),
            "weights_sha256": inception.sha256,
            "samples": len(sampled.thumbnails),
            "training_signals": len(reference.thumbnails),
        }
    return found


def num_samples(model: FieldModel) -> int:
    """Samples that an evaluation draws."""
    return max(model.experiment.evaluation.num_samples, model.experiment.sampling.count)


def num_held_out(model: FieldModel) -> int:
    """Held-out signals that are compared with the training signals as samples are: of distances between distributions,
    as many.
    """
    count = model.experiment.evaluation.num_samples
    return count if count >= 2 else num_samples(model)


def checkpoints(model: FieldModel) -> dict[int, str | None]:
    """By samples seen, oldest first: the prior's kept checkpoints; None for the last of a finished run, which is the
    model itself.
    """
    experiment = model.experiment
    place = str(model.folder / "prior" / "checkpoints")  # the run may have been moved
    if experiment.checkpoints is not None:
        place = experiment.checkpoints_of("prior")
    paths = {int(name): storage.join(place, name) for name in checkpoint.committed(place)}
    return {seen: None if seen >= experiment.prior_training.num_samples else path for seen, path in paths.items()}


def _fields(model: FieldModel, latents: Tensor) -> Iterator[Field]:
    """The functions of many latents, a batch at a time: basis fields are much larger than latents."""
    return (model.decode(part) for part in latents.split(model.experiment.evaluation.batch_size))


def _renderings(model: FieldModel, latents: Tensor) -> Iterator[Tensor]:
    return (fields.render(model.domain.size) for fields in _fields(model, latents))


def _sheets(model: FieldModel, latents: Tensor) -> dict[int, Tensor]:
    """Pictures of the first samples at the base resolution and a finer one."""
    domain, few = model.domain, latents[: model.experiment.sampling.count]
    return {
        resolution: torch.cat([domain.pictures(fields.render(resolution)).cpu() for fields in _fields(model, few)])
        for resolution in (domain.size, domain.fine * domain.size)
    }


def _neighbours(
    model: FieldModel,
    latents: Tensor,
    sampled: Traits,
    held_out: Traits | None,
    training: Split,
    known: Known,
    pictures: Pictures,
) -> dict[str, Any]:
    """How far samples are from the training signals, beside how far held-out signals are."""
    domain, device = model.domain, training.device
    away, places = known.nearest(sampled.thumbnails.to(device))
    found: dict[str, Any] = {
        "median": away.median().item(),
        "smallest": away.min().item(),
        "distance": f"root mean square difference of {known.copies[0].shape[1]} numbers of each {domain.noun}, to the "
        f"nearest training {domain.noun}" + " or its augmented copy" * (len(known.copies) > 1),
        "samples": len(latents),
        "training_signals": len(known.numbers),
    }
    if held_out is not None:
        calibration = known.nearest(held_out.thumbnails.to(device))[0]
        found |= {"held_out_median": calibration.median().item(), "held_out_signals": len(calibration)}
        pictures.held_out_distance = found["held_out_median"]
    samples = torch.cat([domain.pictures(rendered).cpu() for rendered in _renderings(model, latents[:SHOWN])])
    for sample, distance, (number, copy) in zip(samples, away.tolist(), places, strict=False):
        neighbour = domain.truth(domain.copies(training.one(number))[copy])
        pictures.neighbours.append((sample, domain.pictures(neighbour)[0].cpu(), distance))
    return {"neighbours": found}


def _kid(sampled: Traits, held_out: Traits | None, reference: Traits, pictures: Pictures) -> dict[str, Any]:
    """Kernel distance to training signals on EfficientNet-Lite0's features, of samples and of held-out signals."""
    value, error = metrics.kid(sampled.features[0], reference.features[0])
    pixels = pictures.samples[pictures.domain.size].shape[-1]
    found = {
        "value": value,
        "standard_error": error,
        "network": f"EfficientNet-Lite0 (ImageNet), pictures of {pixels} px brought to {metrics.EFFICIENTNET_PIXELS}",
        "samples": len(sampled.thumbnails),
        "training_signals": len(reference.thumbnails),
    }
    if held_out is not None:
        value, error = metrics.kid(held_out.features[0], reference.features[0])
        found |= {"held_out_value": value, "held_out_standard_error": error}
    return found


def _course(
    model: FieldModel,
    observer: Observer,
    sampled: Traits,
    reference: Traits,
    advance: Advance,
    left_out: dict[str, str],
) -> list[dict[str, Any]]:
    """Kernel distance of a few samples from each kept checkpoint of the prior."""
    course, few = [], min(CHECKPOINT_SAMPLES, len(sampled.thumbnails))
    for seen, path in checkpoints(model).items():
        then = sampled.features[0][:few]
        if path is not None:
            try:
                prior = _prior_of(model, path)
            except ValueError as error:
                left_out[f"kid_efficientnet_lite0_by_checkpoint of {seen}"] = str(error)
                advance(few)
                continue
            latents = replace(model, prior=prior).sample_latents(few, seed=model.experiment.seed)
            then = observer.traits(_renderings(model, latents), advance).features[0]
        value, error = metrics.kid(then, reference.features[0])
        course.append({"samples_seen": seen, "value": value, "standard_error": error, "samples": few})
    return course


def _surfaces(sampled: Traits, held_out: Traits | None, reference: Traits) -> dict[str, Any]:
    """Minimum matching distance and coverage of samples' surfaces against training surfaces, by Chamfer distance."""
    own, training = sampled.surfaces, reference.surfaces
    assert own is not None and training is not None
    distance, coverage = metrics.matching(own, training)
    found: dict[str, Any] = {
        "mmd": distance,
        "coverage": coverage,
        "points": own.shape[1],
        "samples": len(own),
        "training_signals": len(training),
        "empty_samples": int(own.isnan().flatten(1).any(1).sum()),
    }
    if held_out is not None and held_out.surfaces is not None:
        distance, coverage = metrics.matching(held_out.surfaces, training)
        found |= {"held_out_mmd": distance, "held_out_coverage": coverage, "held_out_signals": len(held_out.surfaces)}
    return found


def _prior_of(model: FieldModel, path: str) -> LatentPrior:
    """The prior as a checkpoint has it, averaged where an average was kept."""
    prior = model.experiment.prior.build(model.autoencoder.latent_shape)
    average = model.experiment.prior_training.ema_half_life_samples > 0
    set_weights(prior, checkpoint.weights(path, average=average), source=path)
    return prior.to(model.device)
