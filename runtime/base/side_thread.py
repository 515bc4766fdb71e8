"""A thread beside the caller's, which the system may refuse (`ulimit -u`, `pids.max`)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .errors import DeviceError

_T = TypeVar("_T")


def start(thread: threading.Thread, does: str) -> None:
    """Starts a thread that nothing can go on without.

    does: what it does, for the message. Raises DeviceError where the system gives no thread.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise DeviceError(
            f"expected a thread that {does}, found that the system gives no more (ulimit -u,"
            f" pids.max): {error}"
        ) from error


class SideThread:
    """A thread that does jobs in their order while the caller goes on.

    Where the system refuses the thread, the caller does each job when it submits it, with the same
    results.
    """

    def __init__(self, name: str) -> None:
        pool = ThreadPoolExecutor(1, name)
        self._pool: ThreadPoolExecutor | None = pool
        try:
            # The pool starts its thread for its first job, and keeps a job whose thread did not
            # start. This first job is a dummy, because a real one would then be done twice.
            pool.submit(int)
        except RuntimeError:
            pool.shutdown(wait=False)
            self._pool = None

    def submit(self, job: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Returns a future of the result of `job(*arguments)`, or of its error."""
        if self._pool is not None:
            return self._pool.submit(job, *arguments)
        done: Future[_T] = Future()
        try:
            done.set_result(job(*arguments))
        except Exception as error:  # Ctrl-C is the caller's own and is not caught
            done.set_exception(error)
        return done

    def __enter__(self) -> SideThread:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()  # waits for the submitted jobs
