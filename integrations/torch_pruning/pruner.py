"""`SteppingPruner`: SteppingNet behind the interface of torch-pruning's pruners.

Where the toolkit's pruners remove channels, this one moves units to subnets:

    importance = tp.importance.GroupMagnitudeImportance()
    pruner = SteppingPruner(model, example_inputs, importance=importance, budgets=[0.1, 0.3])
    pruner.step()                                   # or: for move in pruner.step(interactive=True): move.prune()
    net = pruner.net                                # a SteppingNet

Importances are the toolkit's: any `tp.importance.Importance` is asked for the scores of the toolkit's own groups.
Differences from `tp.pruner.BasePruner`: MAC budgets instead of ratios; units come from the channel graph, so attention
heads, conv groups and unwrapped parameters are found without `num_heads` and `unwrapped_parameters`; the model is
not modified (the net owns a copy); there is one step, not several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from stepping_plugin.construction.calibration import fixed_round_to
from stepping_plugin.construction.config import ConstructionConfig
from stepping_plugin.construction.importance import magnitude_scores
from stepping_plugin.construction.start import convert, one_shot
from stepping_plugin.errors import SteppingError, explain
from stepping_plugin.files.origin import unwrap
from stepping_plugin.units.analysis import Analysis
from stepping_plugin.units.witness import pin_units

__all__ = ["SteppingPruner", "UnitMove"]


@dataclass
class UnitMove:
    """Some units of one group that are to go to one level. `prune()` carries it out.

    Attributes:
        group: layer that makes the units (the first one, where several do).
        layers: weights that make them.
        units: LongTensor, unit indices.
        level: where they go, 2..N + 1 (N + 1 = spare).
    """

    group: str
    layers: list[str]
    units: Tensor
    level: int
    _apply: Callable[[UnitMove], None]

    def prune(self) -> None:
        """Move the units."""
        self._apply(self)


class SteppingPruner:
    """Nested subnets from a model, budgets and one of the toolkit's importances.

    Args:
        model: classifier of images; not modified.
        example_inputs: images (B, C, H, W), or a tuple with them.
        importance: any `tp.importance.Importance`; None: magnitude of the weights per unit.
        budgets: as in `apply_steppingnet`.
        policy: as in `apply_steppingnet`.
        ignored_layers: modules whose output channels stay in every subnet.
        num_heads: {qkv layer: heads}; heads are found without it, a contradiction is an error.
        customized_pruners, unwrapped_parameters, root_module_types: handed to the toolkit's dependency graph, which
            provides the groups that importances score.
        round_to: channels that every level is to add to a layer in multiples of, or "auto", as in `ConstructionConfig`;
            None: as there by default.
        seed: of the "random" policy.

    Attributes:
        net: the SteppingNet; all units are at level 1 until `step`.
        notes: which groups the toolkit could not score, and budgets that could not be used up.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | Sequence[Tensor],
        importance: Callable[..., Tensor] | None = None,
        budgets: Sequence[float | int | str] = (),
        policy: str = "steppingnet",
        ignored_layers: Sequence[nn.Module] | None = None,
        num_heads: dict[nn.Module, int] | None = None,
        customized_pruners: dict[Any, Any] | None = None,
        unwrapped_parameters: Any = None,
        root_module_types: Sequence[type] = (nn.Conv2d, nn.Linear),
        round_to: int | str | None = None,
        seed: int = 0,
    ) -> None:
        images: Any = example_inputs[0] if isinstance(example_inputs, (tuple, list)) else example_inputs
        model = unwrap(model)
        self.notes: list[str] = []
        names = {module: name for name, module in model.named_modules()}
        scores = torch.empty(0)

        def adapt(analysis: Analysis) -> Analysis:
            nonlocal scores
            _check_heads(analysis, {names.get(m, "?"): heads for m, heads in (num_heads or {}).items()})
            scores = self._score(
                model, images, analysis, importance, customized_pruners, unwrapped_parameters, root_module_types
            )
            analysis, scores = _without_ignored(analysis, scores, [names.get(m) for m in ignored_layers or ()])
            return analysis

        config = ConstructionConfig(expansion=1.0)
        if round_to is not None:
            config = dataclasses.replace(config, round_to=round_to)
        self.net = convert(model, budgets, config, images, adapt=adapt, seed=seed).train(model.training)
        plan = one_shot(self.net, policy, scores=scores, round_to=fixed_round_to(config, model), seed=seed)
        self._plan, self.budgets = plan.levels, self.net.budgets
        self.notes += self.net.notes + plan.notes
        self.net.notes = list(self.notes)

    def step(self, interactive: bool = False) -> Iterator[UnitMove] | None:
        """Move the units to their subnets.

        Args:
            interactive: return the moves instead, one per group and level; those whose `prune()` is called are
                carried out, the others stay where they are.
        """
        if interactive:
            return self._moves()
        self.net.set_levels(self._plan)
        return None

    def _moves(self) -> Iterator[UnitMove]:
        for group in self.net.analysis.groups:
            planned = self._plan[group.units]
            for level in range(2, self.net.num_subnets + 2):
                units = group.units[planned == level]
                if len(units):
                    yield UnitMove(group.name, group.weights, units, level, self._carry_out)

    def _carry_out(self, move: UnitMove) -> None:
        levels = self.net.levels
        levels[move.units] = move.level
        self.net.set_levels(levels)

    def _score(
        self,
        model: nn.Module,
        images: Tensor,
        analysis: Analysis,
        importance: Callable[..., Tensor] | None,
        customized_pruners: dict[Any, Any] | None,
        unwrapped_parameters: Any,
        root_types: Sequence[type],
    ) -> Tensor:
        """Score per unit: the importance of the toolkit's group, averaged over the unit's channels and its layers."""
        fallback = magnitude_scores(model, analysis)
        if importance is None:
            return fallback
        graph = _dependency_graph(model, images, customized_pruners, unwrapped_parameters)
        modules: dict[str, Any] = dict(model.named_modules())
        total, count = (
            torch.zeros(analysis.num_units, dtype=torch.float64),
            torch.zeros(analysis.num_units, dtype=torch.float64),
        )
        for weight, (units, _) in analysis.weight_units.items():
            module = modules.get(weight.removesuffix(".weight"))
            if not isinstance(module, tuple(root_types)) or not bool((units >= 0).any()):
                continue
            assert isinstance(module, nn.Module)
            found = _group_scores(graph, module, len(units), importance)
            if found is None:
                self.notes.append(
                    f"torch-pruning cannot score {weight.removesuffix('.weight')}; magnitude is used there."
                )
                continue
            known = units >= 0
            share = found.double().cpu() / found.double().abs().mean().clamp(min=1e-30).cpu()
            total.index_add_(0, units[known], share[known])
            count.index_add_(0, units[known], torch.ones(int(known.sum()), dtype=torch.float64))
        return torch.where(count > 0, total / count.clamp(min=1), fallback.double())


