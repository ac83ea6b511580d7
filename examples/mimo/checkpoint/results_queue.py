"""The queue through which the writers of a checkpoint report, served by a helper process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async


def install() -> None:
    """Fork the helper, while there are no threads; it ends when this process does, however that is.

    Megatron's own starts an interpreter on each rank at the first save, and outlives a rank that
    is killed or fails.
    """
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_end_with_parent)
    filesystem_async._results_queue = manager.Queue()


def _end_with_parent() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
