"""Keys of a recipe that nothing would look at: the one who wrote them expects something that will not happen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .recipe_schema import Recipe

__all__ = ["without_effect"]

_DECAYING = ("cosine", "tanh", "poly", "wsd", "rsqrt")  # schedules that fall to min_lr
# Key, whether nothing looks at it (of its section), why. Of train and retrain.
_TRAINING: list[tuple[str, Callable[[Any], bool], str]] = [
    ("decay_milestones", lambda s: s.sched != "multistep", "sched: {s.sched}"),
    ("decay_rate", lambda s: s.sched not in ("step", "multistep", "poly"), "sched: {s.sched}"),
    ("decay_epochs", lambda s: s.sched not in ("step", "wsd", "rsqrt"), "sched: {s.sched}"),
    ("min_lr", lambda s: s.sched not in _DECAYING, "sched: {s.sched}"),
    ("cooldown_epochs", lambda s: s.sched not in ("cosine", "tanh", "poly"), "sched: {s.sched}"),
    ("warmup_epochs", lambda s: s.sched == "none", "sched: none"),
    ("warmup_lr", lambda s: s.sched == "none" or not s.warmup_epochs, "warmup_epochs: {s.warmup_epochs}"),
    ("model_ema_decay", lambda s: not s.model_ema, "model_ema: false"),
    ("amp_dtype", lambda s: not s.amp, "amp: false"),
]
_DISTILLATION = ("gamma", "temperature")
# Of construction, for one recipe; a comparison changes the policy and keeps the rest for its other methods.
_ITERATIONS = ("flow", "importance", "importance_batches", "alpha", "beta", "threshold", "rebirth", "updates")


def without_effect(recipe: Recipe, given: Mapping[str, Any], *, whole: bool) -> Iterator[str]:
    """One text for every key that was given in vain.

    Args:
        recipe: what was made of the keys.
        given: the keys in question, by section. A section that names all of its keys is a resolved recipe: nobody chose
            those.
        whole: they make up the recipe; else they override one.
    """
    for section in ("model", "train", "construction", "retrain"):
        keys, values = given.get(section), getattr(recipe, section)
        if not isinstance(keys, dict) or set(keys) >= set(type(values).model_fields):
            continue
        for key, reason in _reasons(recipe, section, whole):
            default = type(values).model_fields[key].get_default(call_default_factory=True)
            if key in keys and getattr(values, key) != default:
                yield f"{section}.{key}: has no effect with {reason}: remove it"


def _reasons(recipe: Recipe, section: str, whole: bool) -> Iterator[tuple[str, str]]:
    """Keys of a section without effect, each with the reason."""
    values: Any = getattr(recipe, section)
    keys = type(values).model_fields
    if recipe.model.net is not None and section != "retrain":
        yield from ((key, "model.net, which is retrained only") for key in keys if key != "net")
        return
    if section in ("train", "retrain"):
        if values.epochs == 0:
            yield from ((key, "epochs: 0") for key in keys if key != "epochs")
            return
        yield from ((key, why.format(s=values)) for key, unused, why in _TRAINING if unused(values))
    if section == "retrain" and values.distill_from == "none":
        yield from ((key, "distill_from: none") for key in _DISTILLATION)
    if section == "construction":
        if not values.amp:
            yield "amp_dtype", "amp: false"
        if whole and values.policy != "steppingnet":
            yield from ((key, f"policy: {values.policy}") for key in _ITERATIONS)
        elif whole and values.importance in ("magnitude", "random"):
            yield from ((key, f"importance: {values.importance}") for key in ("importance_batches", "alpha"))
