"""Runs with text: the table of embeddings, and the stages that depend on it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_clip import NAME, WIDTH, tiny_clip
from tiny_domains import DOMAINS, write_sets
from tiny_text import CAPTIONS, DISTINCT, text_experiment, write_captioned

import distributed_inr as dinr
from distributed_inr import pipeline
from distributed_inr.analysis.control import redraw, tree
from distributed_inr.data.text_table import TextTable, identity, read_captioned_latent, write_table
from distributed_inr.experiment import Experiment
from distributed_inr.files import sample_files
from distributed_inr.models.text import MiniLM, OpenCLIP, TextEncoder
from distributed_inr.randomness import sample_seed
from distributed_inr.raw.arrays import write_npy


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for part in ("train", "val"):
        write_captioned(folder / part, CAPTIONS)
    return folder


@pytest.fixture(scope="module")
def clip(home: Path) -> OpenCLIP:
    return tiny_clip(home)


@pytest.fixture(scope="module")
def finished(home: Path, clip: OpenCLIP) -> Path:
    """A run of DDMI with text; tests that change it copy it."""
    return pipeline.run(text_experiment(home, clip))["run"]


def copy(run: Path, folder: Path) -> Path:
    """The run in another place, to be changed."""
    place = folder / "runs" / run.parent.name / run.name
    shutil.copytree(run, place)
    return place


def again(run: Path, home: Path, text: Any, **changes: Any) -> Experiment:
    return text_experiment(home, text, **{"output": str(run.parents[1])} | changes)


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
    assert (finished / "text" / "tokens.f16").stat().st_size == 2 * total * WIDTH
    assert isinstance(table._rows, np.memmap)
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
    (run / "text" / "tokens.f16").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"tokens.f16 cannot be read: it has 8 bytes, not .*; delete .* to make it"):
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
        with pytest.raises(
            ValueError, match=r"was trained with text embedded by .*, and text.kind=open-clip now loads"
        ):
            model.sample(1, text="a stool", steps=2)
        with pytest.raises(ValueError, match=r"was trained with text embedded by "):
            model.load_text_encoder(with_images=True)
        moved.unlink()
        with pytest.raises(ValueError, match=r"config.json: text.pretrained=.* is neither a file nor one of"):
            model.sample(1, text="a stool", steps=2)
        shutil.rmtree(run / "evaluation")  # a finished table needs its weights no more
        pipeline.run(again(run, home, clip))
        assert "neither a file" in json.loads((run / "evaluation.json").read_text())["left_out"]["text"]
        (run / "text" / "table.json").unlink()
        with pytest.raises(ValueError, match=r"text.pretrained=.* is neither a file nor one of"):
            pipeline.run(again(run, home, clip))
    finally:
        moved.write_bytes(kept)


def test_an_encoder_by_a_tag_is_refused_before_anything_is_written(
    finished: Path, home: Path, clip: OpenCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import open_clip.pretrained as known

    other = tiny_clip(tmp_path, seed=1)
    places = {"the_same": {"file": clip.pretrained}, "other": {"file": other.pretrained}}
    monkeypatch.setitem(known._PRETRAINED, NAME, places)
    run = copy(finished, tmp_path)
    prior = (run / "prior" / "model.safetensors").stat().st_mtime_ns
    kept = {name: (run / name).read_bytes() for name in ("config.json", "text/stage.json", "text/table.json")}
    with pytest.raises(ValueError, match="was trained on captions embedded by .*, and `text` is .*: bring that one"):
        pipeline.run(again(run, home, OpenCLIP(model=NAME, pretrained="other")))
    assert kept == {name: (run / name).read_bytes() for name in kept}
    pipeline.run(again(run, home, OpenCLIP(model=NAME, pretrained="the_same")))
    dinr.load(run).sample(1, text="a stool", steps=2)
    Path(clip.pretrained or "").rename(tmp_path / "gone")  # such as a cache that was cleared
    try:
        pipeline.run(again(run, home, OpenCLIP(model=NAME, pretrained="the_same")))
        assert prior == (run / "prior" / "model.safetensors").stat().st_mtime_ns
    finally:
        (tmp_path / "gone").rename(clip.pretrained or "")


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
    run = pipeline.run(text_experiment(home, clip, **places))["run"]
    kept = tmp_path / "kept" / run.parent.name / run.name / "prior"
    shutil.rmtree(run / "prior")
    other = tiny_clip(tmp_path, seed=1)
    before = (run / "config.json").read_text()
    with pytest.raises(ValueError) as refused:
        pipeline.run(text_experiment(home, other, **places))
    assert f"{kept} was trained on captions embedded by {identity(clip.label, clip.local_sha256 or '')}" in str(
        refused.value
    )
    assert f"or delete {run / 'prior'} and {kept} to train it again" in str(refused.value)
    assert (run / "config.json").read_text() == before
    shutil.rmtree(kept)
    pipeline.run(text_experiment(home, other, **places))
    assert TextTable.open(run / "text").sha256 == other.local_sha256


def test_an_encoder_that_there_is_not_is_said_before_anything_is_trained(home: Path, clip: OpenCLIP, tmp_path: Path):
    output = {"output": str(tmp_path / "runs")}
    with pytest.raises(ValueError, match=r"text.sha256=00ff: .*give the weights that are meant"):
        pipeline.run(text_experiment(home, MiniLM(sha256="00ff"), **output))
    with pytest.raises(ValueError, match=r"text.pretrained=nowhere.pt is neither a file nor one of open_clip's tags"):
        pipeline.run(text_experiment(home, OpenCLIP(model=NAME, pretrained="nowhere.pt"), **output))
    assert not (tmp_path / "runs").exists()


def test_a_set_without_captions_is_one_clear_line(tmp_path: Path, clip: OpenCLIP):
    write_sets(DOMAINS["image"], tmp_path)
    given = text_experiment(tmp_path, clip)
    with pytest.raises(ValueError, match=r"data.train=.* has no captions to condition on \(text.kind=open-clip\)"):
        pipeline.run(given)
    assert not (given.folder / "autoencoder").exists()  # said before anything is trained


def test_a_table_that_was_interrupted_is_made_again(finished: Path, home: Path, clip: OpenCLIP, tmp_path: Path):
    run = copy(finished, tmp_path)
    record = json.loads((run / "text" / "stage.json").read_text())
    (run / "text" / "stage.json").write_text(json.dumps(record | {"complete": False}))
    (run / "text" / "tokens.f16").write_bytes(b"half")
    (run / "text" / "table.json").unlink()
    pipeline.run(again(run, home, clip))
    assert TextTable.open(run / "text").fingerprint == TextTable.open(finished / "text").fingerprint


@pytest.mark.parametrize(
    ("name", "content"),
    [("table.json", None), ("table.json", b"{"), ("tokens.f16", b""), ("starts.npy", b"half"), ("hashes.npy", None)],
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
    run = pipeline.run(text_experiment(home, clip, "chinr"))["run"]
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


def test_numbers_beyond_float16_are_refused(tmp_path: Path, clip: OpenCLIP):
    encoder = clip.build()
    encoder.model.ln_final.weight.fill_(1e5)
    with pytest.raises(ValueError, match="numbers that float16 cannot hold"):
        write_table(tmp_path, ["a chair"], encoder)
