"""What holds for every domain, and for every domain with both families of models."""

import dataclasses
import json
import multiprocessing
import os
import re
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch
from tiny_domains import DOMAINS, FAMILIES, autoencoder, own_file, protocol, tiny_experiment, write_sets

import distributed_inr as dinr
from distributed_inr import analysis, pipeline
from distributed_inr.config import from_json, override, to_json
from distributed_inr.domains import AnyDomain, Domain, Signal, collate
from distributed_inr.evaluation import evaluate, metrics
from distributed_inr.experiment import Experiment
from distributed_inr.field import Field
from distributed_inr.files import export
from distributed_inr.generation import load
from distributed_inr.models.latent_fitting import AutoDecoding
from distributed_inr.plan import plan
from distributed_inr.worker import Worker

KINDS = list(DOMAINS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each domain, with its sets."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        write_sets(DOMAINS[kind], folder)
    return made


def settled(kind: str) -> Domain:
    return DOMAINS[kind].settle(protocol(DOMAINS[kind]))


def batch(kind: str, folder: Path, count: int = 3) -> Signal:
    experiment: Any = dataclasses.replace(tiny_experiment(kind, "ddmi", folder), domain=settled(kind))
    dataset = experiment.dataset(experiment.data.index(experiment.data.train))
    return collate([dataset.signal(number)[0] for number in range(count)])


def model_of(kind: str, family: str) -> Any:
    torch.manual_seed(0)
    model = autoencoder(settled(kind), family).build(settled(kind))
    if family == "ddmi":
        for parameter in model.parameters():  # blocks start as their shortcuts: let every weight matter
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_every_domain_of_the_union_is_tested():
    assert set(KINDS) == {member.kind for member in AnyDomain.__origin__.__args__}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_a_domain_survives_json(kind: str):
    domain = settled(kind)
    assert from_json(type(domain), to_json(domain)) == domain


@pytest.mark.parametrize("kind", KINDS)
def test_signals_batch_as_blank_ones_do(kind: str, folders: dict[str, Path]):
    domain, signal = settled(kind), batch(kind, folders[kind])
    inputs, targets = domain.blank(len(signal))
    assert signal.inputs.shape == inputs.shape and signal.inputs.dtype == inputs.dtype
    for mine, theirs in (
        ((signal.targets, targets),)
        if not isinstance(targets, dict)
        else zip(signal.targets.values(), targets.values(), strict=True)
    ):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    assert signal[1:].key == signal.key[1:] and len(signal.rows([0, 2])) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_measurements_depend_on_the_samples_seed_alone(kind: str, folders: dict[str, Path]):
    domain, signal = settled(kind), batch(kind, folders[kind])
    for draw in (domain.supervise, domain.measurements):
        queries, values = draw(signal, 20)
        alone, same = draw(signal[1:2], 20)
        assert torch.equal(queries.coords[1:2], alone.coords) and torch.equal(values[1:2], same)
        other, _ = draw(dataclasses.replace(signal, seed=signal.seed + 1), 20)
        assert not torch.equal(other.coords, queries.coords)
        assert values.shape[:2] == (3, 20) and values.isfinite().all()
    every, values = domain.measurements(signal)
    again, _ = domain.measurements(dataclasses.replace(signal, seed=signal.seed + 1))
    assert torch.equal(every.coords, again.coords)


@pytest.mark.parametrize("kind", KINDS)
def test_reports_get_what_they_show(kind: str, folders: dict[str, Path]):
    domain, signal = settled(kind), batch(kind, folders[kind])
    truth = domain.truth(signal)
    pictures, thumbnails = domain.pictures(truth), domain.thumbnails(truth)
    assert pictures.shape[:2] == (3, 3) and 0 <= pictures.min() and pictures.max() <= 1
    assert thumbnails.shape[0] == 3 and thumbnails.dim() == 2 and thumbnails.isfinite().all()
    for name, rendered in domain.naive(signal, numbers=50).items():
        assert rendered.shape == truth.shape and name
        for metric in domain.metrics:
            assert metrics.METRICS[metric](rendered, truth).isfinite().all()
    assert len(domain.copies(signal)) == domain.num_copies
    shown = domain.shown(signal[:1])
    assert all(picture.dim() == 3 and picture.shape[0] == 3 for picture in shown.values()) and len(shown) == 2
    assert domain.enlarge(truth, 2 * domain.size).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_at_some_coordinates_equals_itself_at_all(kind: str, family: str):
    domain, model = settled(kind), model_of(kind, family)
    with torch.no_grad():
        field = model.decode(torch.randn(2, *model.latent_shape))
    coords = torch.rand(2, 200, domain.coord_dim) * 2 - 1
    view = torch.rand(2, 200, domain.view_dim) if domain.view_dim else None
    with torch.no_grad():
        whole = field(coords, view)
        some = torch.tensor([3, 77, 150])
        part = field(coords[:, some], None if view is None else view[:, some])
        torch.testing.assert_close(part, whole[:, some])
        torch.testing.assert_close(field[1](coords[1:], None if view is None else view[1:]), whole[1:])
    assert whole.shape == (2, 200, domain.value_dim)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_gradient(kind: str, family: str, folders: dict[str, Path]):
    model, signal = model_of(kind, family), batch(kind, folders[kind])
    if isinstance(getattr(model.cfg, "fitting", None), AutoDecoding):
        signal = dataclasses.replace(signal, latent=torch.randn(3, *model.latent_shape).requires_grad_())
    model.train()
    losses = model(signal)
    sum(losses.values()).backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if not (parameter.grad is not None and parameter.grad.any())
    ]
    assert not without and all(loss.dim() == 0 and loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(kind: str, family: str, folders: dict[str, Path]):
    model, signal = model_of(kind, family), batch(kind, folders[kind], 2)
    if isinstance(getattr(model.cfg, "fitting", None), AutoDecoding):
        signal = dataclasses.replace(signal, latent=torch.randn(2, *model.latent_shape).requires_grad_())
    model.train()
    whole = model(signal)
    parts = [model(signal[i : i + 1]) for i in range(2)]
    for name, loss in whole.items():
        torch.testing.assert_close(loss, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_run_is_made_killed_and_gone_on_with(kind: str, family: str, folders: dict[str, Path], tmp_path: Path):
    experiment = override(tiny_experiment(kind, family, folders[kind]), {"autoencoder_training.num_samples": 24})
    whole = pipeline.run(override(experiment, {"output": str(tmp_path / "whole")}))
    found = (whole["run"] / "report.md").read_text()
    assert metrics.FORMATS[settled(kind).metrics[0]][0] in found and "reconstructions.png" in found
    measured = json.loads((whole["run"] / "evaluation.json").read_text())
    assert ("train" in measured) == bool(kept := settled(kind).kept_back) == (f"{kept} kept from training" in found)

    model = dinr.load(whole["run"])
    assert model.domain == settled(kind) or kind == "scene"
    fields = model.sample(2, steps=2)
    assert not torch.equal(*fields.render(12))
    own = own_file(model.domain, tmp_path)
    rendered = model.encode(own).render(12)
    assert rendered.isfinite().all()
    for suffix in model.domain.suffixes:
        try:
            model.domain.write(fields[0], 12, tmp_path / f"sample{suffix}")
        except ValueError as error:  # a network of two steps: perhaps an empty shape
            assert "there is no surface" in str(error) or ".bvh needs channels" in str(error)
        else:
            assert (tmp_path / f"sample{suffix}").stat().st_size > 0

    if kept and family == "chinr":
        export(whole["run"], tmp_path / "exported")
        apart = override(model.experiment, {"domain.cameras": []})
        (tmp_path / "exported" / "config.json").write_text(to_json(apart))
        result = evaluate(tmp_path / "exported")
        assert "exported runs are without" in result["left_out"]["train"]
        assert "are not known to be seen from the same cameras" in result["left_out"]["distances to training signals"]
        own_views = ["its nearest training view", "the mean of its training views"]
        assert result["samples"] == {} and list(result["val"]["baselines"]) == own_views
        assert "samples-" in (tmp_path / "exported" / "report.md").read_text()
        with pytest.raises(ValueError, match="are not known to be seen from the same cameras"):
            analysis.memorisation(load(tmp_path / "exported"), count=1, steps=1)

    killed = override(experiment, {"output": str(tmp_path / "killed")})
    process = multiprocessing.get_context("spawn").Process(target=run_until_killed, args=(killed,))
    process.start()
    process.join(120)
    assert process.exitcode == -SIGKILL and not list(tmp_path.glob("killed/*/*/*/model.safetensors"))
    pipeline.run(killed)
    for name in ("autoencoder", "prior"):
        parts = [tmp_path / part / family / kind / name / "model.safetensors" for part in ("whole", "killed")]
        assert parts[0].read_bytes() == parts[1].read_bytes()
    log = (tmp_path / "killed" / family / kind / "autoencoder" / "log.txt").read_text()
    assert re.findall(r"a step, (\d+) of 24 samples done", log)[-1] != "0", log


def run_until_killed(experiment: Experiment) -> None:
    """A run that ends as by kill -9 while its autoencoder is trained, some steps after the first checkpoint."""
    fit, kept = pipeline.fit_autoencoder, experiment.folder / "autoencoder" / "checkpoints"

    def kill_once_kept() -> bool:
        if any(kept.glob("*/manifest.json")):
            os.kill(os.getpid(), SIGKILL)
        return False

    def fit_until_killed(worker: Worker, **options: Any) -> None:
        fit(dataclasses.replace(worker, stop=kill_once_kept), **options)

    pipeline.fit_autoencoder = fit_until_killed
    pipeline.run(experiment)


@pytest.mark.parametrize("kind", KINDS)
def test_ones_own_file_is_opened_and_another_is_one_clear_line(kind: str, tmp_path: Path):
    domain = settled(kind)
    signal = domain.open(own_file(domain, tmp_path))
    assert len(signal) == 1 and signal.inputs.shape[1:] == domain.blank(1)[0].shape[1:]
    (tmp_path / "other.xyz").write_text("nothing")
    for path in (tmp_path / "other.xyz", tmp_path / "missing.xyz"):
        with pytest.raises(ValueError, match=path.name) as caught:
            domain.open(path)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_domain_is_planned_for(kind: str, folders: dict[str, Path]):
    found = plan(tiny_experiment(kind, "ddmi", folders[kind]), num_workers=1, device="cpu")
    assert len(found.trainings) == 2 and found.data is not None and found.data.num_samples == 6


def test_a_set_of_another_domain_is_refused(folders: dict[str, Path]):
    experiment = override(
        tiny_experiment("shape", "ddmi", folders["shape"]), {"data.train": str(folders["image"] / "train")}
    )
    with pytest.raises(ValueError, match="holds a set of image, domain.kind=shape; give a set of that domain"):
        pipeline.run(experiment)


def test_a_field_renders_by_its_domain():
    domain = settled("shape")
    field = Field(
        lambda parameters, coords, view: 9 * coords[..., :1] + parameters[0][:, None], (torch.zeros(1, 1),), domain
    )
    assert torch.equal(field.render(8), domain.render(field, 8)) and (field.render(8)[0, 0, 0, :4] < 0.5).all()
