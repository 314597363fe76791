"""Section `data` of a recipe, and what all sections have in common. Keys and limits: see `recipe_schema.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from stepping_plugin.errors import nearest

__all__ = [
    "BATCH",
    "EPOCHS",
    "FOLDERS",
    "LR",
    "SEED",
    "SUBNETS",
    "TORCH_SETS",
    "UPDATES",
    "DataConfig",
    "Section",
    "key",
]

TORCH_SETS = ("cifar10", "cifar100", "kmnist", "mnist", "qmnist")  # of torchvision, one array in memory
FOLDERS = ("imagefolder", "csv", "hfds")  # opened by this package: data.root and what is in it
_KNOWN_SETS = ("digits", "fashion_mnist", *FOLDERS, *TORCH_SETS)
# Where a key has an effect: sets that come as an array, pictures decoded into memory, pictures on disk.
_WHERE = {
    "shift": "array decoded",
    **dict.fromkeys(("workers", "crop_pct", "crop_mode", "interpolation", "in_chans"), "decoded disk"),
    **dict.fromkeys(
        ("scale", "ratio", "train_crop_mode", "rotation", "color_jitter", "aa", "reprob", "num_classes"), "disk"
    ),
}
_RESIZE = ("crop_pct", "crop_mode", "interpolation")
_INSTEAD = {"shift": "scale and ratio", "scale": "shift and hflip", "ratio": "shift and hflip"}
_WITHOUT = {  # sets that do without a key
    "root": ("digits",),
    "test_fraction": ("digits", "fashion_mnist", *TORCH_SETS),
    "download": ("digits", "fashion_mnist", *FOLDERS),
    "train_split": ("digits", "fashion_mnist", *FOLDERS),
    "val_split": ("digits", "fashion_mnist", *FOLDERS),
}
_ONLY = {"labels": ("csv",), "input_key": ("csv", "hfds"), "target_key": ("csv", "hfds")}
_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")  # of timm.data.create_dataset
_INTERPOLATIONS = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"]

# Upper limits. Nothing that anybody trains with is near them; what lies above is a slip of the finger that would end
# hours later as a full memory, an overflow or a run without end.
EPOCHS, BATCH, UPDATES = 100_000, 65_536, 1_000_000
LR = 100.0  # above what any optimizer of timm is used with; far above, float32 overflows
SEED = 2**63 - 1  # what every random generator takes
IMAGE = 2048  # pixels: files of nets hold pictures of up to 2^25 numbers
SUBNETS = 100  # each adds a row to every table and a step to the engine
CLASSES, WORKERS = 1_000_000, 256


def key(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


class Section(BaseModel):
    """Common to all sections: unknown keys, NaN and infinity are errors; values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read `epochs: true` as 1."""
        listed = value if isinstance(value, (list, tuple)) else [value]
        wanted = str(cls.model_fields[str(info.field_name)].annotation)
        if any(isinstance(v, bool) for v in listed) and "bool" not in wanted:
            raise ValueError("true and false are not values of this key")
        return value


class DataConfig(Section):
    """Which pictures, how they are split and augmented."""

    name: str = key(
        ...,
        "digits, fashion_mnist, cifar10, cifar100, mnist; folders: imagefolder (train/CLASS/*.jpg ...), csv (a table "
        "of labels), hfds (of Hugging Face's datasets); or a name that timm opens",
    )
    root: str | None = key(None, "folder of the data, relative to the current folder")
    labels: str | None = key(
        None,
        "of csv: table with the header file,label and maybe split (train, val, test); null: labels.csv, or train.csv "
        "and test.csv, in data.root",
    )
    input_key: str | None = key(None, "column of the pictures; null: file (csv), the only one of pictures (hfds)")
    target_key: str | None = key(None, "column of the classes; null: label (csv), the only one of classes (hfds)")
    in_memory: bool = key(
        False, "of folders: decode all pictures once and keep them as bytes; fast where they are small"
    )
    download: bool = key(False, "let torchvision or the hub fetch the data")
    val_fraction: float | None = key(
        None,
        "share of every class held out of the training set for validation; null: 0.1, unless the set has a "
        "validation part; 0: the test set chooses too",
        ge=0,
        lt=1,
    )
    test_fraction: float | None = key(
        None, "share of every class held out for testing where the set has no test part; null: 0.2", gt=0, lt=1
    )
    split_seed: int = key(
        0, "of the splits; apart from `seed`, so that runs with other seeds share them", ge=0, le=SEED
    )
    limit: int | None = key(None, "use only so many training samples", ge=1, le=10**9)
    balance: Literal["sampler"] | None = key(
        None, "classes of unequal size; sampler: every class is equally often in the training batches"
    )
    img_size: int | None = key(
        None, "resize to this many pixels; null: as they are, or as the model wants them", ge=1, le=IMAGE
    )
    mean: list[Annotated[float, Field(ge=-1000, le=1000)]] | None = key(
        None, "per channel; null: of the training set, or as the model wants it", min_length=1, max_length=64
    )
    std: list[Annotated[float, Field(ge=1e-6, le=1000)]] | None = key(
        None, "per channel, above 0; null: of the training set, or as the model wants it", min_length=1, max_length=64
    )
    in_chans: int | None = key(
        None,
        "channels of pictures and model: 1 grey, 3 RGB, 2 and 4 with alpha, others by TIFF pages or .npy; null: 3",
        ge=1,
        le=64,
    )
    hflip: float | None = key(None, "probability of a mirror image; null: what suits the set", ge=0, le=1)
    vflip: float = key(0.0, "probability that a picture stands on its head", ge=0, le=1)
    rotation: float = key(0.0, "random rotation by up to so many degrees, sets on disk only", ge=0, le=180)
    shift: int | None = key(
        None, "random shift in pixels, black moves in; sets in memory only; null: what suits the set", ge=0, le=IMAGE
    )
    workers: int = key(4, "loader processes, or threads that decode for in_memory; sets on disk only", ge=0, le=WORKERS)
    train_split: str = key("train", "timm's name of the training split")
    val_split: str = key("validation", "timm's name of the test split")
    num_classes: int | None = key(None, "where the set does not tell", ge=2, le=CLASSES)
    train_crop_mode: Literal["rrc", "rkrc", "rkrr"] | None = key(
        None, "timm's training crop, sets on disk only: rrc random resized (null), rkrc and rkrr keep size and aspect"
    )
    scale: tuple[float, float] | None = key(None, "area range of timm's random crop, sets on disk only")
    ratio: tuple[float, float] | None = key(None, "aspect range of timm's random crop, sets on disk only")
    color_jitter: float | None = key(None, "of timm, sets on disk only", ge=0, le=10)
    aa: str | None = key(None, "timm's auto-augment, for example rand-m9-mstd0.5-inc1, sets on disk only")
    reprob: float = key(0.0, "probability of random erasing, sets on disk only", ge=0, le=1)
    crop_pct: float | None = key(None, "of the evaluation crop, sets on disk and in_memory only", gt=0, le=1)
    crop_mode: Literal["center", "squash", "border"] | None = key(
        None, "of the evaluation resize: center keeps the aspect and cuts, squash shows all, border keeps it and pads"
    )
    interpolation: _INTERPOLATIONS | None = key(None, "of the evaluation resize, sets on disk and in_memory only")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in _KNOWN_SETS and not name.startswith(_PREFIXES):
            raise ValueError(
                f"no data set {name!r}; {nearest(name, _KNOWN_SETS)} (or a name starting with torch/, hfds/)"
            )
        return name

    @field_validator("in_memory")
    @classmethod
    def _of_folders(cls, in_memory: bool, info: ValidationInfo) -> bool:
        name = info.data.get("name")
        if in_memory and name not in (None, *FOLDERS):
            is_so = f"data.name={name} lies in memory anyway" if _comes_as_array(name) else f"data.name={name}"
            raise ValueError(f"has no effect on {is_so}: remove it")
        return in_memory

    @field_validator("scale", "ratio")
    @classmethod
    def _ascending_range(cls, value: tuple[float, float] | None, info: ValidationInfo) -> tuple[float, float] | None:
        most = 1 if info.field_name == "scale" else 100
        if value is not None and not 0 < value[0] <= value[1] <= most:
            raise ValueError(f"expected [low, high] with 0 < low <= high <= {most}")
        return value

    @field_validator("std")
    @classmethod
    def _as_many_as_means(cls, std: list[float] | None, info: ValidationInfo) -> list[float] | None:
        mean = info.data.get("mean")
        if mean is not None and std is not None and len(mean) != len(std):
            raise ValueError(f"{len(std)} numbers, but data.mean has {len(mean)}; one per channel each")
        return std

    @field_validator(*_WHERE, *_WITHOUT, *_ONLY)
    @classmethod
    def _has_an_effect(cls, value: Any, info: ValidationInfo) -> Any:
        """A key that this kind of set would ignore is a mistake."""
        name, field = info.data.get("name"), str(info.field_name)
        if name is None or value == cls.model_fields[field].default:
            return value
        if name in _WITHOUT.get(field, ()) or name not in _ONLY.get(field, (name,)):
            raise ValueError(f"has no effect on data.name={name}: remove it")
        kind = "array" if _comes_as_array(name) else "decoded" if info.data.get("in_memory") else "disk"
        if kind not in _WHERE.get(field, kind):
            hint = f"; there, use {_INSTEAD[field]}" if field in _INSTEAD else ""
            raise ValueError(f"has no effect on data.name={name}{' in memory' if kind == 'decoded' else ''}{hint}")
        if kind == "decoded" and field in _RESIZE and info.data.get("img_size") is None:
            raise ValueError("has no effect on pictures in memory as they are: give data.img_size")
        channels = info.data.get("in_chans")
        if field in ("aa", "color_jitter") and channels not in (None, 1, 3):
            raise ValueError(f"has no effect on pictures of {channels} channels: remove it")
        return value


def _comes_as_array(name: str) -> bool:
    return name in ("digits", "fashion_mnist") or name.removeprefix("torch/") in (
        *TORCH_SETS,
        "fashion_mnist",
    )
