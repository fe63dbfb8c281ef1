"""A finished CHINR run as a person uses it: samples with held layers, one's own picture, export."""

import json
import runpy
import sys
import warnings
from pathlib import Path

import PIL.Image
import pytest
import torch
from tiny_chinr import write_chinr
from tiny_run import smooth_picture

import distributed_inr as dinr
from distributed_inr.domains.domain import seeds_for
from distributed_inr.files import export, reconstruct_files, sample_files
from distributed_inr.generation import FieldModel
from distributed_inr.models.hierarchical_diffusion import HierarchicalDiffusionModel
from distributed_inr.models.layers_of_experts import LayersOfExpertsModel


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chinr(tmp_path_factory.mktemp("chinr"))


@pytest.fixture(scope="module")
def model(run: Path) -> FieldModel:
    return dinr.load(run)


def test_a_loaded_run_holds_the_folded_network(model: FieldModel):
    assert isinstance(model.autoencoder, LayersOfExpertsModel) and model.autoencoder.cfg.folded
    assert not any("experts" in name for name, _ in model.autoencoder.named_parameters())


def test_branches_hold_the_first_layers_and_differ_in_the_others(model: FieldModel):
    latents = model.sample_latents(3, seed=1)
    drawn, seeds = model.sample_branches(latents, seeds_for(1, 3), fix_layers=2, branches=4)
    assert drawn.shape == (3, 4, 4, 8) and len(set(seeds.flatten().tolist())) == 12
    assert torch.equal(drawn[:, :, :2], latents[:, None, :2].expand(-1, 4, -1, -1))
    assert (drawn[:, 0, 2:] - drawn[:, 1, 2:]).abs().amin() > 0
    assert (drawn[:, 0, 2:] - latents[:, 2:]).abs().amin() > 0


def test_a_branch_is_drawn_again_from_its_seed_alone(model: FieldModel):
    latents = model.sample_latents(3, seed=1)
    drawn, seeds = model.sample_branches(latents, seeds_for(1, 3), fix_layers=1, branches=2)
    prior = model.prior
    assert isinstance(prior, HierarchicalDiffusionModel)
    again = prior.sample(seeds[2, 1:], prefix=latents[2:, :1], sampler="ddim", steps=4)
    torch.testing.assert_close(again[0], drawn[2, 1], rtol=1e-5, atol=1e-6)
    unlike = prior.sample(seeds[2, :1], prefix=latents[2:, :1], sampler="ddim", steps=4)
    assert (unlike[0, 1:] - drawn[2, 1, 1:]).abs().amax() > 1e-3


def test_holding_no_layer_draws_anew_and_holding_all_draws_nothing(model: FieldModel):
    latents = model.sample_latents(2, seed=1)
    none, seeds = model.sample_branches(latents, seeds_for(1, 2), fix_layers=0, branches=1)
    prior = model.prior
    assert isinstance(prior, HierarchicalDiffusionModel)
    torch.testing.assert_close(none[:, 0], prior.sample(seeds[:, 0], steps=4), rtol=1e-5, atol=1e-6)
    whole, _ = model.sample_branches(latents, seeds_for(1, 2), fix_layers=4, branches=1)
    assert torch.equal(whole[:, 0], latents)


@pytest.mark.parametrize(
    ("fix_layers", "branches", "message"),
    [
        (5, 2, "fix_layers=5 must lie in 0..4, the layers of this run's network"),
        (-1, 2, "fix_layers=-1 must lie in 0..4"),
        (1, 0, "branches=0 must be at least 1"),
    ],
)
def test_layers_that_cannot_be_held_are_refused(model: FieldModel, fix_layers: int, branches: int, message: str):
    latents = model.sample_latents(1)
    with pytest.raises(ValueError, match=message):
        model.sample_branches(latents, seeds_for(0, 1), fix_layers=fix_layers, branches=branches)


def test_holding_layers_needs_a_hierarchy(tmp_path: Path):
    flat = dinr.load(
        write_chinr(
            tmp_path,
            autoencoder__modulation="flat",
            **{"prior__kind": "latent-diffusion", "prior__denoiser__kind": "mlp", "prior__denoiser__width": 16},
        )
    )
    with pytest.raises(ValueError, match="fix_layers=1: this run's prior, latent-diffusion, draws a latent as a whole"):
        flat.sample_branches(flat.sample_latents(1), seeds_for(0, 1), fix_layers=1, branches=1)


def test_sample_files_with_held_layers_say_every_seed(model: FieldModel, tmp_path: Path):
    paths = sample_files(model, tmp_path, count=2, fix_layers=2, branches=3, resolution=24)
    assert [path.name for path in paths[-2:]] == ["seed0-fix2-24px-seeds.json", "seed0-fix2-24px-sheet.png"]
    nodes = json.loads(paths[-2].read_text())["nodes"]
    assert [(node["sample"], node["branch"]) for node in nodes] == [(i, j) for i in (0, 1) for j in (None, 0, 1, 2)]
    assert [node["file"] for node in nodes] == [path.name for path in paths[:8]]
    assert nodes[0]["seed"] == int(seeds_for(0, 1)[0])


def test_ones_own_picture_is_fitted_by_the_inner_loop(model: FieldModel, tmp_path: Path):
    smooth_picture(3, 40).save(tmp_path / "mine.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = reconstruct_files(model, [tmp_path / "mine.png"], tmp_path, resolution=32)
    assert [path.name for path in paths] == ["mine-32px.png", "mine-32px-beside.png"]
    field = model.encode(tmp_path / "mine.png")
    assert field.parameters[0].requires_grad is False
    zero = model.decode(torch.zeros(1, 4, 8))
    assert not torch.equal(field.render(16), zero.render(16))


def test_what_cannot_be_branched_is_refused_before_anything_is_drawn(
    model: FieldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(FieldModel, "sample_latents", lambda *args, **settings: pytest.fail("drew"))
    for changes, message in (({"fix_layers": 5}, "fix_layers=5"), ({"fix_layers": 1, "branches": 0}, "branches=0")):
        with pytest.raises(ValueError, match=message):
            sample_files(model, tmp_path, count=1, **changes)


def test_branches_without_held_layers_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jobs/sample.py", str(run), "--branches", "3"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("jobs/sample.py", run_name="__main__")
    assert ended.value.code == 2 and "fix_layers" in capsys.readouterr().err


def test_an_exported_run_is_folded_and_draws_the_same_functions(run: Path, model: FieldModel, tmp_path: Path):
    export(run, tmp_path / "shared")
    shared = dinr.load(tmp_path / "shared")
    assert shared.experiment.autoencoder.folded
    difference = (shared.sample(3, steps=4).render(16) - model.sample(3, steps=4).render(16)).abs()
    assert 0 < difference.max() < 0.05


def test_a_sheet_of_branches_ends_with_a_whole_row(model: FieldModel, tmp_path: Path):
    heights = []
    for count in (12, 13):  # rows of five, of which 64 pictures are no whole number
        sheet = sample_files(model, tmp_path / str(count), count=count, fix_layers=2, branches=4, resolution=8)[-1]
        with PIL.Image.open(sheet) as picture:
            heights.append(picture.height)
    assert heights[0] == heights[1]
