"""Ctrl-C that waits for the step in hand."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

__all__ = ["deferred_interrupt"]


@contextlib.contextmanager
def deferred_interrupt(enabled: bool) -> Iterator[Callable[[], bool]]:
    """While active, the first Ctrl-C is only noted, and the yielded function says so; the next interrupts as ever.

    Nothing changes where ``enabled`` is False, outside the main thread, or where SIGINT is not Python's to handle.
    """
    previous = signal.getsignal(signal.SIGINT)
    if not enabled or threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield lambda: False
        return
    noted, process = False, os.getpid()

    def note(*_: object) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, previous)
        if os.getpid() == process:  # a data loader's process has the handler too
            os.write(2, b"\nfastgist: stopping after this step, with a checkpoint; Ctrl-C again stops at once\n")

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, previous)
