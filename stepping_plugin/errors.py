"""Every error that users can meet, and the two helpers that keep their texts alike.

A message says what went wrong, where, what was given, what was expected and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "BudgetError",
    "CaptureError",
    "CheckpointError",
    "NestingError",
    "RecipeError",
    "SteppingError",
    "closest",
    "expect",
    "explain",
    "image_shape_error",
    "nearest",
]


class SteppingError(Exception):
    """Base of all errors raised on purpose by this package."""


class BudgetError(SteppingError):
    """Budgets that are malformed, or that no assignment of levels can meet."""


class CaptureError(SteppingError):
    """A model that cannot be captured as a graph, or whose graph has no nested form."""


class NestingError(SteppingError):
    """A subnet depends on units that it does not contain.

    Args:
        message: the whole text.
        layer: name of the first layer whose values differ, if known.
        subnet: number (1..N) of the subnet that is not nested, if known.
    """

    def __init__(self, message: str, layer: str | None = None, subnet: int | None = None) -> None:
        super().__init__(message, layer, subnet)
        self.layer = layer
        self.subnet = subnet

    def __str__(self) -> str:
        return str(self.args[0])


class CheckpointError(SteppingError):
    """A file that is damaged, foreign, or does not belong to the given model."""


class RecipeError(SteppingError):
    """All mistakes of one recipe at once.

    Args:
        problems: one message per mistake, or a single message.
        source: path or name of the recipe, for the heading.
    """

    def __init__(self, problems: str | Iterable[str], source: str | None = None) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        super().__init__(self.problems, source)

    def __str__(self) -> str:
        where = f" in {self.source}" if self.source else ""
        if len(self.problems) == 1:
            return f"{self.source}: {self.problems[0]}" if self.source else self.problems[0]
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        return f"{len(self.problems)} problems{where}:{listed}"


_LISTED = 40  # names that somebody reads


def nearest(key: object, valid: Iterable[object]) -> str:
    """The hint that follows an unknown ``key``: the closest valid one, or all of them when none is close.

    >>> nearest("buget", ["budget", "policy"])
    "did you mean 'budget'?"
    >>> nearest("zzz", ["budget", "policy"])
    "valid: 'budget', 'policy'"
    """
    names = [str(name) for name in valid]
    folded = {name.lower(): name for name in reversed(names)}  # reversed: the first of two equal folds wins
    close = difflib.get_close_matches(str(key).lower(), list(folded), n=1)
    if close:
        return f"did you mean {folded[close[0]]!r}?"
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return "valid: " + (", ".join(repr(name) for name in names[:_LISTED]) or "nothing here") + more


def closest(key: object, valid: Iterable[str] | Mapping[str, str], most: int = 3) -> str:
    """The hint that follows an unknown ``key`` where there are too many valid ones to list; empty if none is close.

    Of a mapping, keys are compared and values shown.

    >>> closest("resnett18", ["resnet18", "resnet18d", "vgg16"])
    "Did you mean 'resnet18' or 'resnet18d'?"
    """
    shown = valid if isinstance(valid, Mapping) else {name: name for name in valid}
    folded = {name.lower(): value for name, value in shown.items()}
    close = difflib.get_close_matches(str(key).lower(), list(folded), n=most)
    found = list(dict.fromkeys(repr(folded[name]) for name in close))
    if not found:
        return ""
    return f"Did you mean {' or '.join([', '.join(found[:-1]), found[-1]] if len(found) > 1 else found)}?"


def explain(
    what: str,
    *,
    where: str | None = None,
    got: object = None,
    expected: str | None = None,
    action: str | None = None,
) -> str:
    """One error text in the order that the whole package keeps; parts that are None are left out.

    >>> explain("budget too small", where="subnet 1", got=0.01, expected="at least 0.04", action="Raise it.")
    'subnet 1: budget too small; got 0.01, expected at least 0.04. Raise it.'
    """
    facts = []
    if got is not None:
        facts.append(f"got {got if isinstance(got, str) else repr(got)}")
    if expected is not None:
        facts.append(f"expected {expected}")
    text = f"{where}: {what}" if where else what
    if facts:
        text += f"; {', '.join(facts)}"
    if action:
        text = f"{text.rstrip('.')}. {action}"
    return text


def expect(value: object, kinds: type | tuple[type, ...], where: str, expected: str, action: str | None = None) -> None:
    """Refuse an argument of another type.

    Raises:
        SteppingError: `value` is none of `kinds`.
    """
    if not isinstance(value, kinds):
        raise SteppingError(
            explain("wrong type", where=where, got=type(value).__name__, expected=expected, action=action)
        )


def image_shape_error(got: Sequence[int], image_size: Sequence[int]) -> SteppingError:
    """Images (B, C, H, W) that are not of the size (C, H, W) that a net or an engine was made for."""
    return SteppingError(
        explain(
            "wrong image shape",
            got=str(tuple(got)),
            expected=f"(B, {', '.join(map(str, image_size))})",
            action="Resize the images, or convert the model again with example_inputs of that size.",
        )
    )