def _dependency_graph(model: nn.Module, images: Tensor, customized: Any, unwrapped: Any) -> tp.DependencyGraph:
    modes = {m: m.training for m in model.modules()}
    try:
        with torch.enable_grad():
            return tp.DependencyGraph().build_dependency(
                model,
                example_inputs=images,
                customized_pruners=dict(customized or {}),
                unwrapped_parameters=unwrapped,
            )
    except Exception as error:
        raise SteppingError(
            f"torch-pruning cannot build its dependency graph of {type(model).__name__} ({type(error).__name__}: "
            f"{error}), so its importances cannot be asked. Leave importance out to rank units by the magnitude of "
            "their weights."
        ) from error
    finally:
        for module, training in modes.items():  # build_dependency leaves the model in eval mode
            module.training = training


def _group_scores(
    graph: tp.DependencyGraph, module: nn.Module, channels: int, importance: Callable[..., Tensor]
) -> Tensor | None:
    """(channels,) scores of a layer's output channels, or None where the toolkit fails."""
    prune = tp.prune_linear_out_channels if isinstance(module, nn.Linear) else tp.prune_conv_out_channels
    try:
        scores = importance(graph.get_pruning_group(module, prune, idxs=list(range(channels))))
    except (IndexError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None  # the toolkit's groups are wrong on some models (docs of `witness`)
    return scores if scores is not None and scores.shape == (channels,) and bool(scores.isfinite().all()) else None


def _check_heads(analysis: Analysis, num_heads: dict[str, int]) -> None:
    for name, heads in num_heads.items():
        if f"{name}.weight" not in analysis.weight_units:
            continue
        found = len(torch.unique(analysis.weight_units[f"{name}.weight"][0]))
        if found != heads:
            raise SteppingError(
                explain(
                    "heads do not fit",
                    where=f"num_heads[{name}]",
                    got=heads,
                    expected=f"{found}, as the model computes",
                )
            )


def _without_ignored(analysis: Analysis, scores: Tensor, ignored: Sequence[str | None]) -> tuple[Analysis, Tensor]:
    made = [analysis.weight_units[f"{name}.weight"][0] for name in ignored if f"{name}.weight" in analysis.weight_units]
    if not made:
        return analysis, scores
    units = torch.unique(torch.cat(made))
    kept = torch.ones(analysis.num_units, dtype=torch.bool)
    kept[units[units >= 0]] = False
    return pin_units(analysis, ~kept, "ignored_layers"), scores[kept]
