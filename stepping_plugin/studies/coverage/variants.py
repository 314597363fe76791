"""Models chosen by their number of parameters, and the smallest images that a model runs on."""

from __future__ import annotations

import fnmatch
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .specs import CLASSES, FAMILIES, Spec

__all__ = ["NEXT_SIZE", "fitted", "next_sizes", "parameter_counts", "variants_under"]

NEXT_SIZE = 1.3  # the next size has at least this many times the parameters, or pixels a side
LARGE = 60_000_000  # above it, the first and second models of a family are reduced
WIDER = {"embed_dim": (4, 3), "num_heads": (4, 3)}  # of a reduced second model, over the first one's
IMAGES = (64, 80, 96, 112, 128, 160, 192, 224, 240, 256, 288, 384, 448)

Say = Callable[[str], None]


def parameter_counts(names: Iterable[str], cache: Path | None = None, say: Say = lambda text: None) -> dict[str, int]:
    """Parameters of timm models with `CLASSES` classes, counted on the meta device.

    Args:
        names: timm names.
        cache: JSON file that keeps the counts of this version of timm; made or continued, written every 50 models.
        say: called with a line of progress.
    """
    import timm

    names, known = list(names), _read_counts(cache)
    missing = [name for name in names if name not in known]
    if missing:
        say(f"counting the parameters of {len(missing)} models")
    for done, name in enumerate(missing, start=1):
        known[name] = sum(p.numel() for p in _without_weights(name, {}).parameters())
        if cache is not None and (done % 50 == 0 or done == len(missing)):
            part = cache.with_name(cache.name + ".part")
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"timm": timm.__version__, "parameters": known}, indent=0))
            os.replace(part, cache)
        if done % 200 == 0:
            say(f"  {done} of {len(missing)}")
    return {name: known[name] for name in names}


def _read_counts(cache: Path | None) -> dict[str, int]:
    import timm

    try:
        data = json.loads(cache.read_text()) if cache is not None else {}
    except (OSError, ValueError):
        return {}
    return dict(data["parameters"]) if data.get("timm") == timm.__version__ else {}


def _without_weights(name: str, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return timm.create_model(name, num_classes=CLASSES, **kwargs)
        except (NotImplementedError, RuntimeError):  # makes its tensors by value: build it for real
            return timm.create_model(name, num_classes=CLASSES, **kwargs)


def variants_under(limit: int, patterns: list[str], cache: Path | None, say: Say) -> list[Spec]:
    """Every timm model with fewer parameters than `limit`, of those whose name or module matches a pattern."""
    import timm

    modules = _modules()
    chosen = [n for n in timm.list_models() if not patterns or _matches(patterns, n, modules[n])]
    counts = parameter_counts(chosen, cache, say)
    return [Spec(name, modules[name], None) for name in chosen if counts[name] < limit]


def next_sizes(patterns: list[str], cache: Path | None, say: Say) -> list[Spec]:
    """Every module's model of another size than its first one.

    That is the smallest with at least `NEXT_SIZE` times the first one's parameters; without such a model the largest of
    those that differ; in a module of one size the first one on larger images. A model of more than `LARGE` parameters
    in a module whose first model is reduced is reduced in the same way, a third wider.
    """
    import timm

    families = [s for s in FAMILIES if not patterns or _matches(patterns, s.model, s.module)]
    members = {s.module: timm.list_models(module=s.module) for s in families}
    # timm lists no deprecated names, which some first models have.
    counted = dict.fromkeys([s.model for s in families] + [name for names in members.values() for name in names])
    counts = parameter_counts(counted, cache, say)
    return [_next_size(first, {name: counts[name] for name in members[first.module]}, counts) for first in families]


def _next_size(first: Spec, members: dict[str, int], counts: dict[str, int]) -> Spec:
    own = counts[first.model]
    smallest_first = sorted(members, key=lambda n: (members[n], n))
    larger = [n for n in smallest_first if members[n] >= NEXT_SIZE * own]
    others = [n for n in reversed(smallest_first) if own != members[n] < NEXT_SIZE * own]
    name = next((n for n in larger + others if _has_classifier(n)), None)
    if name is None:
        return replace(first, image=next(s for s in IMAGES if s >= NEXT_SIZE * (first.image or 0)))
    reduced = first.reduced if counts[name] > LARGE else {}
    wider = {k: v * WIDER[k][0] // WIDER[k][1] if k in WIDER else v for k, v in reduced.items()}
    return Spec(name, first.module, None, wider)


def _has_classifier(name: str) -> bool:
    """Encoders of timm give features whatever number of classes they are asked for."""
    return getattr(_without_weights(name, {}), "num_classes", 0) == CLASSES


def _modules() -> dict[str, str]:
    from timm.models import _registry

    return dict(_registry._model_to_module)


def _matches(patterns: list[str], *names: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def fitted(spec: Spec) -> Spec:
    """The spec with the smallest image from 64 pixels up that its model runs on, found on the meta device.

    Args:
        spec: `image` None: to be found; otherwise the spec is returned as it is.
    """
    if spec.image is not None:
        return spec
    import timm

    own = timm.get_pretrained_cfg(spec.model)
    largest = own.input_size[-1] if own is not None else 224
    started = time.monotonic()
    for size in (*(s for s in IMAGES if s < largest), largest):
        for sized in ({"img_size": size}, {}):
            kwargs = {**spec.kwargs, **sized}
            if time.monotonic() - started < 60 and _runs(spec.model, kwargs, size):
                return replace(spec, image=size, kwargs=kwargs)
    return replace(spec, image=largest)


def _runs(name: str, kwargs: dict[str, Any], size: int) -> bool:
    try:
        with torch.device("meta"), torch.no_grad():
            model = _without_weights(name, kwargs).to("meta").eval()
            return model(torch.zeros(2, 3, size, size)).shape == (2, CLASSES)
    except Exception:  # whatever a model raises for images that it was not made for
        return False
