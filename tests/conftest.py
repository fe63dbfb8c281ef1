"""A Ray cluster for the tests that need one: on this machine, behind a token of its own, started once."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest


@dataclass(frozen=True)
class LocalRay:
    """A running `ray start --head`, and the environment of those who may use it."""

    address: str
    dashboard: str
    home: Path
    environment: dict[str, str]


@pytest.fixture(scope="session")
def local_ray() -> Iterator[LocalRay]:
    with ray_head(num_cpus=2) as local_ray:
        yield local_ray


@contextlib.contextmanager
def ray_head(*, num_cpus: int) -> Iterator[LocalRay]:
    folder = Path(tempfile.mkdtemp(prefix="dinr-"))  # short: Ray's sockets lie below it
    home, ports = folder / "home", free_ports(4)
    home.mkdir()
    (folder / "token").write_text("0123456789abcdef" * 4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        "PYTHONPATH": str(Path(__file__).parent),  # so that workers can import these tests' own modules
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_worker_niceness": "0",  # as launch.py sets it: a busy machine would starve the workers
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    options = ["--head", f"--temp-dir={folder / 'ray'}", "--disable-usage-stats"]
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    options += [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    try:
        with _ray_start(options, environment, folder / "log.txt", num_cpus=num_cpus) as process:
            wait_for(ports[:2], process, folder / "log.txt")
            address = f"127.0.0.1:{ports[0]}"
            yield LocalRay(address, f"http://127.0.0.1:{ports[1]}", home, environment | {"RAY_ADDRESS": address})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def ray_node(head: LocalRay, *, blind_to: Path | None = None) -> Iterator[subprocess.Popen]:
    """One more node with one CPU, on this machine; killing the process's children takes it away.

    Args:
        blind_to: a folder in whose place the node sees an empty one, as where nodes share no storage.
    """
    (port,) = free_ports(1)
    options = [f"--address={head.address}", f"--dashboard-agent-listen-port={port}"]
    environment = {name: value for name, value in head.environment.items() if name != "RAY_ADDRESS"}
    log = head.home / f"node-{port}.txt"
    prefix = (
        [] if blind_to is None else ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', blind_to]
    )
    with _ray_start(options, environment, log, num_cpus=1, prefix=prefix) as process:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield process


@contextlib.contextmanager
def _ray_start(
    options: list[str], environment: dict[str, str], log: Path, *, num_cpus: int, prefix: Sequence[str | Path] = ()
) -> Iterator[subprocess.Popen]:
    command = [
        *prefix,
        "ray",
        "start",
        "--block",
        f"--num-cpus={num_cpus}",
        "--num-gpus=0",
        "--node-ip-address=127.0.0.1",
    ]
    command += ["--object-store-memory=100000000", *options]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            kill_tree(process)


def kill_tree(process: subprocess.Popen) -> None:
    """kill -9 of a process and all below it."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(60)


@contextlib.contextmanager
def in_environment(environment: dict[str, str]) -> Iterator[None]:
    """This process with other environment variables besides its own."""
    before = dict(os.environ)
    os.environ |= environment
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(ports: list[int], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        open_ports = 0
        for port in ports:
            with socket.socket() as one:
                open_ports += one.connect_ex(("127.0.0.1", port)) == 0
        if open_ports == len(ports):
            return
        time.sleep(0.2)
    raise TimeoutError(log.read_text())
