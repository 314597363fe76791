"""How the model inside a net can be made again: what is written down, and how a file's word is taken, with bounds."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..errors import CheckpointError
from ..graph.program import unwrap
from ..integrations.timm import models as _paper_networks  # noqa: F401 - registers them
from .headers import NetHeader, is_harmless

__all__ = ["candidates", "describe_origin", "same_names"]

_INFERRED = ("global_pool", "drop_rate", "drop_path_rate")


def describe_origin(
    model: nn.Module, image_size: tuple[int, ...], arguments: dict[str, Any] | None = None
) -> dict[str, Any]:
    """How a model can be made again: timm name and arguments, or only the name of its class.

    Args:
        model: the original; one that only passes timm's attributes on (a wrapper) is no timm model.
        image_size: (C, H, W).
        arguments: further arguments it was made with (numbers, switches, words and lists of those are kept).
    """
    model = unwrap(model)
    config = vars(model).get("pretrained_cfg") or vars(model).get("default_cfg") or {}
    name = config.get("architecture") if hasattr(config, "get") else None
    if not name or not timm.is_model(name):
        return {"class": f"{type(model).__module__}.{type(model).__qualname__}"}
    kwargs: dict[str, Any] = {"in_chans": image_size[0]}
    if isinstance(getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = model.num_classes
    kwargs.update(_inferred(model))
    kwargs.update({k: v for k, v in (arguments or {}).items() if is_harmless(k, v)})
    return {"timm": name, "kwargs": kwargs}


def _inferred(model: nn.Module) -> dict[str, Any]:
    """Arguments that a timm model shows in its parts, where they differ from the defaults of its class."""
    accepted = inspect.signature(type(model).__init__).parameters
    head = getattr(model, "head", None)
    pool = getattr(model, "global_pool", None) or getattr(head, "global_pool", None)
    paths = [p for m in model.modules() if isinstance(p := getattr(m, "drop_prob", None), float)]
    dropped = getattr(model, "drop_rate", None) or getattr(getattr(model, "head_drop", None), "p", None)
    found = {
        "global_pool": pool if isinstance(pool, str) else getattr(pool, "pool_type", None),
        "drop_rate": dropped,
        "drop_path_rate": round(max(paths), 6) if paths else None,
    }
    return {k: v for k, v in found.items() if v and k in accepted and v != accepted[k].default and is_harmless(k, v)}


# ------------------------------------------------------------------------------------------------- reading


def candidates(
    header: NetHeader, tensors: Mapping[str, Tensor], path: object
) -> Iterator[tuple[nn.Module, Callable[[], nn.Module]]]:
    """Models that a file may mean, each with what makes it again: timm does not say which of them take an image size.

    Only registered names are built (nothing is fetched or executed), and no more than the file's tensors account for.

    Raises:
        CheckpointError: timm cannot build it.
    """
    name = header.origin.timm
    if name is None or not timm.is_model(name):
        raise CheckpointError(
            f"{path}: the net was made from {header.origin.made_of or name!r}, which timm cannot build. "
            "Pass load(path, model=...)."
        )
    kwargs = _checked_arguments(header, tensors, path)
    size, failure, built = header.image_size[1:], "", False
    extras: list[dict[str, Any]] = [{}, {"img_size": tuple(size)}, {"img_size": size[0]}]
    for given in (kwargs, {k: v for k, v in kwargs.items() if k not in _INFERRED}):
        for extra in extras:
            make = partial(timm.create_model, name, pretrained=False, **{**extra, **given})
            try:
                with _bounded(tensors, header.lineage > 0):
                    model = make()
            except _TooLargeError:
                failure = "it is larger than the file"
                continue
            except Exception as error:  # whatever a model makes of arguments that do not suit it
                failure = failure or f"{type(error).__name__}: {error}"
                continue
            built = True
            yield model, make
        if built:
            return
    raise CheckpointError(
        f"{path}: timm cannot build {name} as the file says, with {kwargs} ({failure[:300]}). If the file is whole, "
        "pass load(path, model=...) an instance of the original model."
    )


def _checked_arguments(header: NetHeader, tensors: Mapping[str, Tensor], path: object) -> dict[str, Any]:
    kwargs = header.origin.kwargs
    largest = max([4096, *(64 * size for t in tensors.values() for size in t.shape)])
    for key, value in kwargs.items():
        numbers = value if isinstance(value, list) else [value]
        if not is_harmless(key, value) or any(isinstance(v, int) and abs(v) > largest for v in numbers):
            raise CheckpointError(
                f"{path}: its description is damaged: the model's {key} is {str(value)[:60]}, which no file may set or "
                "is too large for its tensors."
            )
    return kwargs


class _TooLargeError(Exception):
    pass


@contextmanager
def _bounded(tensors: Mapping[str, Tensor], sliced: bool) -> Iterator[None]:
    """Stop the making of a model that has more parameters or layers than a file accounts for.

    Linear layers and convolutions register their parameters before these are filled, so little memory is touched.
    A net without some of its model's units (`sliced`) may come from a far larger model.
    """
    total = sum(t.numel() for t in tensors.values())
    room = {"parameters": 2 * len(tensors) + 16, "modules": 64 * len(tensors) + 1000}
    room["numbers"] = (1024 * total if sliced else 2 * total) + 2**16
    thread = threading.get_ident()

    def use(kind: str, amount: int) -> None:
        room[kind] -= amount
        if room[kind] < 0:
            raise _TooLargeError(kind)

    def on_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == thread:
            use("parameters", 1)
            use("numbers", parameter.numel())

    def on_module(module: nn.Module, name: str, part: nn.Module | None) -> None:
        if threading.get_ident() == thread:
            use("modules", 1)

    hooks = (
        register_module_parameter_registration_hook(on_parameter),
        register_module_module_registration_hook(on_module),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def same_names(model_tensors: Mapping[str, Tensor], tensors: Mapping[str, Tensor], sliced: bool) -> str | None:
    """How the tensors of a file differ from those of a model in names and shapes, if they do.

    Args:
        model_tensors: of the model as built.
        tensors: of the file.
        sliced: the file's have lost or gained units; then only their rank is compared.
    """
    wrong = [
        f"{name}: {tuple(tensors[name].shape) if name in tensors else 'missing'} in the file, {tuple(own.shape)} in "
        "the model"
        for name, own in model_tensors.items()
        if name not in tensors or (tensors[name].dim() != own.dim() if sliced else tensors[name].shape != own.shape)
    ]
    wrong += [f"{name}: unknown to the model" for name in tensors if name not in model_tensors]
    return "; ".join(wrong[:3]) if wrong else None
