"""Checkpoints: exact resumption under every engine, stage and number of workers; nothing half-written is ever used."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file
from test_engine import BATCH, CLIP, ENGINES, make_batch, make_module, rate, start_engine, take_step
from tiny_checkpoint import files_of, write_checkpoint
from torch import Tensor

from distributed_inr.training import checkpoint
from distributed_inr.training.engine import Optim, Scale
from distributed_inr.training.fragments import average

STEPS = 6


def run(folder: Path, scale: Scale, *, steps: int) -> list[dict[str, float]]:
    """Train on to `steps` steps from the newest checkpoint in `folder`, and write one more."""
    engine = start_engine(scale, Optim(weight_decay=0.1, max_grad_norm=CLIP))
    averages = [replace(f, weight=f.weight.clone(), moments={}) for f in engine.state()]
    path = checkpoint.newest(str(folder))
    if path is not None:
        checkpoint.load(path, engine, averages=averages)
    history = []
    for step in range(engine.steps, steps):
        history.append(take_step(engine, step * BATCH, lr=rate(step)))
        average(averages, engine.state(), 0.9)
    writer = checkpoint.Writer(str(folder), keep=10)
    writer.begin(engine, averages=averages, config_json="{}", state={"samples": steps * BATCH})
    writer.commit(needed=True)
    writer.close()
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
        "state-00000-of-00002.safetensors",
        "state-00001-of-00002.safetensors",
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    newest = str(runs.folder / "whole" / name / last)
    weights, average = (checkpoint.weights(newest, average=average)["head.weight"] for average in (False, True))
    assert weights.shape == average.shape == (3, 7) and not torch.equal(weights, average)


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
    modules = [make_module(), make_module()]
    for module, name in zip(modules, ("deepspeed-3", "accelerate"), strict=True):
        path = runs.folder / "whole" / name / f"{STEPS * BATCH:012d}"
        module.load_state_dict(checkpoint.weights(str(path), average=False))
    first, second = (module(make_batch(range(64))) for module in modules)
    assert {name: loss.item() for name, loss in first.items()} == pytest.approx(
        {name: loss.item() for name, loss in second.items()}, rel=1e-4
    )


@pytest.mark.slow
def test_another_architecture_is_refused_with_the_difference(runs):
    path = str(runs.folder / "whole" / "deepspeed-1" / f"{STEPS * BATCH:012d}")
    with checkpoint.Reader.open(path) as reader:
        shapes = reader.shapes | {"head.weight": (4, 7)}
        with pytest.raises(ValueError, match=r"another model \(head\.weight: \(3, 7\) there, \(4, 7\) here\)"):
            reader.check(shapes, averages=True)
        del shapes["head.weight"]
        with pytest.raises(ValueError, match=r"another model \(head\.weight: \(3, 7\) there, absent here\)"):
            reader.check(shapes, averages=True)


# Below: the files alone, without an engine.


def test_newest_is_the_last_committed_one(tmp_path):
    assert checkpoint.newest(str(tmp_path / "absent")) is None
    write_checkpoint(tmp_path, 900)
    last = write_checkpoint(tmp_path, 1000)
    assert checkpoint.newest(str(tmp_path)) == str(last)


@pytest.mark.parametrize("ranks", [1, 2, 3, 10])
def test_any_range_of_a_parameter_is_put_together_from_the_ranks_files(tmp_path, ranks):
    path = write_checkpoint(tmp_path, 100, ranks=ranks)
    whole = torch.arange(100, 110, dtype=torch.float32)
    with checkpoint.Reader.open(str(path)) as reader:
        for start in range(10):
            for stop in range(start, 11):
                assert torch.equal(reader.read("exp_avg", "w", start, stop), whole[start:stop] / 2)
                assert torch.equal(reader.read("weight", "w", start, stop), whole[start:stop])


def test_a_gap_between_fragments_is_an_error(tmp_path):
    path = str(tmp_path / "000000000100")
    checkpoint.commit(path, [checkpoint.write(path, files_of(100, rank=0, ranks=2))])
    with (
        checkpoint.Reader.open(path) as reader,
        pytest.raises(ValueError, match="lacks exp_avg of w from element 5"),
    ):
        reader.read("exp_avg", "w", 0, 10)


def test_a_checkpoint_without_the_average_that_is_asked_for_is_refused(tmp_path):
    with checkpoint.Reader.open(str(write_checkpoint(tmp_path, 100))) as reader:
        reader.check({"w": (2, 5)}, averages=False)
        with pytest.raises(ValueError, match="keeps no average of the weights"):
            reader.check({"w": (2, 5)}, averages=True)
