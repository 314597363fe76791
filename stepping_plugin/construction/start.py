"""What construction starts from: the widened network with all units in subnet 1, and batches without end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import BudgetError, SteppingError
from ..levels import check_budgets
from ..macs import MacModel
from ..net import SteppingNet
from ..training.loader import EpochLoader
from ..training.trainer import Batch
from ..units import Analysis
from .config import ConstructionConfig
from .landing import head_units
from .widening import reinitialise, widen

__all__ = ["endless", "start_network"]


def start_network(
    model: nn.Module,
    analysis: Analysis,
    budgets: Sequence[int],
    config: ConstructionConfig,
    reference_macs: int,
    origin: dict[str, Any] | None = None,
    seed: int = 0,
) -> SteppingNet:
    """The (widened) network with all units in subnet 1.

    Args:
        model: owner of the parameters; not modified.
        analysis: its units.
        budgets: P_1..P_N in MACs.
        config: says how much wider, and whether with the original weights or random ones.
        reference_macs: M_t, MACs of the original network.
        origin: see `SteppingNet`.
        seed: of widening and of random weights.

    Raises:
        BudgetError: budgets that cannot be met, or more subnets than can differ.
    """
    widened = widen(model, analysis, config.expansion, seed, config.noise)
    if config.init == "random":
        reinitialise(widened.model, seed)
    check_budgets(widened.analysis, MacModel(widened.analysis), budgets, reference_macs)
    _check_plugs(widened.analysis, len(budgets))
    lineage = [widened.copies] if config.expansion > 1 else []
    ones = torch.ones(widened.analysis.num_units, dtype=torch.long)
    net = SteppingNet(widened.model, widened.analysis, ones, budgets, reference_macs, origin, lineage)
    net.notes = list(widened.notes)
    return net


def _check_plugs(analysis: Analysis, n: int) -> None:
    """Subnets differ by units that the classifier reads; refuse what training and landing could not mend."""
    read = int(head_units(analysis).sum())
    if read < n - 1:
        layer = analysis.layers[-1].name
        raise BudgetError(
            f"{layer}: the classifier reads {read} units that may move, its other inputs are pinned to level 1, so "
            f"{n} subnets cannot all differ. Use at most {read + 1} budgets; `stepping inspect` shows the pins."
        )


def endless(loader: Iterable[Batch], start: int = 0) -> Iterator[Batch]:
    """Batches without end, the first `start` left out.

    Raises:
        SteppingError: there are none.
    """
    if isinstance(loader, EpochLoader):
        yield from loader.stream(start)
    done = 0
    while True:
        before = done
        for batch in loader:
            if done >= start:
                yield batch
            done += 1
        if done == before:
            raise SteppingError(
                "the training loader is empty, or can be gone through only once. Check the data set, and "
                "pass a loader that starts anew with every `for`."
            )
