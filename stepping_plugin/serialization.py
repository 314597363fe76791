"""Nets as files: one safetensors file with tensors and a JSON header. Nothing in it is executed.

The header names how the model is made (`origin`), the budgets and a fingerprint of the units. Loading builds the model
again (timm models by their registered name, anything else from the instance that the caller gives), finds its units
and compares the fingerprint before any tensor is taken over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import CaptureError, CheckpointError
from .graph.program import copy_model, named_tensors, unwrap
from .integrations.timm import models as _paper_networks  # noqa: F401 - registers them
from .nested.module import sliced_copy
from .nested.net import NestedNet
from .tensorfile import NET, read_file
from .units.analysis import Analysis, restrict
from .units.witness import find_units

__all__ = ["describe_origin", "read_net", "write_net"]

VERSION = 1
NetT = TypeVar("NetT", bound=NestedNet)


def describe_origin(
    model: nn.Module, image_size: tuple[int, ...], arguments: dict[str, Any] | None = None
) -> dict[str, Any]:
    """How a model can be made again: timm name and arguments, or only the name of its class.

    Args:
        model: the original.
        image_size: (C, H, W).
        arguments: further arguments it was made with (numbers, switches and lists of numbers are kept).
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    name = config.get("architecture") if hasattr(config, "get") else None
    if not name or not timm.is_model(name):
        return {"class": f"{type(model).__module__}.{type(model).__qualname__}"}
    kwargs: dict[str, Any] = {"in_chans": image_size[0]}
    if isinstance(getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = model.num_classes
    kwargs.update({k: v for k, v in (arguments or {}).items() if _is_harmless(k, v)})
    return {"timm": name, "kwargs": kwargs}


def _is_harmless(name: str, value: Any) -> bool:
    """Arguments of a model that a file may set: numbers only, nothing that names a file or a class."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return not name.startswith(("pretrained", "checkpoint", "cache")) and all(
        isinstance(v, (int, float)) for v in numbers
    )


def fingerprint(analysis: Analysis) -> str:
    """Hash of the structure that levels refer to: image size, weights and their units."""
    digest = hashlib.sha256(repr((analysis.image_size, analysis.num_units)).encode())
    for name, (outputs, inputs) in sorted(analysis.weight_units.items()):
        digest.update(name.encode() + outputs.numpy().tobytes() + inputs.numpy().tobytes())
    return digest.hexdigest()


def write_net(net: NestedNet, path: str | os.PathLike[str]) -> None:
    """Write a net atomically: the file at `path` is the old one or the complete new one."""
    net.check_structure()
    tensors = {f"model.{name}": t.detach().cpu().contiguous() for name, t in _unique(net.model)}
    tensors["levels"] = net.levels
    for k, copies in enumerate(net.lineage):
        tensors[f"lineage.{k}"] = copies
    header = {
        "format": NET,
        "version": VERSION,
        "origin": net.origin,
        "image_size": list(net.analysis.image_size),
        "modes": [training for training in net.analysis.programs],
        "budgets": net.budgets,
        "macs": net.macs,
        "reference_macs": net.reference_macs,
        "fingerprint": fingerprint(net.analysis),
        "lineage": len(net.lineage),
        "notes": net.notes,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"stepping": json.dumps(header)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_net(
    path: str | os.PathLike[str],
    kind: type[NetT],
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
) -> NetT:
    """Read a net that `write_net` wrote, as one of class `kind`. Other arguments and errors: `stepping_plugin.load`."""
    header, tensors = read_file(Path(path), NET, VERSION)
    errors = []
    for candidate in _candidates(header, model, path):
        try:
            return _rebuild(kind, candidate, header, dict(tensors), path).to(device or "cpu")
        except CaptureError:  # a model that cannot even run on the net's images
            errors.append(str(_other_model(candidate, path)))
        except CheckpointError as error:
            errors.append(str(error))
    raise CheckpointError(errors[0])


def _candidates(header: dict[str, Any], model: nn.Module | None, path: Any) -> Iterator[nn.Module]:
    if model is not None:
        yield copy_model(unwrap(model))
        return
    origin = header.get("origin", {})
    name = origin.get("timm")
    if not isinstance(name, str) or not timm.is_model(name):  # only registered names: nothing is fetched or executed
        made_from = origin.get("class") or name
        raise CheckpointError(
            f"{path}: the net was made from {made_from!r}, which timm cannot build. Pass load(path, model=...)."
        )
    kwargs = {k: v for k, v in origin.get("kwargs", {}).items() if _is_harmless(k, v)}
    size = header["image_size"][1:]
    for extra in ({}, {"img_size": tuple(size)}, {"img_size": size[0]}):
        try:
            yield timm.create_model(name, pretrained=False, **kwargs, **extra)
        except TypeError:  # most models take no img_size
            continue


def _rebuild(kind: type[NetT], model: nn.Module, header: dict[str, Any], tensors: dict[str, Tensor], path: Any) -> NetT:
    modes = tuple(bool(m) for m in header["modes"])
    analysis = find_units(model, tuple(header["image_size"]), modes)
    lineage = [tensors.pop(f"lineage.{k}") for k in range(header["lineage"])]
    for copies in lineage:
        if copies.shape != (analysis.num_units,):
            raise _other_model(model, path)
        analysis, slices = restrict(analysis, copies)
        model = sliced_copy(model, slices)
    if fingerprint(analysis) != header["fingerprint"]:
        raise _other_model(model, path)
    levels = tensors.pop("levels")
    _take_over(model, {k.removeprefix("model."): v for k, v in tensors.items()}, path)
    net = kind(model, analysis, levels, header["budgets"], header["reference_macs"], header["origin"], lineage)
    net.notes = list(header.get("notes", []))
    counted = net.macs_model.subnet_macs(net.levels, net.num_subnets).tolist()  # older files count idle units, too
    if header["macs"] not in (net.macs, counted):
        raise CheckpointError(f"{path}: the net has MACs {net.macs}, the file says {header['macs']}; it is damaged.")
    return net.eval()


def _other_model(model: nn.Module, path: Any) -> CheckpointError:
    return CheckpointError(
        f"{path}: the file belongs to another model than {type(model).__name__} as given (its layers or units "
        "differ). Pass load(path, model=...) an instance made with the same arguments as the original."
    )


def _take_over(model: nn.Module, tensors: dict[str, Tensor], path: Any) -> None:
    own = dict(_unique(model))
    wrong = [
        f"{name}: {tuple(tensors[name].shape) if name in tensors else 'missing'} in the file, "
        f"{tuple(own[name].shape)} in the model"
        for name in own
        if name not in tensors or tensors[name].shape != own[name].shape
    ]
    wrong += [f"{name}: unknown to the model" for name in tensors if name not in own]
    if wrong:
        raise CheckpointError(f"{path}: tensors do not fit the model: " + "; ".join(wrong[:5]))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _unique(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, shared ones once under their first name."""
    seen: set[int] = set()
    for name, tensor in named_tensors(model).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
