"""Nodes of a Ray cluster that go and come, several on this machine: the run waits for them and goes on."""

import contextlib
import subprocess
import sys
import time
from typing import Any

import pytest
from conftest import LocalRay, kill_tree, ray_head, ray_node
from fault_runs import (
    BATCH,
    Job,
    read_account,
    read_losses,
    read_starts,
    read_weights,
    train_alone,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]

CHANGES = {"steps": 700, "autoencoder_training__checkpoint_every_samples": 20 * BATCH}


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on two nodes of one CPU; one is killed and replaced, then both, and replaced after a while."""
    folder = tmp_path_factory.mktemp("nodes")
    whole = train_alone(folder, name="whole", **CHANGES)
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(ray_head(num_cpus=0))
        nodes = [stack.enter_context(ray_node(head)) for _ in range(2)]
        job = Job(folder, head.environment, name="moved", **CHANGES)
        job.wait_until(lambda: job.num_lines >= 50)
        kill_tree(nodes[1])
        nodes.append(stack.enter_context(ray_node(head)))
        job.wait_until(lambda: len(read_starts(job.experiment)) == 2 and job.num_lines >= 100)
        announce_end_of_a_node(head)
        job.wait_until(lambda: job.samples_kept % (20 * BATCH) != 0)  # a checkpoint out of turn
        noticed = job.samples_kept
        kill_tree(nodes[0])
        kill_tree(nodes[2])
        lines = job.num_lines
        time.sleep(10)
        waited = job.process.poll() is None and job.num_lines < lines + 20
        for _ in range(2):
            stack.enter_context(ray_node(head))
        job.finish()
    return {"run": job.experiment, "whole": whole, "waited": waited, "noticed": noticed}


LIVING = """
import ray
ray.init(log_to_driver=False, logging_level="error")
print([node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")][0])
"""


def announce_end_of_a_node(head: LocalRay) -> None:
    """As a cloud does that will take a machine back: Ray tells the workers."""
    found = subprocess.run(
        [sys.executable, "-c", LIVING], env=head.environment, check=True, capture_output=True, text=True
    )
    command = ["ray", "drain-node", f"--address={head.address}", f"--node-id={found.stdout.strip()}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", "--deadline-remaining-seconds=60"]
    subprocess.run(command, env=head.environment, check=True, capture_output=True)


def check(moved: dict[str, Any], start: int) -> None:
    assert read_starts(moved["run"])[start] > 0
    assert read_losses(moved["run"]) == read_losses(moved["whole"])
    assert read_weights(moved["run"]) == read_weights(moved["whole"])
    account = read_account(moved["run"])
    assert account.lost == account.repeated == account.other_keys == []


def test_fault_08_a_node_is_removed(moved: dict[str, Any]):
    """a node is killed and another one added: the run goes on with it; equal in every bit."""
    check(moved, 1)


def test_fault_17_a_node_will_be_taken_away(moved: dict[str, Any]):
    """Ray's notice that a node will be taken away: a checkpoint at once, out of turn, and the run goes on from it."""
    assert read_starts(moved["run"])[2] >= moved["noticed"] > 0
    check(moved, 2)


def test_fault_09_all_nodes_are_removed(moved: dict[str, Any]):
    """all worker nodes are killed, new ones come later: the run waits for them and goes on; equal in every bit."""
    assert moved["waited"]
    check(moved, 2)
