"""The original network: whether it can be converted, and its MACs by two independent counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, SteppingError, explain
from ..graph.program import copy_model
from ..integrations.fvcore import count_macs

__all__ = ["check_model", "private_copy", "reference_notes"]


def check_model(model: nn.Module, example_inputs: Any) -> tuple[int, ...]:
    """Refuse what cannot be converted; returns the image size (C, H, W).

    Raises:
        SteppingError: not a module, no weights, half precision, no or a wrong example.
    """
    image_size = _image_size(model, example_inputs)
    _check_precision(model)
    return image_size


def _image_size(model: Any, example_inputs: Any) -> tuple[int, ...]:
    if not isinstance(model, nn.Module):
        raise SteppingError(
            explain("not a model", where="model", got=type(model).__name__, expected="a torch.nn.Module")
        )
    if isinstance(example_inputs, (tuple, list)) and len(example_inputs) == 1:
        example_inputs = example_inputs[0]
    if example_inputs is not None:
        if not isinstance(example_inputs, Tensor) or example_inputs.dim() != 4:
            got = (
                str(tuple(example_inputs.shape))
                if isinstance(example_inputs, Tensor)
                else type(example_inputs).__name__
            )
            raise SteppingError(
                explain(
                    "wrong shape",
                    where="example_inputs",
                    got=got,
                    expected="one Tensor of images (B, C, H, W)",
                )
            )
        return tuple(example_inputs.shape[1:])
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if hasattr(config, "get") else None
    if not size:
        raise SteppingError(
            f"example_inputs: {type(model).__name__} does not say which image size it takes. Pass example_inputs, for "
            "example torch.zeros(1, 3, 224, 224)."
        )
    return tuple(size)


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
