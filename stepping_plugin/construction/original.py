"""The original network: whether it can be converted, and its MACs by two independent counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import CaptureError, SteppingError, explain
from ..graph.images import image_size_of
from ..graph.program import copy_model, named_tensors, random_operators
from ..integrations.fvcore import count_macs
from ..nested.net import NestedNet
from ..tensorfile import not_finite
from ..units.analysis import Analysis

__all__ = ["check_model", "private_copy", "reference_notes", "structure_notes"]


def check_model(model: nn.Module, example_inputs: Any) -> tuple[int, ...]:
    """Refuse what cannot be converted; returns the image size (C, H, W).

    Raises:
        SteppingError: not a module, no weights, half precision, no or a wrong example.
    """
    if isinstance(model, NestedNet):
        action = "Give the model it was made from, or net.extract(i) for one of its subnets."
        raise SteppingError(explain("a SteppingNet already", where="model", action=action))
    image_size = image_size_of(model, example_inputs)
    _check_precision(model)
    if broken := not_finite(named_tensors(model)):
        action = "Its training has diverged, or its weights were never set; load good ones first."
        raise SteppingError(explain("weights that are not numbers (NaN)", where=broken, action=action))
    return image_size


def _check_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise SteppingError(f"{name}: the model has no weights (it is on the meta device). Load them first.")
        if parameter.dtype in (torch.float16, torch.bfloat16):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise SteppingError(
                explain(
                    "half-precision weights",
                    where=name,
                    got=kind,
                    expected="float32 or float64",
                    action="Convert model.float() and train or run the net under torch.autocast.",
                )
            )


def private_copy(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        SteppingError: the model cannot be copied.
    """
    try:
        return copy_model(model)
    except Exception as error:
        raise SteppingError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Pass a "
            "model that copy.deepcopy can copy, for example a freshly built one with its weights loaded."
        ) from error


def reference_notes(model: nn.Module, image_size: tuple[int, ...], expected: int, static: int = 0) -> list[str]:
    """Count the original network with fvcore, operator by operator, as a check of the channel graph's own count.

    Args:
        model: the original network.
        image_size: (C, H, W).
        expected: MACs of the captured graph.
        static: MACs of the graph that depend on parameters only, see `units.macs.static_macs`.
    """
    reference = next(model.parameters())
    image = torch.zeros(1, *image_size, dtype=reference.dtype, device=reference.device)
    try:
        counted = count_macs(model, (image,)).total
    except SteppingError as error:
        return [f"fvcore could not count the original network ({error}); its MACs are those of the captured graph."]
    if counted != expected + static:
        raise CaptureError(
            f"The captured graph has {expected + static:,} MACs, fvcore counts {counted:,} on the model itself. One of "
            "them misses an operator; please report the model."
        )
    if static:
        return [f"{static:,} MACs depend on parameters only; they are computed once and count in no subnet."]
    return []


def structure_notes(analysis: Analysis) -> list[str]:
    """What users should know about a model before they trust its figures."""
    notes = []
    if drawn := random_operators(analysis.eval_program):
        notes.append(
            f"The model draws random numbers in eval mode ({', '.join(drawn)}): its scores, and those of its subnets, "
            "differ from call to call, and a standalone subnet draws others than the net."
        )
    if bool(analysis.dead_ends.any()):
        groups = [g.name for g in analysis.groups if bool(analysis.dead_ends[g.units].any())]
        notes.append(
            f"Only pinned channels read {int(analysis.dead_ends.sum())} units of {', '.join(groups[:3])}: they are in "
            f"subnet 1 or in none. Pinned are {analysis.why_pinned(1)}."
        )
    return notes
