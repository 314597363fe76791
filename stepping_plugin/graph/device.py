"""Devices and seeds as people name them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ..errors import SteppingError, explain

__all__ = ["checked_seed", "on_cpu_by_default", "usable_device"]


def on_cpu_by_default() -> contextlib.AbstractContextManager[Any]:
    """What the package computes for itself stays on the CPU, whatever `torch.set_default_device` says."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def checked_seed(seed: Any) -> int:
    """A seed that every generator takes: 0 to 2^63 - 1.

    Raises:
        SteppingError: something else.
    """
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise SteppingError(explain("not a seed", where="seed", got=seed, expected="an integer from 0 to 2^63 - 1"))
    return seed


def usable_device(name: str | torch.device) -> torch.device:
    """A device by name.

    Raises:
        SteppingError: no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0][:150]
        raise SteppingError(
            explain(
                f"this device cannot be used ({reason})",
                where="device",
                got=str(name),
                expected="cpu, cuda, cuda:0 ...",
            )
        ) from None
    if device.type == "meta":
        raise SteppingError(
            explain("this device holds no values", where="device", got="meta", expected="cpu, cuda ...")
        )
    return device
