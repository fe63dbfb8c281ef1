"""The report of an evaluation: sheets of labelled pictures, and a page of figures with what they mean."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from distributed_inr.evaluation.metrics import thumbnail_side
from distributed_inr.experiment import Experiment
from distributed_inr.models import LayersOfExperts
from distributed_inr.models.latent_fitting import MetaLearning
from distributed_inr.sheets import fit, in_rows, sheet

_CELL = 128


@dataclass
class Pictures:
    """What the sheets show, gathered while measuring. Pictures are [3, height, width] in [0, 1].

    Attributes:
        reconstructions: for each held-out picture, the columns of its row.
        samples: the same samples at each resolution.
        neighbours: (sample, nearest training picture, distance).
        held_out_distance: median distance of held-out pictures to their nearest training pictures.
    """

    size: int
    reconstructions: list[dict[str, Tensor]] = field(default_factory=list)
    samples: dict[int, Tensor] = field(default_factory=dict)
    neighbours: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    held_out_distance: float | None = None

    def write(self, folder: Path) -> list[str]:
        """Write the sheets that there is something for; returns their names."""
        cell = max(_CELL, self.size)
        names = []
        if self.reconstructions:
            titles = [f"{name}, {self.size} px" if " px" not in name else name for name in self.reconstructions[0]]
            sheet(
                [[fit(picture, cell) for picture in row.values()] for row in self.reconstructions],
                column_titles=[title.replace(", ", "\n") for title in titles],
            ).save(folder / "reconstructions.png")
            names.append("reconstructions.png")
        for resolution, pictures in self.samples.items():
            images = [fit(picture, max(cell, resolution)) for picture in pictures]
            sheet(in_rows(images)).save(folder / f"samples-{resolution}.png")
            names.append(f"samples-{resolution}.png")
        if self.neighbours:
            samples, nearest, distances = zip(*self.neighbours, strict=True)
            title = "root mean square distance to the nearest training picture"
            if self.held_out_distance is not None:
                title += f" (median of held-out pictures: {self.held_out_distance:.3f})"
            blank = [""] * len(samples)
            sheet(
                [[fit(picture, cell) for picture in samples], [fit(picture, cell) for picture in nearest]],
                labels=[blank, [f"{distance:.3f}" for distance in distances]],
                row_titles=["sample", "nearest\ntraining\npicture"],
                title=title,
            ).save(folder / "neighbours.png")
            names.append("neighbours.png")
        return names


def markdown(experiment: Experiment, result: dict[str, Any], pictures: list[str]) -> str:
    """The page: figures, pictures, what they mean, what was left out and why."""
    size = experiment.domain.size
    lines = [f"# {result['run']}", ""]
    val, samples = result.get("val"), result.get("samples", {})
    if val:
        lines += [
            "## Held-out pictures as functions",
            "",
            f"{val['pictures']} pictures that training never saw, encoded at {size} x {size} pixels into "
            f"{val['latent_numbers']} numbers each ({_found(experiment)}) and read out again. PSNR is a mean over "
            "pictures; higher is closer.",
            "",
            "| | |",
            "|---|---:|",
            f"| PSNR at {size} px | {val['psnr']:.2f} dB |",
        ]
        if "ssim" in val:
            lines.append(f"| SSIM at {size} px | {val['ssim']:.3f} |")
        lines += [
            f"| bicubic from as many numbers | {val['bicubic_same_numbers']:.2f} dB |",
            f"| the mean of {val['mean_image_of']} training pictures | {val['mean_image']:.2f} dB |",
        ]
        for name in val:
            if name.startswith("psnr_"):
                finest = name.removeprefix("psnr_")
                enlarged = val[f"bicubic_enlargement_{finest}"]
                lines += [
                    f"| the same functions at {finest} px, against true pixels | {val[name]:.2f} dB |",
                    f"| their {size} px read-out enlarged to {finest} px by bicubic | {enlarged:.2f} dB |",
                ]
        side = thumbnail_side(val["latent_numbers"], size)
        lines += [
            "",
            f"Bicubic from as many numbers: the picture reduced to {side} x {side} colours (antialiased bicubic), "
            f"{3 * side * side} numbers, and enlarged again.",
            "",
        ]
        lines += _show(pictures, "reconstructions.png")
    if samples:
        sampling = experiment.sampling
        lines += ["## Samples", "", f"{sampling.sampler}, {sampling.steps} steps, seed {experiment.seed}.", ""]
        shown = [name for name in pictures if name.startswith("samples-")]
        if len(shown) > 1:
            lines += [f"The same functions at {' and '.join(n[8:-4] for n in shown)} pixels a side:", ""]
        for name in shown:
            lines += _show(pictures, name)
        lines += _kid(samples) + _inception(samples) + _neighbours(samples, pictures)
    if result["left_out"]:
        lines += ["## Left out", "", *(f"- {name}: {reason}" for name, reason in result["left_out"].items()), ""]
    lines += [f"Measured in {result['seconds']:.0f} s. All figures: evaluation.json.", ""]
    return "\n".join(lines)


def _found(experiment: Experiment) -> str:
    """How latents are found."""
    autoencoder = experiment.autoencoder
    if not isinstance(autoencoder, LayersOfExperts):
        return "posterior mean"
    fitting = autoencoder.fitting
    steps = fitting.steps if isinstance(fitting, MetaLearning) else fitting.encode_steps
    return f"fitted by {steps} gradient steps"


def _kid(samples: dict[str, Any]) -> list[str]:
    if "kid_efficientnet_lite0" not in samples:
        return []
    kid, course = samples["kid_efficientnet_lite0"], samples["kid_efficientnet_lite0_by_checkpoint"]
    lines = [
        "## Distance to the training distribution",
        "",
        f"Kernel distance (KID: polynomial MMD) on {kid['network']}. Lower is closer, 0 is the same distribution. "
        "It is not FID, nor KID on Inception, and compares only with figures of the same network, sizes and sets.",
        "",
        "| | kernel distance | standard error |",
        "|---|---:|---:|",
        f"| {kid['samples']} samples against {kid['training_pictures']} training pictures "
        f"| {kid['value']:.4f} | {kid['standard_error']:.4f} |",
    ]
    if "held_out_value" in kid:
        error = kid["held_out_standard_error"]
        lines.append(f"| held-out pictures against the same | {kid['held_out_value']:.4f} | {error:.4f} |")
    if course:
        lines += ["", f"Through the prior's training ({course[0]['samples']} samples from each kept checkpoint):", ""]
        lines += ["| samples seen | kernel distance | standard error |", "|---:|---:|---:|"]
        lines += [f"| {c['samples_seen']:,} | {c['value']:.4f} | {c['standard_error']:.4f} |" for c in course]
    return [*lines, ""]


def _inception(samples: dict[str, Any]) -> list[str]:
    if "inception" not in samples:
        return []
    found = samples["inception"]
    return [
        f"On Inception (weights {found['weights_sha256'][:12]}), {found['samples']} samples against "
        f"{found['training_pictures']} training pictures: FID {found['fid']:.2f}, precision {found['precision']:.3f}, "
        f"recall {found['recall']:.3f}. FID of few samples is biased upwards: compare only equal counts.",
        "",
    ]


def _neighbours(samples: dict[str, Any], pictures: list[str]) -> list[str]:
    found = samples["neighbours"]
    lines = ["## Are the samples copies?", "", f"Distance: {found['distance']}."]
    median = f"Median over {found['samples']} samples: {found['median']:.3f}, smallest {found['smallest']:.3f}"
    if "held_out_median" in found:
        median += f"; median of {found['held_out_pictures']} held-out pictures: {found['held_out_median']:.3f}"
    lines += [f"{median}. Copies of training pictures would lie much nearer than held-out pictures do.", ""]
    return lines + _show(pictures, "neighbours.png")


def _show(pictures: list[str], name: str) -> list[str]:
    return [f"![{name.removesuffix('.png')}]({name})", ""] if name in pictures else []
