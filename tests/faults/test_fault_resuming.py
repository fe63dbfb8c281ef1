"""Runs that go on elsewhere: with other workers, ZeRO stages and batch sizes, the samples and the curve stay."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import BATCH, fit, make_experiment, read_account, read_losses, read_starts, stage_of
from processes import run_processes
from safetensors.torch import load_file

from distributed_inr.experiment import Experiment
from distributed_inr.launch import Worker

pytestmark = pytest.mark.slow

QUARTER = 6 * BATCH
PATHS = {
    "same": [(2, 1), (2, 1), (2, 1), (2, 1)],
    "workers": [(2, 1), (1, 1), (2, 1), (4, 1)],
    "stages": [(2, 0), (2, 2), (2, 3), (2, 0)],
    "batches": [(2, 1), (2, 1), (2, 1), (2, 1)],
}
"""Workers and ZeRO stage of each quarter of a run."""
BATCHES = [(4, 1), (8, 2), (4, 2), (12, 3)]
"""Batch and micro-batch of each quarter of "batches"."""


def experiment_of(folder: Path, name: str, quarter: int) -> Experiment:
    """The run up to the end of a quarter; with a constant rate, its length shows in nothing before."""
    batch, micro = BATCHES[quarter] if name == "batches" else (BATCH, 1)
    changes = {
        "num_samples": (quarter + 1) * QUARTER,
        "optim__schedule": "constant",
        "batch_size": batch,
        "micro_batch_size": micro,
        "evaluate_every_samples": QUARTER,
    }
    stage = PATHS[name][quarter][1] if name in PATHS else 1
    training = {f"autoencoder_training__{key}": value for key, value in changes.items()}
    return make_experiment(folder, steps=1, name=name, scale__zero_stage=stage, **training)


def train_quarters(folder: Path, quarters: list[tuple[str, int]]) -> None:
    """Train quarters of the named runs, one after the other."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    worker = Worker(rank, world, lambda metrics: None, lambda *progress: None, lambda: False)
    for name, quarter in quarters:
        fit(worker, experiment_of(folder, name, quarter))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption, "whole", and those of PATHS."""
    folder = tmp_path_factory.mktemp("resuming")
    for name in ("whole", *PATHS):
        stage_of(experiment_of(folder, name, 3))
    run_processes(train_quarters, 2, folder, [("whole", 3), *((name, 0) for name in PATHS)])
    run_processes(train_quarters, 1, folder, [("workers", 1)])
    rest = [(name, quarter) for quarter in (1, 2, 3) for name in ("same", "stages", "batches")]
    run_processes(train_quarters, 2, folder, [("workers", 2), *rest])
    run_processes(train_quarters, 4, folder, [("workers", 3)])
    return folder


def losses_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_losses(experiment_of(folder, name, 3))


def expect_every_sample_once(folder: Path, name: str) -> None:
    account = read_account(experiment_of(folder, name, 3))
    assert account.num_samples == 4 * QUARTER and account.num_attempts == (1 if name == "whole" else 4)
    assert account.lost == account.repeated == account.other_keys == [] and account.num_redone == 0
    if name != "whole":
        assert read_starts(experiment_of(folder, name, 3)) == [quarter * QUARTER for quarter in range(4)]


def expect_same_curve(folder: Path, name: str) -> None:
    """To 1e-5 over the five steps after each change, to 1e-4 over the whole run."""
    ours, theirs = losses_of(folder, name), losses_of(folder, "whole")
    assert len(ours) == len(theirs) == 24
    for number, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert found == pytest.approx(expected, rel=1e-5 if number % 6 < 5 else 1e-4)


def test_fault_33_other_numbers_of_workers(folder: Path):
    """going on with 2, 1, 2 and 4 workers: the same samples, losses within 1e-5 after a change, 1e-4 over the run."""
    expect_every_sample_once(folder, "workers")
    expect_same_curve(folder, "workers")


def test_fault_34_other_zero_stages(folder: Path):
    """going on under ZeRO stages 0, 2, 3 and 0: the same samples, losses within 1e-5 after each change."""
    expect_every_sample_once(folder, "stages")
    expect_same_curve(folder, "stages")


def test_fault_35_other_batch_sizes(folder: Path):
    """going on with other batch and micro-batch sizes: the same samples in the same order, each once."""
    expect_every_sample_once(folder, "batches")
    lines, whole = losses_of(folder, "batches"), losses_of(folder, "whole")
    assert [line["samples"] for line in lines] == [4, 8, 12, 16, 20, 24, 32, 40, 48, 52, 56, 60, 64, 68, 72, 84, 96]
    assert lines[:6] == whole[:6]  # and then the first step of twice the size sees the samples of the next two
    assert lines[6]["train/total"] == pytest.approx((whole[6]["train/total"] + whole[7]["train/total"]) / 2, rel=0.1)


def test_fault_42_nothing_is_lost_on_resuming(folder: Path):
    """weights, moments, average, buffers, step count and logs after three restarts: each equal in every bit."""
    expect_every_sample_once(folder, "same")
    assert losses_of(folder, "same") == losses_of(folder, "whole")
    name = f"{4 * QUARTER:012d}"
    ours, theirs = (
        experiment_of(folder, run, 3).folder / "autoencoder" / "checkpoints" / name for run in ("same", "whole")
    )
    kinds = set()
    for rank in (0, 1):
        file = f"state-{rank:05d}-of-00002.safetensors"
        found, expected = load_file(ours / file), load_file(theirs / file)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        kinds |= {key.partition("/")[0] for key in expected}
    assert kinds >= {"weight", "ema", "exp_avg", "exp_avg_sq"}
    found, expected = (json.loads((path / "state.json").read_text()) for path in (ours, theirs))
    assert expected.pop("seconds") > 0 and found.pop("seconds") > 0
    assert found == expected and expected["steps"] == 24 and expected["score"] > 0
