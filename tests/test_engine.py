"""Every engine and ZeRO stage against a plain PyTorch loop written by hand; failures that must stop all ranks alike."""

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from processes import run_processes, whole
from torch import Tensor, nn

from distributed_inr import randomness
from distributed_inr.domains.domain import Signal, collate
from distributed_inr.training.engine import Optim, Scale, build_engine
from distributed_inr.training.fragments import average

ENGINES = {f"deepspeed-{stage}": Scale(engine="deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3)} | {
    "accelerate": Scale(engine="accelerate")
}
BATCH, MICRO, STEPS = 16, 4, 5


class Block(nn.Linear):
    """A layer that counts its forward passes and remembers the type it computed in."""

    calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        output = torch.tanh(super().forward(hidden))
        self.dtype = output.dtype
        return output


class Regression(nn.Module):
    """A small module with what engines stumble over: odd sizes, a frozen parameter, a buffer, noise from the seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(5, 33), Block(33, 7)])
        self.head = nn.Linear(7, 3, bias=False)
        self.gain = nn.Parameter(torch.tensor([1.5]))
        self.frozen = nn.Parameter(torch.linspace(-1, 1, 5), requires_grad=False)
        self.register_buffer("target", torch.tensor([0.3, -0.2, 0.9]))

    def forward(self, batch: Signal) -> dict[str, Tensor]:
        hidden = batch.inputs + 0.1 * randomness.normal(batch.seed, "noise", (5,)) + self.frozen
        for block in self.blocks:
            hidden = block(hidden)
        output = self.head(hidden) * self.gain
        return {
            "error": 20 * (output - self.target * batch.inputs[:, :3]).square().mean(),
            "size": 0.01 * output.square().mean(),
        }


def make_module() -> Regression:
    torch.manual_seed(0)
    return Regression()


def make_batch(positions: range, spoil: int | None = None) -> Signal:
    """Signals that depend on their run position only."""
    seeds = [torch.tensor(randomness.sample_seed(7, p)) for p in positions]
    inputs = [
        randomness.normal(seed[None], "inputs", (5,))[0] * (1 + p % 5) for p, seed in zip(positions, seeds, strict=True)
    ]
    signals = [
        Signal(key=f"sample-{p}", seed=s, position=torch.tensor(p), inputs=x * float("nan") if p == spoil else x)
        for p, s, x in zip(positions, seeds, inputs, strict=True)
    ]
    return collate(signals)


def shares(start: int, rank: int, world: int, micro: int = MICRO, batch: int = BATCH) -> list[range]:
    """One rank's micro-batches of the step that starts at `start`."""
    first = range(start + rank, start + batch, world)
    return [first[i : i + micro] for i in range(0, len(first), micro)]


def rank_and_world() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def start_engine(scale: Scale, optim: Optim, module: nn.Module | None = None, micro: int = MICRO, batch: int = BATCH):
    _, world = rank_and_world()
    return build_engine(
        module or make_module(),
        scale=scale,
        optim=optim,
        micro_batch_size=micro,
        num_micro_batches=batch // world // micro,
    )


def take_step(engine: Any, start: int, *, lr: float, spoil: int | None = None, **sizes: int) -> dict[str, float]:
    metrics = None
    for positions in shares(start, *rank_and_world(), **sizes):
        assert metrics is None
        batch = make_batch(positions, spoil)
        metrics = engine.step(engine.forward(batch), keys=batch.key, lr=lr)
    assert metrics is not None
    return metrics


def rate(step: int) -> float:
    return 0.01 * (1 - step / 10)


def plain_loop(max_norm: float | None, steps: int = STEPS) -> list[dict[str, float]]:
    """The reference: one process, the whole batch at once, nothing of ours but the module."""
    module = make_module()
    adamw = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], weight_decay=0.1)
    history = []
    for step in range(steps):
        losses = module(make_batch(range(step * BATCH, (step + 1) * BATCH)))
        total = losses["error"] + losses["size"]
        adamw.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm or float("inf"))
        for group in adamw.param_groups:
            group["lr"] = rate(step)
        adamw.step()
        history.append(
            {"train/error": losses["error"].item(), "train/size": losses["size"].item()}
            | {"train/total": total.item(), "grad_norm": norm.item()}
        )
    return history


