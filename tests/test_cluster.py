"""Jobs submitted to a cluster of several nodes on this machine: killed, resubmitted, and with a node taken away."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import LocalRay, kill_tree, ray_head, ray_node
from test_jobs import TINY

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG = "--prior-training.num-samples 24000 --prior-training.batch-size 8 --prior-training.checkpoint-every-samples 400"
STEPS = 24_000


class Submitted:
    """A training job on a cluster, by its submission id."""

    def __init__(self, head: LocalRay, output: Path, name: str) -> None:
        self.head, self.output, self.name, self.submission = head, output, name, ""
        self.prior = output / "ddmi" / name / "prior"

    def submit(self, submission: str) -> None:
        self.submission = submission
        job = ["python", "jobs/train_ddmi.py", *TINY, *LONG.split(), "--name", self.name, "--output", str(self.output)]
        self.ray("submit", "--no-wait", "--submission-id", submission, "--", *job, "--scale.engine", "accelerate")

    def ray(self, verb: str, *arguments: str) -> str:
        command = ["ray", "job", verb, "--address", self.head.dashboard, *arguments]
        done = subprocess.run(command, env=self.head.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def status(self) -> str:
        found = re.search(r"(PENDING|RUNNING|stopped|succeeded|failed)", self.ray("status", self.submission))
        assert found is not None
        return found[1]

    def samples(self) -> int:
        with contextlib.suppress(OSError, IndexError, ValueError):
            return max(int(path.parent.name) for path in (self.prior / "checkpoints").glob("*/manifest.json"))
        return 0

    def starts(self) -> list[int]:
        return [int(n) for n in re.findall(r"a step, (\d+) of \d+ samples done", (self.prior / "log.txt").read_text())]

    def wait_until(self, true: Callable[[], bool], *, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.ray("logs", self.submission)
            time.sleep(0.5)

    def finish(self) -> None:
        self.wait_until(lambda: self.status() not in ("PENDING", "RUNNING"))
        assert self.status() == "succeeded", self.ray("logs", self.submission)


@pytest.mark.faults
def test_two_jobs_survive_a_kill_with_resubmission_and_the_loss_of_a_node(tmp_path: Path):
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(ray_head(num_cpus=0))
        nodes = [stack.enter_context(ray_node(head)) for _ in range(4)]
        first, second = Submitted(head, tmp_path, "first"), Submitted(head, tmp_path, "second")
        first.submit("first-1")
        second.submit("second-1")
        first.wait_until(lambda: first.samples() > 0 and second.samples() > 0)

        first.ray("stop", "first-1")
        assert first.status() == "stopped"
        kept = first.samples()
        first.submit("first-2")
        kill_tree(nodes[0])  # three CPUs stay: one job may have to wait for the other's two
        first.finish()
        second.finish()

    assert 0 < kept < STEPS
    assert first.starts()[0] == 0 and any(start >= kept for start in first.starts()[1:])
    assert all(start > 0 for job in (first, second) for start in job.starts()[1:])
    assert len(first.starts()) + len(second.starts()) >= 4  # the node's loss was felt too
    for job in (first, second):
        lines = [json.loads(line) for line in (job.prior / "metrics.jsonl").read_text().splitlines()]
        seen = [line["samples"] for line in lines]
        assert seen == sorted(set(seen)) and seen[-1] == STEPS
        assert (job.prior.parent / "report.md").is_file()


def refused(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


TRAIN = [sys.executable, "jobs/train_ddmi.py", *TINY]
SWEEP = [sys.executable, "jobs/tune_ddmi.py"]


@pytest.mark.parametrize("command", [TRAIN, SWEEP], ids=["train", "sweep"])
def test_a_cluster_that_cannot_be_reached_is_one_line(command: list[str], tmp_path: Path):
    environment = dict(os.environ) | {"RAY_ADDRESS": "127.0.0.1:1"}
    begin = time.monotonic()
    error = refused([*command, "--output", str(tmp_path)], environment)
    assert error.startswith("error: Ray cannot be reached at RAY_ADDRESS=127.0.0.1:1: ")
    assert time.monotonic() - begin < 100  # Ray's own answer comes later
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_token_is_one_line(local_ray: LocalRay, tmp_path: Path):
    (tmp_path / "token").write_text("fedcba9876543210" * 4)
    environment = local_ray.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    error = refused([*TRAIN, "--output", str(tmp_path / "runs")], environment)
    assert error.startswith(f"error: Ray at RAY_ADDRESS={local_ray.address} refuses the token: set RAY_AUTH_MODE=token")
    submitted = subprocess.run(
        ["ray", "job", "submit", "--address", local_ray.dashboard, "--", "python", "-V"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert submitted.returncode != 0 and "token" in submitted.stdout + submitted.stderr


@pytest.mark.faults
@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0, reason="needs mount namespaces"
)
def test_storage_that_a_node_does_not_see_is_found_at_the_start(tmp_path: Path):
    output = tmp_path / "runs"
    output.mkdir()
    with ray_head(num_cpus=1) as head, ray_node(head, blind_to=output):
        environment = {name: value for name, value in head.environment.items()}
        error = refused([*SWEEP, "--output", str(output)], environment)
        assert error.startswith(f"error: {output}/sweeps/beta-z is not shared: node ") and "(1 of 2 nodes)" in error
        error = refused([*TRAIN, "--output", str(output)], environment)
        assert "is not the driver's folder; set --output to a folder that all nodes share" in error
        assert not list(output.glob("*/*/autoencoder/metrics.jsonl"))
