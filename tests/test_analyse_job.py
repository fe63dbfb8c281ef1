"""The job that analyses runs, as a person runs it: what it writes, and what it refuses."""

import csv
import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image as PillowImage
from safetensors.torch import load_file
from tiny_run import smooth_picture
from trained_runs import chinr, ddmi

import distributed_inr as dinr
from distributed_inr import analysis
from distributed_inr.config import override


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chinr(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chinr(tmp_path_factory.getbasetemp(), name="unconditional", condition_bits=0)


@pytest.fixture(scope="module")
def planes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ddmi(tmp_path_factory.getbasetemp())


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the job in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["jobs/analyse.py", *arguments])
    try:
        runpy.run_path("jobs/analyse.py", run_name="__main__")
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code
    return 0


LINES = {
    "tree": ("--fix-layers 1 2 --branches 2 --seed 3", ["tree.png", "tree.json", "latents.safetensors"]),
    "composition": ("--from samples --signals 3 --layers 2 4", ["composition.png", "composition.csv"]),
    "interpolation": ("--from held-out --count 3 --resolution 20", ["interpolation.png", "interpolation.csv"]),
    "layerwise": ("--numbers 3 7 --count 3", ["layerwise.png", "layerwise.csv"]),
    "retrieval": ("--files {own} --count 2", ["retrieval-00.png", "retrieval.csv"]),
    "svcca": ("--permutations 20", ["svcca.png", "svcca.json"]),
    "clusters": ("--count 4 --neighbours 3", ["clusters.png", "clusters.csv", "clusters.json"]),
    "conditions": ("--count 2 --samples 10", ["conditions.png", "signals.png", "conditions.csv"]),
    "memorisation": ("--count 6", ["memorisation.png", "memorisation.json"]),
    "deviations": ("--count 2 --samples 10 --steps 2", ["deviations.png", "deviations.csv"]),
}


