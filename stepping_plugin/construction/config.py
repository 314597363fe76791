"""All knobs of the construction, in one place."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..errors import SteppingError, nearest
from .importance import COPY
from .uniform import BAND, INCREMENTS

__all__ = ["ConstructionConfig"]

_CHOICES = {
    "flow": ("trajectory", "paper"),
    "init": ("original", "random"),
    "importance": ("per-sample", "per-batch", "magnitude", "random"),
    "updates": ("joint", "sequential"),
    "latency": ("torch", "onnxruntime"),
    "amp_dtype": ("bfloat16", "float16"),
}


@dataclass(frozen=True)
class ConstructionConfig:
    """How subnets are found (Fig. 3). Named as in the paper, or as in timm for the training in between.

    Attributes:
        flow: "trajectory": every subnet follows its own MAC target down to its budget; "paper": the literal
            rules.
        iterations: N_t.
        batches: m, training batches per iteration.
        cooldown_iterations: after the landing, m batches of training for so many times, without moves; the
            learning rate falls to 0. The last moves are learned too, before accuracy is measured.
        expansion: widen every layer by this factor before construction; "auto": by the least one with which the last
            budget can be used up.
        noise: how unequally the copies of a widened unit share its outgoing weights, see `widening.widen`; 0: equally,
            and copies at one level stay the same unit.
        copy_importance: importance of a second copy as a share of its own, 1: as any unit; see
            `importance.discount_copies`. The flow "paper" and random weights know no copies.
        init: weights of the start network: "original" (widened, same function) or "random".
        importance: estimator of Eq. 2: absolute value "per-sample" or "per-batch" (the paper); or
            "magnitude" of the weights; or "random" order.
        importance_batches: batches per iteration on which Eq. 2 is evaluated, the last ones of the m.
        alpha: alpha_k = alpha ** (k - 1) in Eq. 3.
        beta: suppression of weight updates (III-A2); 1: none.
        threshold: weights of smaller magnitude are pruned after every iteration; 0: none.
        band: least and greatest width of a layer relative to the uniform pattern; None: free.
        increments: least and greatest number of units that a level adds to a layer, relative to the uniform pattern;
            None: free. Without a band it has no effect.
        round_to: channels that every level adds to a layer in multiples of, see `rounding`; 1: any number. "auto": the
            multiple that the device likes best, see `calibration`.
        latency: runtime whose speed counts, "torch" or "onnxruntime": what "auto" measures.
        rebirth: after the landing, units that never fire get new incoming weights, see `rebirth.revive`. The flow
            "paper" knows none.
        updates: "joint" (one pass for all subnets) or "sequential" (the paper's ascending order).
        opt, lr, momentum, weight_decay, clip_grad, grad_accum_steps, amp, amp_dtype: see
            `training.TrainConfig`.

    Raises:
        SteppingError: one error that lists everything that is wrong.
    """

    flow: str = "trajectory"
    iterations: int = 30
    batches: int = 10
    cooldown_iterations: int = 3
    expansion: float | str = "auto"
    noise: float = 1.0
    copy_importance: float = COPY
    init: str = "original"
    importance: str = "per-sample"
    importance_batches: int = 2
    alpha: float = 1.5
    beta: float = 0.9
    threshold: float = 1e-5
    band: tuple[float, float] | None = BAND
    increments: tuple[float, float] | None = INCREMENTS
    round_to: int | str = 1
    latency: str = "torch"
    rebirth: bool = True
    updates: str = "joint"
    opt: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_grad: float | None = None
    grad_accum_steps: int = 1
    amp: bool = False
    amp_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        problems = [*self._wrong_choices(), *self._wrong_numbers()]
        if problems:
            listed = problems[0] if len(problems) == 1 else "".join(f"\n  - {p}" for p in problems)
            raise SteppingError(f"ConstructionConfig: {listed}")

    @classmethod
    def of(cls, section: Any, **changes: Any) -> ConstructionConfig:
        """From anything that has some of these attributes, such as a section of a recipe."""
        names = [f.name for f in dataclasses.fields(cls) if hasattr(section, f.name)]
        return cls(**{**{name: getattr(section, name) for name in names}, **changes})

    def _wrong_choices(self) -> list[str]:
        given = {name: getattr(self, name) for name in _CHOICES}
        return [
            f"{name}: got {value!r}; {nearest(value, _CHOICES[name])}"
            for name, value in given.items()
            if value not in _CHOICES[name]
        ]

    def _wrong_numbers(self) -> list[str]:
        whole = [
            ("iterations", 1), ("batches", 0), ("cooldown_iterations", 0), ("importance_batches", 1),
            ("grad_accum_steps", 1),
        ]  # fmt: skip
        problems = [
            f"{name}: got {getattr(self, name)!r}, expected a whole number from {least} up"
            for name, least in whole
            if not _is_whole(getattr(self, name)) or getattr(self, name) < least
        ]
        ranges = [
            ("expansion", lambda v: 1 <= v <= 16, "a number from 1 to 16 (times the MACs: its square), or 'auto'"),
            ("round_to", lambda v: _is_whole(v) and 1 <= v <= 1024, "a whole number from 1 (any) to 1024, or 'auto'"),
            ("noise", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
            ("copy_importance", lambda v: 0 <= v <= 1, "a number from 0 to 1 (as any unit)"),
            ("alpha", lambda v: v > 0, "a number above 0"),
            ("beta", lambda v: 0 < v <= 1, "a number above 0, up to 1 (none)"),
            ("threshold", lambda v: v >= 0, "a number from 0 (none) up"),
            ("lr", lambda v: v > 0, "a number above 0"),
            ("momentum", lambda v: 0 <= v < 1, "a number from 0 up to 1"),
            ("weight_decay", lambda v: v >= 0, "a number from 0 up"),
            ("clip_grad", lambda v: v > 0, "a number above 0, or None"),
        ]
        for name, fine, expected in ranges:
            value = getattr(self, name)
            if (name, value) in (("clip_grad", None), ("expansion", "auto"), ("round_to", "auto")):
                continue
            if not (_is_number(value) and fine(value)):
                problems.append(f"{name}: got {value!r}, expected {expected}")
        for name in ("band", "increments"):
            value = getattr(self, name)
            if value is not None and not _is_around_one(value):
                problems.append(f"{name}: got {value!r}, expected (low, high) with 0 <= low <= 1 <= high, or None")
        return problems


def _is_around_one(band: Any) -> bool:
    if not isinstance(band, (tuple, list)) or len(band) != 2 or not all(map(_is_number, band)):
        return False
    return 0 <= band[0] <= 1 <= band[1]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
