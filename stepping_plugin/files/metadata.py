"""What a file says besides the function itself, so that production can use it alone: schema of nets, engines, exports.

Names of the classes, how a picture becomes the net's input, when to stop stepping, and where the net comes from.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["CalibratedExit", "DataOrigin", "Metadata", "Preprocessing", "Provenance"]

Name = Annotated[str, Field(min_length=1, max_length=1000)]
Line = Annotated[str, Field(max_length=2000)]
Pixels = Annotated[int, Field(ge=1, le=65_536)]
Extent = Annotated[list[Pixels], Field(min_length=2, max_length=2)]  # height, width
Number = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Threshold = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Preprocessing(_Part):
    """From a picture to the net's input, as the pictures were evaluated. Carried out by `engine.standalone.prepare`.

    Attributes:
        mode: Pillow's, that the picture is converted to.
        resize: how `size` is meant: `none`; `exact`; `shorter`: the shorter side gets size[0] (torchvision's
            Resize(int)); `cover`, `contain`: the sides keep their ratio and cover the size, or fit into it (timm's
            ResizeKeepRatio).
        size: height and width; None with `none`.
        interpolation: Pillow's filter.
        library: `pillow` resizes bytes; `torch` resizes floats and rounds, as sets in memory are.
        crop: height and width cut out of the middle; where the picture is smaller, it is padded with `fill`.
        fill: one byte per channel, or one for all.
        mean, std: per channel of values in [0, 1]; subtracted and divided by.
    """

    mode: Literal["RGB", "L"]
    resize: Literal["none", "exact", "shorter", "cover", "contain"]
    size: Extent | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = "bilinear"
    library: Literal["pillow", "torch"] = "pillow"
    crop: Extent | None = None
    fill: Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=1, max_length=3)] = [0]
    mean: Annotated[list[Number], Field(min_length=1, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0, le=1e6)]], Field(min_length=1, max_length=3)]

    @model_validator(mode="after")
    def _fits_together(self) -> Preprocessing:
        channels = len(self.mode)
        if len(self.mean) != channels or len(self.std) != channels or len(self.fill) not in (1, channels):
            raise ValueError(f"mean, std and fill of another number of channels than {self.mode}")
        if (self.size is None) != (self.resize == "none"):
            raise ValueError("resize and size do not fit together")
        if self.library == "torch" and (self.resize != "exact" or self.interpolation != "bilinear"):
            raise ValueError("torch resizes bilinearly, to an exact size")
        return self


class CalibratedExit(_Part):
    """When the answer of a subnet is good enough, for `predict(until="calibrated")`.

    The answer of subnet i are the scores z_i, or with `product` the weighted mean of the log-probabilities of subnets
    1..i (weights 1..i); divided by `temperatures[i]`, their softmax gives calibrated probabilities. A picture stops at
    the first subnet whose largest probability is at least the subnet's threshold, for the class that it answers.

    Attributes:
        combine: `last`, or `product` (https://arxiv.org/abs/2306.02652 with softmax probabilities).
        temperatures: of subnets 1..N.
        thresholds: of subnets 1..N-1: one number for all classes, or one per class; None: never stop here.
        target: what they were chosen for, as it was asked for.
        chosen_on: the pictures, in words.
        met: whether the target was met there; if not, they are the best that can be had.
    """

    combine: Literal["last", "product"] = "last"
    temperatures: Annotated[list[Temperature], Field(min_length=1, max_length=1000)]
    thresholds: Annotated[list[Annotated[list[Threshold], Field(min_length=1)]], Field(max_length=999)]
    target: Line
    chosen_on: Line
    met: bool

    @model_validator(mode="after")
    def _one_per_subnet(self) -> CalibratedExit:
        if len(self.thresholds) != len(self.temperatures) - 1:
            raise ValueError("thresholds: one entry for every subnet but the last")
        return self


class DataOrigin(_Part):
    """The data set of a run.

    Attributes:
        name: as in the recipe.
        pictures: of training.
        sha256: of the training pictures in memory; of the names and labels of those on disk, where the set tells.
        of: what was hashed.
    """

    name: Line
    pictures: Annotated[int, Field(ge=0, le=10**12)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    of: Literal["pictures and labels", "names and labels", "nothing"]


class Provenance(_Part):
    """Where a net comes from."""

    recipe: Annotated[str, Field(max_length=1_000_000)] | None = None
    data: DataOrigin | None = None
    versions: Annotated[dict[str, Annotated[str, Field(max_length=200)]], Field(max_length=50)] = {}


class Metadata(_Part):
    """Of a net, an engine or an export. Everything may be missing."""

    classes: Annotated[list[Name], Field(min_length=1, max_length=1_000_000)] | None = None
    preprocessing: Preprocessing | None = None
    exit: CalibratedExit | None = None
    provenance: Provenance | None = None

    def updated(self, **parts: Any) -> Metadata:
        """A copy with other parts, validated."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return Metadata(**{**given, **parts})

    def problem(self, image_size: tuple[int, ...], subnets: int, classes: int | None) -> str | None:
        """What speaks against these data being of a net of this form."""
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            return "two classes of one name"
        if self.classes is not None and classes is not None and len(self.classes) != classes:
            return f"{len(self.classes)} names of classes for {classes} scores"
        if self.exit is not None:
            counts = {len(t) for t in self.exit.thresholds} - {1}
            if len(self.exit.temperatures) != subnets or (classes is not None and not counts <= {classes}):
                return "temperatures or thresholds of another net"
        if self.preprocessing is not None:
            channels, found = len(self.preprocessing.mode), self.preprocessing.crop or self.preprocessing.size
            if channels != image_size[0] or (found is not None and tuple(found) != tuple(image_size[1:])):
                return f"preprocessing for pictures of another size than {tuple(image_size)}"
        return None
