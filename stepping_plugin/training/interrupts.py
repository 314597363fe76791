"""Ctrl-C that waits until what is being done can be kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["ctrl_c"]


@contextmanager
def ctrl_c(tell: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that a loop looks at where it can stop; a second one stops at once.

    Args:
        tell: called at the first one.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        tell()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
