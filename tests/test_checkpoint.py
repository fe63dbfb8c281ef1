"""Checkpoints: exact resumption under every engine, stage and number of workers; nothing half-written is ever used."""

import json
import resource
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file
from test_engine import BATCH, CLIP, ENGINES, make_batch, make_module, rate, start_engine, take_step
from torch import Tensor

from distributed_inr.training import checkpoint
from distributed_inr.training.checkpoint import Tensors
from distributed_inr.training.engine import Optim, Scale
from distributed_inr.training.fragments import average

STEPS = 6


def run(folder: Path, scale: Scale, *, steps: int) -> list[dict[str, float]]:
    """Train on to `steps` steps from the newest checkpoint in `folder`, and write one more."""
    engine = start_engine(scale, Optim(weight_decay=0.1, max_grad_norm=CLIP))
    averages = [replace(f, weight=f.weight.clone(), moments={}) for f in engine.state()]
    path = checkpoint.newest(folder)
    if path is not None:
        checkpoint.load(path, engine, averages=averages)
    history = []
    for step in range(engine.steps, steps):
        history.append(take_step(engine, step * BATCH, lr=rate(step)))
        average(averages, engine.state(), 0.9)
    state = {"samples": steps * BATCH}
    checkpoint.save(folder, engine, averages=averages, config_json="{}", state=state, keep=10)
    return history


def run_all(folder: Path, *, names: list[str], steps: int) -> dict[str, list[dict[str, float]]]:
    return {name: run(folder / name, ENGINES[name], steps=steps) for name in names}


