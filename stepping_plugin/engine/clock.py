"""How long steps take on this machine: what decides about a deadline."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

__all__ = ["StepClock"]

WINDOW = 24  # measured times that are remembered per step and batch size


class StepClock:
    """Measured times of every step, by batch size.

    An estimate is deliberately high (nearly the slowest of the recent times), and it grows when the machine
    is slower right now than it used to be, which the steps of the request that has just run tell.

    Args:
        macs: MACs that each step executes per sample; they scale times of steps that were never measured.
    """

    def __init__(self, macs: Sequence[int]) -> None:
        self._macs = list(macs)
        self._times: dict[tuple[int, int], deque[float]] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def record(self, level: int, batch_size: int, seconds: float) -> None:
        """Add a measured time of step `level`."""
        with self._lock:
            window = self._times.setdefault((level, batch_size), deque(maxlen=WINDOW))
            usual = _quantile(window, 0.5) if window else seconds
            window.append(seconds)
        self._local.slowdown = seconds / usual if usual > 0 else 1.0

    def estimate(self, level: int, batch_size: int, last: int = 0) -> float:
        """Seconds that step `level` will hardly exceed.

        Args:
            last: the step that this thread has just run, 0 = none; it tells how loaded the machine is now.
        """
        slowdown = max(1.0, getattr(self._local, "slowdown", 1.0)) if last else 1.0
        with self._lock:
            return self._usual(level, batch_size, last) * slowdown

    def _usual(self, level: int, batch_size: int, last: int) -> float:
        window = self._times.get((level, batch_size))
        if window:
            return _quantile(window, 0.9)
        known = [(size, _quantile(times, 0.9)) for (s, size), times in self._times.items() if s == level]
        if known:  # of other batch sizes: a larger batch takes longer, a smaller one takes longer per sample
            larger = [seconds for size, seconds in known if size >= batch_size]
            return min(larger) if larger else max(seconds * batch_size / size for size, seconds in known)
        share = self._macs[level - 1] / max(1, self._macs[last - 1])
        guesses = [
            _quantile(times, 0.9) * max(1.0, batch_size / size) * share
            for (s, size), times in self._times.items()
            if s == last
        ]
        return 2.0 * max(guesses, default=0.0)


def _quantile(values: Sequence[float] | deque[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
