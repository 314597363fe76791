"""Ctrl-C that waits until what is being done can be kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["ctrl_c"]


@contextmanager
def ctrl_c(notice: str = "") -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that a loop looks at where it can stop; a second one stops at once.

    Args:
        notice: written to standard error at the first one.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if notice:  # by the descriptor: a handler may come in the middle of a print
            with suppress(OSError):
                os.write(2, f"{notice}\n".encode())

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
