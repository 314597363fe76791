"""The modes of torch that a conversion must not inherit from its caller."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["ordinary_mode"]

P = ParamSpec("P")
T = TypeVar("T")


def ordinary_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function without inference mode, autocast and a meta default device.

    Tensors made in inference mode cannot be trained, a graph traced under autocast keeps its casts for ever, and
    nothing can be looked up on the meta device. What the caller had is in force again afterwards.
    """

    @wraps(function)
    def ordinary(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            for kind in ("cpu", "cuda", "mps", "xpu"):
                if torch.is_autocast_enabled(kind):
                    modes.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type == "meta":
                modes.enter_context(torch.device("cpu"))
            return function(*args, **kwargs)

    return ordinary
