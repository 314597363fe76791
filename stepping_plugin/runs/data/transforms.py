"""timm's transforms as a recipe asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, RandomRotation

from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.runs.recipe_schema import DataConfig

from .bundle import check_channels
from .channels import plain_modes

__all__ = ["data_config", "transforms"]


def data_config(cfg: DataConfig, model_name: str | None) -> dict[str, Any]:
    """timm's data configuration: of the recipe, else of the model, which may be made for other channels."""
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    own = get_pretrained_cfg(model_name) if model_name else None
    channels = cfg.in_chans or 3
    check_channels(cfg, channels, cfg.mean or (0,) * channels, cfg.std or (1,) * channels)
    config = resolve_data_config(
        cfg.model_dump(include={"in_chans", "img_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}),
        pretrained_cfg=own.to_dict() if own else {"input_size": (3, 224, 224)},
    )
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):
        config[key] = _of_channels(config[key], channels)
    return config


def _of_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value per channel; for other channels than the model's own the mean, as timm adapts its first layer."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def transforms(cfg: DataConfig, config: dict[str, Any]) -> tuple[Any, Any]:
    """Of training and of evaluation.

    Raises:
        SteppingError: a policy of `data.aa` that timm does not know.
    """
    from timm.data import create_transform

    size, norm = config["input_size"], {"mean": config["mean"], "std": config["std"]}
    keys = {"scale", "ratio", "hflip", "vflip", "color_jitter", "train_crop_mode"}
    chosen = cfg.model_dump(include=keys, exclude_none=True)
    plain = size[0] in plain_modes
    if not plain:
        chosen["color_jitter"] = None  # timm's default is for colours
    try:
        train = create_transform(size, is_training=True, auto_augment=cfg.aa, re_prob=cfg.reprob,
                                 interpolation="random", **norm, **chosen)  # fmt: skip
    except (AssertionError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"timm cannot read it ({type(error).__name__}: {error})"
        expected = "a policy such as rand-m9-mstd0.5-inc1, augmix-m5-w4 or original-mstd0.5"
        raise SteppingError(explain(reason, where="data.aa", got=cfg.aa, expected=expected)) from error
    cut = {"interpolation": config["interpolation"], "crop_pct": config["crop_pct"], "crop_mode": config["crop_mode"]}
    first = [] if plain else [_Scaled()]
    turned = [_rotation(cfg.rotation, config["mean"], plain)] if cfg.rotation else []
    return Compose([*first, *turned, train]), Compose([*first, create_transform(size, **cut, **norm)])


def _rotation(degrees: float, mean: Sequence[float], plain: bool) -> RandomRotation:
    """What comes in from outside has the mean value, which is zero to the model."""
    fill = [round(255 * v) for v in mean] if plain else list(mean)
    return RandomRotation(degrees, InterpolationMode.BILINEAR, fill=fill)


class _Scaled:
    """Bytes to [0, 1]: timm takes tensors as they are."""

    def __call__(self, picture: Tensor) -> Tensor:
        return picture.float() / 255
