"""Runs with text: the table of embeddings, the stages that depend on it, and samples that follow prompts."""

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
from safetensors.torch import load_file
from tiny_clip import NAME, WIDTH, tiny_clip
from tiny_domains import DOMAINS, RECORDS, tiny_experiment, write_sets
from tiny_run import write_run

import distributed_inr as dinr
from distributed_inr import files, pipeline
from distributed_inr.analysis.control import redraw, tree
from distributed_inr.config import override
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.data.text_table import TextTable, identity, read_captioned_latent, write_table
from distributed_inr.experiment import Experiment
from distributed_inr.files import export, sample_files
from distributed_inr.models.text import MiniLM, OpenCLIP, TextEncoder, load_encoder
from distributed_inr.randomness import sample_seed
from distributed_inr.raw.arrays import write_npy

REPOSITORY = Path(__file__).parents[1]
CAPTIONS = ["a chair\nchair", "a round  table\ntable\na chair", "", "a lamp", "a chair", "椅子"]
DISTINCT = {"", "a chair", "chair", "a round table", "table", "a lamp", "椅子"}


def write_captioned(folder: Path) -> None:
    """Six tiny pictures for training and for validation, with captions."""
    for part in ("train", "val"):
        writer = ShardWriter(folder / part, domain="image", protocol={"made": "for tests"})
        for number, text in enumerate(CAPTIONS):
            record = {"__key__": f"{number:04d}", **RECORDS["image"](DOMAINS["image"], number)}
            writer.write(record | ({"txt": text.encode()} if text else {}))
        writer.close()


def experiment(folder: Path, text: Any, family: str = "ddmi", **changes: Any) -> Experiment:
    given = {f"text.{name}": value for name, value in vars(text).items() if not name.startswith("_")}
    return override(tiny_experiment("image", family, folder), given | changes)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_captioned(folder)
    return folder


@pytest.fixture(scope="module")
def clip(home: Path) -> OpenCLIP:
    return tiny_clip(home)


@pytest.fixture(scope="module")
def finished(home: Path, clip: OpenCLIP) -> Path:
    """A run of DDMI with text; tests that change it copy it."""
    return pipeline.run(experiment(home, clip))["run"]


def copy(run: Path, folder: Path) -> Path:
    """The run in another place, to be changed."""
    place = folder / "runs" / run.parent.name / run.name
    shutil.copytree(run, place)
    return place


def again(run: Path, home: Path, text: Any, **changes: Any) -> Experiment:
    return experiment(home, text, **{"output": str(run.parents[1])} | changes)


# --- the table


def test_a_table_holds_each_caption_once_unpadded_and_mapped(finished: Path, clip: OpenCLIP):
    table = TextTable.open(finished / "text")
    assert set((finished / "text" / "captions.txt").read_text().splitlines()) == DISTINCT
    assert table.captions == len(DISTINCT) and table.encoder == f"open_clip {NAME}" and table.width == WIDTH
    assert table.sha256 == clip.local_sha256
    encoder = clip.build()
    total = 0
    for caption in sorted(DISTINCT):
        found, (tokens, mask) = encoder([caption]), table.lookup(caption)
        expected = found.tokens[0][found.mask[0]].half().float()
        assert torch.equal(tokens[mask], expected) and not tokens[~mask].any()
        assert torch.equal(table.tokens(caption), expected)
        total += int(mask.sum())
    stored = np.load(finished / "text" / "tokens.npy", mmap_mode="r")
    assert stored.shape == (total, WIDTH) and stored.dtype == np.float16
    assert isinstance(table._array("tokens"), np.memmap)
    assert "a  round table" in table and "a square table" not in table
    with pytest.raises(ValueError, match="has no embedding of 'a square table'"):
        table.lookup("a square table")


