"""The latent bank of auto-decoding: rows that are trained, kept and resumed like weights, whoever computes them."""

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file
from tiny_run import write_pictures
from torch import Tensor, nn

from distributed_inr.data.reader import Data, ShardDataset
from distributed_inr.domains import Image, Signal
from distributed_inr.domains.domain import collate
from distributed_inr.models import LayersOfExperts
from distributed_inr.models.latent_fitting import AutoDecoding
from distributed_inr.training import checkpoint
from distributed_inr.training.bank import Bank, read_rows
from distributed_inr.training.engine import Optim, Scale
from distributed_inr.training.loop import Training, train

NUM_SIGNALS, BATCH, STEPS, CLIP = 11, 8, 6, 0.06
DOMAIN = Image(size=4, source_size=4, scales=(1.0,), scale_weights=(1.0,), flip=False)
FITTING = AutoDecoding(lr=1e-2, betas=(0.8, 0.95), penalty=1e-3, encode_steps=3)
MODEL = LayersOfExperts(num_layers=3, num_experts=4, width=8, latent_dim=5, num_points=16, fitting=FITTING)
TRAINING = Training(
    num_samples=STEPS * BATCH,
    batch_size=BATCH,
    micro_batch_size=2,
    optim=Optim(lr=1e-3, warmup_samples=16, max_grad_norm=CLIP),
    log_every_samples=BATCH,
    checkpoint_every_samples=BATCH,
    keep_checkpoints=100,
)
ENGINES = {f"deepspeed-{stage}": Scale(zero_stage=stage) for stage in (0, 1, 2)}
ENGINES |= {"accelerate": Scale(engine="accelerate")}
ALONE = ENGINES["accelerate"]
MEANS = ("exp_avg", "exp_avg_sq")


def open_set(folder: Path) -> ShardDataset:
    data = Data(train=str(folder), num_streams=2, shuffle_shards=2)
    return data.dataset(data.index(data.train), read=DOMAIN.read, seed=3)


def make_module() -> nn.Module:
    torch.manual_seed(1)
    return MODEL.build(DOMAIN)


def make_bank(folder: Path, *, num_signals: int = NUM_SIGNALS, seed: int = 3, mapped_above: int = 2**30) -> Bank:
    shape = (MODEL.num_layers, MODEL.latent_dim)
    return Bank(num_signals, shape, fitting=FITTING, seed=seed, folder=folder, mapped_above=mapped_above)


def call_train(
    data: Path,
    folder: Path,
    scale: Scale = ALONE,
    training: Training = TRAINING,
    *,
    module: nn.Module | None = None,
    mapped_above: int = 2**30,
    **more: Any,
) -> bool:
    return train(
        module or make_module(),
        open_set(data),
        training=training,
        scale=scale,
        seed=3,
        folder=folder,
        config_json="{}",
        bank=make_bank(folder, num_signals=len(open_set(data)), mapped_above=mapped_above),
        **more,
    )


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"{step * BATCH:012d}"


def kept(folder: Path, step: int) -> dict[str, Tensor]:
    """The bank and the weights of a checkpoint, by name."""
    path = checkpoint_of(folder, step)
    return load_file(path / "bank.safetensors") | checkpoint.weights(str(path), average=False)


def losses(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if "second" not in name} for line in lines]