def whole_and_interrupted(folder: Path) -> dict[str, tuple[list[dict[str, float]], ...]]:
    names = list(ENGINES)
    whole = run_all(folder / "whole", names=names, steps=STEPS)
    first = run_all(folder / "interrupted", names=names, steps=STEPS // 2)
    return {name: (whole[name], first[name]) for name in names}


def resume_elsewhere(folder: Path, changes: list[tuple[str, str]]) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Resume one engine's half-way checkpoint under another engine, in copies of its folder."""
    histories = {}
    world = torch.distributed.get_world_size()
    for before, after in changes:
        copy = folder / f"{before}-{after}-{world}"
        if torch.distributed.get_rank() == 0:
            half = f"{STEPS // 2 * BATCH:012d}"
            shutil.copytree(folder / "interrupted" / before / half, copy / half)
        torch.distributed.barrier()
        histories[before, after] = run(copy, ENGINES[after], steps=STEPS)
    return histories


def tensors(path: Path) -> dict[str, Tensor]:
    return {
        f"{file.name}:{name}": t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()
    }


CHANGES = [
    ("deepspeed-1", "deepspeed-3"),
    ("deepspeed-3", "deepspeed-1"),
    ("deepspeed-1", "deepspeed-0"),
    ("deepspeed-2", "deepspeed-3"),
    ("deepspeed-2", "accelerate"),
    ("accelerate", "deepspeed-2"),
]


@dataclass
class Runs:
    folder: Path
    whole: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    first: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    second: dict[str, list[dict[str, float]]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Each engine with two workers: six steps; and three steps, then three more in new processes."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    for name, (whole, first) in run_processes(whole_and_interrupted, 2, runs.folder)[0].items():
        runs.whole[name], runs.first[name] = whole, first
    runs.second = run_processes(continue_all, 2, runs.folder)[0]
    return runs


def continue_all(folder: Path) -> dict[str, list[dict[str, float]]]:
    return run_all(folder / "interrupted", names=list(ENGINES), steps=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_six_steps_equal_three_and_three_resumed_in_every_bit(runs, name):
    assert runs.first[name] + runs.second[name] == runs.whole[name]
    last = f"{STEPS * BATCH:012d}"
    expected = tensors(runs.folder / "whole" / name / last)
    found = tensors(runs.folder / "interrupted" / name / last)
    assert {file.split(":")[0] for file in found} == {
        "model.safetensors",
        "ema.safetensors",
        "optimizer-00000-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors",
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not torch.equal(found["model.safetensors:head.weight"], found["ema.safetensors:head.weight"])


@pytest.mark.slow
def test_resuming_under_another_engine_or_stage_continues_the_same_run(runs):
    histories = run_processes(resume_elsewhere, 2, runs.folder, CHANGES)[0]
    for (before, _), history in histories.items():
        for ours, theirs in zip(history, runs.whole[before][STEPS // 2 :], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
def test_resuming_with_another_number_of_workers_continues_the_same_run(runs, world):
    changes = [(name, name) for name in ("deepspeed-1", "deepspeed-3", "accelerate")]
    histories = run_processes(resume_elsewhere, world, runs.folder, changes)[0]
    for (before, _), history in histories.items():
        for ours, theirs in zip(history, runs.whole[before][STEPS // 2 :], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_weights_load_into_a_plain_module_and_give_the_same_losses(runs):
    module = make_module()
    module.load_state_dict(
        load_file(runs.folder / "whole" / "deepspeed-3" / f"{STEPS * BATCH:012d}" / "model.safetensors")
    )
    reference = make_module()
    reference.load_state_dict(
        load_file(runs.folder / "whole" / "accelerate" / f"{STEPS * BATCH:012d}" / "model.safetensors")
    )
    batch = make_batch(range(64))
    for name, loss in module(batch).items():
        assert loss.item() == pytest.approx(reference(batch)[name].item(), rel=1e-4)


@pytest.mark.slow
def test_another_architecture_is_refused_with_the_difference(runs):
    path = runs.folder / "whole" / "deepspeed-1" / f"{STEPS * BATCH:012d}"
    with pytest.raises(ValueError, match=r"another model \(head\.weight: \(3, 7\) there, \(4, 7\) here\)"):
        with checkpoint._Reader.open(path) as reader:
            reader.check({"head.weight": (4, 7)}, averages=True)


# Below: the files alone, without an engine.


def write_checkpoint(folder: Path, samples: int, *, keep: int = 10, ranks: int = 2) -> Path:
    path = folder / f"{samples:012d}"
    whole = torch.arange(samples, samples + 10, dtype=torch.float32)
    written = {}
    for rank in range(ranks):
        start, stop = rank * 10 // ranks, (rank + 1) * 10 // ranks
        metadata = {"format": "1", "fragments": json.dumps({"w": [start, stop - start, 10]})}
        files: checkpoint.Files = {
            f"optimizer-{rank:05d}-of-{ranks:05d}.safetensors": Tensors({"exp_avg/w": whole[start:stop] / 2}, metadata)
        }
        if rank == 0:
            files |= {
                "model.safetensors": Tensors({"w": whole.view(2, 5)}, {"format": "1"}),
                "state.json": json.dumps({"format": 1, "samples": samples}),
                "config.json": "{}",
            }
        written |= checkpoint.write(path, files)
    checkpoint.commit(path, written, keep=keep)
    return path


def test_newest_is_the_last_committed_one(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None
    write_checkpoint(tmp_path, 900)
    last = write_checkpoint(tmp_path, 1000)
    assert checkpoint.newest(tmp_path) == last


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer-00001-of-00002.safetensors", "state.json", "config.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_ignored_with_a_warning(tmp_path, caplog, name, damage):
    previous = write_checkpoint(tmp_path, 900)
    damage(write_checkpoint(tmp_path, 1000) / name)
    assert checkpoint.newest(tmp_path) == previous
    assert "000000001000 is ignored" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {"../x": {}}}', "null", "\x00"])
def test_a_garbled_manifest_is_ignored(tmp_path, text):
    previous = write_checkpoint(tmp_path, 900)
    (write_checkpoint(tmp_path, 1000) / "manifest.json").write_text(text)
    assert checkpoint.newest(tmp_path) == previous


def test_a_run_killed_before_its_first_commit_starts_again(tmp_path):
    (write_checkpoint(tmp_path, 900) / "manifest.json").unlink()
    assert checkpoint.newest(tmp_path) is None


def test_when_all_committed_checkpoints_are_damaged_the_run_is_refused(tmp_path):
    truncate(write_checkpoint(tmp_path, 900) / "model.safetensors")
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged; restore one, or delete the folder"):
        checkpoint.newest(tmp_path)


def test_only_the_newest_are_kept_and_unfinished_older_ones_removed(tmp_path):
    write_checkpoint(tmp_path, 100)
    (write_checkpoint(tmp_path, 200) / "manifest.json").unlink()
    for samples in (300, 400, 500):
        write_checkpoint(tmp_path, samples, keep=2)
    assert [int(path.name) for path in sorted(tmp_path.iterdir())] == [400, 500]


@pytest.mark.parametrize("ranks", [1, 2, 3, 10])
def test_any_range_of_a_parameter_is_put_together_from_the_ranks_files(tmp_path, ranks):
    path = write_checkpoint(tmp_path, 100, ranks=ranks)
    whole = torch.arange(100, 110, dtype=torch.float32)
    with checkpoint._Reader.open(path) as reader:
        for start in range(10):
            for stop in range(start, 11):
                assert torch.equal(reader.read("exp_avg", "w", start, stop), whole[start:stop] / 2)
                assert torch.equal(reader.read("weight", "w", start, stop), whole[start:stop])


def test_a_gap_between_fragments_is_an_error(tmp_path):
    path = write_checkpoint(tmp_path, 100)
    (path / "optimizer-00001-of-00002.safetensors").unlink()
    with checkpoint._Reader.open(path) as reader, pytest.raises(ValueError, match="lacks exp_avg of w from element 5"):
        reader.read("exp_avg", "w", 0, 10)


def test_an_unknown_format_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, 100)
    (path / "state.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        checkpoint.read_state(path)


def test_a_checkpoint_without_the_average_that_is_asked_for_is_refused(tmp_path):
    with checkpoint._Reader.open(write_checkpoint(tmp_path, 100)) as reader:
        reader.check({"w": (2, 5)}, averages=False)
        with pytest.raises(ValueError, match="keeps no average of the weights"):
            reader.check({"w": (2, 5)}, averages=True)


def test_no_space_is_one_clear_error_and_leaves_the_earlier_checkpoint(tmp_path):
    previous = write_checkpoint(tmp_path, 900)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(ValueError, match="000000001000 cannot be written: .*; free some space or choose another"):
            checkpoint.write(tmp_path / "000000001000", {"model.safetensors": Tensors({"w": torch.ones(10_000)}, {})})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.newest(tmp_path) == previous
