"""Sweeps as a person runs them, on a cluster of two cores: real trials, kills, failures, and early stops."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import LocalRay, in_environment
from safetensors.torch import load_file
from test_jobs import run_here
from tiny_run import write_pictures

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = """
    --domain.size 16 --domain.source-size 32 --data.num-streams 4
    --autoencoder-training.num-samples 64 --prior-training.num-samples 64 --prior-training.batch-size 8
    --scale.engine accelerate --sampling.steps 2 --sampling.count 2
    --evaluation.num-samples 8 --evaluation.max-reconstructions 4
""".split()
CHINR = """
    --autoencoder.num-experts 4 --autoencoder.width 16 --autoencoder.latent-dim 8 --autoencoder.num-points 64
    --autoencoder.fitting.num-points 64 --prior.denoiser.width 16 --prior.denoiser.num-blocks 1
""".split()
DDMI = """
    --autoencoder.encoder.channels 8 --autoencoder.encoder.multipliers 1 2 --autoencoder.latent-channels 2
    --autoencoder.decoder-channels 8 --autoencoder.decoder-multipliers 1 2 --autoencoder.num-fields 2
    --autoencoder.field-channels 8 --autoencoder.readout-width 16 --autoencoder.num-points 64
    --domain.scales 1 --domain.scale-weights 1 --prior.denoiser.width 16 --prior.denoiser.num-blocks 1
