"""What runs in a worker of Ray Train around a worker function: its letters to the driver, and its heartbeat.

With launch.py, the only module that imports ray.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distributed_inr.allocator import keep_freed_memory
from distributed_inr.console import log_file
from distributed_inr.data.storage import Unreachable
from distributed_inr.training.engine import Scale

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
_BEAT_SECONDS = 1.0
_NAMESPACE = "distributed_inr"
_MISTAKES = (ValueError, FloatingPointError)
"""What a restart cannot mend: the same would happen again."""


@dataclass(frozen=True)
class Worker:
    """What a worker function gets.

    Attributes:
        report: called on every rank, equally often, with metrics and the path of a checkpoint.
        progress: called on the first rank with (done, total, {name: value}), at most a few times a second.
        stop: whether the user has asked for an end; the first rank knows, the others always say False.
        save: whether Ray has announced, since the last call, that it takes a node away; the first rank knows.
    """

    rank: int
    world: int
    report: Callable[[dict[str, Any]], None]
    progress: Callable[[int, int, dict[str, float]], None]
    stop: Callable[[], bool]
    save: Callable[[], bool] = lambda: False


def work(
    function: Callable[[Worker], None], *, mail: "Mail", scale: Scale, folder: Path, directory: str, prepare: Callable
) -> None:
    """Run a worker function here.

    Args:
        directory: that relative paths refer to.
        prepare: sets the environment, before anything else.
    """
    import ray
    import ray.train
    from ray.train.v2._internal.execution.context import get_train_context  # the public way is a barrier

    if mail.get("mistake") is not None:
        return  # an earlier attempt found what a restart cannot mend
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if rank == 0:
        mail.put("attempt", (mail.get("attempt") or 0) + 1)

    prepare()
    keep_freed_memory()
    if os.path.isdir(directory):
        os.chdir(directory)
    here = ray.get_runtime_context().get_node_id()
    if not torch.cuda.is_available():
        cores = next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == here)
        torch.set_num_threads(scale.num_threads or max(1, int(cores) // context.get_local_world_size()))

    asked, noticed = 0.0, None

    def stop() -> bool:
        nonlocal asked
        if rank != 0 or time.monotonic() - asked < POLL_SECONDS:
            return False
        asked = time.monotonic()
        return mail.get("stop") is not None

    def save() -> bool:
        nonlocal noticed
        before, noticed = noticed, get_train_context().preemption_context.preemption_info
        return rank == 0 and noticed is not None and noticed != before

    def report(metrics: dict[str, Any]) -> None:
        if rank == 0:
            with _tolerating_the_store():
                mail.send("reports", metrics)
        ray.train.report(metrics)

    def progress(done: int, total: int, values: Mapping[str, float]) -> None:
        mail.put("progress", [done, total, dict(values)])

    with (
        log_file(folder) if rank == 0 else contextlib.nullcontext(),
        _mailed_warnings(mail),
        _heartbeat(mail, rank, here),
    ):
        try:
            function(Worker(rank, world, report, progress, stop, save))
        except Exception as error:
            if not torch.distributed.is_initialized():
                raise  # Ray is ending this worker because another one has failed
            if isinstance(error, _MISTAKES) and not isinstance(error, Unreachable):
                mail.put("mistake", str(error), overwrite=False)
                raise
            name, cause = f"cause/{mail.get('attempt')}", "".join(traceback.format_exception(error))
            if mail.get(name) is None and "timed out" in str(error).lower():  # a collective
                beats = read_beats(mail, range(world))
                write_stacks(folder, beats)
                others = "; ".join(beat.place for beat in beats if beat.rank != rank)
                cause += f"rank {rank} waited {scale.timeout_seconds} s for the others: {others}; see {folder}/hang.txt"
            mail.put(name, cause, overwrite=False)
            raise


@dataclass(frozen=True)
class Mail:
    """Small values shared by the driver and the workers of one run, in the cluster's own key-value store.

    That costs no process and less than a millisecond, works between nodes, and is behind Ray's token. (An actor would
    cost a process on a machine of two cores; `ray.train.report` is a barrier.)
    """

    run: str

    def put(self, name: str, value: Any, *, overwrite: bool = True) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(f"{self.run}/{name}", json.dumps(value), overwrite, namespace=_NAMESPACE)

    def get(self, name: str) -> Any:
        from ray.experimental.internal_kv import _internal_kv_get

        content = _internal_kv_get(f"{self.run}/{name}", namespace=_NAMESPACE)
        return None if content is None else json.loads(content)

    def send(self, folder: str, value: Any) -> None:
        """Put a value under `folder`/, after those sent before."""
        self.put(f"{folder}/{time.time_ns():020d}-{uuid.uuid4().hex}", value)

    def take(self, folder: str) -> list[Any]:
        """The values sent to `folder`/, in their order; they are then gone."""
        from ray.experimental.internal_kv import _internal_kv_list

        keys = _internal_kv_list(f"{self.run}/{folder}/", namespace=_NAMESPACE)
        names = sorted(key.decode().removeprefix(f"{self.run}/") for key in keys)
        values = [self.get(name) for name in names]
        for name in names:
            self.remove(name)
        return values

    def remove(self, name: str) -> None:
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(f"{self.run}/{name}", namespace=_NAMESPACE)

    def close(self) -> None:
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(f"{self.run}/", del_by_prefix=True, namespace=_NAMESPACE)


@dataclass(frozen=True)
class Beat:
    """Where a rank is, told once a second.

    Attributes:
        node: Ray's name of the node.
        started: when the process started, in the system's ticks: process numbers are used again.
        count: of beats.
        frame: the innermost line of ours that it executes.
        stack: all of the training thread's.
    """

    rank: int
    host: str
    node: str
    pid: int
    started: str
    count: int
    frame: str
    stack: str

    @property
    def place(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host}) is at {self.frame}"


def read_beats(mail: Mail, ranks: Iterable[int]) -> list[Beat]:
    """The last beat of each rank that has one."""
    found = [mail.get(f"beats/{rank}") for rank in ranks]
    return [Beat(**values) for values in found if values is not None]


def write_stacks(folder: Path, beats: Iterable[Beat]) -> None:
    """Append where the ranks are to `folder`/hang.txt."""
    now = datetime.datetime.now().isoformat(" ", "seconds")
    with (folder / "hang.txt").open("a") as file:
        file.write("".join(f"{now} {beat.place}\n{beat.stack}\n" for beat in beats))


def kill_process(pid: int, started: str) -> bool:
    """Kill a process of this machine, even a stopped one; False if it has ended, or where that cannot be told."""
    if not started or _start_of(pid) != started:
        return False
    os.kill(pid, signal.SIGKILL)
    return True


@contextlib.contextmanager
def _heartbeat(mail: Mail, rank: int, node: str) -> Iterator[None]:
    """Tell the driver where this thread is, until it leaves; a stopped process falls silent."""
    ended, thread = threading.Event(), threading.get_ident()
    beat = Beat(rank, socket.gethostname(), node, os.getpid(), _start_of(os.getpid()), 0, "", "")

    def tell() -> None:
        for count in itertools.count():
            frames = traceback.extract_stack(sys._current_frames()[thread])
            ours = [f for f in frames if "distributed_inr" in f.filename and f.filename != __file__] or frames
            frame = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} in {ours[-1].name}"
            stack = "".join(traceback.format_list(frames))
            now = dataclasses.replace(beat, count=count, frame=frame, stack=stack)
            with _tolerating_the_store():
                mail.put(f"beats/{rank}", dataclasses.asdict(now))
            if ended.wait(_BEAT_SECONDS):
                return

    teller = threading.Thread(target=tell, name="heartbeat", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
        with _tolerating_the_store():
            mail.remove(f"beats/{rank}")


@contextlib.contextmanager
def _tolerating_the_store() -> Iterator[None]:
    """A letter that cannot be sent is no reason to end the training."""
    try:
        yield
    except Exception as error:
        logger.debug("the cluster's store: %s", error)


def _start_of(pid: int) -> str:
    """When a process of this machine started; empty if there is none, or where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


@contextlib.contextmanager
def _mailed_warnings(mail: Mail) -> Iterator[None]:
    """Send our warnings to the driver."""

    process = os.getpid()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if os.getpid() != process:
                return  # a forked loader, where the cluster's client would wait for ever
            with _tolerating_the_store():
                mail.send("warnings", record.getMessage())

    handler, log = Handler(logging.WARNING), logging.getLogger("distributed_inr")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
