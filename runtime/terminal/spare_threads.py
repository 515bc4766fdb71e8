"""Threads that numpy's BLAS starts as it is imported: none where the system gives no more."""

from __future__ import annotations

import os
import threading


def spare_threads() -> None:
    """Keeps BLAS to the caller's thread where no other can be started: it would end the process.

    Before numpy is imported.
    """
    try:
        probe = threading.Thread(target=lambda: None)
        probe.start()
    except RuntimeError:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    else:
        probe.join()