def expect_equal(found: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank") / "data"
    write_pictures(folder, NUM_SIGNALS, seed=1, size=DOMAIN.source_size, shard_samples=4)
    return folder


# --- the rows and their Adam


def touch(bank: Bank, numbers: list[int], gradients: Tensor, *, factor: float = 1.0, start: int = 0) -> None:
    """An update by samples that leave these gradients."""
    count = len(numbers)
    batch = Signal(
        key=[f"sample-{number}" for number in numbers],
        seed=torch.zeros(count, dtype=torch.int64),
        position=torch.arange(start, start + count),
        inputs=torch.zeros(count),
        text=[""] * count,
        number=torch.tensor(numbers),
    )
    batch = bank.attach(batch, torch.device("cpu"))
    assert batch.latent is not None
    (batch.latent * gradients).sum().backward()
    bank.update([batch], factor=factor)


def test_each_row_moves_as_under_an_adam_of_its_own(tmp_path: Path):
    bank, generator = make_bank(tmp_path, num_signals=7), torch.Generator().manual_seed(0)
    rows = [nn.Parameter(row.clone()) for row in bank.rows]
    adams = [torch.optim.Adam([row], lr=FITTING.lr, betas=FITTING.betas) for row in rows]
    for step in range(50):
        numbers = [n for n in range(6) if torch.rand((), generator=generator) < 0.15 * (n + 1)]  # the last one never
        if not numbers:
            continue
        gradients = torch.randn(len(numbers), *bank.rows.shape[1:], generator=generator)
        factor = 1 / (1 + step)
        touch(bank, numbers, gradients, factor=factor)
        for number, gradient in zip(numbers, gradients, strict=True):
            rows[number].grad = gradient
            adams[number].param_groups[0]["lr"] = FITTING.lr * factor
            adams[number].step()
    taken = [int(adam.state[row]["step"]) if adam.state else 0 for adam, row in zip(adams, rows, strict=True)]
    assert bank.steps.tolist() == taken and len(set(taken)) > 4 and taken[-1] == 0
    torch.testing.assert_close(bank.rows, torch.stack(list(rows)).detach(), rtol=1e-6, atol=1e-8)


def test_gradients_of_a_signal_that_occurs_twice_in_a_batch_are_summed(tmp_path: Path):
    twice, once = make_bank(tmp_path), make_bank(tmp_path)
    gradients = torch.randn(3, *twice.rows.shape[1:], generator=torch.Generator().manual_seed(0))
    touch(twice, [4, 2, 4], gradients)
    touch(once, [2, 4], torch.stack([gradients[1], gradients[0] + gradients[2]]))
    assert twice.steps.tolist() == [0, 0, 1, 0, 1, *[0] * 6]
    expect_equal(twice.tensors, once.tensors)


def test_rows_start_as_normal_numbers_that_belong_to_seed_and_row(tmp_path: Path):
    large, small = make_bank(tmp_path, num_signals=5000), make_bank(tmp_path, num_signals=9)
    assert torch.equal(large.rows[:9], small.rows)
    assert not torch.equal(make_bank(tmp_path, num_signals=9, seed=4).rows, small.rows)
    scaled = large.rows / FITTING.deviation
    assert abs(scaled.mean()) < 0.02 and abs(scaled.std() - 1) < 0.02
    assert len(large.rows.unique(dim=0)) == 5000


# --- in training


def plain_loop(data: Path) -> dict[str, Tensor]:
    """The reference: one process, the whole batch at once, an Adam for each row, nothing of ours but the module."""
    dataset, module = open_set(data), make_module()
    rows = [nn.Parameter(row.clone()) for row in make_bank(data).rows]
    adams = [torch.optim.Adam([row], betas=FITTING.betas) for row in rows]
    adamw, num_twice, norms = torch.optim.AdamW(module.parameters(), weight_decay=0.0), 0, []
    for step in range(STEPS):
        batch = collate([dataset[position] for position in range(step * BATCH, (step + 1) * BATCH)])
        assert batch.number is not None
        numbers = batch.number.tolist()
        num_twice += BATCH - len(set(numbers))
        rate = TRAINING.optim.learning_rate(step * BATCH, batch_size=BATCH, num_samples=TRAINING.num_samples)
        for optimizer, lr in [(adamw, rate), *((adam, FITTING.lr * rate / TRAINING.optim.lr) for adam in adams)]:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = lr
        losses = module(replace(batch, latent=torch.stack([rows[number] for number in numbers])))
        sum(losses.values()).backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), CLIP))
        adamw.step()
        for adam in adams:
            adam.step()
    assert num_twice > 2, "batches that reach into the next epoch must hold some signals twice"
    assert min(norms) < CLIP < max(norms), "clipping must matter in some steps and not in others"
    moments = {key: torch.stack([adam.state[row][key] for adam, row in zip(adams, rows, strict=True)]) for key in MEANS}
    return {"rows": torch.stack(list(rows)).detach(), **moments, **module.state_dict()}