""".split()


LONG = 24_000
CHECKPOINTS = "prior/checkpoints/*/manifest.json"


class Sweep:
    """A sweep on tiny pictures in a folder of its own."""

    def __init__(self, folder: Path, ray: LocalRay, job: str, space: str, *flags: str) -> None:
        if not (folder / "train").exists():
            write_pictures(folder / "train", 40, seed=1)
            write_pictures(folder / "val", 6, seed=2)
        (folder / "space.py").write_text(f"from ray import tune\nSPACE = {space}\n")
        model = DDMI if job == "tune_ddmi" else CHINR
        self.command = [sys.executable, f"jobs/{job}.py", "--space", str(folder / "space.py"), "--name", "tiny"]
        self.command += ["--output", str(folder), *TINY, *model, *flags]
        self.command += ["--data.train", str(folder / "train"), "--data.val", str(folder / "val")]
        self.environment, self.folder = ray.environment, folder / "sweeps" / "tiny"
        self.log = folder / "log.txt"

    def start(self, *flags: str) -> subprocess.Popen:
        with self.log.open("a") as file:
            return subprocess.Popen([*self.command, *flags], env=self.environment, stdout=file, stderr=file)

    def run(self, *flags: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*self.command, *flags], env=self.environment, capture_output=True, text=True, timeout=600
        )

    def trials(self) -> dict[str, dict]:
        """By name: what trial.json holds."""
        return {path.parent.name: json.loads(path.read_text()) for path in self.folder.glob("trials/*/*/trial.json")}

    def run_folder(self, name: str) -> Path:
        (folder,) = self.folder.glob(f"trials/*/{name}")
        return folder

    def starts(self, stage: Path) -> list[int]:
        """Samples that a stage had seen each time that it was started."""
        return [int(n) for n in re.findall(r"a step, (\d+) of \d+ samples done", (stage / "log.txt").read_text())]

    def kept(self) -> dict[str, int]:
        """By trial: the samples its prior had seen at its last checkpoint; 0 before the first."""
        return {
            name: max([int(path.parent.name) for path in self.run_folder(name).glob(CHECKPOINTS)], default=0)
            for name in self.trials()
        }

    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.folder / "trials.csv").read_text().splitlines()))


def wait_until(true: Callable[[], bool], process: subprocess.Popen, log: Path, *, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def halfway(sweep: Sweep) -> str | None:
    """A trial that has a checkpoint of its prior, and most of the way before it."""
    kept, trials = sweep.kept(), sweep.trials()
    return next((name for name in kept if trials[name]["status"] == "running" and 0 < kept[name] < LONG / 3), None)


def test_a_killed_sweep_and_a_killed_trial_go_on_and_nothing_is_lost_or_repeated(local_ray: LocalRay, tmp_path: Path):
    long = f"--prior-training.num-samples {LONG} --prior-training.checkpoint-every-samples 400".split()
    sweep = Sweep(
        tmp_path, local_ray, "tune_hcdm", '{"prior.condition_bits": tune.grid_search([0, 2, 3, 4, 5])}', *long
    )
    driver = sweep.start()

    def some_done_and_one_halfway() -> bool:
        return halfway(sweep) is not None and any(t["status"] == "finished" for t in sweep.trials().values())

    wait_until(some_done_and_one_halfway, driver, sweep.log)
    driver.kill()
    driver.wait()
    cut = halfway(sweep)
    assert cut is not None
    kept = sweep.kept()
    done = {name: trial for name, trial in sweep.trials().items() if trial["status"] == "finished"}
    times = {name: (sweep.run_folder(name) / "prior" / "model.safetensors").stat().st_mtime_ns for name in done}
    assert 1 <= len(done) <= 3

    driver = sweep.start("--resume")
    wait_until(lambda: halfway(sweep) not in (None, cut), driver, sweep.log)
    victim = halfway(sweep)
    assert victim is not None
    held_by = re.match(r"process (\d+)", (sweep.run_folder(victim) / ".lock").read_text())
    assert held_by is not None and int(held_by[1]) != driver.pid
    kept_by_victim = sweep.kept()[victim]
    os.kill(int(held_by[1]), signal.SIGKILL)
    assert driver.wait(600) == 0, sweep.log.read_text()

    trials = sweep.trials()
    assert set(trials) == {f"condition_bits={bits},seed=0" for bits in (0, 2, 3, 4, 5)}
    assert all(trial["status"] == "finished" for trial in trials.values())
    for name in trials:
        lines = (sweep.run_folder(name) / "prior" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["samples"] == LONG
        starts = sweep.starts(sweep.run_folder(name) / "prior")
        assert starts[0] == 0 and all(start >= kept.get(name, 0) for start in starts[1:]), (name, starts, kept)
        assert len(starts) <= 1 + (name in kept) + (name == victim), (name, starts)
    for name, trial in done.items():
        assert trials[name] == trial
        assert (sweep.run_folder(name) / "prior" / "model.safetensors").stat().st_mtime_ns == times[name]
    for name, at_least in ((cut, kept[cut]), (victim, kept_by_victim)):
        assert sweep.starts(sweep.run_folder(name) / "prior")[-1] >= at_least > 0
    assert sweep.starts(sweep.folder / "shared" / "chinr" / "shared" / "autoencoder") == [0]  # by all, once
    assert (sweep.run_folder(cut) / "autoencoder").is_symlink()
    assert "| 5 | ours | " in (sweep.folder / "report.md").read_text()
    rows = sweep.rows()
    assert len(rows) == 5 and all(float(row["deviation"]) > 0 and float(row["kid"]) for row in rows)

    again = sweep.run("--prior-training.num-samples", "17000")
    assert again.returncode == 2
    assert f"is another sweep: experiment.prior_training.num_samples is {LONG} there and 17000 here" in again.stderr


@pytest.mark.faults
def test_trials_of_two_workers_run_one_at_a_time_and_one_that_fails_is_reported(local_ray: LocalRay, tmp_path: Path):
    sweep = Sweep(tmp_path, local_ray, "tune_hcdm", '{"prior.condition_bits": tune.grid_search([2, 1000, 3])}')
    asked_too_much = sweep.run("--scale.num-workers", "3")
    assert asked_too_much.returncode == 2 and asked_too_much.stderr.count("\n") == 1
    expected = "error: scale.num_workers=3 for each trial, but the cluster has 2 CPUs: 1 are missing."
    assert asked_too_much.stderr.startswith(expected)

    finished = sweep.run("--scale.num-workers", "2")
    assert finished.returncode == 0, finished.stderr
    trials = sweep.trials()
    assert {trial["status"] for name, trial in trials.items() if "=1000," not in name} == {"finished"}
    failed = trials["condition_bits=1000,seed=0"]
    assert failed["status"] == "failed" and "condition_bits=1000" in failed["error"]
    assert "**Failed**: condition_bits=1000,seed=0: " in (sweep.folder / "report.md").read_text()
    spans = []
    for name in trials:
        if "=1000," not in name:
            log = (sweep.run_folder(name) / "prior" / "log.txt").read_text()
            assert "2 workers x 1 micro-batches x 4 samples a step" in log
            stamps = re.findall(r"^[\d-]+ [\d:,]+", log, re.MULTILINE)
            spans.append((stamps[0], stamps[-1]))
    first, second = sorted(spans)
    assert first[1] <= second[0]


@pytest.mark.faults
def test_a_trial_whose_process_dies_again_and_again_is_reported_as_failed(local_ray: LocalRay, tmp_path: Path):
    long = "--prior-training.num-samples 1000000 --scale.max-failures 1".split()
    sweep = Sweep(tmp_path, local_ray, "tune_hcdm", '{"prior.condition_bits": tune.grid_search([2])}', *long)
    driver = sweep.start()
    for _ in range(2):
        wait_until(lambda: bool(list(sweep.folder.glob("trials/*/*/prior/log.txt"))), driver, sweep.log)
        (folder,) = sweep.folder.glob("trials/*/*")
        held_by = re.match(r"process (\d+)", (folder / ".lock").read_text())
        assert held_by is not None
        os.kill(int(held_by[1]), signal.SIGKILL)
        (folder / "prior" / "log.txt").unlink()
    assert driver.wait(200) == 1
    (trial,) = sweep.trials().values()
    assert trial["status"] == "failed" and "its process died" in trial["error"]
    assert "no trial has finished; the first to fail was condition_bits=2,seed=0: " in sweep.log.read_text()


def test_the_best_settings_command_trains_it(local_ray: LocalRay, tmp_path: Path):
    sweep = Sweep(tmp_path, local_ray, "tune_hcdm", '{"prior.condition_bits": tune.grid_search([2])}', "--seeds", "2")
    finished = sweep.run()
    assert finished.returncode == 0, finished.stderr
    text = (sweep.folder / "report.md").read_text()
    assert "over 2 seeds" in text and finished.stdout.strip() == str(sweep.folder / "report.md")
    first, second = (sweep.run_folder(name) for name in sorted(sweep.trials()))
    assert (first / "autoencoder").samefile(second / "autoencoder")
    one, other = (load_file(folder / "prior" / "model.safetensors") for folder in (first, second))
    assert any((one[name] - other[name]).abs().max() > 1e-3 for name in one)  # of two seeds
    (line,) = [line for line in text.splitlines() if line.startswith("python ")]
    words = [sys.executable, *shlex.split(line)[1:], "--scale.launcher", "none", "--scale.num-threads", "1"]
    again = subprocess.run(words, env=sweep.environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    best = load_file(tmp_path / "chinr" / "tiny-best" / "prior" / "model.safetensors")
    assert all(torch.allclose(best[name], one[name], atol=1e-5) for name in one)


def test_asha_stops_trials_that_lag_behind(local_ray: LocalRay, tmp_path: Path):
    grid = '{"autoencoder.fitting.rate": tune.grid_search([0.01, 1e-6, 1e-7, 1e-8])}'  # the others learn nothing
    sweep = Sweep(tmp_path, local_ray, "tune_loe", grid, "--autoencoder-training.num-samples", "720")
    finished = sweep.run("--scheduler", "asha", "--output", os.path.relpath(tmp_path))
    assert finished.returncode == 0, finished.stderr
    seen = {float(row["autoencoder.fitting.rate"]): int(row["autoencoder_samples"]) for row in sweep.rows()}
    status = {float(row["autoencoder.fitting.rate"]): row["status"] for row in sweep.rows()}
    assert status[0.01] == "finished" and seen[0.01] == 720
    stopped = [rate for rate in status if status[rate] == "stopped"]
    assert len(stopped) >= 2 and all(seen[rate] < 720 for rate in stopped)
    assert all(not row["psnr"] and float(row["early"]) for row in sweep.rows() if row["status"] == "stopped")
    assert not list(sweep.folder.glob("trials/chinr/*/prior"))


@pytest.mark.faults
def test_optuna_draws_from_a_space_with_conditions_and_repeats_with_seeds(local_ray: LocalRay, tmp_path: Path):
    pytest.importorskip("optuna")
    space = """{
        "prior.denoiser.kind": tune.choice(["mlp", "unet"]), "prior.denoiser.width": tune.choice([8, 16]),
        "prior.denoiser.channels": tune.choice([8]), "prior.denoiser.head_dim": 8,
        "prior.denoiser.multipliers": (1,), "prior_training.optim.lr": tune.loguniform(1e-4, 1e-2),
    }
