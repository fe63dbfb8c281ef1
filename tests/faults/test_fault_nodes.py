"""Nodes of a Ray cluster that go and come, several on this machine: the run waits for them and goes on."""

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import kill_tree, ray_head, ray_node
from fault_runs import BATCH, fit, make_experiment, read_account, read_losses, read_starts, read_weights, stage_of
from processes import run_processes
from test_fault_stopping import Job

from distributed_inr.launch import Worker

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CHANGES = {"steps": 400, "autoencoder_training__checkpoint_every_samples": 20 * BATCH}


def train_whole(folder: Path) -> None:
    import torch.distributed as dist

    worker = Worker(dist.get_rank(), dist.get_world_size(), lambda metrics: None, lambda *progress: None, lambda: False)
    fit(worker, make_experiment(folder, name="whole", **CHANGES))


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on two nodes of one CPU; one is killed and replaced, then both, and replaced after a while."""
    folder = tmp_path_factory.mktemp("nodes")
    whole = make_experiment(folder, name="whole", **CHANGES)
    stage_of(whole)
    run_processes(train_whole, 2, folder)
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(ray_head(num_cpus=0))
        nodes = [stack.enter_context(ray_node(head)) for _ in range(2)]
        job = Job(folder, head.environment, name="moved", **CHANGES)
        job.wait_until(lambda: job.num_lines >= 50)
        kill_tree(nodes[1])
        nodes.append(stack.enter_context(ray_node(head)))
        job.wait_until(lambda: len(read_starts(job.experiment)) == 2 and job.num_lines >= 100)
        kill_tree(nodes[0])
        kill_tree(nodes[2])
        lines = job.num_lines
        time.sleep(10)
        waited = job.process.poll() is None and job.num_lines < lines + 20
        for _ in range(2):
            stack.enter_context(ray_node(head))
        job.finish()
    return {"run": job.experiment, "whole": whole, "waited": waited}


def check(moved: dict[str, Any], start: int) -> None:
    assert read_starts(moved["run"])[start] > 0
    assert read_losses(moved["run"]) == read_losses(moved["whole"])
    assert read_weights(moved["run"]) == read_weights(moved["whole"])
    account = read_account(moved["run"])
    assert account.lost == account.repeated == account.other_keys == []


def test_fault_08_a_node_is_removed(moved: dict[str, Any]):
    """a node is killed and another one added: the run goes on with it; equal in every bit."""
    check(moved, 1)


def test_fault_09_all_nodes_are_removed(moved: dict[str, Any]):
    """all worker nodes are killed, new ones come later: the run waits for them and goes on; equal in every bit."""
    assert moved["waited"]
    check(moved, 2)
