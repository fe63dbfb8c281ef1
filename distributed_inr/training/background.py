"""A thread that calls functions one after the other, and that the end of the process waits for, but not for long."""

import atexit
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_GRACE_SECONDS = 1.0


class Background(threading.Thread):
    """The thread, started; `concurrent.futures` has one that a process cannot end without."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._calls = queue.SimpleQueue()
        self.start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Have `function` called after those submitted before."""
        future: Future[T] = Future()
        self._calls.put((future, function, arguments))
        return future

    def stop(self) -> None:
        """End the thread when it has called all that was submitted; does not wait for it."""
        self._calls.put(None)

    def run(self) -> None:
        """Called by the thread itself."""
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)


@atexit.register
def _end_threads() -> None:
    """A thread that is still within torch when Python is taken down, be it to free a tensor, aborts the process."""
    threads = [thread for thread in threading.enumerate() if isinstance(thread, Background)]
    for thread in threads:
        thread.stop()
    deadline = time.monotonic() + _GRACE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
