"""Evaluation of a finished run, from held-out data: `evaluation.json`, pictures and `report.md`.

Everything runs in the calling process, on the GPU where there is one, with the weights that the run ended with.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distributed_inr.data import storage
from distributed_inr.evaluation import report
from distributed_inr.evaluation.classifier import MAX_SIGNALS
from distributed_inr.evaluation.distances import CHECKPOINT_SAMPLES, checkpoints, distances, num_held_out, num_samples
from distributed_inr.evaluation.reconstructions import kept_back, reconstructions
from distributed_inr.evaluation.splits import MAX_TRAINING_SIGNALS, SHOWN, Advance, Split, survey
from distributed_inr.evaluation.text import MAX_CAPTIONS, SAMPLES, ImageTower, measure_text
from distributed_inr.evaluation.text_report import write_confusion
from distributed_inr.files import make_folder
from distributed_inr.generation import FieldModel, load
from distributed_inr.models.text import NoWeights, OpenCLIPEncoder, TextEncoder
from distributed_inr.training.checkpoint_reader import BANK

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, dict[str, float]], None]
"""Called with (signals done, of how many, {})."""

_USUAL_CLASSES = 10


@torch.no_grad()
def evaluate(
    run: str | Path, *, out: Path | None = None, allow_pipe: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure a run and write evaluation.json, pictures and report.md; returns what evaluation.json holds.

    Args:
        run: a run folder.
        out: where to write; None is the run folder.
        allow_pipe: read data from `pipe:` addresses, which run a shell command; the run's own config.json is not asked.
    """
    begin = time.monotonic()
    model = load(run)
    check_pipe(model, allow_pipe=allow_pipe)
    experiment, folder, left_out = model.experiment, make_folder(out or model.folder), dict[str, str]()
    encoder = _text_encoder(model, left_out)
    training = Split(model, experiment.data.train)
    held_out = None if experiment.data.val is None else Split(model, experiment.data.val)
    bar = Bar(progress, model, training, held_out)
    pictures = report.Pictures(domain=experiment.domain)
    result: dict[str, Any] = {"run": f"{experiment.family}/{experiment.name}"}

    known = None
    if (reason := why_incomparable(model)) is None:
        known = survey(training, bar.advance)
    else:
        left_out["distances to training signals"] = reason
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
        result["samples"] = distances(model, training, held_out, known, pictures, bar.advance, left_out)
        if encoder is not None and known is not None:
            result["text"] = _text(model, encoder, training, held_out, pictures, left_out, bar.advance)

    result |= {"left_out": left_out, "seconds": round(time.monotonic() - begin, 1)}
    names = pictures.write(folder) + write_confusion(result.get("text", {}), folder)
    storage.write_atomic(str(folder / "evaluation.json"), json.dumps(result, indent=2).encode() + b"\n")
    (folder / "report.md").write_text(report.markdown(experiment, result, names))
    bar.finish()
    return result


def _text_encoder(model: FieldModel, left_out: dict[str, str]) -> TextEncoder | None:
    """What samples are drawn by words with, and their pictures compared to these; the reason where it cannot be had."""
    if model.experiment.text is None or model.prior is None:
        return None
    if (reason := why_incomparable(model)) is not None:
        left_out["text"] = reason
        return None
    try:
        return model.load_text_encoder(with_images=True)
    except NoWeights as error:
        logger.warning("samples by words are left out: %s", error)
        left_out["text"] = str(error)
        return None


def _text(
    model: FieldModel,
    encoder: TextEncoder,
    training: Split,
    held_out: Split | None,
    pictures: report.Pictures,
    left_out: dict[str, str],
    advance: Advance,
) -> dict[str, Any]:
    """How samples of a run with text follow it; the first ones of the words of classes are kept for a sheet."""
    domain, drawn, tower = model.domain, dict[str, torch.Tensor](), None
    if isinstance(encoder, OpenCLIPEncoder) and (tower := ImageTower.of(encoder)) is None:
        left_out["clip_s"] = (
            f"text.pretrained={encoder.cfg.pretrained} does not say how {encoder.name} was shown pictures, and its "
            "weights differ in that; give one of open_clip's tags, whose weights may lie in its cache"
        )

    def encode_text(prompts: list[str]) -> torch.Tensor:
        return encoder(prompts).pooled

    def draw(prompts: list[str], count: int) -> torch.Tensor:
        latents = model.sample_latents(count, guide=model.guide(prompts), seed=model.experiment.seed)
        drawn.update(zip(prompts, latents.split(count), strict=True))
        return latents

    found = measure_text(
        model, draw, training, held_out, left_out=left_out, tower=tower, encode_text=encode_text, advance=advance
    )
    shown = found.get("class words", found.get("held-out captions", {"prompts": []}))["prompts"][:SHOWN]
    for prompt in shown:
        rendered = model.decode(drawn[prompt][:SHOWN]).render(domain.size)
        pictures.prompts[prompt] = list(domain.pictures(rendered).cpu())
    return found


class Bar:
    """Counts signals against how many there will be."""

    def __init__(self, progress: Progress | None, model: FieldModel, training: Split, held_out: Split | None) -> None:
        self.progress, self.done = progress, 0
        evaluation = model.experiment.evaluation
        comparable = model.domain.comparable
        self.total = len(training.spread(MAX_TRAINING_SIGNALS)) if comparable else 0
        if held_out is not None:
            self.total += len(held_out.spread(evaluation.max_reconstructions))
        if model.domain.kept_back:
            self.total += len(training.spread(evaluation.max_reconstructions))
        if model.prior is not None and comparable:
            self.total += num_samples(model)
            self.total += 0 if held_out is None else len(held_out.spread(num_held_out(model)))
            if evaluation.num_samples >= 2:
                self.total += len(training.spread(2 * evaluation.num_samples))
                earlier = [path for path in checkpoints(model).values() if path is not None]
                self.total += min(CHECKPOINT_SAMPLES, evaluation.num_samples) * len(earlier)
            if model.experiment.text is not None:  # about: how many classes there are is not known yet
                self.total += len(training.spread(MAX_SIGNALS)) + len(training.spread(MAX_TRAINING_SIGNALS))
                self.total += SAMPLES * (MAX_CAPTIONS + 2 * _USUAL_CLASSES)

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


def why_incomparable(model: FieldModel) -> str | None:
    """The reason why samples cannot be compared with the run's training signals, where they cannot."""
    if model.domain.comparable:
        return None
    return (
        f"the {model.domain.noun}s of {model.experiment.data.train!r} are not known to be seen from the same cameras: "
        "samples cannot be compared with them; prepare a set whose objects share their cameras"
    )
