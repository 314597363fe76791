"""How long steps take on this machine: what decides about a deadline."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["PATIENCE", "StepClock"]

WINDOW = 24  # measured times that are remembered per step and batch size
PATIENCE = (16, 256)  # refusals in a row before a step is tried all the same: at first, and at most


@dataclass
class _Record:
    """What is known of one step at one batch size."""

    times: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    refused: int = 0  # times in a row
    patience: int = PATIENCE[0]
    trial: bool = False  # it runs although the times speak against it


class StepClock:
    """Measured times of every step, by batch size.

    An estimate is deliberately high (nearly the slowest of the recent times), and it grows when the machine
    is slower right now than it used to be, which the steps of the request that has just run tell.

    A step that is refused is not measured, so that a slow phase would be believed for ever. Therefore a step that was
    refused 16 times in a row is tried once against its times, and the new time replaces them. Every trial doubles the
    refusals before the next one, up to 256; once the step has run 24 times since, 16 are enough again. It follows, for
    each step and batch size:

    - A deadline cannot lock in: where requests have more time left than the step takes, it runs after at most 16 of
      them; after at most 256 if earlier trials found it slow.
    - Trials are few: of n requests in a row that have less time left than the step takes, at most 7 + n / 256 run it.

    Args:
        macs: MACs that each step executes per sample; they scale times of steps that were never measured.
    """

    def __init__(self, macs: Sequence[int]) -> None:
        self._macs = list(macs)
        self._records: dict[tuple[int, int], _Record] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def record(self, level: int, batch_size: int, seconds: float) -> None:
        """Add a measured time of step `level`."""
        with self._lock:
            record = self._record(level, batch_size)
            usual = _quantile(record.times, 0.5) if record.times else seconds
            if record.trial:
                record.times.clear()
            record.times.append(seconds)
            record.trial, record.refused = False, 0
            if len(record.times) == WINDOW:
                record.patience = PATIENCE[0]
        self._local.slowdown = seconds / usual if usual > 0 else 1.0

    def forget(self, batch_size: int) -> None:
        """Drop what was measured at a batch size."""
        with self._lock:
            self._records = {key: record for key, record in self._records.items() if key[1] != batch_size}

    def allows(self, level: int, batch_size: int, left: float, last: int = 0) -> bool:
        """Whether step `level` may run with `left` seconds to go: it will probably end in time, or it is tried."""
        if left <= 0:
            return False
        if self.estimate(level, batch_size, last) <= left:
            return True
        with self._lock:
            record = self._record(level, batch_size)
            if record.refused < record.patience:
                for missed in range(level, len(self._macs) + 1):  # the steps behind it do not run either
                    self._record(missed, batch_size).refused += 1
                return False
            record.refused, record.trial = 0, True
            record.patience = min(2 * record.patience, PATIENCE[1])
            return True

    def estimate(self, level: int, batch_size: int, last: int = 0) -> float:
        """Seconds that step `level` will hardly exceed.

        Args:
            last: the step that this thread has just run, 0 = none; it tells how loaded the machine is now.
        """
        slowdown = max(1.0, getattr(self._local, "slowdown", 1.0)) if last else 1.0
        with self._lock:
            return self._usual(level, batch_size, last) * slowdown

    def _record(self, level: int, batch_size: int) -> _Record:
        return self._records.setdefault((level, batch_size), _Record())

    def _usual(self, level: int, batch_size: int, last: int) -> float:
        own = self._measured(level)
        if batch_size in own:
            return own[batch_size]
        if own:  # of other batch sizes: a larger batch takes longer, a smaller one takes longer per sample
            larger = [seconds for size, seconds in own.items() if size >= batch_size]
            return min(larger) if larger else max(seconds * batch_size / size for size, seconds in own.items())
        share = self._macs[level - 1] / max(1, self._macs[last - 1])
        guesses = [seconds * max(1.0, batch_size / size) * share for size, seconds in self._measured(last).items()]
        return 2.0 * max(guesses, default=0.0)

    def _measured(self, level: int) -> dict[int, float]:
        """Seconds of a step per batch size at which it ran."""
        return {size: _quantile(r.times, 0.9) for (s, size), r in self._records.items() if s == level and r.times}


def _quantile(values: Sequence[float] | deque[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
