"""Runs with a latent bank: from data to evaluation, killed, spoiled by values that are not finite, and refused."""

import itertools
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import Job, kill_jobs, read_losses, read_starts, read_weights
from processes import run_processes
from safetensors.torch import load_file, save_file
from test_bank import (
    BATCH,
    DOMAIN,
    ENGINES,
    NUM_SIGNALS,
    TRAINING,
    call_train,
    checkpoint_of,
    expect_equal,
    kept,
    make_module,
    open_set,
)
from test_pipeline import FAST
from tiny_chinr import chinr_experiment
from tiny_run import write_pictures
from torch import Tensor, nn

from distributed_inr import pipeline
from distributed_inr.config import override
from distributed_inr.data.reader import evaluation_stream, read_latent
from distributed_inr.domains import Signal
from distributed_inr.experiment import Experiment
from distributed_inr.generation import load
from distributed_inr.training.bank import read_rows

AUTO_DECODING = {
    "autoencoder.fitting.kind": "auto-decoding",
    "autoencoder.fitting.lr": 1e-2,
    "autoencoder.fitting.encode_steps": 20,
}
SHAPE = (4, 8)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A complete run of 33 training pictures, each seen about four times, and 5 held out."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_pictures(folder / "train", 33, seed=1)
    write_pictures(folder / "val", 5, seed=2)
    changes = AUTO_DECODING | FAST | {"autoencoder_training.num_samples": 128, "evaluation.num_samples": 0}
    experiment = override(chinr_experiment(folder), changes)
    pipeline.run(experiment)
    return experiment


def test_the_latents_that_a_prior_trains_on_are_the_rows_of_the_bank(experiment: Experiment):
    rows = read_rows(experiment.folder / "autoencoder" / "bank.safetensors")
    assert rows.shape == (33, *SHAPE)
    index = experiment.data.index(str(experiment.folder / "latents"))
    latents = experiment.data.dataset(index, read=read_latent, seed=0)
    found = {signal.key: signal.inputs for signal in (latents.signal(number)[0] for number in range(len(latents)))}
    assert len(found) == 33
    for number, row in enumerate(rows):
        assert torch.equal(found[f"{number:04d}"], row[None])
    prior = load(experiment.folder).prior
    assert prior is not None
    torch.testing.assert_close(prior.latent_mean, rows.mean(0), rtol=1e-5, atol=1e-7)
    statistics = json.loads((experiment.folder / "latents" / "statistics.json").read_text())
    assert statistics["psnr"] > 5


def test_held_out_signals_are_encoded_by_an_optimisation(experiment: Experiment):
    """The evaluation's PSNR is that of latents fitted here with an Adam of torch's."""
    model = load(experiment.folder)
    data = experiment.dataset(experiment.data.index(str(experiment.data.val)))
    (batch,) = evaluation_stream(data, batch=5)
    queries, values = experiment.domain.measurements(batch)
    latent = nn.Parameter(torch.zeros(5, *SHAPE))
    adam = torch.optim.Adam([latent], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 20)
    for _ in range(20):
        adam.zero_grad()
        experiment.domain.nll(model.autoencoder.decode(latent)(queries.coords), values).sum().backward()
        adam.step()
        schedule.step()
    fields = model.autoencoder.decode(latent.detach())
    assert latent.detach().abs().max() > 0.05
    error = ((fields.render(16) * 2 - 1).flatten(2).transpose(1, 2) - values).square().mean((1, 2))
    psnr = (10 * (4 / error).log10()).mean().item()
    result = json.loads((experiment.folder / "evaluation.json").read_text())
    assert result["val"]["psnr"] == pytest.approx(psnr, abs=0.02) and result["val"]["signals"] == 5


def test_a_complete_run_is_skipped_and_one_with_another_bank_refused(experiment: Experiment, tmp_path: Path):
    copy = override(experiment, {"output": str(tmp_path)})
    shutil.copytree(experiment.folder, copy.folder)
    paths = [p for p in copy.folder.rglob("*") if p.is_file() and p.name not in (".lock", "config.json")]
    before = {path: path.stat().st_mtime_ns for path in paths}
    pipeline.run(copy)
    assert {path: path.stat().st_mtime_ns for path in paths} == before

    bank = copy.folder / "autoencoder" / "bank.safetensors"
    save_file({"rows": load_file(bank)["rows"] + 1}, bank)
    with pytest.raises(ValueError, match=r"latents was made from other inputs \(bank\)"):
        pipeline.run(copy)


