"""A small experiment that files carry: images made from a number, and the scores that they had when it was written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .headers import Probe

__all__ = ["compare_outputs", "probe_images", "probe_names", "quiet", "stored_probe"]

# Largest difference that other machines and versions may make, relative to the largest score.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 0.2}


def probe_images(probe: Probe, image_size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Images (B, C, H, W) in [-1, 1): the same bits on every machine, independent of torch's generators."""
    index = torch.arange(probe.batch * math.prod(image_size)) + probe.seed * 7919
    for _ in range(2):
        index = ((index ^ (index >> 15)) * 73244475) % 2**32
    values = (index % 65536).double() / 32768 - 1
    return values.view(probe.batch, *image_size).to(dtype)


def probe_names(outputs: int) -> list[str]:
    """Tensors of a file that hold what the outputs were for the images, one per output."""
    return ["probe"] if outputs == 1 else [f"probe.{k}" for k in range(outputs)]


def stored_probe(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of `probe_names` that a file must have, to be judged by those that it has."""
    return probe_names(max(1, sum(name.startswith("probe.") for name in tensors)))


def compare_outputs(expected: Sequence[Tensor], got: Sequence[Tensor]) -> str | None:
    """What is wrong with the outputs of all subnets, (N, ...) each, if anything."""
    if len(expected) != len(got):
        return f"{len(got)} outputs, expected {len(expected)}"
    return next(filter(None, map(_compare, expected, got)), None)


def _compare(expected: Tensor, got: Tensor) -> str | None:
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return f"scores {tuple(got.shape)} in {got.dtype}, expected {tuple(expected.shape)} in {expected.dtype}"
    scale = float(expected.double().abs().max()) if expected.numel() else 0.0
    gap = (expected.double() - got.double()).abs()
    allowed = _TOLERANCE.get(expected.dtype, 1e-6) * max(scale, 1e-30)
    if bool((gap <= allowed).all()):
        return None
    first = int((gap > allowed).flatten(1).any(1).nonzero()[0]) + 1
    return f"scores of subnet {first} differ by {float(gap.max()):.3g}, the largest is {scale:.3g}"


def quiet(compute: Callable[[], Sequence[Tensor]]) -> list[Tensor] | None:
    """Outputs on the CPU, computed without gradients and casts; None if they are no numbers or this type cannot run."""
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            scores = [output.detach().cpu() for output in compute()]
    except (RuntimeError, NotImplementedError):
        return None
    return scores if all(bool(output.isfinite().all()) for output in scores) else None
