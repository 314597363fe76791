"""Anybody's weights as a start: another number of classes, another number of channels, timm's older names.

What does not fit is either adapted, and said, or refused: nothing is loaded in part without a word.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, SteppingError, explain
from ..integrations.timm.twins import twins_of
from .recipe_schema import TeacherConfig
from .weights import misfit, read_weights

__all__ = ["HEAD", "fit_to_model", "head_names", "new_head", "renew_pretrained_head", "start_from",
           "take_over"]  # fmt: skip

HEAD = "head replaced, to be learned anew"


def take_over(model: nn.Module, config: TeacherConfig, where: str, *, trained: bool) -> list[str]:
    """Weights that a recipe names, into a model that was built for its data.

    Args:
        model: of `config.name`; where `config.pretrained`, timm loaded its own weights already, or will.
        config: section of the recipe, at `where`.
        trained: whether training follows; a new head is of no use without.

    Returns:
        What was adapted, and what the weights may not be meant for.

    Raises:
        SteppingError: the weights do not fit, or a head would stay as it was drawn.
    """
    notes: list[str] = []
    if config.checkpoint_path:
        notes = start_from(model, Path(config.checkpoint_path), str(config.name))
    elif config.pretrained:
        notes = renew_pretrained_head(model)
    if not trained and any(HEAD in note for note in notes):
        action = "Train it (train.epochs)." if where == "model" else "Take one that was trained on these classes."
        what = "its classifier is new and would not be trained"
        raise SteppingError(explain(what, where=where, got="; ".join(notes), action=action))
    return notes


def start_from(model: nn.Module, path: Path, name: str) -> list[str]:
    """Put pretrained weights into a timm model that may have other classes or channels.

    Args:
        model: as it is to be trained.
        path: a .safetensors file of a model of the same architecture.
        name: timm name of the model.

    Returns:
        What was adapted, and which other architecture the file fits as well.

    Raises:
        SteppingError: no such file, or one that can hold code.
        CheckpointError: damaged, or weights of another architecture; the model is as it was.
    """
    texts, given = read_weights(path)
    tensors, notes = fit_to_model(model, given)
    problem = misfit(model.state_dict(), tensors)
    if problem:
        raise CheckpointError(
            f"{path}: not the weights of {type(model).__name__} as built here ({problem}). If only the names differ, "
            f"`stepping convert-weights FILE --model {name}` can give them the names of the model."
        )
    model.load_state_dict(tensors)
    return [*notes, *_origin_notes(path, texts, name)]


def renew_pretrained_head(model: nn.Module) -> list[str]:
    """After timm loaded weights of its own: where it made a new classifier, one as `new_head` makes them.

    Returns:
        What was done.
    """
    theirs, num_classes = getattr(model, "pretrained_cfg", {}).get("num_classes"), getattr(model, "num_classes", None)
    if theirs in (None, num_classes):
        return []
    model.load_state_dict(new_head(model), strict=False)
    return [f"{HEAD}: {theirs} classes -> {num_classes}"]


def fit_to_model(model: nn.Module, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a file as a model takes them, as far as that is known, and what was done.

    In turn: timm's own filter of the architecture (older names, position embeddings of other image sizes), the input
    convolution of another number of channels, the classifier of another number of classes.
    """
    tensors, notes = dict(given), []
    if set(_wrong(model, tensors)) - _allowed(model):
        filtered = _filtered(model, tensors)
        if filtered is not None:
            tensors = filtered
            notes.append("renamed or resized by timm's filter for this architecture")
    notes += _adapt_input(model, tensors)
    notes += _replace_head(model, tensors)
    return tensors, notes


