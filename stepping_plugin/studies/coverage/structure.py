"""Conversion without weights: units, MACs and the floor of models that are too large to load, on the meta device."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import timm
import torch
from rich.table import Table
from tqdm import tqdm

from ...integrations.timm.models import require_model
from ...units.analysis import analyse
from ...units.levels import floor_macs
from ...units.macs import MacModel

__all__ = ["structure", "structure_table", "structures"]


def structure(name: str) -> dict[str, Any]:
    """Facts about a timm model from its structure alone. No tensor of it is ever filled.

    Returns:
        Parameters, channels, units, MACs, floor (share of the MACs), CPU seconds of capture and labelling together
        with those of everything behind them, and the most memory of this process so far in GiB.
    """
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


def structures(names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """`structure` of every model, each in a process of its own: memory is counted from zero.

    Raises:
        SteppingError: timm has no such model.
    """
    names = list(names)
    for name in names:
        require_model(name)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        yield from tqdm(pool.imap(structure, names), unit="model", disable=None)


def structure_table(rows: Sequence[dict[str, Any]]) -> Table:
    """For `rich.print`: one line per model."""
    table = Table(title="structure without weights")
    for column in ("model", "parameters, M", "channels", "units", "pinned channels", "G MACs", "floor", "CPU s",
                   "µs per channel", "GiB"):  # fmt: skip
        table.add_column(column, justify="left" if column == "model" else "right")
    for r in rows:
        table.add_row(
            r["model"], f"{r['parameters'] / 1e6:,.0f}", f"{r['channels']:,}", f"{r['units']:,}",
            f"{r['pinned_channels']:,}", f"{r['macs'] / 1e9:,.1f}", f"{r['floor_share']:.2%}",
            f"{r['cpu_seconds']:.1f}", f"{r['cpu_seconds'] / r['channels'] * 1e6:.0f}", f"{r['gib']:.2f}",
        )  # fmt: skip
    return table
