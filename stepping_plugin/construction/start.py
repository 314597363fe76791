"""The one way in: from a trained classifier and budgets to the network that construction starts from.

`convert` gives the (widened) network with all units in subnet 1; `one_shot` proposes levels for it without data;
`flow.Construction` finds them with data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SteppingError
from ..files.origin import describe_origin
from ..graph.program import unwrap
from ..net import SteppingNet
from ..training.loader import EpochLoader
from ..training.trainer import Batch
from ..units.analysis import Analysis
from ..units.levels import check_budgets, parse_budgets
from ..units.macs import MacModel, static_macs
from ..units.witness import find_units
from .calibration import fixed_round_to
from .config import ConstructionConfig
from .distinct import check_distinct
from .expansion import least_expansion
from .importance import magnitude_scores
from .landing import LandingResult
from .original import check_model, private_copy, reference_notes, structure_notes
from .policies import assign
from .rounding import Grid
from .widening import reinitialise, widen

__all__ = ["convert", "endless", "one_shot", "start_network"]


def convert(
    model: nn.Module,
    budgets: Sequence[float | int | str],
    config: ConstructionConfig,
    example_inputs: Tensor | None = None,
    *,
    arguments: dict[str, Any] | None = None,
    adapt: Callable[[Analysis], Analysis] | None = None,
    seed: int = 0,
) -> SteppingNet:
    """The network that construction starts from, with what there is to say about it in `notes`.

    Args:
        model, budgets, example_inputs, seed: see `apply_steppingnet`.
        config: says how much wider the network gets, and whether with the original weights or random ones.
        arguments: keyword arguments that the timm model was made with, to make it again on loading.
        adapt: changes the units before anything is widened, for example to keep some at level 1.

    Raises:
        BudgetError, CaptureError, SteppingError: see `apply_steppingnet`.
    """
    image_size = check_model(model, example_inputs)
    model = unwrap(model)
    owner = private_copy(model)
    analysis = find_units(owner, image_size)
    static = static_macs(analysis.eval_program)
    if adapt is not None:
        analysis = adapt(analysis)
    reference = MacModel(analysis).total
    notes = reference_notes(owner, image_size, reference, static) + structure_notes(analysis)
    factor = 1.0 if config.expansion == "auto" else float(config.expansion)
    allowed = parse_budgets(budgets, reference, limit=int(reference * factor**2) + 1)
    origin = describe_origin(model, image_size, arguments)
    net = start_network(owner, analysis, allowed, config, reference, origin, seed)
    net.notes = notes + net.notes
    return net


def one_shot(
    net: SteppingNet,
    policy: str = "steppingnet",
    *,
    scores: Tensor | None = None,
    round_to: int = 1,
    seed: int = 0,
) -> LandingResult:
    """Levels by a policy, without data; `net.take` carries them out.

    Args:
        net: from `convert`; not changed.
        policy: see `policies.assign`.
        scores: (num_units,) importance, higher is better; by default the magnitude of the weights.
        round_to: channels that every level is to add in multiples of.
        seed: of the policy "random".
    """
    if scores is None and policy == "steppingnet":
        scores = magnitude_scores(net.model, net.analysis)
    return assign(
        net.analysis,
        net.macs_model,
        net.budgets,
        scores,
        policy=policy,
        generator=torch.Generator().manual_seed(seed),
        reference_macs=net.reference_macs,
        lineage=net.lineage,
        round_to=round_to,
    )


def start_network(
    model: nn.Module,
    analysis: Analysis,
    budgets: Sequence[int],
    config: ConstructionConfig,
    reference_macs: int,
    origin: dict[str, Any] | None = None,
    seed: int = 0,
) -> SteppingNet:
    """The (widened) network with all units in subnet 1, where units and budgets are known; see `convert`.

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
    grid = Grid(fixed_round_to(config, model), len(budgets))
    factor = least_expansion(analysis, budgets, grid) if config.expansion == "auto" else float(config.expansion)
    widened = widen(model, analysis, factor, seed, config.noise, grid)
    if config.init == "random":
        reinitialise(widened.model, seed)
    check_budgets(widened.analysis, MacModel(widened.analysis), budgets, reference_macs)
    check_distinct(widened.analysis, MacModel(widened.analysis), budgets, reference_macs)
    lineage = [widened.copies] if factor > 1 else []
    ones = torch.ones(widened.analysis.num_units, dtype=torch.long)
    net = SteppingNet(widened.model, widened.analysis, ones, budgets, reference_macs, origin, lineage)
    if config.expansion == "auto" and factor > 1:
        net.notes.append(f"widened by {factor:g} times, so that budget {len(budgets)} can be used up")
    net.notes += widened.notes
    return net


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