@dataclass
class Outcome:
    """What one rank saw of one engine."""

    history: list[dict[str, float]]
    error: str
    same_after_error: bool
    next_step: dict[str, float]
    gradient_error: str
    average_equal: bool


def try_engines(max_norm: float | None, names: list[str]) -> dict[str, Outcome]:
    outcomes = {}
    for name in names:
        engine = start_engine(ENGINES[name], Optim(weight_decay=0.1, max_grad_norm=max_norm))
        fragments = engine.state()
        averages = [replace(f, weight=f.weight.clone(), moments={}) for f in fragments]
        expected = whole(averages)
        history = []
        for step in range(STEPS):
            history.append(take_step(engine, step * BATCH, lr=rate(step)))
            average(averages, fragments, 0.9)
            now = whole(fragments)
            expected = {key: torch.lerp(value, now[key], 1 - 0.9) for key, value in expected.items()}
        kept = whole(averages)
        average_equal = all(torch.equal(kept[key], value) for key, value in expected.items())

        before = whole(engine.state())
        try:  # the last sample of the batch: only the last rank has it
            take_step(engine, STEPS * BATCH, lr=0.1, spoil=(STEPS + 1) * BATCH - 1)
            error = ""
        except FloatingPointError as problem:
            error = str(problem)
        after = whole(engine.state())
        same = all(torch.equal(after[key], value) for key, value in before.items())
        next_step = take_step(engine, STEPS * BATCH, lr=0.1)

        engine = start_engine(ENGINES[name], Optim(), module=FiniteLoss())
        try:
            take_step(engine, 0, lr=0.1)
            gradient_error = ""
        except FloatingPointError as problem:
            gradient_error = str(problem)
        outcomes[name] = Outcome(history, error, same, next_step, gradient_error, average_equal)
    return outcomes


def try_all() -> dict[str, Outcome]:
    unclipped = {f"{name} unclipped": outcome for name, outcome in try_engines(None, UNCLIPPED).items()}
    return try_engines(CLIP, list(ENGINES)) | unclipped