@pytest.mark.parametrize("name", LINES)
def test_every_analysis_writes_its_pictures_and_its_numbers(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    options, names = LINES[name]
    smooth_picture(4, 16).save(tmp_path / "own.png")
    arguments = options.format(own=tmp_path / "own.png").split()
    out = tmp_path / "out"
    assert run_here(monkeypatch, str(run), name, *arguments, "--out", str(out)) == 0
    assert capsys.readouterr().out.split() == [str(out / made) for made in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for made in names:
        if made.endswith(".png"):
            with PillowImage.open(out / made) as picture:
                assert min(picture.size) > 150 and len(picture.convert("L").getcolors()) > 20
        elif made.endswith(".csv"):
            with (out / made).open() as file:
                rows = list(csv.DictReader(file))
            assert rows and all(None not in row.values() and None not in row for row in rows)
        elif made.endswith(".json"):
            assert json.loads((out / made).read_text())["run"] == "chinr/tiny"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("retrieval --files own.png --signals 2", "--signals would change nothing: --files says which signals"),
        ("retrieval --seed 3 --steps 2", "--seed, --steps would change nothing: they are about --from samples"),
        ("retrieval --numbers 1 2 --signals 3", "--signals would change nothing: --numbers says how many"),
        ("retrieval --from samples --numbers -1", "numbers: -1 is negative"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    line: str, message: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run_here(monkeypatch, str(run), *line.split()) == 2
    assert message in capsys.readouterr().err


def test_the_written_tree_says_how_to_draw_each_node_again(run: Path, monkeypatch: pytest.MonkeyPatch):
    assert run_here(monkeypatch, str(run), "tree", "--fix-layers", "2", "--branches", "3", "--seed", "9") == 0
    written = json.loads((run / "analysis" / "tree" / "tree.json").read_text())
    latents = load_file(run / "analysis" / "tree" / "latents.safetensors")["latents"]
    found = analysis.tree(dinr.load(run), fix_layers=[2], branches=3, seed=9)
    for row, (node, kept) in enumerate(zip(found.nodes.values(), written["nodes"], strict=True)):
        assert (kept["path"], kept["seed"], kept["fixed"], kept["latents"]) == (
            [*node.path],
            node.seed,
            node.fixed,
            row,
        )
        assert kept["bits"] == ["".join(str(int(bit)) for bit in bits) for bits in node.bits]
        assert torch.equal(latents[row], node.latent)
    assert written["options"] == {"seed": 9, "levels": [0, 2], "branches": 3, "sampler": "ddim", "steps": 3}


@pytest.mark.slow
def test_an_ablation_writes_samples_and_figures_of_both_runs(
    run: Path, unconditional: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run_here(monkeypatch, str(run), "ablation", str(unconditional), "--count", "9", "--out", str(tmp_path)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ablation.json", "ablation.png"]
    written = json.loads((tmp_path / "ablation.json").read_text())
    assert written["conditional"]["run"] == "tiny" and written["unconditional"]["condition_bits"] == 0


def test_analyses_of_planes_write_theirs(planes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = [
        [str(planes), "frequencies", "--signals", "3"],
        [str(planes), "interpolation", "--count", "3"],
        [str(planes), "retrieval", "--signals", "1", "--count", "2"],
        [str(planes), "memorisation", "--count", "3"],
    ]
    for line in lines:
        assert run_here(monkeypatch, *line, "--out", str(tmp_path / line[1])) == 0
        assert any(path.suffix == ".png" for path in (tmp_path / line[1]).iterdir())


@pytest.mark.parametrize(
    ("which", "line", "message"),
    [
        ("run", "tre", "argument ANALYSIS: invalid choice: 'tre'"),
        ("run", "tree --branch 2", "unrecognized arguments: --branch 2; --help lists every flag"),
        ("run", "tree --fix-layers 9", "layer=9 must lie in 1..4, the run's layers"),
        ("run", "frequencies", "autoencoder.kind=layers-of-experts of "),
        ("run", "ablation nowhere", "nowhere is not a folder; give a run folder"),
        ("run", "interpolation --numbers 1 2", "2 signals; an interpolation has 4 corners: give four"),
        ("run", "layerwise --numbers 1", "1 signals; an interpolation by layers has 2 ends: give two"),
        ("run", "composition --signals 1", "1 signals; give at least 2"),
        ("run", "retrieval --layers 7", "layer=7 must lie in 1..4"),
        ("run", "composition --resolution 0", "resolution=0 must lie in 1..16384 px a side"),
        ("run", "memorisation --count 0", "count=0 must be at least 1"),
        ("run", "deviations --samples 1", "samples=1 must be at least 2"),
        ("planes", "tree", "prior.kind=latent-diffusion of "),
        ("planes", "deviations", "prior.kind=latent-diffusion of "),
        ("planes", "clusters", "prior.kind=latent-diffusion of "),
        ("planes", "svcca", "autoencoder.kind=d2c-vae of "),
        ("planes", "composition", "autoencoder.kind=d2c-vae of "),
        ("planes", "layerwise", "autoencoder.kind=d2c-vae of "),
        ("planes", "retrieval --layers 2", "autoencoder.kind=d2c-vae of "),
        ("planes", "interpolation --from held-out", "data.val of "),
    ],
)
def test_an_analysis_that_does_not_apply_is_one_line(
    which: str,
    line: str,
    message: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    assert run_here(monkeypatch, str(request.getfixturevalue(which)), *line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_commands_of_a_run_are_not_run_unless_asked_for(run: Path, tmp_path: Path):
    model, command = dinr.load(run), f"pipe:touch {tmp_path}/ran"
    experiment = override(model.experiment, {"data.train": command, "data.val": command, "data.allow_pipe": True})
    piped = dataclasses.replace(model, experiment=experiment)
    for call in (
        lambda: analysis.memorisation(piped, count=2),
        lambda: analysis.choose(piped, "held-out"),
        lambda: analysis.ablation(piped, piped, count=4),
    ):
        with pytest.raises(ValueError, match="data.allow_pipe=true: reading its data|prior.condition_bits"):
            call()
    assert len(analysis.training_latents(piped)) == 40  # these lie in the run folder
    assert not (tmp_path / "ran").exists()