ONLY_IF = {"prior.denoiser.width": {"prior.denoiser.kind": "mlp"}} | {
    f"prior.denoiser.{name}": {"prior.denoiser.kind": "unet"} for name in ("channels", "head_dim", "multipliers")
}"""
    sweep = Sweep(tmp_path, local_ray, "tune_ddmi", space)
    finished = sweep.run("--search", "optuna", "--num-samples", "2", "--seeds", "2")
    assert finished.returncode == 0, finished.stderr
    text = (sweep.folder / "report.md").read_text()
    assert (
        "# Sweep tiny: prior.denoiser.kind, " in text and shlex.split(text.split("```")[1])[1] == "jobs/train_ddmi.py"
    )
    before = sweep.trials()
    more = sweep.run("--search", "optuna", "--num-samples", "2", "--seeds", "2", "--resume")  # finds all as it was
    assert more.returncode == 0 and sweep.trials() == before
    trials = list(before.values())
    assert len(trials) == 4 and {trial["status"] for trial in trials} == {"finished"}
    assert sorted(trial["seed"] for trial in trials) == [0, 0, 1, 1]
    for trial in trials:
        held = {path.rpartition(".")[2] for path in trial["values"]}
        mlp, unet = {"kind", "width", "lr"}, {"kind", "channels", "head_dim", "multipliers", "lr"}
        assert held == (mlp if trial["values"]["prior.denoiser.kind"] == "mlp" else unet)


def test_what_cannot_be_swept_is_refused_in_one_line(
    local_ray: LocalRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sweep = Sweep(tmp_path, local_ray, "tune_hcdm", '{"prior.condition_bit": tune.grid_search([2])}')
    for flags, message in (
        ([], "unknown field 'prior.condition_bit'; did you mean prior.condition_bits?"),
        (["--scheduler", "asha", "--space", "tune_spaces/condition_bits.py"], "scheduler=asha stops trials by"),
        (["--seed", "x"], "error: seed='x'"),
        (["--seeds", "0"], "error: seeds="),
        (["--scheduler", "hyperband"], "scheduler='hyperband'"),
        (["--scale.launcher", "none", "--space", "tune_spaces/condition_bits.py"], "scale.launcher=none"),
    ):
        with in_environment(local_ray.environment):
            assert run_here(monkeypatch, *sweep.command[2:], *flags, job=sweep.command[1]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and not sweep.trials()
    refused = sweep.run("--resume", "--space", "tune_spaces/condition_bits.py")  # known once the cluster is
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert "--resume: " in refused.stderr and not sweep.trials()


def test_help_names_the_sweeps_options_and_the_fields():
    command = [sys.executable, "jobs/tune_hcdm.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    for option in (
        "--space",
        "--num-samples",
        "--seeds",
        "--scheduler",
        "--search",
        "--resume",
        "--prior.condition-bits",
    ):
        assert option in shown
