"""How well samples follow their text, how different those of one text are, and whether they are copies."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from scipy.spatial import KDTree
from torch import Tensor, nn

from distributed_inr.data.layouts.captions import with_article
from distributed_inr.data.layouts.item import in_words
from distributed_inr.domains import AnyDomain
from distributed_inr.evaluation import classifier as classification
from distributed_inr.evaluation import metrics
from distributed_inr.evaluation.classifier import Classifier, labelled, unseen_captions
from distributed_inr.evaluation.distances import Observer, Traits
from distributed_inr.evaluation.splits import MAX_TRAINING_SIGNALS, Advance, Split, spread
from distributed_inr.generation import FieldModel
from distributed_inr.models import open_clip_zoo
from distributed_inr.models.text import OpenCLIPEncoder

Draw = Callable[[list[str], int], Tensor]
"""Called with prompts and a number of samples for each; gives latents, all of the first prompt first."""

SAMPLES = 10
"""Samples of each prompt: as many as total mutual differences are reported for."""
MAX_CAPTIONS = 32
"""Held-out captions, evenly spaced, that samples are drawn for."""


class ImageTower(nn.Module):
    """The image half of a model such as CLIP, shown pictures as open_clip prepares them: standardised, and either
    `squash`ed to a square, or the middle square of them with the `shortest` side so long.

    Args:
        name: of the model and its weights, for reports.
        encode: `encode_image` of an open_clip model; the others are those of its PreprocessCfg.
    """

    def __init__(
        self,
        name: str,
        encode: Callable[[Tensor], Tensor],
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resize_mode: str = "shortest",
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        self.name, self.encode, self.size, self.squash = name, encode, size, resize_mode == "squash"
        self.mean, self.std = tuple(mean), tuple(std)
        self.interpolation = "bilinear" if interpolation == "bilinear" else "bicubic"

    @staticmethod
    def of(encoder: OpenCLIPEncoder) -> "ImageTower | None":
        """That of an OpenCLIP model which kept it; None where it is not known how it was shown pictures."""
        visual, given = encoder.model.visual, open_clip_zoo.preprocessing(encoder.cfg.model, encoder.cfg.pretrained)
        if given is None:
            return None
        about = {name: visual.preprocess_cfg[name] for name in ("mean", "std", "resize_mode", "interpolation")} | given
        size = visual.image_size if isinstance(visual.image_size, int) else min(visual.image_size)
        return ImageTower(encoder.name, encoder.model.encode_image, size=size, **about)

    def forward(self, pictures: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        height, width = pictures.shape[-2:]
        size = [self.size if self.squash else round(side * self.size / min(height, width)) for side in (height, width)]
        if size != [height, width]:
            pictures = F.interpolate(pictures, size=size, mode=self.interpolation, antialias=True).clamp(0, 1)
        top, left = ((side - self.size) // 2 for side in size)
        pictures = pictures[..., top : top + self.size, left : left + self.size]
        mean, std = pictures.new_tensor(self.mean), pictures.new_tensor(self.std)
        return self.encode((pictures - mean.view(3, 1, 1)) / std.view(3, 1, 1))


def clip_score(images: Float[Tensor, "batch dim"], texts: Float[Tensor, "batch dim"]) -> float:
    """CLIP-S of embedded pictures and their texts: 100 times the mean of max(cos(image, text), 0) (Hessel et al., 2021,
    scale it by 2.5).
    """
    return 100 * F.cosine_similarity(images.float(), texts.float().to(images.device)).clamp(min=0).mean().item()


def total_mutual_difference(samples: Traits, count: int) -> dict[str, Any]:
    """Total mutual difference (Wu et al., 2020): of the k samples of a prompt, the sum of each one's mean distance to
    the other k - 1; the mean of that over prompts. Higher is more diverse.

    TMD = mean over prompts of sum_i 1 / (k - 1) sum_{j != i} d(i, j). The distance d is the Chamfer distance of
    surfaces (squared lengths, where half the cube's side is 1) where there are such, else the root mean square
    difference of thumbnails. Samples without a surface are left out: of a prompt with m < k others, the mean over its
    pairs is taken for all k; a prompt with one or none does not count.

    Args:
        samples: `count` of each prompt, all of the first prompt first.
    """
    values, surfaces = [], samples.surfaces
    rows = samples.thumbnails if surfaces is None else surfaces
    has_surface = ~rows.isnan().flatten(1).any(1)
    for part, usable in zip(rows.split(count), has_surface.split(count), strict=True):
        part = part[usable]
        if len(part) < 2:
            continue
        if surfaces is None:
            values.append(count * (torch.pdist(part.double()) / part.shape[1] ** 0.5).mean().item())
        else:
            values.append(count * _mean_chamfer(part))
    what = "root mean square difference of {} numbers" if surfaces is None else "Chamfer distance of {} surface points"
    found: dict[str, Any] = {
        "value": sum(values) / len(values) if values else None,
        "distance": what.format(rows.shape[1]),
        "samples_per_prompt": count,
        "prompts": len(values),
    }
    return found if surfaces is None else found | {"empty_samples": int((~has_surface).sum())}


def _mean_chamfer(surfaces: Float[Tensor, "count points 3"]) -> float:
    """Mean Chamfer distance of all pairs, by trees: all distances of 2048 points to 2048 take far longer."""
    trees = [KDTree(points.cpu().numpy()) for points in surfaces]
    ways = [(tree.query(other.data)[0] ** 2).mean() for tree, other in permutations(trees, 2)]
    return 2 * float(sum(ways)) / len(ways)  # there and back


def confusion(
    predicted: Int64[Tensor, " count"], true: Int64[Tensor, " count"], classes: Sequence[str]
) -> Int64[Tensor, "true predicted"]:
    """How many of each true class (rows) are taken for each class (columns)."""
    size = len(classes)
    return torch.bincount(true * size + predicted, minlength=size * size).view(size, size)


def nearest_training(domain: AnyDomain, samples: Tensor, training: Split, advance: Advance) -> Float[Tensor, " count"]:
    """How near each sample is to its nearest training signal (of at most 2048, evenly spaced) or its augmented copy:
    the largest IoU where IoU is the domain's first metric, else the smallest root mean square distance of thumbnails.

    Args:
        samples: as `comparand` gives them.
    """
    found, samples, by_iou = [], samples.to(training.device), domain.metrics[0] == "iou"
    for signal in training.batches(training.spread(MAX_TRAINING_SIGNALS)):
        for copy in domain.copies(signal):
            known = comparand(domain, domain.truth(copy))
            if by_iou:
                parts = [_iou(part, known).max(1).values for part in samples.split(training.batch_size)]
                found.append(torch.cat(parts))
            else:
                found.append(metrics.nearest(samples, known)[0])
        advance(len(signal))
    together = torch.stack(found)
    return (together.max(0) if by_iou else together.min(0)).values.cpu()


def comparand(domain: AnyDomain, rendered: Tensor) -> Tensor:
    """What renderings are compared by: their cells where IoU is the domain's first metric, else their thumbnails."""
    return (rendered > 0.5).flatten(1) if domain.metrics[0] == "iou" else domain.thumbnails(rendered)


def _iou(first: Bool[Tensor, "a cells"], second: Bool[Tensor, "b cells"]) -> Float[Tensor, "a b"]:
    both = first.float() @ second.float().T  # whole numbers below 2^24: exact
    union = first.sum(1, keepdim=True) + second.sum(1) - both
    return torch.where(union > 0, both / union.clamp(min=1), 1.0)


@dataclass(frozen=True)
class _Drawn:
    prompts: list[str]
    expected: list[int]
    traits: Traits
    comparands: Tensor


def measure_text(
    model: FieldModel,
    draw: Draw,
    training: Split,
    held_out: Split | None,
    *,
    left_out: dict[str, str],
    count: int = SAMPLES,
    tower: ImageTower | None = None,
    encode_text: Callable[[list[str]], Float[Tensor, "prompts dim"]] | None = None,
    advance: Advance = lambda _: None,
) -> dict[str, Any]:
    """Samples of the words of classes, and of held-out captions that no training signal has, and what is expected of
    either without text. Renderings must be comparable (`Domain.comparable`).

    Args:
        left_out: gets the reasons for what could not be measured.
        count: samples of each prompt, at least 2.
        tower: with `encode_text`, its other half; None leaves CLIP-S out.
        advance: told of signals and samples that are done.
    """
    domain = model.domain
    known, others = labelled(model, training), [] if held_out is None else labelled(model, held_out)
    sizes = Counter(one.name for one in known if one.name)
    large = [name for name, size in sizes.most_common() if size >= classification.MIN_SIGNALS]
    names = sorted(large[: classification.MAX_CLASSES])
    if len(large) > len(names):
        left_out["other classes"] = f"the {len(names)} of the most training signals are told, of {len(large)} classes"
    towers = [] if tower is None or encode_text is None else [tower]
    if not towers:
        left_out.setdefault("clip_s", "the prior's text encoder has no image tower")
    network = metrics.EfficientNetLite0().to(model.device)
    observer = Observer(domain, [network, *towers], model.experiment.evaluation.surface_points)
    plain, told, result = replace(observer, networks=[network], surface_points=0), None, {}
    if len(names) < 2:
        left_out["accuracy by text"] = (
            f"{len(names)} of the classes in the training records have {classification.MIN_SIGNALS} or more signals; "
            "a classifier needs 2 such"
        )
    else:
        told, result["classifier"] = classification.classify(plain, training, known, held_out, others, names, advance)

    def sample(prompts: list[str], expected: list[int]) -> _Drawn:
        latents, size = draw(prompts, count), model.experiment.evaluation.batch_size
        assert len(latents) == len(prompts) * count, f"{len(latents)} latents of {len(prompts)} x {count} samples"
        compared: list[Tensor] = []

        def renderings() -> Iterator[Tensor]:
            for part in latents.split(size):
                rendered = model.decode(part).render(domain.size)
                compared.append(comparand(domain, rendered).cpu())
                yield rendered

        traits = observer.traits(renderings(), advance)
        return _Drawn(prompts, expected, traits, torch.cat(compared))

    sets: dict[str, _Drawn] = {}
    if told is not None:
        sets["class words"] = sample([with_article(in_words(name)).lower() for name in names], list(range(len(names))))
    unseen = unseen_captions(known, others, names if told is not None else [])
    if unseen:
        chosen = [unseen[i] for i in spread(len(unseen), MAX_CAPTIONS)]
        expected = [names.index(name) for _, name in chosen] if told is not None else []
        sets["held-out captions"] = sample([text for text, _ in chosen], expected)
    else:
        of = "" if told is None else " of these classes"
        left_out["held-out captions"] = f"no held-out signal{of} has a caption that no training signal has"
    if not sets:
        return result
    without = sample([""] * max(len(names), 2), [])

    blind = None if told is None else told.predict(without.traits)
    result["samples_per_prompt"] = count
    for what, drawn in sets.items():
        found: dict[str, Any] = {"prompts": drawn.prompts, "samples": len(drawn.comparands)}
        if told is not None and blind is not None:
            found |= _agreement(told, drawn, blind, count)
        if towers and encode_text is not None:
            texts = encode_text(drawn.prompts).repeat_interleave(count, dim=0)
            found["clip_s"] = {"value": clip_score(drawn.traits.features[1], texts), "encoder": towers[0].name}
        result[what] = found | {"tmd": total_mutual_difference(drawn.traits, count)}
    alone = {"samples": len(without.comparands), "tmd": total_mutual_difference(without.traits, count)}
    result["without text"] = alone
    if blind is not None:
        shares = torch.bincount(blind, minlength=len(names)).double() / len(blind)
        result["without text"]["taken_for"] = dict(zip(names, shares.tolist(), strict=True))
    return result | {
        "nearest_training": _nearest(domain, {**sets, "without text": without}, training, held_out, advance)
    }


def _agreement(told: Classifier, drawn: _Drawn, blind: Tensor, count: int) -> dict[str, Any]:
    """How often the classifier finds the prompted class, and how often it would by chance: the expected agreement of
    prompts with samples drawn without text.
    """
    true = torch.tensor(drawn.expected).repeat_interleave(count)
    predicted, size = told.predict(drawn.traits), len(told.classes)
    matrix = confusion(predicted, true, told.classes)
    of_class, by_chance = matrix.sum(1), torch.bincount(blind, minlength=size).double() / len(blind)
    shares = matrix.diagonal().double() / of_class.clamp(min=1)
    return {
        "accuracy": (predicted == true).double().mean().item(),
        "chance": (of_class.double() / len(true) @ by_chance).item(),
        "by_class": {name: shares[i].item() for i, name in enumerate(told.classes) if of_class[i]},
        "chance_by_class": {name: by_chance[i].item() for i, name in enumerate(told.classes) if of_class[i]},
        "confusion": matrix.tolist(),
    }


def _nearest(
    domain: AnyDomain, sets: dict[str, _Drawn], training: Split, held_out: Split | None, advance: Advance
) -> dict[str, Any]:
    """How near samples of each kind, and held-out signals, are to their nearest training signals."""
    parts = {what: drawn.comparands for what, drawn in sets.items()}
    if held_out is not None:
        signals = held_out.batches(held_out.spread(max(len(part) for part in parts.values())))
        parts["held out"] = torch.cat([comparand(domain, domain.truth(signal)).cpu() for signal in signals])
    values = nearest_training(domain, torch.cat(list(parts.values())), training, advance)
    is_iou = domain.metrics[0] == "iou"
    found: dict[str, Any] = {"measure": "IoU" if is_iou else "root mean square difference of thumbnails"}
    for what, own in zip(parts, values.split([len(part) for part in parts.values()]), strict=True):
        nearest = own.max() if is_iou else own.min()
        found[what] = {"median": own.median().item(), "nearest": nearest.item(), "values": own.tolist()}
    return found
