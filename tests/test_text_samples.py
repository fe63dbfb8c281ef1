"""Samples of runs with text: guidance, grids and files of prompts, and what is measured of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from tiny_clip import NAME, tiny_clip
from tiny_run import write_run
from tiny_text import CAPTIONS, text_experiment, write_captioned

import distributed_inr as dinr
from distributed_inr import files, pipeline
from distributed_inr.data.text_table import TextTable
from distributed_inr.evaluation.text import ImageTower, clip_score
from distributed_inr.files import export, sample_files
from distributed_inr.randomness import sample_seed
from distributed_inr.sheets import sheet

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for part in ("train", "val"):
        write_captioned(folder / part, CAPTIONS)
    return folder


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    """A run of DDMI with text."""
    return pipeline.run(text_experiment(home, tiny_clip(home)))["run"]


def test_a_whole_run_says_how_its_samples_follow_their_text(tmp_path: Path):
    names = ["chair", "floor_lamp"]
    write_captioned(tmp_path / "train", [f"a {n}" for n in names] * 4, names * 4)
    write_captioned(tmp_path / "val", ["a chair", "a blue chair"], ["chair", "chair"])
    encoder = tiny_clip(tmp_path)
    run = pipeline.run(text_experiment(tmp_path, encoder))["run"]
    result = json.loads((run / "evaluation.json").read_text())
    words, unseen = result["text"]["class words"], result["text"]["held-out captions"]
    assert words["prompts"] == ["a chair", "a floor lamp"] and words["samples"] == 20
    assert unseen["prompts"] == ["a blue chair"] and unseen["by_class"].keys() == {"chair"}
    model = dinr.load(run)
    latents = model.sample_latents(10, guide=model.guide(words["prompts"]), seed=model.experiment.seed)
    loaded = model.load_text_encoder(with_images=True)
    assert loaded is model.load_text_encoder()  # one is loaded, not two
    tower = ImageTower.of(loaded)
    assert tower is not None
    with torch.no_grad():
        pictures = model.domain.pictures(model.decode(latents).render(model.domain.size))
        texts = loaded(words["prompts"]).pooled.repeat_interleave(10, dim=0)
        assert words["clip_s"]["value"] == pytest.approx(clip_score(tower(pictures), texts), abs=0.5)
    assert words["clip_s"]["encoder"] == f"open_clip {NAME}" and "clip_s" not in result["left_out"]
    page = (run / "report.md").read_text()
    assert "| 2 class words |" in page and "| 1 held-out captions |" in page and "![prompts](prompts.png)" in page
    for name in ("prompts.png", "confusion.png"):
        with Picture.open(run / name) as picture:
            assert np.asarray(picture).std() > 5


def test_an_evaluation_without_its_encoder_measures_the_rest(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text())
    config["text"]["pretrained"] = "/another/machine.safetensors"
    (run / "config.json").write_text(json.dumps(config))
    result = dinr.evaluate(run)
    assert "samples by words are left out" in caplog.text
    assert "text" not in result and "neither a file nor one of" in result["left_out"]["text"]
    assert result["val"] and result["samples"]
    shutil.rmtree(run / "text")
    with pytest.raises(ValueError, match=r"text/table.json does not exist: the run has not come that far"):
        dinr.evaluate(run)


def test_samples_depend_on_their_seed_and_prompt_alone(finished: Path):
    model = dinr.load(finished)
    prompts = ["a chair", "a lamp", "something that no caption says"]

    def draw(count: int, text: Any, **how: Any) -> torch.Tensor:
        return model.sample_latents(count, guide=model.guide(text), steps=3, **how)

    drawn = draw(2, prompts, seed=4)
    assert len(drawn) == 6
    torch.testing.assert_close(draw(1, prompts[1], seed=4, start=3), drawn[3:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draw(2, prompts[2], seed=4, start=4), drawn[4:], rtol=1e-4, atol=1e-5)
    assert torch.equal(draw(2, " a  chair\n", seed=4), draw(2, "a chair", seed=4))
    empty, plain = draw(2, "", seed=4), model.sample_latents(2, seed=4, steps=3)
    torch.testing.assert_close(empty, plain, rtol=1e-4, atol=1e-5)


def test_guidance_without_text_or_prompt_is_one_clear_line(finished: Path, tmp_path: Path):
    model = dinr.load(finished)
    with pytest.raises(ValueError, match=r"guidance=3.0 has no prompt that it could guide towards; give text"):
        model.sample(1, guidance=3.0)
    with pytest.raises(ValueError, match=r"text=\[\] holds no prompt"):
        model.sample(1, text=[])
    with pytest.raises(ValueError, match=r"sampling.guidance=-1.0: .*greater than or equal to 0"):
        model.sample(1, text="a chair", guidance=-1.0)
    with pytest.raises(ValueError, match=r"sampling.guidance_interval=0.7 0.2 must rise"):
        model.sample(1, text="a chair", guidance_interval=(0.7, 0.2))
    without = dinr.load(write_run(tmp_path))
    for given in ({"guidance": 3.0}, {"text": "a chair"}, {"negative_text": "a lamp"}):
        name, value = next(iter(given.items()))
        with pytest.raises(ValueError, match=rf"{name}={value!r}: .*tiny was trained without text; leave it out"):
            without.sample(1, **given)


def test_prompts_become_a_labelled_grid_and_files(finished: Path, tmp_path: Path):
    model = dinr.load(finished)
    paths = sample_files(model, tmp_path / "out", text=["a chair", "", "椅子", "A Round table!"], count=2, steps=2)
    names = [path.name for path in paths]
    assert names[:2] == ["seed0-16px-000-a-chair.png", "seed0-16px-001-a-chair.png"]
    assert names[2:8] == [
        *["seed0-16px-002.png", "seed0-16px-003.png", "seed0-16px-004.png", "seed0-16px-005.png"],
        *["seed0-16px-006-a-round-table.png", "seed0-16px-007-a-round-table.png"],
    ]
    nodes = json.loads(paths[-2].read_text())["nodes"]
    assert [node["prompt"] for node in nodes] == [p for p in ("a chair", "", "椅子", "A Round table!") for _ in (0, 1)]
    assert [node["seed"] for node in nodes] == [sample_seed(0, i) for i in range(8)]
    with Picture.open(paths[-1]) as grid:
        assert grid.height > 4 * 128 and grid.width > 2 * 128 + 40  # four rows, and a column of prompts
    alone = sample_files(model, tmp_path / "out", text="a chair", count=1, steps=2)
    assert alone[0].name == "seed0-16px-000-a-chair.png"
    with Picture.open(paths[0]) as picture:
        first = np.asarray(picture)
    again = model.sample(1, text="a chair", steps=2).render(16)[0]
    np.testing.assert_allclose(first, (again.permute(1, 2, 0) * 255).numpy(), atol=1)


def test_an_evaluation_is_not_done_before_its_text_is(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counted: list[tuple[int, int]] = []

    def measure(*args: Any, advance: Any, **given: Any) -> dict[str, Any]:
        assert 0 < counted[-1][0] < counted[-1][1]
        advance(7)
        return {}

    monkeypatch.setattr(sys.modules["distributed_inr.evaluation.evaluate"], "measure_text", measure)
    dinr.evaluate(finished, out=tmp_path, progress=lambda done, total, figures: counted.append((done, total)))
    assert counted[-2][0] == counted[-3][0] + 7 and counted[-1][0] == counted[-1][1]


def test_a_sheet_is_of_so_many_samples_of_a_prompt_and_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: dict[str, Any] = {}

    def keep(rows: Any, **given: Any) -> Picture.Image:
        drawn.update(given, rows=rows)
        return Picture.new("RGB", (1, 1))

    monkeypatch.setattr(files, "sheet", keep)
    paths = sample_files(dinr.load(finished), tmp_path, text=["a chair", "a lamp"], count=18, steps=1)
    assert len(paths) == 36 + 2
    assert [len(row) for row in drawn["rows"]] == [16, 16] and drawn["row_titles"] == ["a chair", "a lamp"]
    assert drawn["title"] == "the first 16 of 18 samples of each prompt"
    with Picture.open(paths[18]) as picture:
        lamp = np.asarray(picture)
    assert np.array_equal(np.asarray(drawn["rows"][1][0].resize((16, 16), Picture.Resampling.NEAREST)), lamp)
    sample_files(dinr.load(finished), tmp_path, text=["a chair"] * 5, count=17, steps=1)
    assert [len(row) for row in drawn["rows"]] == [16] * 4
    assert drawn["title"] == "the first 16 of 17 samples of the first 4 of 5 prompts"


def test_titles_of_other_scripts_can_be_read():
    def drawn(title: str) -> np.ndarray:
        return np.asarray(sheet([[Picture.new("RGB", (64, 64))]], row_titles=[title]))

    for one, other in ("жд", "λμ", "بت"):
        first, second = drawn(one), drawn(other)
        assert first.shape != second.shape or not np.array_equal(first, second)  # no boxes


def test_options_without_influence_are_said(finished: Path, caplog: pytest.LogCaptureFixture):
    model = dinr.load(finished)
    model.guide("a chair", negative_text="a lamp", guidance=3.0, guidance_rescale=0.5)
    model.guide("a chair", guidance=1.0, guidance_rescale=0.0)
    model.guide("a chair", negative_text="a lamp", guidance=0.0)
    assert not caplog.messages
    model.guide("a chair", negative_text="a lamp", guidance=1.0, guidance_interval=(0.2, 0.8))
    model.guide("a chair", guidance=0.0, guidance_rescale=0.5)
    assert caplog.messages == [
        "negative_text='a lamp' has no influence at guidance=1",
        "guidance_interval=(0.2, 0.8) has no influence at guidance=1",
        "guidance_rescale=0.5 has no influence at guidance=0",
    ]


def test_many_prompts_are_embedded_in_parts(finished: Path, monkeypatch: pytest.MonkeyPatch):
    model = dinr.load(finished)
    prompts = [f"chair {i}" for i in range(150)]
    encoder, sizes = model.load_text_encoder(), []
    forward = encoder.forward

    def counted(part: list[str]) -> Any:
        sizes.append(len(part))
        return forward(part)

    monkeypatch.setattr(encoder, "forward", counted)
    found = model.embed(prompts)
    assert sizes == [64, 64, 22] and len(found.mask) == 150
    one = encoder([prompts[149]])
    torch.testing.assert_close(found.tokens[149][found.mask[149]], one.tokens[0][one.mask[0]], rtol=1e-3, atol=2e-3)


@pytest.mark.slow
def test_the_sampling_job_reads_prompts_from_a_file(finished: Path, tmp_path: Path):
    """With prompts of the table, since a process of its own does not know the tiny model."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (tmp_path / "prompts.txt").write_text("\ufeffa lamp\n\n   \n a round table \n", encoding="utf-8")
    out = tmp_path / "out"

    def job(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "jobs/sample.py", str(run), "--count", "1", "--steps", "2", "--out", str(out)]
        return subprocess.run([*command, *arguments], cwd=REPOSITORY, capture_output=True, text=True)

    done = job("--text", "a chair", "--text-file", str(tmp_path / "prompts.txt"), "--guidance", "2")
    assert done.returncode == 0, done.stderr
    nodes = json.loads((out / "seed0-16px-seeds.json").read_text())["nodes"]
    assert [node["prompt"] for node in nodes] == ["a chair", "a lamp", "a round table"]
    (tmp_path / "blank.txt").write_text("\n \n")
    for given, message in (
        (["--text-file", str(tmp_path / "blank.txt")], "holds no prompt; write one a line"),
        (["--text-file", str(tmp_path / "none.txt")], "cannot be read: "),
        (["--guidance", "3"], "guidance=3.0 has no prompt that it could guide towards"),
    ):
        failed = job(*given)
        assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and message in failed.stderr


def test_an_exported_run_keeps_what_prompts_need(finished: Path, tmp_path: Path):
    out = tmp_path / "shared"
    export(finished, out)
    table = TextTable.open(out / "text")
    assert table.captions == 1 and table.sha256 == TextTable.open(finished / "text").sha256
    exact, shared = (dinr.load(place).sample(2, text="a chair", steps=2).render(8) for place in (finished, out))
    assert (exact - shared).abs().max() < 0.05  # weights of half the digits
    shutil.rmtree(out / "text")
    with pytest.raises(ValueError, match=r"text/table.json does not exist: the run has not come that far"):
        dinr.load(out).sample(1)
