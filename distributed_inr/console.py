"""What the person who runs a job sees of it, and says to it: a progress bar, a log file, and signals to stop."""

import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

_LINE_SECONDS = 10.0

_ECHO_SECONDS = 1.0
"""In which another SIGTERM is the same one: `timeout` sends one to the process and one to its group."""


class Bar:
    """One progress bar: drawn on a terminal, a line now and then in a file."""

    def __init__(self, title: str) -> None:
        self.title, self.drawn = title, sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.start, self.begin, self.shown, self.last = time.monotonic(), 0, 0.0, ""

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.last:
            print(self.last, file=sys.stderr, flush=True)

    def update(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """Show `done` of `total` samples, and `values` beside them; "samples/s" among these is the rate."""
        postfix = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "samples/s")
        if self.drawn:
            if self.bar is None:
                self.bar = tqdm(desc=self.title, total=total, initial=done, unit=" samples", dynamic_ncols=True)
            self.bar.set_postfix_str(postfix, refresh=False)
            self.bar.n = done
            self.bar.refresh()
            return
        now = time.monotonic()
        if not self.last:
            self.start, self.begin = now, done
        rate = values.get("samples/s") or (done - self.begin) / max(now - self.start, 1e-9)
        self.last = tqdm.format_meter(
            done,
            total,
            now - self.start,
            prefix=self.title,
            unit=" samples",
            rate=rate or None,
            postfix=postfix,
            ncols=120,
            ascii=True,
        )
        if now - self.shown > _LINE_SECONDS:
            self.shown = now
            print(self.last, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        tqdm.write(f"{self.title}: {text}", file=sys.stderr)


@contextlib.contextmanager
def signals(*, stoppable: bool) -> Iterator[list[int]]:
    """The SIGINT or SIGTERM received, if `stoppable`; otherwise, and the second time, either ends the process."""
    received: list[int] = []
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def hear(number: int, frame: Any) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
        elif number == signal.SIGTERM and time.monotonic() - first < _ECHO_SECONDS:
            return
        received.append(number)
        if len(received) > 1 or not stoppable:
            _exit(number, "stopped at once")
        os.write(2, b"\nstopping, with a checkpoint; once more stops at once\n")  # print must not interrupt itself

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_if_stopped(received: list[int]) -> None:
    if received:
        _exit(received[0], "stopped with a checkpoint")


def _exit(number: int, how: str) -> NoReturn:
    """End the process as a signal does, with a line that says how to go on."""
    print(f"{how}; to go on: {shlex.join(['python', *sys.argv])}", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


@contextlib.contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Append our log lines, and Python's warnings, to `folder`/log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger("distributed_inr"), logging.getLogger("py.warnings")]
    levels = [log.level for log in loggers]
    showwarning = warnings.showwarning
    logging.captureWarnings(True)
    loggers[1].propagate = False
    for log in loggers:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.removeHandler(handler)
            log.setLevel(level)
        loggers[1].propagate = True
        logging.captureWarnings(False)
        warnings.showwarning = showwarning
        handler.close()


_leaving_group = False


def _leave_group() -> None:
    if _leaving_group:
        os.setpgrp()


os.register_at_fork(after_in_child=_leave_group)


@contextlib.contextmanager
def own_groups() -> Iterator[None]:
    """Processes started in here are not of our process group: a signal to all of that is for us, who end them in order.

    `timeout` sends such, and some schedulers; Ray would end before its workers have written a checkpoint.
    """
    global _leaving_group
    _leaving_group = True
    try:
        yield
    finally:
        _leaving_group = False


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Keep our answer to SIGTERM, for which Ray sets its own: Python's, and that of the C library below it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # Ray's own answer, which says nothing
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