class StopAfter:
    """Asks for an end at the n-th question, on the last rank only."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def train_all(data: Path, folder: Path) -> None:
    """On two ranks with two micro-batches a step each: to the end, and stopped in the fourth step."""
    for name, scale in ENGINES.items():
        assert call_train(data, folder / name / "whole", scale)
        assert not call_train(data, folder / name / "parts", scale, stop=StopAfter(8))
        if name == "deepspeed-1":
            assert not call_train(data, folder / name / "moved", scale, stop=StopAfter(8))


def train_on(data: Path, folder: Path, names: list[str], part: str) -> None:
    for name in names:
        assert call_train(data, folder / name / part, ENGINES[name])


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_processes(train_all, 2, data, folder)
    run_processes(train_on, 2, data, folder, list(ENGINES), "parts")
    run_processes(train_on, 1, data, folder, ["deepspeed-1"], "moved")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
class TestTraining:
    def test_two_ranks_with_two_micro_batches_equal_a_plain_loop_over_the_whole_batch(self, runs, data, name):
        found, expected = kept(runs / name / "whole", STEPS), plain_loop(data)
        start = {"rows": make_bank(data).rows, **make_module().state_dict()}
        assert all((expected[key] - start[key]).abs().max() > 1e-3 for key in start)
        expect_equal({key: found[key] for key in start}, {key: expected[key] for key in start}, atol=1e-5)
        for key in MEANS:  # which show the scale of gradients, to which rows under Adam are blind
            assert (found[key] - expected[key]).abs().max() <= 1e-5 * expected[key].abs().max(), key

    def test_six_steps_equal_three_and_three_resumed_in_every_bit(self, runs, name):
        assert (checkpoint_of(runs / name / "parts", 3) / "manifest.json").exists()
        assert losses(runs / name / "parts") == losses(runs / name / "whole")
        for step in (3, STEPS):
            expect_equal(kept(runs / name / "parts", step), kept(runs / name / "whole", step))
        assert kept(runs / name / "parts", STEPS)["steps"].sum() > STEPS

    def test_a_complete_training_leaves_the_rows_beside_the_model(self, runs, name):
        rows = read_rows(runs / name / "whole" / "bank.safetensors")
        assert rows.shape == (NUM_SIGNALS, MODEL.num_layers, MODEL.latent_dim)
        assert torch.equal(rows, kept(runs / name / "whole", STEPS)["rows"])


@pytest.mark.slow
def test_one_worker_goes_on_from_a_checkpoint_of_two(runs: Path):
    folder = runs / "deepspeed-1"
    expect_equal(kept(folder / "moved", 3), kept(folder / "whole", 3))
    found, expected = kept(folder / "moved", STEPS), kept(folder / "whole", STEPS)
    expect_equal(found, expected, atol=1e-5)
    for ours, theirs in zip(losses(folder / "moved"), losses(folder / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


class Once:
    """Asks for an end at the n-th question of one worker."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def test_a_mapped_bank_equals_one_in_memory_in_every_bit(data: Path, tmp_path: Path):
    for name, mapped_above in (("memory", 2**30), ("mapped", 0)):
        folder = tmp_path / name
        assert not call_train(data, folder, mapped_above=mapped_above, stop=Once(4 * 3 + 2))
        assert call_train(data, folder, mapped_above=mapped_above)
    for step in range(1, STEPS + 1):
        expect_equal(kept(tmp_path / "mapped", step), kept(tmp_path / "memory", step))
    expected = (tmp_path / "memory" / "bank.safetensors").read_bytes()
    assert (tmp_path / "mapped" / "bank.safetensors").read_bytes() == expected

    bank = make_bank(tmp_path, mapped_above=0)
    assert bank.copies.keys() == {"rows", "exp_avg", "exp_avg_sq"} and make_bank(tmp_path).copies == {}
    assert Path("/proc/self/maps").read_text().count(f"{tmp_path}/bank-00000.mapped (deleted)") == 6
    assert not list(tmp_path.rglob("*.mapped")), "a kill would leave them"


def test_a_bank_that_has_no_room_for_its_files_is_one_clear_line(tmp_path: Path):
    with pytest.raises(ValueError, match=f"^cannot write to {tmp_path}: File too large; choose another place$"):
        Bank(2**50, (2**10,), fitting=FITTING, seed=0, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_do_not_change_while_they_are_copied(data: Path, tmp_path: Path):
    """The report of each checkpoint holds back the thread that is to copy the next one."""
    assert call_train(data, tmp_path / "fast")
    assert call_train(data, tmp_path / "slow", report=lambda about: time.sleep(0.2))
    for step in range(1, STEPS + 1):
        expect_equal(kept(tmp_path / "slow", step), kept(tmp_path / "fast", step))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert call_train(data, folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55"), "differs from the sha256 in its manifest"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "has .* bytes, its manifest says"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_bank_is_found_and_the_checkpoint_before_it_used(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], problem: str
):
    shutil.copytree(finished, tmp_path / "run")
    damage(checkpoint_of(tmp_path / "run", STEPS) / "bank.safetensors")
    assert checkpoint.newest(str(tmp_path / "run" / "checkpoints")) == str(checkpoint_of(tmp_path / "run", STEPS - 1))
    assert re.search(f"{STEPS * BATCH:012d} is ignored: bank.safetensors {problem}", caplog.text)


def test_going_on_with_other_data_is_refused_even_if_they_are_accepted(data: Path, finished: Path, tmp_path: Path):
    write_pictures(tmp_path / "more", NUM_SIGNALS + 1, seed=2, size=DOMAIN.source_size)
    for accepted in (False, True):
        with pytest.raises(ValueError, match="its bank has latents of those alone; restore them, or choose another"):
            call_train(tmp_path / "more", finished, accept_changed=accepted)


def test_a_bank_that_a_checkpoint_does_not_hold_is_refused(finished: Path, tmp_path: Path):
    path = checkpoint_of(finished, STEPS)
    with checkpoint.Reader.open(str(path)) as reader, pytest.raises(ValueError, match=r"a bank \[11, 3, 5\], .*12"):
        make_bank(tmp_path, num_signals=12).load(reader)
    (tmp_path / path.name).mkdir()
    state = next(path.glob("state-*.safetensors"))
    shutil.copy(state, tmp_path / path.name)
    (tmp_path / path.name / "manifest.json").write_text(json.dumps({"files": {state.name: {}}}))
    with (
        checkpoint.Reader.open(str(tmp_path / path.name)) as reader,
        pytest.raises(ValueError, match="holds no bank of latents; choose another --name or --output"),
    ):
        make_bank(tmp_path).load(reader)
