"""The image size of a model: given by an example, or found in the model itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import SteppingError, explain
from .program import unwrap

__all__ = ["image_size_of"]


def image_size_of(model: Any, example_inputs: Any = None) -> tuple[int, ...]:
    """(C, H, W) of one image that a model takes.

    Args:
        model: any module; of a timm model the size in its configuration is taken, with the channels and the image size
            that it was really made with (`in_chans`, `img_size`).
        example_inputs: images (B, C, H, W); what they say holds.

    Raises:
        SteppingError: not a module, a wrong example, or none for a model that does not say.
    """
    if not isinstance(model, nn.Module):
        raise SteppingError(
            explain("not a model", where="model", got=type(model).__name__, expected="a torch.nn.Module")
        )
    if isinstance(example_inputs, (tuple, list)) and len(example_inputs) == 1:
        example_inputs = example_inputs[0]
    if example_inputs is not None:
        return _size_of_example(example_inputs)
    model = unwrap(model)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if hasattr(config, "get") else None
    if not size:
        raise SteppingError(
            f"example_inputs: {type(model).__name__} does not say which image size it takes. Pass example_inputs, for "
            "example torch.zeros(1, 3, 224, 224)."
        )
    return (_channels(model, config.get("first_conv")) or size[0], *(_sides(model) or size[1:]))


def _size_of_example(images: Any) -> tuple[int, ...]:
    got = str(tuple(images.shape)) if isinstance(images, Tensor) else type(images).__name__
    if not isinstance(images, Tensor) or images.dim() != 4 or 0 in images.shape:
        expected = "one Tensor of images (B, C, H, W)"
        raise SteppingError(explain("wrong shape", where="example_inputs", got=got, expected=expected))
    return tuple(images.shape[1:])


def _channels(model: nn.Module, first: Any) -> int | None:
    """Input channels of the layer that timm names as the first one, else of the first convolution."""
    names = [first] if isinstance(first, str) else list(first or ())
    named = dict(model.named_modules())
    candidates = [named.get(name) for name in names] or [m for m in model.modules() if isinstance(m, nn.Conv2d)][:1]
    found = {m.in_channels for m in candidates if isinstance(m, nn.Conv2d)}
    return found.pop() if len(found) == 1 else None


def _sides(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) that a model was made for, if it cannot take others: its patch embedding knows."""
    for module in model.modules():
        size = getattr(module, "img_size", None)
        if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(s, int) for s in size):
            return int(size[0]), int(size[1])
    return None
