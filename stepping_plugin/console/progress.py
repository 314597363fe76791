"""Progress of everything that may take over five seconds: what is being done, how far it is, the time that is left.

    with stage("construction", total=330) as task:
        for batch in batches:
            ...
            task.advance(text="iteration 3/30")

On a terminal it is a bar on standard error (rich's), which goes away at the end; elsewhere, lines on standard error:
the first one as soon as a stage takes longer than `Manner.delay`, then 10, 30, 70 seconds later and every minute.
Stages may lie in each other. `manner` says for everything inside whether and how soon it is shown. Of the processes of
a distributed run, the first one speaks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Stage", "as_time", "manner", "stage", "track"]

T = TypeVar("T")
FIRST, LONGEST = 10.0, 60.0  # seconds between two lines of a stage; each pause is twice the one before
WORTH_AN_END = 5.0  # seconds from which on the end of a stage is told
BAR_DELAY = 0.5  # seconds after which a bar appears


@dataclass(frozen=True)
class Manner:
    """How progress is shown.

    Attributes:
        shown: whether at all.
        bars: whether as bars on a terminal; else as lines there too. A bar takes time from what is being measured.
        lines: whether as lines where standard error is no terminal.
        delay: seconds after which a stage's first line appears.
    """

    shown: bool = True
    bars: bool = True
    lines: bool = True
    delay: float = 5.0


_manner: ContextVar[Manner] = ContextVar("manner", default=Manner())  # noqa: B039 - it is frozen


@contextlib.contextmanager
def manner(
    shown: bool | None = None, *, bars: bool | None = None, lines: bool | None = None, delay: float | None = None
) -> Iterator[None]:
    """For what is done inside; None: as outside. What an outer call has switched off stays off."""
    now = _manner.get()
    token = _manner.set(
        Manner(
            now.shown and shown is not False,
            now.bars and bars is not False,
            now.lines and lines is not False,
            now.delay if delay is None else delay,
        )
    )
    try:
        yield
    finally:
        _manner.reset(token)


class Stage:
    """Something that takes its time, and how far it is.

    Attributes:
        what: is being done.
        total: pieces of work in all; None: nobody knows.
        done: pieces of it.
        text: what is at hand, for people.
    """

    def __init__(self, what: str, total: int | None, done: int) -> None:
        self.what, self.total, self.done, self.text = what, total, done, ""
        self.began, self._at_first = time.monotonic(), done

    def advance(self, pieces: int = 1, text: str | None = None) -> None:
        """So many pieces more are done."""
        self.done += pieces
        if text is not None:
            self.text = text

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def seconds_left(self) -> float | None:
        """By the pace so far; None where nobody can tell yet."""
        pieces = self.done - self._at_first
        if self.total is None or pieces <= 0:
            return None
        return self.seconds / pieces * max(0, self.total - self.done)


@contextlib.contextmanager
def stage(what: str, total: int | None = None, *, done: int = 0) -> Iterator[Stage]:
    """Show a stage while it is on.

    Args:
        what: is being done, in a few words.
        total: pieces of work, each told by `Stage.advance`; None: unknown.
        done: pieces that an earlier process did.
    """
    own, how = Stage(what, total, done), _manner.get()
    if not how.shown or os.environ.get("RANK", "0") != "0":
        yield own
        return
    terminal = sys.stderr.isatty()
    if not (terminal or how.lines):
        yield own
        return
    view: _View = _Bar(own) if terminal and how.bars else _Lines(own, how.delay)
    _clock.add(view)
    ended = False
    try:
        yield own
        ended = True
    finally:
        _clock.remove(view)
        view.end(ended)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, while a stage shows how many are done."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with stage(what, total) as task:
        for item in items:
            yield item
            task.advance()


def as_time(seconds: float) -> str:
    """Seconds for people: 4 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


# ------------------------------------------------------------------------------------------------- showing


class _View:
    """How a stage is shown; `due` is the moment at which `show` wants to be called."""

    due: float

    def show(self) -> None:
        raise NotImplementedError

    def end(self, whole: bool) -> None:
        raise NotImplementedError


class _Lines(_View):
    def __init__(self, own: Stage, delay: float) -> None:
        self.own, self.due, self.pause, self.spoken = own, own.began + delay, FIRST, False

    def show(self) -> None:
        self._say(_line(self.own))
        self.due, self.pause, self.spoken = time.monotonic() + self.pause, min(2 * self.pause, LONGEST), True

    def end(self, whole: bool) -> None:
        if self.spoken and whole and self.own.seconds >= WORTH_AN_END:
            self._say(f"{self.own.what}: done, {as_time(self.own.seconds)}")

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads
            print(text, file=sys.stderr, flush=True)


def _line(own: Stage) -> str:
    facts = [f"{as_time(own.seconds)} so far", _facts(own), own.text]
    return f"{own.what}: {', '.join(fact for fact in facts if fact)}"


def _facts(own: Stage) -> str:
    """How far a stage is, as far as anybody can tell: 12 of 330 (4 %), about 2 min 3 s left."""
    if own.total is None:
        return ""
    left, share = own.seconds_left, own.done / max(1, own.total)
    return f"{own.done:,} of {own.total:,} ({share:.0%})" + ("" if left is None else f", about {as_time(left)} left")


class _Bar(_View):
    """A line of the one live display that a terminal can have."""

    display: Progress | None = None
    shown = 0
    lock = threading.Lock()

    def __init__(self, own: Stage) -> None:
        self.own, self.due = own, own.began + BAR_DELAY
        self.task: TaskID | None = None

    def show(self) -> None:
        self.due = time.monotonic() + 0.25
        with _Bar.lock:
            if self.task is None:
                if _Bar.display is None:
                    _Bar.display = _new_display()
                    _Bar.display.start()
                self.task = _Bar.display.add_task(self.own.what, total=self.own.total, facts="")
                _Bar.shown += 1
            if _Bar.display is not None:
                what = f"{self.own.what}  {self.own.text}" if self.own.text else self.own.what
                facts = _facts(self.own)
                _Bar.display.update(self.task, completed=self.own.done, description=what, facts=facts)

    def end(self, whole: bool) -> None:
        with _Bar.lock:
            if self.task is None or _Bar.display is None:
                return
            _Bar.display.remove_task(self.task)
            _Bar.shown -= 1
            if _Bar.shown == 0:
                _Bar.display.stop()
                _Bar.display = None


def _new_display() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty(), refresh_per_second=4,
    )  # fmt: skip


class _Clock:
    """Calls views at the moments that they ask for, from one thread that lives as long as there are views."""

    def __init__(self) -> None:
        self.changed, self.views = threading.Condition(), list[_View]()
        self.thread: threading.Thread | None = None

    def add(self, view: _View) -> None:
        with self.changed:
            self.views.append(view)
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._run, name="progress", daemon=True)
                self.thread.start()
            self.changed.notify()

    def remove(self, view: _View) -> None:
        with self.changed:
            self.views.remove(view)
            self.changed.notify()

    def _run(self) -> None:
        with self.changed:
            while self.views:
                wait = min(view.due for view in self.views) - time.monotonic()
                if wait > 0:
                    self.changed.wait(wait)
                for view in self.views:
                    if view.due <= time.monotonic():
                        view.show()
            self.thread = None


_clock = _Clock()


def _begin_anew() -> None:
    """In a forked process: the thread is not there, and nobody will ever give back what it held."""
    global _clock
    _clock, _Bar.lock, _Bar.display, _Bar.shown = _Clock(), threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
