"""Threads beside the training, and the end of the process that they belong to."""

import subprocess
import sys

import pytest

ENDINGS = {
    "freeing tensors": "thread.submit(tensors.clear)",
    "multiplying": "thread.submit(lambda: [torch.ones(200, 200) @ torch.ones(200, 200) for _ in range(300)])",
}


def end_of_process(last_words: str) -> subprocess.CompletedProcess[str]:
    """What comes of a process that says `last_words` to a thread and then ends."""
    program = f"""
import threading, torch
from distributed_inr.training.background import Background
tensors = [torch.ones(10) for _ in range(50_000)]
thread = Background("test")
{last_words}
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_ends_well_while_a_thread_is_within_torch(ending: str) -> None:
    ended = end_of_process(ENDINGS[ending])
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_process_does_not_wait_for_a_thread_that_waits_for_ever() -> None:
    ended = end_of_process('thread.submit(threading.Event().wait)\nthread.submit(print, "in vain")')
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
