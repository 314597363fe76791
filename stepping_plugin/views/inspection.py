"""What `stepping inspect` shows: units of a model, where they come from and what keeps channels at level 1."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from ..errors import SteppingError
from ..graph.images import image_size_of
from ..graph.modes import ordinary_mode
from ..graph.program import Program, copy_model, unwrap
from ..integrations.fvcore import count_macs
from ..integrations.torch_pruning.witness import toolkit_couplings
from ..units.analysis import analyse
from ..units.levels import floor_macs
from ..units.macs import MacModel
from ..units.witness import compare_witnesses, join_units

__all__ = ["describe", "inspect_model"]


@ordinary_mode
def inspect_model(
    model: nn.Module,
    image_size: tuple[int, ...] | None = None,
    *,
    example_inputs: Tensor | None = None,
    time_limit: float = 20.0,
) -> dict[str, Any]:
    """Facts about a model's units, ready for JSON: what moves, what is pinned and why, what the smallest subnet costs.

    Args:
        model: any model of images, of timm or your own; not modified.
        image_size: (C, H, W); by default that of `example_inputs`, or what the model says (timm models do).
        example_inputs: images (B, C, H, W).
        time_limit: seconds that torch-pruning's dependency graph may take.

    Raises:
        SteppingError: no image size is given and the model does not say one.
        CaptureError: the model cannot be captured, or none of its units can move.
    """
    image_size = image_size_of(model, example_inputs) if image_size is None else tuple(image_size)
    model = copy_model(unwrap(model))
    analysis = analyse(model, image_size, modes=(False,))
    reference = next(model.parameters())
    image = torch.zeros(1, *image_size, dtype=reference.dtype, device=reference.device)
    toolkit = toolkit_couplings(model, image, time_limit)
    comparison = compare_witnesses(analysis, toolkit)
    seconds = {**analysis.seconds, "torch-pruning": toolkit.seconds}
    holds = bool(analysis.unknown) and bool(comparison.only_toolkit)
    if holds:
        analysis, _ = join_units(analysis, comparison.only_toolkit)
    start = time.perf_counter()
    macs_model = MacModel(analysis)
    try:
        counted, uncounted = count_macs(model, (image,)), None
    except SteppingError as error:  # an operator that fvcore does not know
        counted, uncounted = None, str(error)
    seconds["fvcore"] = time.perf_counter() - start
    floor = floor_macs(analysis, macs_model)
    return {
        "image_size": list(image_size),
        "macs": macs_model.total,
        "macs_fvcore": counted and counted.total,
        "macs_fvcore_default": counted and counted.fvcore_default,
        "macs_fvcore_error": uncounted,
        "floor_macs": floor,
        "floor_share": floor / macs_model.total,
        "outputs": _outputs(analysis.eval_program),
        "units": analysis.num_units,
        "channels": analysis.channels,
        "pinned_channels": analysis.pinned_channels,
        "pins": [
            {"reason": reason, "module": module, "operator": operator, "channels": channels}
            for (reason, module, operator), channels in analysis.pins.most_common()
        ],
        "operators_without_rule": dict(analysis.unknown),
        "groups": [{"name": g.name, "units": len(g.units), "made_by": g.weights} for g in analysis.groups],
        "couplings": {
            "agreed_units": comparison.agreed,
            "only_channel_graph_units": comparison.only_channel_graph,
            "only_torch_pruning_sets": len(comparison.only_toolkit),
            "only_torch_pruning": "held" if holds else "set aside: every operator has an exact rule",
            "only_torch_pruning_layers": dict(comparison.where.most_common(20)),
            "unknown_to_torch_pruning_units": comparison.unseen,
            "contradictions_in_torch_pruning": toolkit.set_aside,
            "torch_pruning_finished": toolkit.finished,
            "torch_pruning_error": toolkit.error,
        },
        "seconds": {k: round(v, 3) for k, v in seconds.items()},
    }


def _outputs(program: Program) -> list[dict[str, Any]]:
    """Name, shape (the batch counted as 1) and how each output is in a subnet."""
    found = []
    for name, node in zip(program.structure.names(), program.outputs):
        moves = node.meta.get("units") is not None and not node.meta.get("per_level")
        subnets = "up to their level" if moves else "whole" if node.meta.get("per_level") else "the same"
        found.append({"name": name, "shape": list(node.meta["shape"]), "subnets": subnets})
    return found


def describe(facts: dict[str, Any], name: str) -> Group:
    """Printable form of `inspect_model`'s facts."""
    couplings = facts["couplings"]
    head = Table.grid(padding=(0, 2))
    default = facts["macs_fvcore_default"]
    quoted = "-" if default is None else f"{default:,}"
    own = "-" if facts["macs_fvcore"] is None else f"{facts['macs_fvcore']:,}"
    rows = [
        ("model", f"{name}, images {tuple(facts['image_size'])}"),
        (
            "MACs (M_t)",
            f"{facts['macs']:,} (fvcore: {own}; fvcore's default total: {quoted})",
        ),
        (
            "outputs in a subnet",
            ", ".join(f"{o['name']} {o['shape']} {o['subnets']}".strip() for o in facts["outputs"]),
        ),
        ("floor of subnet 1", f"{facts['floor_macs']:,} MACs = {facts['floor_share']:.2%} of M_t"),
        ("units", f"{facts['units']:,} made of {facts['channels']:,} output channels"),
        ("channels kept at level 1", f"{facts['pinned_channels']:,}"),
        ("seconds", ", ".join(f"{k} {v:.2f}" for k, v in facts["seconds"].items())),
    ]
    for row in rows:
        head.add_row(*row)
    groups = Table(title="groups of units")
    groups.add_column("made by")
    groups.add_column("units", justify="right")
    for group in facts["groups"]:
        others = f" (+{len(group['made_by']) - 1})" if len(group["made_by"]) > 1 else ""
        groups.add_row(group["name"] + others, str(group["units"]))
    lines = [
        f"couplings: {couplings['agreed_units']:,} units as torch-pruning has them; "
        f"{couplings['only_channel_graph_units']:,} units that only the channel graph ties (heads, conv groups, ...)"
    ]
    if couplings["only_torch_pruning_sets"]:
        layers = ", ".join(list(couplings["only_torch_pruning_layers"])[:6])
        sets, fate = couplings["only_torch_pruning_sets"], couplings["only_torch_pruning"]
        lines.append(f"{sets} sets of units that only torch-pruning ties: {fate} (in {layers})")
    if couplings["torch_pruning_error"]:
        lines.append(f"torch-pruning: {couplings['torch_pruning_error']}")
    lines += [f"torch-pruning contradicts itself: {text}" for text in couplings["contradictions_in_torch_pruning"][:5]]
    lines += [
        f"pin: {p['channels']} channels by {p['operator']} in {p['module'] or 'the model'} ({p['reason']})"
        for p in facts["pins"]
    ]
    return Group(head, groups, *lines)