def test_the_space_that_a_run_needs_includes_its_banks(experiment: Experiment):
    with torch.device("meta"):
        weights = sum(t.numel() for t in experiment.autoencoder.build(experiment.domain).state_dict().values())
    needed = 10**12 * 4 * 3 * (weights + 33 * 4 * 8)
    with pytest.raises(ValueError, match=re.escape(f"GB are needed (autoencoder {needed / 1e9:.3g}, latents")):
        pipeline.run(override(experiment, {"autoencoder_training.keep_checkpoints": 10**12}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain.flip": True}, "domain.kind=image trains on 2 copies of each signal, and .* one latent for each"),
        ({"autoencoder_training.ema_half_life_samples": 8}, "ema_half_life_samples=8 averages weights .*; set it to 0"),
        ({"data.accept_changed": True}, "data.accept_changed=True does not work with .*auto-decoding"),
    ],
)
def test_what_does_not_go_with_a_bank_is_refused(experiment: Experiment, change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        override(experiment, change)
    assert "\n" not in str(error.value)
    override(experiment, {"autoencoder.fitting.kind": "meta-learning"} | change)


# --- kills


KILLED: dict[str, Any] = {
    "steps": 120,
    "family": "chinr",
    "domain__flip": False,
    "autoencoder": {
        "kind": "layers-of-experts",
        **{"num_layers": 3, "num_experts": 4, "width": 8, "latent_dim": 4, "num_points": 16},
        "fitting": {"kind": "auto-decoding", "lr": 1e-2, "encode_steps": 2},
    },
    "autoencoder_training__ema_half_life_samples": 0,
    "autoencoder_training__checkpoint_every_samples": 40,
    "autoencoder_training__keep_checkpoints": 100,
    "scale__launcher": "none",
    "scale__num_threads": 1,
}


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_ends_equal_in_every_bit(tmp_path: Path):
    """kill -9 in training, twice: the same losses, weights, rows and running means as of a run without a kill."""
    try:
        whole = Job(tmp_path, name="whole", **KILLED)
        whole.finish()
        starts = [0]
        for lines in (25, 70):
            job = Job(tmp_path, name="killed", **KILLED)
            job.wait_until(lambda job=job, lines=lines: job.num_lines >= lines)
            job.stop(signal.SIGKILL)
            assert job.process.returncode == -signal.SIGKILL and job.samples_kept < 480
            starts.append(job.samples_kept)
        job = Job(tmp_path, name="killed", **KILLED)
        job.finish()
    finally:
        kill_jobs()
    assert read_starts(job.experiment) == starts and starts[2] > starts[1] > 0
    assert read_losses(job.experiment) == read_losses(whole.experiment)
    assert read_weights(job.experiment) == read_weights(whole.experiment)
    ours, theirs = (one.experiment.folder / "autoencoder" for one in (job, whole))
    assert (ours / "bank.safetensors").read_bytes() == (theirs / "bank.safetensors").read_bytes()
    last = Path("checkpoints") / f"{480:012d}" / "bank.safetensors"
    expect_equal(load_file(ours / last), load_file(theirs / last))
    assert load_file(ours / last)["steps"].min() >= 15  # of 16 epochs; in one step a signal occurs twice


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "data", NUM_SIGNALS, seed=1, size=DOMAIN.source_size, shard_samples=4)
    return tmp_path / "data"


# --- values that are not finite

BAD = 33  # the second sample of the fifth step, which only the second of two ranks sees


class Spoiled(nn.Module):
    """At one position, a loss of NaN; or a gradient of NaN for the latents, and for nothing else."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.inner, self.what = make_module(), what

    def forward(self, batch: Signal) -> dict[str, Tensor]:
        losses = self.inner(batch)
        loss = losses["reconstruction"] + losses["penalty"]
        assert batch.latent is not None
        if BAD in batch.position.tolist() and self.what == "loss":
            loss = loss * torch.nan
        if BAD in batch.position.tolist() and self.what == "latent":
            row = batch.latent[batch.position.tolist().index(BAD)]
            loss = loss + (row - row.detach()).abs().sqrt().sum()
        return {"reconstruction": loss}


SPOILED = list(itertools.product(("deepspeed-1", "accelerate"), ("loss", "latent"), ("stop", "skip", "rollback")))
"""Engine, what is spoiled, and what is to follow."""


def spoil(data: Path, folder: Path) -> list[str]:
    """Train five steps, of which the last is spoiled; what went wrong."""
    errors = []
    for engine, what, policy in SPOILED:
        values = {"num_samples": 5 * BATCH, "on_nonfinite": policy}
        if policy == "rollback":
            values["checkpoint_every_samples"] = 3 * BATCH
        training = override(TRAINING, values)
        try:
            call_train(data, folder / engine / what / policy, ENGINES[engine], training, module=Spoiled(what))
            errors.append("")
        except FloatingPointError as problem:
            errors.append(str(problem))
    return errors


@pytest.mark.slow
def test_a_step_that_is_not_finite_touches_neither_rows_nor_weights_on_any_rank(data: Path, tmp_path: Path):
    errors, other = run_processes(spoil, 2, data, tmp_path)
    assert errors == other
    key = open_set(data)[BAD].key
    for (engine, what, policy), error in zip(SPOILED, errors, strict=True):
        folder = tmp_path / engine / what / policy
        if policy == "stop":
            cause = "the gradient of latents is not finite, of" if what == "latent" else "step 5 is not finite"
            assert cause in error and key in error
            assert not checkpoint_of(folder, 5).exists()
        else:
            assert error == ""
            found = kept(folder, 5)
            expect_equal(found, kept(folder, 3 if policy == "rollback" else 4))
            assert found["steps"].sum() > 0
