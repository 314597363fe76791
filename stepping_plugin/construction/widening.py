"""Function-preserving widening (Net2Wider, https://arxiv.org/abs/1511.05641) of any model with known units.

The paper expands the network before construction, so that units can be chosen from more than are needed.
Here units are
duplicated: a copy computes what the original unit computes, and whoever reads the unit reads all its copies
with shares of the old weight that add up to 1. With all units at level 1 the wide network is the same
function.

Where a unit's value enters a statistic over channels (layer norm, mean over channels), that only holds if
every unit of the tensor has the same number of copies. Such tensors grow by whole factors, or not at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..errors import SteppingError, explain
from ..graph.labels import Role
from ..graph.program import Program, call_arg, named_tensors, op_name
from ..nested.module import direct_weights, sliced_copy, weight_layouts
from ..units.analysis import Analysis, restrict
from .rounding import ANY, Grid

__all__ = ["Widened", "copies_for", "reinitialise", "widen"]


class Widened(NamedTuple):
    """A wider model, its analysis, the copies of every old unit (LongTensor), and what could not grow."""

    model: nn.Module
    analysis: Analysis
    copies: Tensor
    notes: list[str]


def widen(
    model: nn.Module, analysis: Analysis, factor: float, seed: int = 0, noise: float = 0.0, grid: Grid = ANY
) -> Widened:
    """Duplicate units so that every width grows by a factor, without changing the function.

    Args:
        model: owner of the parameters; not modified.
        analysis: its units.
        factor: at least 1; a width of `size` units grows to `round(factor * size)`, or near it on the grid.
        seed: decides which units get one copy more than others, and the noise.
        noise: relative spread of the shares that the copies of a unit get of each of its outgoing weights. 0: equal
            shares; the copies then have equal gradients and stay the same unit until they are at different
            levels. The function is preserved whatever the noise is.
        grid: which widths are wanted.

    Raises:
        SteppingError: factor below 1, or noise that could make a share negative.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise SteppingError(explain("out of range", where="expansion", got=factor, expected="a factor of at least 1"))
    if not 0 <= noise <= 1:
        raise SteppingError(explain("out of range", where="noise", got=noise, expected="a number from 0 to 1"))
    generator = torch.Generator().manual_seed(seed)
    copies, notes = copies_for(analysis, factor, generator, grid)
    wide, slices = restrict(analysis, copies)
    model = sliced_copy(model, slices)
    _split_outgoing(model, wide, copies, noise, generator)
    return Widened(model, wide, copies, notes)


def copies_for(
    analysis: Analysis, factor: float, generator: torch.Generator, grid: Grid = ANY
) -> tuple[Tensor, list[str]]:
    """Copies of every unit that make every width `factor` times as wide, LongTensor (num_units,), and notes.

    Extra copies are spread evenly: counts within a group differ by one at most, and chance decides where.
    """
    fixed = _cannot_grow(analysis)
    uniform = torch.zeros(analysis.num_units, dtype=torch.bool)
    copies = torch.ones(analysis.num_units, dtype=torch.long)
    for units, bears_copies in _statistics_sets(analysis):
        uniform[units] = True
        if bears_copies and not bool(fixed[units].any()):
            copies[units] = math.floor(factor)
        else:
            fixed[units] = True
    blocks = grid.blocks(analysis)
    for group in analysis.groups:
        free = group.units[~(fixed | uniform)[group.units]]
        wide = grid.width(factor, len(free), int(blocks[group.units].max()))
        each, extra = divmod(wide, max(1, len(free)))
        copies[free] = each
        copies[free[torch.randperm(len(free), generator=generator)[:extra]]] += 1
    return copies, _notes(analysis, factor, copies, fixed, uniform)


def _notes(analysis: Analysis, factor: float, copies: Tensor, fixed: Tensor, uniform: Tensor) -> list[str]:
    """One sentence per reason why groups are narrower than asked for."""
    short: dict[str, list[str]] = {}
    for group in analysis.groups:
        held_back = bool((fixed | uniform)[group.units].any())
        if held_back and int(copies[group.units].sum()) < round(factor * len(group.units)):
            reason = "a transformed weight, a convolution or a statistic over their channels bears no copies"
            if not bool(fixed[group.units].any()):
                reason = "a statistic over their channels allows whole factors only"
            short.setdefault(reason, []).append(group.name)
    return [
        f"widening by {factor:g} leaves {len(names)} of {len(analysis.groups)} widths below that, because "
        f"{reason}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for reason, names in short.items()
    ]


