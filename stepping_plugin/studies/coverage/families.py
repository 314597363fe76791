"""Which models a coverage run takes: the smallest variant of every module of timm, or any other selection."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from pathlib import Path

from ...errors import SteppingError, nearest
from .specs import FAMILIES, TORCHVISION, Spec, spec_of
from .variants import next_sizes, variants_under

__all__ = ["select"]


def select(
    patterns: Iterable[str] = (),
    family_smallest: bool = False,
    all_variants_under: int | None = None,
    *,
    family_second: bool = False,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Spec]:
    """Models of a run, without repetitions.

    Args:
        patterns: shell patterns of timm names, module names or `torchvision:NAME`. Alone they select models; with
            one of the other choices they narrow it down.
        family_smallest: the models of `FAMILIES` and `TORCHVISION`.
        all_variants_under: every timm model with fewer parameters than this.
        family_second: a model of another size of every module of timm, see `variants.next_sizes`.
        cache: file that keeps counted parameters, see `variants.parameter_counts`.
        say: called with lines of progress.

    Raises:
        SteppingError: nothing matches.
    """
    patterns = list(patterns)
    if family_second:
        specs = next_sizes(patterns, cache, say)
    elif all_variants_under is not None:
        specs = variants_under(all_variants_under, patterns, cache, say)
    elif patterns and not family_smallest:
        return _by_name(patterns)
    else:
        specs = list(FAMILIES + TORCHVISION)
        if patterns:
            specs = [s for s in specs if any(fnmatch.fnmatchcase(n, p) for p in patterns for n in (s.model, s.module))]
    if not specs:
        raise SteppingError(f"models: nothing matches {', '.join(patterns) or 'the selection'}.")
    return specs


def _by_name(patterns: list[str]) -> list[Spec]:
    import timm

    specs: dict[str, Spec] = {}
    for pattern in patterns:
        known = {s.model: s for s in FAMILIES if fnmatch.fnmatchcase(s.module, pattern) or s.model == pattern}
        if pattern.startswith("torchvision:"):
            known = {s.model: s for s in _torchvision(pattern)}
        names = [n for n in timm.list_models() if fnmatch.fnmatchcase(n, pattern) and n not in known]
        if not known and not names:
            raise SteppingError(f"models: timm has no model {pattern!r}; {nearest(pattern, timm.list_models())}")
        specs |= known | {name: spec_of(name) for name in names}
    return list(specs.values())


def _torchvision(pattern: str) -> list[Spec]:
    from torchvision import models

    chosen = {spec.model: spec for spec in TORCHVISION}
    names = [f"torchvision:{name}" for name in models.list_models(module=models)]
    modules = {n: models.get_model_builder(n.partition(":")[2]).__module__.rpartition(".")[2] for n in names}
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    return [chosen.get(name) or Spec(name, f"torchvision.{modules[name]}", 224) for name in found]
