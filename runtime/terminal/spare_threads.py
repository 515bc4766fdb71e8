"""Keeps numpy's BLAS from starting threads at import if the system refuses any more."""

from __future__ import annotations

import os
import threading


def spare_threads() -> None:
    """Keeps BLAS to the caller's thread if no other can be started, which would end the process.

    It must be called before numpy is imported.
    """
    try:
        probe = threading.Thread(target=lambda: None)
        probe.start()
    except RuntimeError:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    else:
        probe.join()
