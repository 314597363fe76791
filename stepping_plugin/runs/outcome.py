"""What a run found, as the plain data of its report."""

from __future__ import annotations

from typing import Any

from ..net import SteppingNet
from ..views.summary import units_per_level
from .machine import describe_machine
from .recipe import dump_recipe
from .recipe_schema import Recipe

__all__ = ["report_data"]


def report_data(
    recipe: Recipe, net: SteppingNet, accuracies: dict[str, list[float]], reference: float | None
) -> dict[str, Any]:
    """The report's data: see `report`."""
    subnets = [
        {
            "subnet": i + 1,
            "macs": net.macs[i],
            "share": net.macs[i] / net.reference_macs,
            "budget": net.budgets[i],
            "accuracy": accuracies["after"][i],
            "accuracy_before_retraining": accuracies["before"][i],
        }
        for i in range(net.num_subnets)
    ]
    layers = [
        {"name": g.name, "units_per_level": units_per_level(net.levels, g, net.num_subnets)}
        for g in net.analysis.groups
    ]
    return {
        "title": f"{recipe.model.name or recipe.model.net} on {recipe.data.name}",
        "original": {"macs": net.reference_macs, "accuracy": reference},
        "subnets": subnets,
        "layers": layers,
        "contribution": net.contribution and net.contribution.model_dump(),
        "notes": net.notes,
        "recipe": dump_recipe(recipe),
        "seed": recipe.seed,
        "machine": describe_machine(),
    }