def test_a_table_that_is_not_whole_is_no_table(finished: Path, tmp_path: Path):
    run = copy(finished, tmp_path)
    (run / "text" / "table.json").write_text('{"version": 1, "encoder"')
    with pytest.raises(
        ValueError, match=r"table.json cannot be read: .*; delete .*/text and run the training job again"
    ):
        TextTable.open(run / "text")
    (run / "text" / "table.json").write_text((finished / "text" / "table.json").read_text())
    (run / "text" / "tokens.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"tokens.npy cannot be read: .*delete .* to make it again"):
        TextTable.open(run / "text").lookup("a chair")


def test_one_of_several_captions_is_drawn_for_each_position(finished: Path):
    table = TextTable.open(finished / "text")
    record = {"__key__": "k", "latent.npy": write_npy(np.zeros((1, 2), np.float32)), "txt": CAPTIONS[1].encode()}
    signals = [read_captioned_latent(record, sample_seed(0, i), texts=table, dropout=0.1) for i in range(3000)]
    parts = {text: sum(s.text == text for s in signals) / 3000 for text in ("", "a round  table", "table", "a chair")}
    assert abs(parts[""] - 0.1) < 0.02 and all(abs(parts[t] - 0.3) < 0.03 for t in list(parts)[1:])
    for signal in signals[:50]:
        assert torch.equal(signal.text_tokens[signal.text_mask], table.tokens(signal.text))
    same = read_captioned_latent(record, sample_seed(0, 7), texts=table, dropout=0.1)
    assert same.text == signals[7].text
    without = {**record, "txt": b""}
    assert read_captioned_latent(without, 5, texts=table, dropout=0.0).text == ""


def test_loader_processes_open_the_table_themselves(finished: Path, home: Path, clip: OpenCLIP, tmp_path: Path):
    run = copy(finished, tmp_path)
    shutil.rmtree(run / "prior")
    pipeline.run(again(run, home, clip, **{"data.num_loaders": 2}))
    one, other = (load_file(place / "prior" / "model.safetensors") for place in (finished, run))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- stages


def test_training_a_prior_loads_no_text_encoder(
    finished: Path, home: Path, clip: OpenCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = copy(finished, tmp_path)
    shutil.rmtree(run / "prior")

    def refuse(self: TextEncoder, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a text encoder was loaded")

    for encoder in TextEncoder.__subclasses__():
        monkeypatch.setattr(encoder, "__init__", refuse)
    with pytest.raises(AssertionError, match="a text encoder was loaded"):
        clip.build()
    pipeline.run(again(run, home, clip), stages=("prior",))
    found = load_file(run / "prior" / "model.safetensors")
    assert any(name.startswith("denoiser.text") for name in found)
    # A prompt of the table needs none either; another one does.
    model = dinr.load(run)
    assert model.sample(2, text="a round table", steps=2).render(8).shape == (2, 3, 8, 8)


def test_another_encoder_is_refused_and_then_reruns_what_depends_on_it(
    finished: Path, home: Path, clip: OpenCLIP, tmp_path: Path
):
    run = copy(finished, tmp_path)
    before = {path: path.stat().st_mtime_ns for part in ("autoencoder", "latents") for path in (run / part).rglob("*")}
    changed = again(run, home, MiniLM())
    with pytest.raises(
        ValueError, match=r"prior was made with other options: .*text is open_clip tiny-clip there and all-MiniLM-L6-v2"
    ):
        pipeline.run(changed)
    shutil.rmtree(run / "prior")
    pipeline.run(changed)
    assert TextTable.open(run / "text").encoder == "all-MiniLM-L6-v2"
    assert before == {path: path.stat().st_mtime_ns for path in before}  # neither was touched
    assert dinr.load(run).experiment.prior.text_dim == 384


def test_other_weights_at_the_same_path_are_refused_before_anything_is_written(
    finished: Path, home: Path, clip: OpenCLIP, tmp_path: Path
):
    run = copy(finished, tmp_path)
    other = tiny_clip(tmp_path, seed=1)
    moved = Path(clip.pretrained or "")
    kept = moved.read_bytes()
    try:
        moved.write_bytes(Path(other.pretrained or "").read_bytes())
        table = (run / "text" / "table.json").read_bytes()
        with pytest.raises(ValueError) as refused:
            pipeline.run(again(run, home, clip))
        old, new = TextTable.open(finished / "text").identity, identity(other.label, other.local_sha256 or "")
        assert f"embedded by {old}, and `text` is {new}: bring that one back" in str(refused.value)
        assert (run / "text" / "table.json").read_bytes() == table
        model = dinr.load(run)  # prompts of the table are known; others need the encoder, which is another one
        model.sample(1, text="a chair", steps=2)
        load_encoder.cache_clear()
        with pytest.raises(
            ValueError, match=r"was trained with text embedded by .*, and text.kind=open-clip now loads"
        ):
            model.sample(1, text="a stool", steps=2)
        with pytest.raises(ValueError, match=r"was trained with text embedded by "):
            model.load_text_encoder(with_images=True)
        moved.unlink()
        load_encoder.cache_clear()
        with pytest.raises(ValueError, match=r"config.json: text.pretrained=.* is neither a file nor one of"):
            model.sample(1, text="a stool", steps=2)
    finally:
        moved.write_bytes(kept)
        load_encoder.cache_clear()


def test_the_same_weights_may_be_moved(finished: Path, home: Path, clip: OpenCLIP, tmp_path: Path):
    run = copy(finished, tmp_path)
    prior = run / "prior" / "model.safetensors"
    made = prior.stat().st_mtime_ns
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copyfile(clip.pretrained or "", moved)
    pipeline.run(again(run, home, OpenCLIP(model=NAME, pretrained=str(moved), sha256=clip.local_sha256)))
    assert prior.stat().st_mtime_ns == made
    assert dinr.load(run).experiment.text == OpenCLIP(model=NAME, pretrained=str(moved), sha256=clip.local_sha256)


def test_checkpoints_elsewhere_hold_to_their_encoder(home: Path, clip: OpenCLIP, tmp_path: Path):
    places = {"output": str(tmp_path / "runs"), "checkpoints": str(tmp_path / "kept")}
    run = pipeline.run(experiment(home, clip, **places))["run"]
    kept = tmp_path / "kept" / run.parent.name / run.name / "prior"
    shutil.rmtree(run / "prior")
    other = tiny_clip(tmp_path, seed=1)
    before = (run / "config.json").read_text()
    with pytest.raises(ValueError) as refused:
        pipeline.run(experiment(home, other, **places))
    assert f"{kept} was trained on captions embedded by {identity(clip.label, clip.local_sha256 or '')}" in str(
        refused.value
    )
    assert f"or delete {run / 'prior'} and {kept} to train it again" in str(refused.value)
    assert (run / "config.json").read_text() == before
    shutil.rmtree(kept)
    pipeline.run(experiment(home, other, **places))
    assert TextTable.open(run / "text").sha256 == other.local_sha256


def test_an_encoder_that_there_is_not_is_said_before_anything_is_trained(home: Path, clip: OpenCLIP, tmp_path: Path):
    output = {"output": str(tmp_path / "runs")}
    with pytest.raises(ValueError, match=r"text.sha256=00ff: .*give the weights that are meant"):
        pipeline.run(experiment(home, MiniLM(sha256="00ff"), **output))
    with pytest.raises(ValueError, match=r"text.pretrained=nowhere.pt is neither a file nor one of open_clip's tags"):
        pipeline.run(experiment(home, OpenCLIP(model=NAME, pretrained="nowhere.pt"), **output))
    assert not (tmp_path / "runs").exists()


def test_a_set_without_captions_is_one_clear_line(tmp_path: Path, clip: OpenCLIP):
    write_sets(DOMAINS["image"], tmp_path)
    given = experiment(tmp_path, clip)
    with pytest.raises(ValueError, match=r"data.train=.* has no captions to condition on \(text.kind=open-clip\)"):
        pipeline.run(given)
    assert not (given.folder / "autoencoder").exists()  # said before anything is trained


def test_a_table_that_was_interrupted_is_made_again(finished: Path, home: Path, clip: OpenCLIP, tmp_path: Path):
    run = copy(finished, tmp_path)
    record = json.loads((run / "text" / "stage.json").read_text())
    (run / "text" / "stage.json").write_text(json.dumps(record | {"complete": False}))
    (run / "text" / "tokens.npy").write_bytes(b"half")
    (run / "text" / "table.json").unlink()
    pipeline.run(again(run, home, clip))
    assert TextTable.open(run / "text").fingerprint == TextTable.open(finished / "text").fingerprint


@pytest.mark.parametrize(
    ("name", "content"),
    [("table.json", None), ("table.json", b"{"), ("tokens.npy", b""), ("starts.npy", b"half"), ("hashes.npy", None)],
)
def test_a_table_that_was_damaged_is_made_again(
    finished: Path, home: Path, clip: OpenCLIP, tmp_path: Path, name: str, content: bytes | None
):
    run = copy(finished, tmp_path)
    place = run / "text" / name
    whole, prior = place.read_bytes(), (run / "prior" / "model.safetensors").stat().st_mtime_ns
    if content is None:
        place.unlink()
    else:
        place.write_bytes(content)
    pipeline.run(again(run, home, clip))
    assert place.read_bytes() == whole
    assert (run / "prior" / "model.safetensors").stat().st_mtime_ns == prior


def test_both_families_train_and_sample_with_text(home: Path, clip: OpenCLIP):
    run = pipeline.run(experiment(home, clip, "chinr"))["run"]
    model = dinr.load(run)
    guide = model.guide(["a chair", "a lamp"], guidance=3.0)
    latents = model.sample_latents(2, guide=guide, steps=2)
    assert latents.shape == (4, 3, 6)
    paths = sample_files(model, text=["a chair", "a lamp"], count=1, fix_layers=1, branches=2, steps=2)
    nodes = json.loads(next(path for path in paths if path.suffix == ".json").read_text())["nodes"]
    assert [node["prompt"] for node in nodes] == ["a chair"] * 3 + ["a lamp"] * 3
    assert [node["branch"] for node in nodes] == [None, 0, 1] * 2
    made = tree(model, branches=1, steps=2)  # analyses draw with the empty prompt
    path = max(made.nodes, key=len)
    assert torch.equal(redraw(model, made, path), made.nodes[path].latent)


# --- samples


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
    with Picture.open(paths[0]) as picture:
        first = np.asarray(picture)
    again = model.sample(1, text="a chair", steps=2).render(16)[0]
    np.testing.assert_allclose(first, (again.permute(1, 2, 0) * 255).numpy(), atol=1)


def test_an_evaluation_is_not_done_before_its_text_is(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
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


def test_options_without_influence_are_said(finished: Path, caplog: pytest.LogCaptureFixture):
    model = dinr.load(finished)
    model.guide("a chair", negative_text="a lamp", guidance=3.0, guidance_rescale=0.5)
    model.guide("a chair", guidance=1.0, guidance_rescale=0.0)
    model.guide("a chair", negative_text="a lamp", guidance=0.0)
    assert not caplog.messages
    model.guide("a chair", negative_text="a lamp", guidance=1.0)
    model.guide("a chair", guidance=0.0, guidance_rescale=0.5)
    assert caplog.messages == [
        "negative_text='a lamp' has no influence at guidance=1",
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
    run = copy(finished, tmp_path)
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


def test_numbers_beyond_float16_are_refused(tmp_path: Path, clip: OpenCLIP):
    encoder = clip.build()
    encoder.model.ln_final.weight.fill_(1e5)
    with pytest.raises(ValueError, match="numbers that float16 cannot hold"):
        write_table(tmp_path, ["a chair"], encoder)
