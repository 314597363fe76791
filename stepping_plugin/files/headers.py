"""What the headers of our files may hold: types and bounds, checked before anything is built from them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import CheckpointError
from .metadata import Metadata

__all__ = [
    "Contribution", "EngineHeader", "NetHeader", "Probe", "ProgramText", "StoredAnalysis", "is_harmless", "mode_name",
    "validated",
]  # fmt: skip

Count = Annotated[int, Field(ge=0, le=10**18)]
Size = Annotated[int, Field(ge=1, le=8192)]
ImageSize = Annotated[list[Size], Field(min_length=3, max_length=3)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
DType = Annotated[str, Field(pattern="^(float16|bfloat16|float32|float64)$")]

_PIXELS = 2**25  # of one image with all its channels
_WORD = re.compile(r"[A-Za-z0-9_]{1,40}")  # names of kinds ("max", "silu"), nothing that could be a path or an address
_LARGEST = 10**6  # of a number that a model is made with


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ProgramText(_Strict):
    """See `graph.describe`."""

    lines: list[str]
    sketches: list[Annotated[list[float], Field(min_length=3, max_length=3)]]


class Probe(_Strict):
    """Scores of all subnets for images that follow from a number; the scores are the tensor `probe`."""

    seed: Annotated[int, Field(ge=0, le=10**6)]
    batch: Annotated[int, Field(ge=1, le=4)]


class Origin(_Strict):
    """How the model is made: a timm model and its arguments, or the name of its class, to be shown only."""

    timm: str | None = None
    kwargs: dict[str, Any] = {}
    made_of: str | None = Field(default=None, alias="class")


Share = Annotated[float, Field(ge=0, le=1 + 1e-9)]


class Contribution(_Strict):
    """What levels 1..N add, see `views.contribution`.

    Attributes:
        pictures: how many it was measured on.
        live: per group of units, share of its units of levels 1..N that say anything (`nested.liveness`); None where
            the group has no unit of that level.
        scores: share of every level in the variance over pictures of the score increments o_1..o_N, where
            o_i = scores_i - scores_(i-1).
        changed: share of pictures whose answer changes from subnet i - 1 to i; 0 for i = 1.
    """

    pictures: Count
    live: dict[str, list[Share | None]]
    scores: list[Share]
    changed: list[Share]


class StoredAnalysis(_Strict):
    """See `units.stored`; the nodes are checked one by one there.

    Attributes:
        constants: number of the tensor `analysis.NUMBER` of every constant.
        pins: reason, module, operator, channels.
        code: hash of the model's modules, see `units.stored.code_of`.
    """

    nodes: list[dict[str, Any]]
    constants: dict[str, Count]
    mutations: list[str]
    structure: Any = None  # None: one tensor, see `graph.structure`
    num_units: Count
    pins: list[Annotated[list[str | int], Field(min_length=4, max_length=4)]]
    unknown: dict[str, Count]
    pinned_channels: Count
    channels: Count
    code: Digest


class NetHeader(_Strict):
    """Header of a net. Files of version 1 lack what has a default here."""

    format: str
    version: int
    origin: Origin
    image_size: ImageSize
    modes: Annotated[list[bool], Field(min_length=1, max_length=2)]
    budgets: Annotated[list[Count], Field(min_length=1, max_length=1000)]
    macs: Annotated[list[Count], Field(min_length=1, max_length=1000)]
    reference_macs: Annotated[int, Field(ge=1, le=10**18)]
    fingerprint: Digest
    lineage: Annotated[int, Field(ge=0, le=100)]
    notes: list[str] = []
    versions: dict[str, str]
    dtype: DType | None = None
    programs: dict[str, ProgramText] | None = None
    probe: Probe | None = None
    contribution: Contribution | None = None
    analysis: StoredAnalysis | None = None
    metadata: Metadata = Metadata()

    @model_validator(mode="after")
    def _fits_together(self) -> NetHeader:
        if math.prod(self.image_size) > _PIXELS:
            raise ValueError(f"image_size: larger than {_PIXELS:,} numbers")
        if len(set(self.modes)) != len(self.modes):
            raise ValueError("modes: one twice")
        if len(self.budgets) != len(self.macs):
            raise ValueError(f"{len(self.budgets)} budgets, but MACs of {len(self.macs)} subnets")
        for name in ("budgets", "macs"):
            values = getattr(self, name)
            if any(b < a for a, b in itertools.pairwise(values)):
                raise ValueError(f"{name}: they do not ascend")
        _check_metadata(self.metadata, self.image_size, len(self.macs))
        if self.version == 1:
            if (self.dtype, self.programs, self.probe) != (None, None, None):
                raise ValueError("version 1 has no dtype, programs or probe")
        else:
            if self.dtype is None or self.programs is None:
                raise ValueError("dtype or programs are missing")
            if set(self.programs) != {mode_name(m) for m in self.modes}:
                raise ValueError("programs: others than the modes")
        return self


class EngineHeader(_Strict):
    """Header of an engine. The step programs are checked node by node (`engine.files`)."""

    format: str
    version: int
    image_size: ImageSize
    dtype: DType
    macs: Annotated[list[Count], Field(min_length=1, max_length=1000)]
    cache_axes: dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)] | None]
    structure: Any = None  # None: one tensor, see `graph.structure`
    programs: list[dict[str, Any]]
    versions: dict[str, str]
    probe: Probe | None = None
    metadata: Metadata = Metadata()

    @field_validator("image_size")
    @classmethod
    def _not_too_large(cls, size: list[int]) -> list[int]:
        if math.prod(size) > _PIXELS:
            raise ValueError(f"larger than {_PIXELS:,} numbers")
        return size

    @model_validator(mode="after")
    def _fits_together(self) -> EngineHeader:
        _check_metadata(self.metadata, self.image_size, len(self.macs))
        return self


def _check_metadata(metadata: Metadata, image_size: list[int], subnets: int) -> None:
    problem = metadata.problem(tuple(image_size), subnets, None)
    if problem:
        raise ValueError(f"metadata: {problem}")


def mode_name(training: bool) -> str:
    """Key of a mode in `NetHeader.programs`."""
    return "train" if training else "eval"


def is_harmless(name: str, value: Any) -> bool:
    """Whether a file may set this argument of a model.

    Numbers of moderate size, switches, words and short lists of them; nothing that names a file, an address or a class.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    safe = not name.startswith(("pretrained", "checkpoint", "cache")) and len(values) <= 64
    return safe and all(_is_harmless_value(v) for v in values)


def _is_harmless_value(value: Any) -> bool:
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) <= _LARGEST


def validated(kind: type[Any], header: Mapping[str, Any], where: object) -> Any:
    """The header as an object.

    Raises:
        CheckpointError: a field is missing, unknown, of another type or out of bounds; all of them are named.
    """
    try:
        return kind.model_validate(header)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise CheckpointError(f"{where}: its description is nested too deeply.") from None
        problems = [f"{'.'.join(map(str, e['loc'])) or 'header'}: {e['msg']}" for e in error.errors(include_url=False)]
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{where}: its description is damaged: {'; '.join(problems[:3])}{more}.") from None
