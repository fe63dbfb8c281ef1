"""The report of an evaluation: sheets of labelled pictures, and a page of figures with what they mean."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from distributed_inr.domains import AnyDomain
from distributed_inr.evaluation.metrics import FORMATS
from distributed_inr.evaluation.text_report import text_section
from distributed_inr.experiment import Experiment
from distributed_inr.models import LayersOfExperts
from distributed_inr.models.latent_fitting import MetaLearning
from distributed_inr.sheets import fit, in_rows, sheet, titled

_CELL = 128


@dataclass
class Pictures:
    """What the sheets show, gathered while measuring. Pictures are [3, height, width] in [0, 1].

    Attributes:
        reconstructions: for each held-out signal, the columns of its row.
        samples: the same samples at each resolution.
        neighbours: (sample, nearest training signal, distance).
        prompts: samples of each prompt.
        held_out_distance: median distance of held-out signals to their nearest training signals.
    """

    domain: AnyDomain
    reconstructions: list[dict[str, Tensor]] = field(default_factory=list)
    samples: dict[int, Tensor] = field(default_factory=dict)
    neighbours: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    prompts: dict[str, list[Tensor]] = field(default_factory=dict)
    held_out_distance: float | None = None

    def write(self, folder: Path) -> list[str]:
        """Write the sheets that there is something for; returns their names."""
        domain, cell = self.domain, max(_CELL, self.domain.size)
        names = []
        if self.reconstructions:
            titles = [
                title if title.endswith(f" {domain.unit}") else f"{title}, {domain.size} {domain.unit}"
                for title in self.reconstructions[0]
            ]
            sheet(
                [[fit(picture, cell) for picture in row.values()] for row in self.reconstructions],
                column_titles=[titled(title) for title in titles],
            ).save(folder / "reconstructions.png")
            names.append("reconstructions.png")
        for resolution, pictures in self.samples.items():
            images = [fit(picture, max(cell, min(resolution, pictures.shape[-2]))) for picture in pictures]
            sheet(in_rows(images)).save(folder / f"samples-{resolution}.png")
            names.append(f"samples-{resolution}.png")
        if self.prompts:
            rows = [[fit(picture, cell) for picture in row] for row in self.prompts.values()]
            sheet(rows, row_titles=[titled(prompt) for prompt in self.prompts]).save(folder / "prompts.png")
            names.append("prompts.png")
        if self.neighbours:
            samples, nearest, distances = zip(*self.neighbours, strict=True)
            title = f"root mean square distance to the nearest training {domain.noun}"
            if self.held_out_distance is not None:
                title += f" (median of held-out {domain.noun}s: {self.held_out_distance:.3f})"
            blank = [""] * len(samples)
            sheet(
                [[fit(picture, cell) for picture in samples], [fit(picture, cell) for picture in nearest]],
                labels=[blank, [f"{distance:.3f}" for distance in distances]],
                row_titles=["sample", f"nearest\ntraining\n{domain.noun}"],
                title=title,
            ).save(folder / "neighbours.png")
            names.append("neighbours.png")
        return names


def markdown(experiment: Experiment, result: dict[str, Any], pictures: list[str]) -> str:
    """The page: figures, pictures, what they mean, what was left out and why."""
    domain = experiment.domain
    lines = [f"# {result['run']}", ""]
    val, samples = result.get("val"), result.get("samples", {})
    if val:
        lines += _held_out(experiment, val) + _show(pictures, "reconstructions.png")
    if "train" in result:
        lines += _kept_back(experiment, result["train"])
    if "samples" in result:
        sampling = experiment.sampling
        lines += ["## Samples", "", f"{sampling.sampler}, {sampling.steps} steps, seed {experiment.seed}.", ""]
        shown = [name for name in pictures if name.startswith("samples-")]
        if len(shown) > 1:
            lines += [f"The same functions at {' and '.join(n[8:-4] for n in shown)} {domain.unit}:", ""]
        for name in shown:
            lines += _show(pictures, name)
        lines += (
            _kid(samples, domain) + _surfaces(samples) + _inception(samples) + _neighbours(samples, pictures, domain)
        )
    if "text" in result:
        lines += text_section(result["text"]) + _show(pictures, "prompts.png") + _show(pictures, "confusion.png")
    if result["left_out"]:
        lines += ["## Left out", "", *(f"- {name}: {reason}" for name, reason in result["left_out"].items()), ""]
    lines += [f"Measured in {result['seconds']:.0f} s. All figures: evaluation.json.", ""]
    return "\n".join(lines)


def _held_out(experiment: Experiment, val: dict[str, Any]) -> list[str]:
    """What was measured of held-out signals, beside what one would have without a model."""
    domain = experiment.domain
    lines = [
        f"## Held-out {domain.noun}s as functions",
        "",
        f"{val['signals']} {domain.noun}s that training never saw, encoded at {domain.size} {domain.unit} into "
        f"{val['latent_numbers']} numbers each ({_found(experiment)}) and read out again. Means over {domain.noun}s.",
        "",
        *_beside_baselines(domain, val),
    ]
    if "finer" in val:
        finer, (name, form) = val["finer"], FORMATS[domain.metrics[0]]
        at = f"{finer['resolution']} {domain.unit}"
        lines += [
            "",
            f"The same functions read out at {at}, against what the encoder never saw: {name} "
            f"{form.format(finer[domain.metrics[0]])}; read out at {domain.size} {domain.unit} and enlarged to {at}: "
            f"{form.format(finer['enlarged'])}.",
        ]
    return [*lines, ""]


def _kept_back(experiment: Experiment, train: dict[str, Any]) -> list[str]:
    """What was measured of training signals where training had not looked."""
    domain = experiment.domain
    return [
        f"## Training {domain.noun}s, {train['what']} kept from training",
        "",
        f"{train['signals']} {domain.noun}s, from the latents that they have in the run. Means over {domain.noun}s.",
        "",
        *_beside_baselines(domain, train),
        "",
    ]


def _beside_baselines(domain: AnyDomain, measured: dict[str, Any]) -> list[str]:
    """A table: a row for the model, and one for each of its baselines."""
    names = [FORMATS[metric] for metric in domain.metrics]
    lines = [f"| | {' | '.join(name for name, _ in names)} |", f"|---|{'---:|' * len(names)}"]
    for what, values in {"its function": measured, **measured["baselines"]}.items():
        cells = [form.format(values[metric]) for metric, (_, form) in zip(domain.metrics, names, strict=True)]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def _surfaces(samples: dict[str, Any]) -> list[str]:
    if "surfaces" not in samples:
        return []
    found = samples["surfaces"]
    lines = [
        "## Surfaces",
        "",
        f"Chamfer distances of {found['points']} points a surface, against {found['training_signals']} training "
        f"surfaces; {found['empty_samples']} of {found['samples']} samples have none.",
        "",
        "| | minimum matching distance (lower is better) | coverage (higher is better) |",
        "|---|---:|---:|",
        f"| {found['samples']} samples | {found['mmd']:.5f} | {found['coverage']:.3f} |",
    ]
    if "held_out_mmd" in found:
        value, coverage = found["held_out_mmd"], found["held_out_coverage"]
        lines.append(f"| {found['held_out_signals']} held out | {value:.5f} | {coverage:.3f} |")
    return [*lines, ""]


def _found(experiment: Experiment) -> str:
    """How latents are found."""
    autoencoder = experiment.autoencoder
    if not isinstance(autoencoder, LayersOfExperts):
        return "posterior mean"
    fitting = autoencoder.fitting
    steps = fitting.steps if isinstance(fitting, MetaLearning) else fitting.encode_steps
    return f"fitted by {steps} gradient steps"


def _kid(samples: dict[str, Any], domain: AnyDomain) -> list[str]:
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
        f"| {kid['samples']} samples against {kid['training_signals']} training {domain.noun}s "
        f"| {kid['value']:.4f} | {kid['standard_error']:.4f} |",
    ]
    if "held_out_value" in kid:
        error = kid["held_out_standard_error"]
        lines.append(f"| held-out {domain.noun}s against the same | {kid['held_out_value']:.4f} | {error:.4f} |")
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
        f"{found['training_signals']} training signals: FID {found['fid']:.2f}, precision {found['precision']:.3f}, "
        f"recall {found['recall']:.3f}. FID of few samples is biased upwards: compare only equal counts.",
        "",
    ]


def _neighbours(samples: dict[str, Any], pictures: list[str], domain: AnyDomain) -> list[str]:
    if "neighbours" not in samples:
        return []
    found = samples["neighbours"]
    lines = ["## Are the samples copies?", "", f"Distance: {found['distance']}."]
    median = f"Median over {found['samples']} samples: {found['median']:.3f}, smallest {found['smallest']:.3f}"
    if "held_out_median" in found:
        median += f"; median of {found['held_out_signals']} held-out {domain.noun}s: {found['held_out_median']:.3f}"
    lines += [f"{median}. Copies of training {domain.noun}s would lie much nearer than held-out ones do.", ""]
    return lines + _show(pictures, "neighbours.png")


def _show(pictures: list[str], name: str) -> list[str]:
    return [f"![{name.removesuffix('.png')}]({name})", ""] if name in pictures else []
