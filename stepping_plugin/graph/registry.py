"""The register of label rules, and what most rules need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from .labels import Labels, Rule
from .program import is_static, tensor_inputs

__all__ = ["RULES", "dynamic_inputs", "free", "is_pointwise", "pass_per_level", "rule", "shape_of"]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return node.meta["shape"]


def is_pointwise(node: fx.Node) -> bool:
    """Whether torch itself says that every element of a result depends on the elements at its place only."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def free(node: fx.Node) -> Tensor:
    return torch.zeros([1] * len(shape_of(node)), dtype=torch.long)


def dynamic_inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in tensor_inputs(node) if not is_static(n)]


def pass_per_level(labels: Labels, node: fx.Node) -> Tensor | None:
    """If the (first) input is per level, so is the output."""
    if dynamic_inputs(node) and dynamic_inputs(node)[0] in labels.per_level:
        labels.per_level.add(node)
        return free(node)
    return None