def _statistics_sets(analysis: Analysis) -> list[tuple[Tensor, bool]]:
    """Disjoint sets of units that enter statistics over channels together, and whether those bear copies.

    They do if they stay the same when every unit of the set has the same number of copies.
    """
    found: list[tuple[set[int], bool]] = []
    for program in analysis.programs.values():
        for node in _statistics(program):
            source: fx.Node = node.args[0]  # type: ignore[assignment]
            units = source.meta.get("units")
            if units is None:
                continue
            name = op_name(node)
            if name in ("amax", "amin"):
                continue  # a copy changes no extreme
            whole = bool((units >= 0).all()) and name not in ("linalg_vector_norm", "sum.dim_IntList")
            if name == "var.correction":
                whole = whole and call_arg(node, "correction") == 0
            found.append((set(units[units >= 0].tolist()), whole))
    return [(torch.tensor(sorted(units)), whole) for units, whole in _merge(found)]


def _statistics(program: Program) -> Iterator[fx.Node]:
    return (n for n in program.operators() if n.meta.get("role") in (Role.PREFIX_NORM, Role.PREFIX_REDUCE))


def _merge(sets: list[tuple[set[int], bool]]) -> list[tuple[set[int], bool]]:
    """Join sets that share a unit."""
    merged: list[tuple[set[int], bool]] = []
    for units, whole in sets:
        apart = []
        for other, other_whole in merged:
            if units & other:
                units, whole = units | other, whole and other_whole
            else:
                apart.append((other, other_whole))
        merged = [*apart, (units, whole)]
    return merged


def _cannot_grow(analysis: Analysis) -> Tensor:
    """Units that bear no copies, BoolTensor (num_units,).

    Copies of a weight that is transformed before use (standardised) would share one parameter, and the
    transformation would undo their shares. A convolution along the channels reads one unit per position.
    """
    fixed = torch.zeros(analysis.num_units, dtype=torch.bool)
    direct = direct_weights(analysis)
    stays = [units for name, pair in analysis.weight_units.items() if name not in direct for units in pair]
    for layer in analysis.layers:
        weight = layer.node.args[1]
        transformed = not (isinstance(weight, fx.Node) and weight.op == "placeholder")
        if layer.role == Role.TAPS or (transformed and layer.role in (Role.HEAD, Role.GROUPED)):
            stays += [layer.in_units, layer.out_units]
    for units in stays:
        fixed[units[units >= 0]] = True
    return fixed


@torch.no_grad()
def _split_outgoing(
    model: nn.Module, analysis: Analysis, copies: Tensor, noise: float, generator: torch.Generator
) -> None:
    """Divide every weight that read a unit among the copies of the unit."""
    tensors, layouts = named_tensors(model), weight_layouts(analysis)
    columns = {name: (0 if layouts[name][1] else 1, pair[1]) for name, pair in analysis.weight_units.items()}
    for layer in analysis.layers:
        if layer.role == Role.HEAD and layer.weight is not None:
            columns[layer.weight] = (0 if "transpose" in op_name(layer.node) else 1, layer.in_units)
    parent = torch.arange(len(copies)).repeat_interleave(copies)
    for name, (axis, units) in columns.items():
        sources = _sources(units, parent)
        if len(sources.unique()) < len(sources):
            weight = tensors[name]
            shares = _shares(sources, weight.shape[1 - axis], noise, generator).to(weight)
            shares = shares.t() if axis == 0 else shares
            weight.mul_(shares.reshape(*shares.shape, *[1] * (weight.dim() - 2)))


def _sources(units: Tensor, parent: Tensor) -> Tensor:
    """Which column of the narrow weight each column of a wide one comes from, as equal or different numbers.

    Args:
        units: wide unit per column, -1 for none.
        parent: narrow unit per wide unit.
    """
    sources, seen = torch.empty_like(units), Counter[int]()
    for column, unit in enumerate(units.tolist()):
        seen[unit] += 1  # a unit may have several columns; its copies have them in the same order
        sources[column] = (seen[unit] * (len(parent) + 1)) + (int(parent[unit]) if unit >= 0 else len(parent))
    return sources


def _shares(sources: Tensor, rows: int, noise: float, generator: torch.Generator) -> Tensor:
    """Shares (rows, columns), float64; in every row, those of the columns with one source sum to 1."""
    _, source, count = sources.unique(return_inverse=True, return_counts=True)
    spread = 2 * torch.rand(rows, len(sources), generator=generator, dtype=torch.float64) - 1
    shares = (1 + noise * spread) / count[source]
    total = torch.zeros(rows, len(count), dtype=torch.float64).index_add_(1, source, shares)
    return shares / total[:, source]


def reinitialise(model: nn.Module, seed: int) -> None:
    """Give a model new random weights, in place: every module that can be reset is.

    Parameters of modules without `reset_parameters` (class tokens, layer scales, position embeddings) keep
    their values.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
