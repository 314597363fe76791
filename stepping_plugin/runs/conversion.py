"""`stepping convert-weights`: a PyTorch checkpoint as a .safetensors file, read without running any code of it."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, SteppingError, explain
from ..integrations.timm.models import named_model
from ..integrations.timm.twins import twins_of
from ..tensorfile import not_finite, read_tensors, write_tensors
from .pretrained import fit_to_model, head_names
from .weights import misfit

__all__ = ["add_convert_weights", "convert_weights"]

# Where training scripts keep the weights; averaged ones first, as timm prefers them.
_NESTED = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "net", "module", "weights")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning


def convert_weights(path: Path, output: Path | None = None, model: str | None = None) -> tuple[Path, list[str]]:
    """Write the tensors of a checkpoint as safetensors.

    Args:
        path: a file of `torch.save`, or of safetensors.
        output: None: beside it, with the ending .safetensors.
        model: timm name whose tensors they are to be; names of other packages are then replaced by those of the model,
            if both list the same shapes in the same order.

    Returns:
        The file written, and what was taken, renamed and left out.

    Raises:
        SteppingError: the output exists.
        CheckpointError: no tensors, more than tensors and plain containers, or not those of the model.
    """
    output = path.with_suffix(".safetensors") if output is None else output
    if output.exists():
        action = "Remove it, or name another file."
        raise SteppingError(explain("exists already", where=str(output), action=action))
    notes: list[str] = []
    tensors = _without_prefixes(_tensors(_read(path), notes, path), notes)
    texts = {"format": "pt", "source": path.name}
    if model is not None:
        tensors = _as_model(tensors, model, notes, path)
        texts["architecture"] = model.split(".")[0]
    bad = not_finite(tensors)
    if bad:
        raise CheckpointError(f"{path}: {bad} holds NaN: no weights to start from. Take an earlier checkpoint.")
    write_tensors(output, tensors, texts)
    return output, [*notes, f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers"]


def _read(path: Path) -> Any:
    """What a file holds, as tensors and plain containers."""
    if path.suffix == ".safetensors":
        return read_tensors(path)[1]
    if not path.is_file():
        raise CheckpointError(explain("no such file", where=str(path), action="Check the path."))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = " ".join(str(error).split())
        start = text.find("Unsupported")
        reason = text[start if start >= 0 else 0 :][:200]
        raise CheckpointError(
            f"{path}: holds more than tensors and plain containers ({reason}). Reading that would run code of the "
            "file, which this package never does. Save its state_dict() alone, in the code that made it."
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        text = " ".join(str(error).split())[:200]
        expected = "a file of torch.save, or of safetensors"
        raise CheckpointError(explain(f"cannot be read ({text})", where=str(path), expected=expected)) from None


def _tensors(found: Any, notes: list[str], path: Path) -> dict[str, Tensor]:
    """The weights, wherever a training script put them."""
    place = ""
    while isinstance(found, Mapping) and not any(isinstance(value, Tensor) for value in found.values()):
        inner = next((key for key in _NESTED if isinstance(found.get(key), Mapping) and found[key]), None)
        if inner is None:
            break
        _note_left_out(notes, place, [key for key in found if key != inner])
        place, found = f"{place}{inner}.", found[inner]
    if not isinstance(found, Mapping):
        raise CheckpointError(explain("no weights by name", where=str(path), got=type(found).__name__,
                                      expected="a state dict"))  # fmt: skip
    tensors = {str(k): v.detach() for k, v in found.items() if isinstance(v, Tensor) and v.layout == torch.strided}
    _note_left_out(notes, place, [key for key in found if str(key) not in tensors])
    tensors = {k: v for k, v in tensors.items() if not v.is_quantized}
    if not tensors:
        raise CheckpointError(explain("no tensors", where=str(path), got=f"keys {', '.join(map(str, list(found)[:8]))}",
                                      expected="a state dict, alone or under state_dict or model"))  # fmt: skip
    if place:
        notes.append(f"taken from {place.rstrip('.')}")
    return tensors


def _note_left_out(notes: list[str], place: str, keys: list[Any]) -> None:
    if keys:
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        notes.append(f"left out: {', '.join(f'{place}{key}' for key in keys[:8])}{more}")


def _without_prefixes(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Names as the bare model has them, where all begin with what a wrapper puts before them."""
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        notes.append(f"{prefix} removed from all names")
    return tensors


def _as_model(tensors: dict[str, Tensor], name: str, notes: list[str], path: Path) -> dict[str, Tensor]:
    """The tensors by the names of a timm model with their number of classes."""
    model = named_model(name, num_classes=_classes(tensors, named_model(name)))
    found, adapted = fit_to_model(model, tensors)
    problem = misfit(model.state_dict(), found)
    if problem:
        renamed = _by_order(model, tensors)
        if renamed is None:
            raise CheckpointError(f"{path}: not the weights of {name} ({problem}), nor its shapes in the same order.")
        found = renamed
        notes.append(f"all names replaced by those of {name}: the same shapes in the same order. Check the accuracy.")
    notes += adapted if not problem else []
    twins = ", ".join(f"{twin} ({difference})" for twin, difference in twins_of(name.split(".")[0]))
    if twins:
        notes.append(f"the same tensors fit {twins}; written down as those of {name.split('.')[0]}")
    return found


def _classes(tensors: Mapping[str, Tensor], model: nn.Module) -> int:
    """Of the classifier: by its name, else that of the last bias."""
    names = [f"{head}.weight" for head in head_names(model)]
    known = next((tensors[name] for name in names if name in tensors), None)
    biases = [tensor for tensor in tensors.values() if tensor.dim() == 1]
    return len(known) if known is not None else len(biases[-1]) if biases else 1000


def _by_order(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Names of the model for tensors of the same shapes in the same order; counters of batches may be missing."""
    own, given = model.state_dict(), list(tensors.values())
    if len(own) != len(given):
        counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}
        own = {k: v for k, v in own.items() if k not in counters}
    if [v.shape for v in own.values()] != [v.shape for v in given]:
        return None
    return {**model.state_dict(), **dict(zip(own, given))}


def add_convert_weights(commands: Any) -> None:
    """`stepping convert-weights`."""
    convert = commands.add_parser(
        "convert-weights", help="a PyTorch checkpoint (.pth) as .safetensors, without its code"
    )
    convert.add_argument("file", metavar="FILE.pth", help="checkpoint of torch.save, or a .safetensors file to rename")
    convert.add_argument("output", nargs="?", metavar="OUT.safetensors", help="default: beside it")
    convert.add_argument(
        "--model", metavar="NAME", help="timm model that they are weights of: checks, renames, notes it"
    )
    convert.set_defaults(command=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output) if arguments.output else None
    written, notes = convert_weights(Path(arguments.file), output, arguments.model)
    for note in notes:
        print(note)
    print(f"written: {written}  (model.checkpoint_path={written})")
    return 0
