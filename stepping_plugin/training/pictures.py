"""How a data set's pictures become a net's input, as data that files can hold: read off the evaluation transform."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from torch import nn

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.files.metadata import Preprocessing
from stepping_plugin.training.loader import TensorSet, TransformSet

__all__ = ["preprocessing_of"]


def preprocessing_of(source: Any, normalised: tuple[Sequence[float], Sequence[float]] | None = None) -> Preprocessing:
    """The same as data.

    Args:
        source: an evaluation transform of PIL images as torchvision and timm compose them (Resize, CenterCrop,
            ToTensor, Normalize; `timm.data.create_transform`); or a data set of `training.loader`.
        normalised: mean and standard deviation per channel, where the transform leaves that to others.

    Raises:
        SteppingError: a step that has no place in such data.
    """
    if isinstance(source, TensorSet):
        height, width = source.images.shape[-2:]
        return _checked(
            mode=_mode(source.images.shape[1]),
            resize="exact",
            size=[height, width],
            library="torch",
            mean=list(source.mean),
            std=list(source.std),
        )
    transform = source.transform if isinstance(source, TransformSet) else source
    found: dict[str, Any] = {"resize": "none"}
    for step in _steps(transform):
        _read(step, found)
    if normalised is not None:
        found |= {"mean": list(normalised[0]), "std": list(normalised[1])}
    if "mean" not in found:
        found |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    found.setdefault("mode", _mode(len(found["mean"])))
    return _checked(**found)


def _steps(transform: Any) -> Iterator[Any]:
    """The steps of a composition, which may hold others."""
    inner = getattr(transform, "transforms", None)
    if inner is None:
        yield transform
    for step in inner or ():
        yield from _steps(step)


def _mode(channels: int) -> str:
    names = {1: "L", 3: "RGB"}
    if channels not in names:
        raise SteppingError(explain("no kind of picture", got=f"{channels} channels", expected="1 (grey) or 3 (RGB)"))
    return names[channels]


def _checked(**fields: Any) -> Preprocessing:
    try:
        return Preprocessing(**fields)
    except ValidationError as error:
        reason = "; ".join(e["msg"] for e in error.errors(include_url=False)[:3])
        raise SteppingError(f"the evaluation transform has no form that files can hold: {reason}.") from None


def _read(step: Any, found: dict[str, Any]) -> None:
    """One step of a transform, added to what the steps before it are."""
    kind = type(step).__name__
    if kind in ("Resize", "ResizeKeepRatio"):
        if found["resize"] != "none" or "crop" in found:
            raise _unknown(step, "a second resize, or one after the crop")
        found |= _resize(step) | {"interpolation": _interpolation(step)}
    elif kind in ("CenterCrop", "CenterCropOrPad"):
        if "crop" in found:
            raise _unknown(step, "a second crop")
        found["crop"] = _pair(step.size)
        fill = getattr(step, "fill", 0)
        found["fill"] = [int(v) for v in (fill if isinstance(fill, Sequence) else [fill])]
    elif kind == "Grayscale" and step.num_output_channels == 1:
        found["mode"] = "L"
    elif kind == "Normalize":
        found |= {"mean": [float(v) for v in step.mean], "std": [float(v) for v in step.std]}
    elif kind not in ("MaybeToTensor", "ToTensor", "PILToTensor", "Identity", "ConvertImageDtype", "MaybePILToTensor"):
        raise _unknown(step, kind)


def _resize(step: Any) -> dict[str, Any]:
    size = step.size
    if type(step).__name__ == "ResizeKeepRatio":
        longest = float(getattr(step, "longest", 0.0))
        drawn = [getattr(step, name, None) for name in ("random_scale_prob", "random_aspect_prob")]
        if longest not in (0.0, 1.0) or any(drawn):
            raise _unknown(step, "a ratio in between, or a random one")
        return {"resize": "contain" if longest else "cover", "size": _pair(size)}
    if isinstance(size, int) or len(size) == 1:
        if getattr(step, "max_size", None) is not None:
            raise _unknown(step, "max_size")
        return {"resize": "shorter", "size": _pair(size)}
    return {"resize": "exact", "size": _pair(size)}


def _pair(size: Any) -> list[int]:
    values = [size] if isinstance(size, int) else list(size)
    return [int(v) for v in (values * 2 if len(values) == 1 else values)]


def _interpolation(step: Any) -> str:
    mode = step.interpolation
    name = getattr(mode, "value", mode)
    if not isinstance(name, str):
        raise _unknown(step, "an interpolation that is drawn at random")
    return name.lower()


def _unknown(step: Any, what: str) -> SteppingError:
    name = type(step).__name__ if isinstance(step, nn.Module) else getattr(step, "__name__", type(step).__name__)
    return SteppingError(
        explain(
            "a step that files cannot hold",
            where=f"evaluation transform: {name}",
            got=what,
            expected="resize, centre crop, conversion to a tensor, normalisation",
            action="Prepare pictures yourself in production, with the same code.",
        )
    )
