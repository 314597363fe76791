"""Conversion without weights: units, MACs and the floor of models that are too large to load, on the meta device."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from ..levels import floor_macs
from ..macs import MacModel
from ..units import analyse

__all__ = ["structure", "structure_line"]


def structure(name: str) -> dict[str, Any]:
    """Facts about a timm model from its structure alone. No tensor of it is ever filled.

    Returns:
        Parameters, channels, units, MACs, floor (share of the MACs), CPU seconds of capture and labelling together
        with those of everything behind them, and the most memory of this process so far in GiB.
    """
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=1000).eval()
    start = time.process_time()
    analysis = analyse(model, tuple(model.default_cfg["input_size"]), (False,))
    macs = MacModel(analysis)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "channels": analysis.channels,
        "units": analysis.num_units,
        "pinned_channels": analysis.pinned_channels,
        "macs": macs.total,
        "floor_share": floor_macs(analysis, macs) / macs.total,
        "cpu_seconds": round(time.process_time() - start, 1),
        "gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def structure_line(facts: dict[str, Any]) -> str:
    """One line of a Markdown table."""
    per_channel = facts["cpu_seconds"] / facts["channels"] * 1e6
    return (
        f"| {facts['model']} | {facts['parameters'] / 1e6:,.0f} | {facts['channels']:,} | {facts['units']:,} | "
        f"{facts['pinned_channels']:,} | {facts['macs'] / 1e9:,.0f} | {facts['floor_share']:.2%} | "
        f"{facts['cpu_seconds']:.1f} | {per_channel:.0f} | {facts['gib']:.2f} |"
    )