class FiniteLoss(nn.Module):
    """A finite loss whose gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, batch: Signal) -> dict[str, Tensor]:
        return {"error": self.weight.square().sum().sqrt() + 0 * batch.inputs.mean()}


CLIP = 70.0
UNCLIPPED = ["deepspeed-0", "deepspeed-1", "accelerate"]


@pytest.fixture(scope="module")
def reference() -> list[dict[str, float]]:
    history = plain_loop(CLIP)
    norms = [step["grad_norm"] for step in history]
    assert min(norms) < CLIP < max(norms), "clipping must matter in some steps and not in others"
    return history


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def outcomes(request: pytest.FixtureRequest) -> list[dict[str, Outcome]]:
    return run_processes(try_all, request.param)


@pytest.mark.parametrize("name", ENGINES)
class TestEngine:
    def test_engine_equals_a_plain_loop(self, outcomes, reference, name):
        for outcome in outcomes:
            for ours, theirs in zip(outcome[name].history, reference, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5)

    def test_all_ranks_report_the_same_metrics(self, outcomes, name):
        assert all(outcome[name].history == outcomes[0][name].history for outcome in outcomes)

    def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update(self, outcomes, name):
        for outcome in outcomes:
            assert outcome[name].error == outcomes[0][name].error
            assert f"step {STEPS + 1} is not finite and was not applied" in outcome[name].error
            assert f"sample-{(STEPS + 1) * BATCH - 1}" in outcome[name].error
            assert outcome[name].same_after_error

    def test_after_a_refused_step_training_goes_on_as_if_it_had_not_been(self, outcomes, name):
        expected = plain_loop(CLIP, STEPS + 1)[STEPS]
        assert all(outcome[name].next_step == pytest.approx(expected, rel=1e-5) for outcome in outcomes)

    def test_a_gradient_that_is_not_finite_stops_all_ranks_and_names_the_samples(self, outcomes, name):
        for outcome in outcomes:
            assert "only the gradient is not, of samples sample-0, " in outcome[name].gradient_error

    def test_average_on_fragments_equals_the_average_of_whole_weights(self, outcomes, name):
        assert outcomes[0][name].average_equal


@pytest.mark.parametrize("name", UNCLIPPED)
def test_gradients_are_not_clipped_unless_asked(outcomes, name):
    for ours, theirs in zip(outcomes[0][f"{name} unclipped"].history, plain_loop(None), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def run_steps(scale: Scale) -> tuple[list[dict[str, float]], Regression]:
    engine = start_engine(scale, Optim(weight_decay=0.1, max_grad_norm=CLIP))
    history = [take_step(engine, step * BATCH, lr=rate(step)) for step in range(STEPS)]
    return history, engine.unwrap()


def try_bfloat16() -> list[tuple]:
    results = []
    for name in ("deepspeed-0", "deepspeed-2", "deepspeed-3", "accelerate"):
        history, module = run_steps(replace(ENGINES[name], precision="bfloat16"))
        results.append((history, module.blocks[0].dtype, {p.dtype for p in module.parameters()}))
    return results


def try_recomputing() -> list[tuple]:
    results = []
    for name, scale in ENGINES.items():
        history, module = run_steps(replace(scale, activation_checkpointing=True))
        results.append((name, history, [block.calls for block in module.blocks]))
    return results


def try_compiling(path: str) -> list[dict[str, float]]:
    os.environ["PATH"] = path
    return run_steps(Scale(compile=True))[0]


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_over_float32_weights(reference):
    for history, computed, stored in run_processes(try_bfloat16, 2)[0]:
        assert computed == torch.bfloat16 and stored == {torch.float32}
        for ours, theirs in zip(history, reference, strict=True):
            assert ours["train/total"] == pytest.approx(theirs["train/total"], rel=3e-2)


@pytest.mark.slow
def test_recomputing_activations_changes_nothing_but_the_number_of_passes(reference):
    micro_batches = STEPS * BATCH // 2 // MICRO
    for name, history, calls in run_processes(try_recomputing, 2)[0]:
        assert calls == [2 * micro_batches] * 2, name
        for ours, theirs in zip(history, reference, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False])
def test_compiling_changes_nothing_and_needs_no_compiler_to_run(reference, compiler, capfd):
    (history,) = run_processes(try_compiling, 1, os.environ["PATH"] if compiler else "")
    for ours, theirs in zip(history, reference, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert capfd.readouterr().err.count("scale.compile=True is ignored: no C++ compiler") == (0 if compiler else 1)


def test_learning_rate_rises_over_the_warmup_and_falls_to_zero():
    optim = Optim(lr=2.0, warmup_samples=100)
    rates = [optim.learning_rate(samples, batch_size=10, num_samples=1100) for samples in range(0, 1100, 10)]
    assert rates[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert rates[60] == pytest.approx(1.0)  # half of the way from the end of the warm-up to the end of the run
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True) and rates[-1] < 0.001


def test_learning_rate_does_not_move_with_the_batch_size():
    optim = Optim(lr=2.0, warmup_samples=64)
    small = optim.learning_rate(640, batch_size=8, num_samples=1000)
    assert small == optim.learning_rate(640, batch_size=64, num_samples=1000)


def test_constant_schedule_without_warmup_is_constant():
    optim = Optim(lr=2.0, schedule="constant")
    assert {optim.learning_rate(s, batch_size=8, num_samples=64) for s in range(0, 64, 8)} == {2.0}


def test_scale_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="scale.compile=True does not work with scale.zero_stage=3"):
        Scale(compile=True, zero_stage=3)
    with pytest.raises(ValueError, match="scale.num_workers=2 needs scale.launcher='ray'"):
        Scale(num_workers=2, launcher="none")


def test_parameters_without_dimension_are_refused():
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"parameter scale has no dimension.*\[1\]"):
        build_engine(module, scale=Scale(), optim=Optim(), micro_batch_size=1, num_micro_batches=1)
