"""The second witness: what torch-pruning's dependency graph says about the units of the channel graph.

Policy. A coupling that only the channel graph sees always holds. A coupling that only the toolkit sees holds where
the channel graph had to guess, that is, if the model has an operator without a label rule; it is set aside where every
operator has an exact rule, because then the channel graph has proof that the channels may part, and `verify` checks the
result numerically. (The toolkit takes some reshapes, broadcasts and one-channel convolutions for couplings of whole
layers; see the docs of `integrations.torch_pruning.witness`.)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..console.progress import stage
from ..graph.program import Program
from ..integrations.torch_pruning.witness import ToolkitCouplings, toolkit_couplings
from .analysis import Analysis, analyse, assemble

__all__ = ["Comparison", "compare_witnesses", "find_units", "join_units", "pin_units"]


@dataclass
class Comparison:
    """Units by source.

    Attributes:
        agreed: units whose channels the toolkit couples in the same way.
        only_channel_graph: units of several channels that the toolkit would let part (heads, conv groups, ...).
        only_toolkit: sets of units that the toolkit moves together and the channel graph does not.
        where: layers in which the toolkit's extra couplings lie, with their number of channels.
        unseen: units of which the toolkit knows no channel.
    """

    agreed: int = 0
    only_channel_graph: int = 0
    only_toolkit: list[list[int]] = field(default_factory=list)
    where: Counter = field(default_factory=Counter)
    unseen: int = 0


def find_units(model: nn.Module, image_size: tuple[int, ...], modes: tuple[bool, ...] = (False, True)) -> Analysis:
    """Units of a model by both witnesses, see the policy above; arguments and errors are those of `analyse`."""
    analysis = analyse(model, image_size, modes)
    if not analysis.unknown:
        return analysis
    reference = next(model.parameters())
    image = torch.zeros(1, *image_size, dtype=reference.dtype, device=reference.device)
    with stage("torch-pruning's dependency graph"):
        extra = compare_witnesses(analysis, toolkit_couplings(model, image)).only_toolkit
    return join_units(analysis, extra)[0] if extra else analysis


def compare_witnesses(analysis: Analysis, toolkit: ToolkitCouplings) -> Comparison:
    """Compare the toolkit's classes of channels with the units of an analysis."""
    units = torch.full((len(toolkit.entries),), -1)
    for index, module in enumerate(toolkit.modules):
        for side in (0, 1):
            rows = ((toolkit.entries[:, 0] == index) & (toolkit.entries[:, 1] == side)).nonzero().flatten()
            known = _units_of(analysis, module + ".weight", side)
            if known is not None and len(rows):
                channel = toolkit.entries[rows, 2]
                inside = channel < len(known)
                units[rows[inside]] = known[channel[inside]]
    known_rows = (units >= 0).nonzero().flatten()
    pairs = torch.unique(torch.stack([toolkit.classes[known_rows], units[known_rows]], 1), dim=0)
    return _tally(analysis, toolkit, units, pairs)


def _units_of(analysis: Analysis, weight: str, side: int) -> Tensor | None:
    if weight in analysis.weight_units:
        return analysis.weight_units[weight][side]
    if side == 0 and weight in analysis.param_units and analysis.param_units[weight][0] == 0:
        return analysis.param_units[weight][1]
    return None


def _tally(analysis: Analysis, toolkit: ToolkitCouplings, units: Tensor, pairs: Tensor) -> Comparison:
    result = Comparison()
    classes_of = torch.bincount(pairs[:, 1], minlength=analysis.num_units)
    units_in = Counter(pairs[:, 0].tolist())
    joined = {c for c, count in units_in.items() if count > 1}
    members: dict[int, list[int]] = {}
    for c, unit in pairs.tolist():
        if c in joined:
            members.setdefault(c, []).append(unit)
    result.only_toolkit = list(members.values())
    extra = {unit for group in members.values() for unit in group}
    result.unseen = int((classes_of == 0).sum())
    result.only_channel_graph = int((classes_of > 1).sum())
    result.agreed = sum(1 for unit in range(analysis.num_units) if classes_of[unit] == 1 and unit not in extra)
    for row in (units >= 0).nonzero().flatten().tolist():
        if int(toolkit.classes[row]) in joined and int(toolkit.entries[row, 1]) == 0:
            result.where[toolkit.modules[int(toolkit.entries[row, 0])]] += 1
    return result


def join_units(analysis: Analysis, groups: list[list[int]]) -> tuple[Analysis, Tensor]:
    """The analysis with units joined; a tensor that becomes one single unit goes to level 1.

    Args:
        groups: sets of unit indices; overlapping sets join.

    Returns:
        The new analysis (the programs are shared and rewritten: the old one must not be used any more) and LongTensor
        (num_units,), new index of every old unit, -1 for those that went to level 1.
    """
    parent = list(range(analysis.num_units))

    def root(unit: int) -> int:
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit

    for group in groups:
        for unit in group[1:]:
            a, b = root(group[0]), root(unit)
            parent[max(a, b)] = min(a, b)
    roots = torch.tensor([root(u) for u in range(analysis.num_units)])
    for program in analysis.programs.values():
        _rename(program, roots)
    pinned = torch.isin(roots, _single_unit_tensors(analysis.programs))
    joined, index = _renumbered(analysis, roots, pinned)
    if bool(pinned.any()):
        joined.pins[("couplings leave a tensor with one single unit", "", "")] += _channels_of(analysis, pinned)
    return joined, index


def _channels_of(analysis: Analysis, chosen: Tensor) -> int:
    """Output channels of some units, BoolTensor (num_units,)."""
    outputs = [units[units >= 0] for units, _ in analysis.weight_units.values()]
    return sum(int(chosen[units].sum()) for units in outputs)


def pin_units(analysis: Analysis, pinned: Tensor, reason: str) -> Analysis:
    """The analysis with some units kept at level 1 for good. The old analysis must not be used any more.

    Args:
        pinned: BoolTensor (num_units,).
        reason: listed among the pins.
    """
    result, _ = _renumbered(analysis, torch.arange(analysis.num_units), pinned)
    result.pins[(reason, "", "")] += _channels_of(analysis, pinned)
    return result


def _renumbered(analysis: Analysis, roots: Tensor, pinned: Tensor) -> tuple[Analysis, Tensor]:
    kept = torch.unique(roots[~pinned])
    index = torch.full((analysis.num_units,), -1)
    index[kept] = torch.arange(len(kept))
    for program in analysis.programs.values():
        _rename(program, index)
    result = assemble(analysis.programs, len(kept), analysis.image_size)
    result.pins, result.unknown, result.seconds = Counter(analysis.pins), analysis.unknown, analysis.seconds
    result.pinned_channels = analysis.pinned_channels + _channels_of(analysis, pinned)
    result.channels = analysis.channels
    return result, torch.where(pinned, -1, index[roots])


def _rename(program: Program, index: Tensor) -> None:
    for node in program.operators():
        units = node.meta.get("units")
        if units is not None:
            renamed = torch.where(units >= 0, index[units.clamp(min=0)], -1)
            alive = bool((renamed >= 0).any())
            node.meta["units"], node.meta["axis"] = (renamed, node.meta["axis"]) if alive else (None, None)


def _single_unit_tensors(programs: dict[bool, Program]) -> Tensor:
    found = set()
    for program in programs.values():
        for node in program.operators():
            units = node.meta.get("units")
            if units is not None and bool((units == units[0]).all()):
                found.add(int(units[0]))
    return torch.tensor(sorted(found), dtype=torch.long)
