"""Models of timm that have the same parameters, by name and shape, and other operators.

Weights of one load into the other without complaint, and answer worse: padding, eps, activations differ.
"""

from __future__ import annotations

import timm
import torch
from torch import nn

__all__ = ["GROUPS", "difference", "twins_of"]

# Each line one set of parameters, each text the models that are built alike, in timm 1.0.31: a test in
# tests/test_pretrained.py makes the table again.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("efficientnet_b0", "efficientnet_blur_b0", "tf_efficientnet_b0"),
    ("efficientnet_b1", "tf_efficientnet_b1"),
    ("efficientnet_b2", "tf_efficientnet_b2"),
    ("efficientnet_b3", "tf_efficientnet_b3"),
    ("efficientnet_b4", "tf_efficientnet_b4"),
    ("efficientnet_b5", "tf_efficientnet_b5"),
    ("efficientnet_b6", "tf_efficientnet_b6"),
    ("efficientnet_b7", "tf_efficientnet_b7"),
    ("efficientnet_b8", "tf_efficientnet_b8"),
    ("efficientnet_cc_b0_4e", "tf_efficientnet_cc_b0_4e"),
    ("efficientnet_cc_b0_8e", "tf_efficientnet_cc_b0_8e"),
    ("efficientnet_cc_b1_8e", "tf_efficientnet_cc_b1_8e"),
    ("efficientnet_el efficientnet_el_pruned", "tf_efficientnet_el"),
    ("efficientnet_em", "tf_efficientnet_em"),
    ("efficientnet_es efficientnet_es_pruned", "tf_efficientnet_es"),
    ("efficientnet_l2", "tf_efficientnet_l2"),
    ("efficientnet_lite0", "tf_efficientnet_lite0"),
    ("efficientnet_lite1", "tf_efficientnet_lite1"),
    ("efficientnet_lite2", "tf_efficientnet_lite2"),
    ("efficientnet_lite3", "tf_efficientnet_lite3"),
    ("efficientnet_lite4", "tf_efficientnet_lite4"),
    ("efficientnetv2_l", "tf_efficientnetv2_l"),
    ("efficientnetv2_m", "tf_efficientnetv2_m"),
    ("efficientnetv2_s", "tf_efficientnetv2_s"),
    ("efficientnetv2_xl", "tf_efficientnetv2_xl"),
    ("mixnet_l", "tf_mixnet_l"),
    ("mixnet_m", "tf_mixnet_m"),
    ("mixnet_s", "tf_mixnet_s"),
    ("mobilenetv3_large_075", "tf_mobilenetv3_large_075"),
    ("mobilenetv3_large_100", "tf_mobilenetv3_large_100"),
    ("mobilenetv3_small_075", "tf_mobilenetv3_small_075"),
    ("mobilenetv3_small_100", "tf_mobilenetv3_small_100"),
    ("mobilenetv4_conv_aa_large", "mobilenetv4_conv_large"),
    ("mobilenetv4_conv_aa_medium", "mobilenetv4_conv_blur_medium", "mobilenetv4_conv_medium"),
    ("nest_base", "nest_base_jx"),
    ("nest_small", "nest_small_jx"),
    ("nest_tiny", "nest_tiny_jx"),
    ("resnet101d", "resnetaa101d", "resnetblur101d"),
    ("resnet18", "resnetblur18"),
    ("resnet34d", "resnetaa34d"),
    ("resnet50", "resnetaa50", "resnetblur50"),
    ("resnet50d", "resnetaa50d", "resnetblur50d"),
    ("seresnext101d_32x8d", "seresnextaa101d_32x8d"),
    ("test_efficientnet_gn", "test_efficientnet_ln"),
    ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224"),
    ("vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"),
    ("vit_gigantic_patch14_clip_224", "vit_gigantic_patch14_clip_quickgelu_224"),
    ("vit_huge_patch14_clip_224", "vit_huge_patch14_clip_quickgelu_224"),
    ("vit_huge_patch14_clip_378", "vit_huge_patch14_clip_quickgelu_378"),
    ("vit_large_patch14_clip_224", "vit_large_patch14_clip_quickgelu_224"),
    ("vit_large_patch14_clip_336", "vit_large_patch14_clip_quickgelu_336"),
)


def twins_of(name: str) -> list[tuple[str, str]]:
    """(name of the twin, what differs) of every twin of a model, one for those that are built alike."""
    variants = next((group for group in GROUPS if any(name in variant.split() for variant in group)), ())
    others = [variant.split()[0] for variant in variants if name not in variant.split()]
    return [(other, difference(name, other)) for other in others]


def difference(one: str, other: str, most: int = 3) -> str:
    """How modules of two models differ, as "theirs for ours", each kind once."""
    with torch.device("meta"):
        ours, theirs = (dict(timm.create_model(name, num_classes=10).named_modules()) for name in (one, other))
    found: dict[str, None] = {}
    for place, module in ours.items():
        if place in theirs:
            found.update(dict.fromkeys(_changes(module, theirs[place])))
    listed = list(found)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more kinds" if len(listed) > most else "")


def _changes(module: nn.Module, twin: nn.Module) -> list[str]:
    ours, theirs = type(module).__name__, type(twin).__name__
    if ours != theirs:
        return [f"{theirs} for {ours}"]
    pairs = zip(_settings(module), _settings(twin))
    return [f"{twin_text} for {text}" for text, twin_text in pairs if text != twin_text]


def _settings(module: nn.Module) -> list[str]:
    """Of the module itself, such as `padding=(1, 1)`; without numbers of channels, which are equal."""
    text = module.extra_repr().replace(", ", ",").replace(",", ", ")
    return [part for part in _split(text) if "=" in part]


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
