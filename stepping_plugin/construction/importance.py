"""How much every unit matters: the magnitude of its weights, without data; and what copies of a unit add."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from ..graph.labels import Role
from ..graph.program import is_static, named_tensors, op_name, static_value
from ..units.analysis import Analysis, Layer

__all__ = ["discount_copies", "magnitude_scores"]

COPY = 0.1

_SCALES = ("weight", "gamma", "scale")  # what norms and layer scales call their factor


def magnitude_scores(model: nn.Module, analysis: Analysis) -> Tensor:
    """Magnitude of every unit: L2 norm of its incoming weights and |gamma| of its norms.

    Each layer's values are divided by their mean over the layer, so that 1 means average wherever a unit
    lies; a unit in several layers (a residual stream) gets the mean over its channels in all of them.

    Args:
        model: owner of the parameters that the analysis names.
        analysis: its units.

    Returns:
        float64 (num_units,), positive where any weight is, higher is more important.
    """
    total = torch.zeros(analysis.num_units, dtype=torch.float64)
    count = torch.zeros(analysis.num_units, dtype=torch.float64)
    for values, units in _magnitudes(model, analysis):
        mean = values.mean()
        values = values / mean if float(mean) > 0 else torch.ones_like(values)  # zero-initialised: says nothing
        movable = units >= 0
        total.index_add_(0, units[movable], values[movable])
        count.index_add_(0, units[movable], torch.ones_like(values[movable]))
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def _magnitudes(model: nn.Module, analysis: Analysis) -> Iterator[tuple[Tensor, Tensor]]:
    """Per layer and norm: magnitude per channel, float64 (channels,), and unit per channel."""
    tensors = named_tensors(model)
    weighted = {name: units for name, (units, _) in analysis.weight_units.items()}
    for layer in analysis.layers:
        if layer.role == Role.GROUPED and layer.weight is not None:
            weighted.setdefault(layer.weight, layer.out_units)
    layers = {layer.weight: layer for layer in analysis.layers}
    for name, units in weighted.items():
        weight = _weight(name, layers.get(name), tensors, analysis)
        axis = int(name in layers and "transpose" in op_name(layers[name].node))
        if weight is not None and weight.dim() > axis and weight.shape[axis] == len(units):
            yield _magnitude(weight.detach().movedim(axis, 0).flatten(1)), units
    for name, (_, units) in analysis.param_units.items():
        scale = tensors.get(name)
        named_as_scale = name.rpartition(".")[2] in _SCALES and name not in weighted
        if named_as_scale and scale is not None and scale.numel() == len(units):
            yield _magnitude(scale.detach().reshape(-1, 1)), units


def _weight(name: str, layer: Layer | None, tensors: dict[str, Tensor], analysis: Analysis) -> Tensor | None:
    """The parameter of that name, or what the layer reads if that is cut, turned or joined from parameters."""
    weight = layer.node.args[1] if layer is not None else None
    if name in tensors or not isinstance(weight, fx.Node) or not is_static(weight):
        return tensors.get(name)
    constants = analysis.eval_program.constants
    return static_value(weight, lambda key: constants[key] if key in constants else tensors[key])


def _magnitude(rows: Tensor) -> Tensor:
    """L2 norm of every row, float64 on the CPU."""
    return torch.linalg.vector_norm(rows.float(), dim=1).double().cpu()


def discount_copies(scores: Tensor, copies: Tensor, share: float = COPY) -> Tensor:
    """Importance of the units of a widened network, all but the best copy of every unit lowered.

    Copies compute nearly the same, so each has the importance of the unit (Eq. 2), but a subnet that has one of
    them gains little by another.

    Args:
        scores: (num_units,) importance, higher is better.
        copies: LongTensor, number of copies of every unit before widening; they lie side by side.
        share: what is left of the importance of all others, 0 to 1.

    Returns:
        float64 (num_units,).
    """
    scores = scores.double()
    parent = torch.arange(len(copies)).repeat_interleave(copies)
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(parent[order], stable=True)]  # unit after unit, the best copy first
    later = torch.zeros_like(scores, dtype=torch.bool)
    later[order[1:]] = parent[order].diff() == 0
    return torch.where(later, scores - (1 - share) * scores.abs(), scores)
