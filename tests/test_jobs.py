"""The training job as a person runs it: flags, exit codes, interruption, and `ray job submit`."""

import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LocalRay

from distributed_inr.presets.ddmi import PRESETS

TINY = """
    --domain.size 16 --domain.scales 1 --domain.scale-weights 1
    --autoencoder.encoder.channels 8 --autoencoder.encoder.multipliers 1 2
    --autoencoder.latent-channels 2 --autoencoder.decoder-channels 8 --autoencoder.decoder-multipliers 1 2
    --autoencoder.num-fields 2 --autoencoder.field-channels 8 --autoencoder.readout-width 16
    --autoencoder.num-points 64 --autoencoder-training.num-samples 64
    --prior.denoiser.width 16
    --prior-training.num-samples 64 --sampling.steps 2 --sampling.count 4
    --evaluation.num-samples 0 --evaluation.max-reconstructions 4
""".split()
ALONE = "--scale.launcher none --scale.engine accelerate --scale.num-threads 1".split()


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str, job: str = "jobs/train_ddmi.py") -> int:
    """Run a job in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [job, *arguments])
    try:
        runpy.run_path(job, run_name="__main__")
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["furniture-imag"], "error: unknown preset 'furniture-imag'; did you mean furniture-image?"),
        (["--scale.num-worker", "2"], "error: unknown flag '--scale.num-worker'; did you mean --scale.num-workers?"),
        (["--seed", "one"], "error: seed='one': "),
        (["--domain.size", "-3"], "error: domain.size='-3': "),
        (
            ["--autoencoder.kl-wieght", "3"],
            "error: unknown flag '--autoencoder.kl-wieght'; did you mean --autoencoder.kl-weight?",
        ),
        (["--autoencoder-training.batch-size", "many"], "error: autoencoder_training.batch_size='many': "),
        (
            ["--domain.size", "256"],
            "error: domain.source_size=128 is smaller than domain.size=256; pixels are never invented",
        ),
        (["--domain.size", "60"], "error: domain.size=60 must be a multiple of the encoder's reduction 8; try 56"),
        (
            ["--scale.launcher", "none", "--scale.num-workers", "2"],
            "error: scale.num_workers=2 needs scale.launcher='ray'",
        ),
        (["--data.train", "nowhere"], "error: nowhere: no index.json and no .tar files there; check the path"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    assert run_here(monkeypatch, *arguments, "--output", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_option_with_its_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run_here(monkeypatch, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    lr = PRESETS["furniture-image"]().prior_training.optim.lr
    assert "--autoencoder.kl-weight" in shown and "beta_z of eq. 9" in shown
    assert "--prior-training.optim.lr" in shown and f"(default: {lr})" in shown
    assert "presets: furniture-image, " in shown
    assert "beta_z of eq. 9" in shown and "--scale.zero-stage int" in shown


@pytest.mark.slow
def test_fault_16_sigint_by_the_user(tmp_path: Path):
    """Ctrl-C: a checkpoint, exit code 130, and the command that goes on is printed."""
    command = [sys.executable, "jobs/train_ddmi.py", *TINY, *ALONE, "--output", str(tmp_path)]
    endless = [*command, "--prior-training.num-samples", "10000000"]
    metrics = tmp_path / "ddmi" / "furniture-image" / "prior" / "metrics.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(endless, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        assert job.poll() is None
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    _, error = job.communicate(timeout=60)
    assert job.returncode == 130, error
    go_on = shlex.join(["python", *endless[1:]])
    assert f"stopped with a checkpoint; to go on: {go_on}\n" in error and "Traceback" not in error
    assert len(list((metrics.parent / "checkpoints").glob("*/manifest.json"))) == 1

    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "prior_training.num_samples is 10000000 there and 64 here" in refused.stderr.splitlines()[-1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "workers"),
    [
        pytest.param([], 2, id="in-place"),
        pytest.param(["--working-dir", "."], 1, id="working-dir", marks=pytest.mark.faults),
    ],
)
def test_ray_job_submit_runs_the_job_and_keeps_its_output(local_ray: LocalRay, options: list[str], workers: int):
    name = f"submitted-{workers}"
    job = ["python", "jobs/train_ddmi.py", *TINY, "--name", name, "--scale.num-workers", str(workers)]
    done = subprocess.run(
        ["ray", "job", "submit", "--address", local_ray.dashboard, *options, "--", *job],
        env=local_ray.environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = local_ray.home / "distributed_inr" / "runs" / "ddmi" / name
    assert f"output: {folder.parents[1]}" in done.stdout
    for made in ("config.json", "autoencoder/model.safetensors", "prior/model.safetensors", "report.md"):
        assert (folder / made).is_file()
        assert f"{folder / made}\n" in done.stdout
