"""The training loop on real shards: exact resumption, exact validation, and what it leaves behind."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file
from torch import Tensor, nn

from distributed_inr import randomness
from distributed_inr.config import override
from distributed_inr.data.reader import Data, ShardDataset, read_latent
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.domains.domain import Signal
from distributed_inr.training import checkpoint
from distributed_inr.training.engine import Optim, Scale
from distributed_inr.training.loop import Training, train

SAMPLES = 11
TRAINING = Training(
    num_samples=48,
    batch_size=8,
    micro_batch_size=2,
    optim=Optim(lr=1e-2, warmup_samples=16),
    ema_half_life_samples=20,
    log_every_samples=8,
    evaluate_every_samples=24,
    checkpoint_every_samples=16,
)
ENGINES = {
    "deepspeed-1": Scale(),
    "deepspeed-3": Scale(zero_stage=3),
    "accelerate": Scale(engine="accelerate"),
}


class Small(nn.Module):
    """A module whose losses use the samples' seeds and positions, as the real ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
        self.register_buffer("target", torch.tensor([1.0, 0.0, -1.0]))

    def forward(self, batch: Signal) -> dict[str, Tensor]:
        noise = randomness.normal(batch.seed, "noise", (5,))
        output = self.layers(batch.inputs[:, 0] + 0.1 * noise)
        weight = (batch.position / 48).clamp(max=1)
        return {
            "error": (output - self.target).square().mean(),
            "annealed": (weight * output.square().mean(1)).mean(),
        }


def make_module() -> Small:
    torch.manual_seed(1)
    return Small()


