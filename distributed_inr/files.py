"""A run's functions as files: samples, one's own files, and the run itself for others."""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from distributed_inr.config import to_json
from distributed_inr.domains import AnyDomain
from distributed_inr.domains.domain import seeds_for
from distributed_inr.experiment import DEFAULT_OUTPUT
from distributed_inr.field import Field
from distributed_inr.generation import FieldModel, load
from distributed_inr.models.noising import Sampler
from distributed_inr.models.text import one_line
from distributed_inr.sheets import fit, in_rows, sheet, titled

logger = logging.getLogger(__name__)

_SHEET_PICTURES = 64
_SHEET_COLUMNS = 16
_SHEET_CELL = 256
_MOST = {"frames": 100_000, "width": 8192, "fps": 1000}
"""Of a file's options."""


def sample_files(
    model: FieldModel,
    out: Path | None = None,
    *,
    count: int | None = None,
    text: str | Sequence[str] | None = None,
    negative_text: str | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float | None = None,
    resolution: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    sampler: Sampler | None = None,
    fix_layers: int | None = None,
    branches: int | None = None,
    suffix: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write `count` samples, each to a file of its own, and one sheet of them. Returns their paths, the sheet last.

    Args:
        out: None takes `samples` inside the run folder, or in the working directory where the run is read-only.
        count: None takes 16; with text 8, of each prompt.
        text: prompts: a row of the sheet for each, and a .json beside it that says each file's. The options of
            guidance as for `FieldModel.sample`.
        resolution: in the domain's `unit`; None takes its base resolution.
        fix_layers: of each sample, hold the latents of so many first layers and draw the others anew, `branches` times:
            a row of the sheet for each sample, itself first. A .json beside the sheet says each one's seed. With text,
            only the sample itself is guided by it: under text, the others would hardly vary (LOG.md).
        branches: None takes 4.
        suffix: the kind of file, one of the domain's `suffixes`; None takes the first. What cannot be one, such as an
            empty shape as a mesh, is left out with a warning.
        options: of each file, such as the frames of a clip; None among the values stands for the domain's own.
    """
    resolution, suffix = check_resolution(model, resolution), check_suffix(model, suffix)
    options = check_options(model.domain, suffix, resolution, options or {})
    text = [text] if isinstance(text, str) else text
    if fix_layers is None and branches is not None:
        raise ValueError(f"branches={branches} redraws layers after held ones; say how many with fix_layers")
    branches = 4 if branches is None else branches
    if fix_layers is not None:
        model.branching_prior(fix_layers, branches)
    guide = model.guide(
        text,
        negative_text=negative_text,
        guidance=guidance,
        guidance_interval=guidance_interval,
        guidance_rescale=guidance_rescale,
    )
    if count is None:
        count = 16 if text is None else 8
    latents = model.sample_latents(count, guide=guide, seed=seed, steps=steps, sampler=sampler)
    seeds, columns = seeds_for(seed, len(latents)), None if text is None else count
    prompts = [one_line(prompt) for prompt in text or [] for _ in range(count)]
    if fix_layers is not None:
        columns = 1 + branches
        drawn, own = model.sample_branches(
            latents, seeds, fix_layers=fix_layers, branches=branches, steps=steps, sampler=sampler
        )
        prompts = [prompt for prompt in prompts for _ in range(columns)]
        latents = torch.cat([latents[:, None], drawn], dim=1).flatten(0, 1)
        seeds = torch.cat([seeds[:, None], own], dim=1).flatten()
    out = make_folder(out or default_folder(model.folder, "samples"))
    held = "" if fix_layers is None else f"-fix{fix_layers}"
    domain = model.domain
    stem, digits = f"seed{seed}{held}-{resolution}{domain.unit}", max(3, len(str(len(latents) - 1)))
    row = columns or 1
    across = min(row, _SHEET_COLUMNS) if fix_layers is None else row
    most = max(_SHEET_PICTURES // across, 1)
    what = "samples" if text is None or fix_layers is not None else "prompts"
    title = f"the first {most} of {len(latents) // row} {what}" if len(latents) > most * row else ""
    if across < row:
        title = f"the first {across} of {row} samples of {title or 'each prompt'}"
    paths, shown = [], []
    for index, latent in enumerate(latents):
        about = f"-{slug}" if prompts and (slug := _slug(prompts[index])) else ""
        paths.append(out / f"{stem}-{index:0{digits}d}{about}{suffix}")
        rendered = _write(model.decode(latent[None]), resolution, paths[-1], options)
        if index < most * row and index % row < across:
            shown.append(fit(domain.pictures(rendered)[0], min(_SHEET_CELL, max(resolution, 128))))
    if columns is None:
        paths.append(out / f"{stem}-sheet.png")
        sheet(in_rows(shown), title=title).save(paths[-1])
        return [path for path in paths if path.exists()]
    nodes: list[dict[str, Any]] = [
        {"file": path.name, "seed": int(own)} for path, own in zip(paths, seeds, strict=True)
    ]
    for node, prompt in zip(nodes, prompts, strict=False):
        node["prompt"] = prompt
    record: dict[str, Any] = {"nodes": nodes}
    titles = None
    if fix_layers is not None:
        for i, node in enumerate(nodes):
            node |= {"sample": i // columns, "branch": i % columns - 1 if i % columns else None}
        record = {"fix_layers": fix_layers} | record
        titles = ["sample", *[f"branch {j}" for j in range(branches)]]
        along = f"the first {fix_layers} of {model.autoencoder.latent_shape[0]} layers held along each row"
        title = f"{along}; {title}" if title else along
    paths.append(out / f"{stem}-seeds.json")
    paths[-1].write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [shown[i : i + across] for i in range(0, len(shown), across)]
    row_titles = [titled(prompts[i * columns] or "(empty)") for i in range(len(rows))] if prompts else None
    paths.append(out / f"{stem}-sheet.png")
    sheet(rows, row_titles=row_titles, column_titles=titles, title=title).save(paths[-1])
    return [path for path in paths if path.exists()]


def reconstruct_files(
    model: FieldModel,
    files: Sequence[str | Path],
    out: Path | None = None,
    *,
    resolution: int | None = None,
    suffix: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write each file as its function, read out at any resolution, and a sheet with the original beside it.

    Args:
        out: None takes `reconstructions` inside the run folder, or in the working directory where the run is read-only.
        resolution: in the domain's `unit`; None takes its base resolution.
        suffix: the kind of file, one of the domain's `suffixes`; None takes the first.
        options: as for `sample_files`.
    """
    resolution, suffix = check_resolution(model, resolution), check_suffix(model, suffix)
    options = check_options(model.domain, suffix, resolution, options or {})
    domain = model.domain
    signals = [domain.open(Path(file)) for file in files]  # all are read before anything is written
    out = make_folder(out or default_folder(model.folder, "reconstructions"))
    paths: list[Path] = []
    for file, signal in zip(files, signals, strict=True):
        stem = f"{Path(file).stem}-{resolution}{domain.unit}"
        while out / f"{stem}{suffix}" in paths:
            stem += "-again"
        paths.append(out / f"{stem}{suffix}")
        rendered = _write(model.encode(signal), resolution, paths[-1], options)

        row = domain.shown(signal) | {f"its function, {resolution} {domain.unit}": domain.pictures(rendered)[0]}
        paths.append(out / f"{stem}-beside.png")
        cell = min(max(resolution, 256), 1024)
        sheet([[fit(picture, cell) for picture in row.values()]], column_titles=[titled(title) for title in row]).save(
            paths[-1]
        )
    return [path for path in paths if path.exists()]


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
    if model.texts is not None:  # what samples without a prompt need, and which encoder embeds those with one
        model.texts.excerpt(make_folder(out / "text"), [""])
    for path in [*model.folder.glob("*.png"), *model.folder.glob("report.md"), *model.folder.glob("evaluation.json")]:
        shutil.copyfile(path, out / path.name)


def _slug(prompt: str) -> str:
    """What of a prompt a file's name can say."""
    return "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40].strip("-")


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


def check_resolution(model: FieldModel, resolution: int | None) -> int:
    """What to read out at; None takes the domain's own. Raises ValueError where no file can be that large."""
    resolution = model.domain.size if resolution is None else resolution
    if not 1 <= resolution <= model.domain.max_resolution:
        raise ValueError(
            f"resolution={resolution} must lie in 1..{model.domain.max_resolution} {model.domain.unit} a side"
        )
    return resolution


def check_suffix(model: FieldModel, suffix: str | None) -> str:
    """The kind of file to write; None takes the domain's first. Raises ValueError where it writes no such files."""
    known = model.domain.suffixes
    found = known[0] if suffix is None else "." + suffix.lower().removeprefix(".")
    if found not in known:
        kinds = " ".join(kind.removeprefix(".") for kind in known)
        raise ValueError(f"format={suffix}: a {model.domain.noun} is written as one of {kinds}")
    return found


def check_options(domain: AnyDomain, suffix: str, resolution: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a file's options that are given. Raises ValueError where it has no such option or cannot be written."""
    given, known = {name: value for name, value in options.items() if value is not None}, domain.options_of(suffix)
    for name, value in given.items():
        if name not in known:
            found = ", ".join(known) or f"only a resolution, in {domain.unit}"
            raise ValueError(f"{name}={value}: the {suffix} of a {domain.noun} has {found}; leave {name} out")
        if not 0 < value <= _MOST[name]:
            raise ValueError(f"{name}={value} must be above 0 and at most {_MOST[name]}")
    domain.check_file(suffix, resolution, **given)
    return given


def _write(field: Field, resolution: int, path: Path, options: Mapping[str, Any]) -> Tensor:
    """Write a function, if it can be; returns a rendering of it."""
    try:
        return field.domain.write(field, resolution, path, **options)
    except ValueError as error:
        path.unlink(missing_ok=True)  # an earlier call's
        logger.warning("%s is left out: %s", path, error)
        return field.render(field.domain.size).cpu()
