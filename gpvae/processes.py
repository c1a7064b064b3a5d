"""Worker processes for long calls: one that dies takes nothing along but its own call."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Processes(Executor):
    """Like `ProcessPoolExecutor` with the spawn context, for workers that the system may kill.

    When a worker of a `ProcessPoolExecutor` dies, every call that was running or waiting is lost,
    and the pool with it. Here each worker is a pool of its own: only its call raises
    `BrokenProcessPool`, and the next call starts another worker. An exception (or Ctrl-C) inside
    the `with` block kills the workers at once, and they do not outlive a parent that was killed.

    Args:
        workers: how many processes there are at most; each starts when it is first needed.

    Example:
        >>> with Processes(2) as executor:
        ...     executor.submit(abs, -3).result()
        3
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers)  # each waits for the calls of one worker
        self._own = threading.local()
        self._lock = threading.Lock()
        self._started: list[_Worker] = []
        self._killed = False

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Call the function in one of the processes; as for any executor."""
        return self._threads.submit(self._call, function, args, kwargs)

    def kill(self) -> None:
        """Kill the workers in the middle of their calls and drop the calls that wait."""
        with self._lock:
            self._killed = True
            for worker in self._started:
                worker.kill()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As for any executor: calls that run are finished."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        for worker in self._started:
            worker.pool.shutdown(wait)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.kill()
        self.shutdown()

    def _call(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        if getattr(self._own, "worker", None) is None:
            self._own.worker = self._start()
        try:
            return self._own.worker.pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            self._own.worker = None
            raise

    def _start(self) -> _Worker:
        worker = _Worker()
        with self._lock:
            self._started.append(worker)
            if self._killed:
                worker.kill()
        return worker


def make_executor(workers: int) -> AbstractContextManager[Processes | None]:
    """Processes for several workers; None, which means this process, for one."""
    return nullcontext() if workers == 1 else Processes(workers)


class _Worker:
    """A pool of one process, whose id is known, so that it can be killed."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _settle)
        self.pid = self.pool.submit(os.getpid).result()

    def kill(self) -> None:
        for process in multiprocessing.active_children():
            if process.pid == self.pid:
                process.kill()


def _settle() -> None:
    """Leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