def make_set(folder: Path, *, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    writer = ShardWriter(folder, domain="latent", protocol={}, shard_samples=4)
    for number in range(SAMPLES):
        npy = io.BytesIO()
        np.save(npy, rng.standard_normal((2, 5)).astype(np.float16))
        writer.write({"__key__": f"latent-{number}", "latent.npy": npy.getvalue()})
    writer.close()


def open_set(folder: Path) -> ShardDataset:
    data = Data(train=str(folder), num_streams=2, shuffle_shards=2)
    return data.dataset(data.index(data.train), read=read_latent, seed=3)


def call_train(data: Path, folder: Path, scale: Scale, training: Training = TRAINING, **more: Any) -> dict[str, Any]:
    """Run `train`; what it returned and handed to its callbacks on this rank."""
    seen: dict[str, Any] = {"reports": [], "progress": []}
    seen["complete"] = train(
        make_module(),
        open_set(data),
        training=training,
        scale=scale,
        seed=3,
        folder=folder,
        config_json='{"name": "test"}',
        val_dataset=open_set(data),
        report=seen["reports"].append,
        progress=lambda *values: seen["progress"].append(values),
        **more,
    )
    return seen


class StopAfter:
    """Asks for an end at the n-th question, on the last rank only."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def scenario(data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    results = {}
    for name, scale in ENGINES.items():
        whole = call_train(data, folder / name / "whole", scale)
        stopped = call_train(
            data, folder / name / "parts", scale, stop=StopAfter(8)
        )  # at the second micro-batch of the fourth step
        if torch.distributed.get_rank() == 0:  # what a run killed after its last checkpoint would have left
            with (folder / name / "parts" / "metrics.jsonl").open("a") as file:
                file.write('{"samples": 32, "train/total": 0.5}\n{"samples": 40, "train/to')
        torch.distributed.barrier()
        resumed = call_train(data, folder / name / "parts", scale)
        again = call_train(data, folder / name / "parts", scale)
        results[name] = {"whole": whole, "stopped": stopped, "resumed": resumed, "again": again}
    return results


@dataclass
class Run:
    data: Path
    folder: Path
    ranks: list[dict[str, dict[str, Any]]] = field(default_factory=list)

    def lines(self, *parts: str) -> list[dict[str, float]]:
        text = self.folder.joinpath(*parts, "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("loop")
    make_set(root / "data")
    run = Run(root / "data", root / "runs")
    run.ranks = run_processes(scenario, 2, run.data, run.folder)
    return run


CLOCK = ("seconds", "samples_per_second")


def without_clock(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
class TestTrain:
    def test_a_stopped_and_resumed_run_equals_the_whole_one_in_every_bit(self, run, name):
        results = run.ranks[0][name]
        assert not results["stopped"]["complete"] and results["resumed"]["complete"] and results["whole"]["complete"]
        assert without_clock(run.lines(name, "parts")) == without_clock(run.lines(name, "whole"))
        whole, parts = (load_file(run.folder / name / kind / "model.safetensors") for kind in ("whole", "parts"))
        assert whole.keys() == make_module().state_dict().keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)

    def test_running_a_complete_run_again_changes_nothing(self, run, name):
        again = run.ranks[0][name]["again"]
        assert again["complete"] and again["reports"] == [] and again["progress"] == []
        assert len(run.lines(name, "parts")) == 6

    def test_stopping_on_one_rank_writes_a_checkpoint_at_that_sample_on_all(self, run, name):
        for rank in run.ranks:
            (*_, last) = rank[name]["stopped"]["reports"]
            assert last["samples"] == 24 and last["checkpoint"].endswith("checkpoints/000000000024")

    def test_every_rank_reports_equally_often_and_the_same(self, run, name):
        for kind, counts in (("whole", [16, 32, 48]), ("stopped", [16, 24]), ("resumed", [32, 48])):
            for rank in run.ranks:
                assert [report["samples"] for report in rank[name][kind]["reports"]] == counts
            first, second = (without_clock(rank[name][kind]["reports"]) for rank in run.ranks)
            assert first == second

    def test_progress_is_shown_by_the_first_rank_only(self, run, name):
        assert run.ranks[1][name]["whole"]["progress"] == []
        done, total, values = run.ranks[0][name]["whole"]["progress"][-1]
        assert (done, total) == (48, 48) and values.keys() == {"loss", "samples/s"}

    def test_the_run_ends_with_the_average_and_keeps_the_newest_checkpoints(self, run, name):
        folder = run.folder / name / "whole"
        kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert kept == ["000000000032", "000000000048"]
        final = load_file(folder / "model.safetensors")
        newest = str(folder / "checkpoints" / kept[-1])
        average, weights = (checkpoint.weights(newest, average=average) for average in (True, False))
        assert all(torch.equal(final[key], average[key]) for key in final)
        assert not torch.equal(final["layers.0.weight"], weights["layers.0.weight"])
        assert torch.equal(final["target"], torch.tensor([1.0, 0.0, -1.0]))
        assert json.loads((folder / "checkpoints" / kept[-1] / "config.json").read_text()) == {"name": "test"}

    def test_validation_is_the_mean_over_each_sample_once(self, run, name):
        """Eleven samples on two ranks in twos: a ragged last step, and one batch without any sample."""
        module, dataset = make_module(), open_set(run.data)
        newest = run.folder / name / "whole" / "checkpoints" / "000000000048"
        module.load_state_dict(checkpoint.weights(str(newest), average=False))
        losses = []
        for number in range(SAMPLES):
            signal, _ = dataset.signal(number)
            single = signal.map(lambda tensor: tensor[None])
            losses.append(module(Signal(**{**single.__dict__, "key": [signal.key], "position": torch.tensor([48])})))
        line = run.lines(name, "whole")[-1]
        assert line["val/error"] == pytest.approx(sum(loss["error"].item() for loss in losses) / SAMPLES, rel=1e-5)
        assert line["val/annealed"] == pytest.approx(
            sum(loss["annealed"].item() for loss in losses) / SAMPLES, rel=1e-5
        )
        assert line["val/total"] == pytest.approx(line["val/error"] + line["val/annealed"])

    def test_metrics_have_flat_keys_at_the_expected_samples(self, run, name):
        lines = run.lines(name, "whole")
        assert [line["samples"] for line in lines] == [8, 16, 24, 32, 40, 48]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert [line["samples"] for line in lines if "val/total" in line] == [24, 48]
        assert set(lines[0]) == {"train/error", "train/annealed", "train/total", "grad_norm", "lr"} | {
            *("samples", "step", "seconds", "samples_per_second")
        }
        assert list((run.folder / name / "whole" / "tensorboard").iterdir())

    def test_losses_equal_those_of_one_worker_with_the_whole_batch(self, run, name, alone):
        for ours, theirs in zip(run.lines(name, "whole"), alone, strict=True):
            for key in ("train/error", "train/annealed", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5)


def train_alone(data: Path, folder: Path) -> None:
    call_train(data, folder, Scale(engine="accelerate"), override(TRAINING, {"micro_batch_size": 8}))


@pytest.fixture(scope="module")
def alone(run: Run) -> list[dict[str, float]]:
    run_processes(train_alone, 1, run.data, run.folder / "alone")
    return run.lines("alone")


def go_on_with_other_data(data: Path, other: Path, folder: Path) -> tuple[str, bool]:
    scale = Scale(engine="accelerate")
    call_train(data, folder, scale, override(TRAINING, {"num_samples": 8}))
    try:
        call_train(other, folder, scale)
    except ValueError as error:
        return str(error), call_train(other, folder, scale, accept_changed=True)["complete"]
    return "", False


class AskIn:
    """Says True at the n-th question, once."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


IN_EVALUATION = 4 * 3 + 3
"""Of the questions to one worker, that in the middle of the evaluation after the third step of four micro-batches."""


def interrupt_evaluation(data: Path, folder: Path) -> list[bool]:
    scale, keep_all = Scale(engine="accelerate"), override(TRAINING, {"keep_checkpoints": 10})
    call_train(data, folder / "whole", scale)
    call_train(data, folder / "saved", scale, keep_all, save=AskIn(IN_EVALUATION))
    stopped = call_train(data, folder / "stopped", scale, stop=AskIn(IN_EVALUATION))
    resumed = train(
        make_module(),
        open_set(data),
        training=TRAINING,
        scale=scale,
        seed=3,
        folder=folder / "stopped",
        config_json="{}",
    )
    return [stopped["complete"], resumed]


@pytest.mark.slow
def test_a_stop_or_a_wish_for_a_checkpoint_in_an_evaluation(tmp_path: Path):
    make_set(tmp_path / "data")
    assert run_processes(interrupt_evaluation, 1, tmp_path / "data", tmp_path) == [[False, True]]
    state = checkpoint.read_state(str(tmp_path / "saved" / "checkpoints" / f"{24:012d}"))
    assert state["is_unevaluated"] and state["sums"]  # written in the evaluation, before its line was logged

    def lines(name: str) -> list[dict[str, float]]:
        return without_clock(
            [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        )

    assert lines("saved") == lines("whole")
    no_validation = [{key: value for key, value in line.items() if "val/" not in key} for line in lines("whole")]
    assert lines("stopped") == no_validation  # it went on without a validation set


def train_twice_with_other_seed(data: Path, folder: Path) -> str:
    call_train(data, folder, Scale(engine="accelerate"), override(TRAINING, {"num_samples": 8}))
    try:
        train(
            make_module(),
            open_set(data),
            training=TRAINING,
            scale=Scale(engine="accelerate"),
            seed=4,
            folder=folder,
            config_json="{}",
        )
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_resuming_with_other_data_is_refused_unless_accepted(tmp_path):
    make_set(tmp_path / "data")
    make_set(tmp_path / "other", seed=1)
    (found,) = run_processes(go_on_with_other_data, 1, tmp_path / "data", tmp_path / "other", tmp_path / "run")
    assert "000000000008 comes from other data; restore them" in found[0] and found[1] is True


@pytest.mark.slow
def test_resuming_with_another_seed_is_refused(tmp_path):
    make_set(tmp_path / "data")
    (message,) = run_processes(train_twice_with_other_seed, 1, tmp_path / "data", tmp_path / "run")
    assert "has seed=3, this run seed=4" in message


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(tmp_path):
    make_set(tmp_path / "data")
    training = override(TRAINING, {"batch_size": 30, "micro_batch_size": 8})
    with pytest.raises(ValueError, match=r"training\.batch_size=30 must be a multiple .* = 1 \* 8 = 8; try 32"):
        call_train(tmp_path / "data", tmp_path / "run", Scale(engine="accelerate"), training)