def _wrong(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names that only one side has, or whose shapes differ."""
    own = model.state_dict()
    return [k for k in {**own, **tensors} if k not in own or k not in tensors or own[k].shape != tensors[k].shape]


def _allowed(model: nn.Module) -> set[str]:
    """Names of tensors that depend on the number of classes or channels."""
    modules = [*head_names(model), *_input_names(model)]
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def _filtered(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What timm's `checkpoint_filter_fn` of the architecture makes of them, where it is less wrong."""
    function = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if function is None:
        return None
    try:
        filtered = dict(function(dict(tensors), model))
    except Exception:  # written for files of this architecture: others fail in any way
        return None
    before, after = (len(set(_wrong(model, found)) - _allowed(model)) for found in (tensors, filtered))
    return filtered if after < before else None


# --- Input


def _input_names(model: nn.Module) -> list[str]:
    return _names(getattr(model, "pretrained_cfg", {}).get("first_conv"))


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _adapt_input(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Input convolutions for other channels, as timm does: summed for grey, repeated and scaled for others."""
    from timm.models import adapt_input_conv

    notes, channels = [], getattr(model, "in_chans", None)
    for name in _input_names(model):
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            continue
        weight = tensors.get(f"{name}.weight")
        if not isinstance(layer, nn.Conv2d) or weight is None or weight.dim() != 4:
            continue
        own, found = tuple(layer.weight.shape), tuple(weight.shape)
        wanted = channels or own[1]
        if own == found or (own[0], *own[2:]) != (found[0], *found[2:]) or found[1] * wanted % own[1]:
            continue
        base = found[1] * wanted // own[1]  # of layers that read blocks of pixels, the weight has several per channel
        keys = {} if base == 3 else {"base_chans": base}
        try:
            adapted = adapt_input_conv(wanted, weight, **keys)
        except (NotImplementedError, TypeError, AssertionError, RuntimeError):
            continue
        if tuple(adapted.shape) == own:
            tensors[f"{name}.weight"] = adapted
            notes.append(f"input convolution adapted from {base} to {wanted} channels: {name} {found} -> {own}")
    return notes


# --- Head


def head_names(model: nn.Module) -> list[str]:
    """Modules of a timm model that give class scores; some have two."""
    names = _names(getattr(model, "pretrained_cfg", {}).get("classifier"))
    return [name for name in names if hasattr(_submodule(model, name), "weight")]


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _replace_head(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """A new classifier where that of the file has other classes or is missing."""
    own, notes = model.state_dict(), []
    for name in head_names(model):
        keys = [key for key in (f"{name}.weight", f"{name}.bias") if key in own or key in tensors]
        shapes = [(tuple(own[k].shape) if k in own else None, tuple(tensors[k].shape) if k in tensors else None)
                  for k in keys]  # fmt: skip
        if all(mine == theirs for mine, theirs in shapes) or not _same_inputs(shapes[0]):
            continue
        fresh = new_head(model, [name])
        for key in keys:
            tensors.pop(key, None)
        tensors.update(fresh)
        said = ", ".join(f"{key} {theirs or 'missing'} -> {mine}" for key, (mine, theirs) in zip(keys, shapes))
        notes.append(f"{HEAD}: {said}")
    return notes


def _same_inputs(shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]) -> bool:
    """Whether two classifiers, (classes, inputs...), differ in the classes only; a missing one is replaced too."""
    own, found = shapes
    return own is not None and (found is None or own[1:] == found[1:])


def new_head(model: nn.Module, names: list[str] | None = None) -> dict[str, Tensor]:
    """Initial weights of classifiers as `torch.nn.Linear` has them: uniform up to 1 / sqrt(inputs), bias 0.

    timm's own depend on the architecture; some grow as classes get fewer (EfficientNet: up to 1 / sqrt(classes)).

    Args:
        model: of timm.
        names: of its classifiers; None: all.
    """
    own, result = model.state_dict(), {}
    for name in head_names(model) if names is None else names:
        weight = torch.empty_like(own[f"{name}.weight"])
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        result[f"{name}.weight"] = weight
        if f"{name}.bias" in own:
            result[f"{name}.bias"] = torch.zeros_like(own[f"{name}.bias"])
    return result


# --- Where a file comes from


def _origin_notes(path: Path, texts: Mapping[str, str], name: str) -> list[str]:
    """Architectures whose tensors are the same and whose operators are not."""
    ours, theirs = name.split(".")[0], _architecture(path, texts)
    if theirs == ours:
        return []
    if theirs is not None:
        return [f"warning: its description says {theirs}, the recipe {ours}; the tensors fit both"]
    twins = ", ".join(f"{twin} ({difference})" for twin, difference in twins_of(ours))
    if not twins:
        return []
    return [f"the same tensors fit {twins}, and the file does not say for which they were made. If accuracy starts far "
            "below what you know, try that model.name"]  # fmt: skip


def _architecture(path: Path, texts: Mapping[str, str]) -> str | None:
    """Of the file's own texts (of a run too), or of a config.json beside it, as timm writes for the hub."""
    described: list[Any] = [texts]
    with contextlib.suppress(ValueError, KeyError, TypeError):
        described += [{"architecture": json.loads(texts["settings"])["model"]["name"]}]
    with contextlib.suppress(OSError, ValueError):
        described += [json.loads((path.parent / "config.json").read_text(encoding="utf-8"))]
    for text in (texts.get("pretrained_cfg"), texts.get("config")):
        try:
            described.append(json.loads(text or "null"))
        except ValueError:
            continue
    for found in described:
        if isinstance(found, Mapping) and isinstance(found.get("architecture"), str):
            return found["architecture"].split(".")[0]
    return None
