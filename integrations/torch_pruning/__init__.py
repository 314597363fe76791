"""torch-pruning: its account of coupled channels for our analysis, our importance for its pruners, and a pruner.

The names load on first use: the core imports `witness` from here, and the pruner imports the core.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepping_plugin.integrations.torch_pruning.importance import SteppingImportance
    from stepping_plugin.integrations.torch_pruning.pruner import SteppingPruner, UnitMove
    from stepping_plugin.integrations.torch_pruning.witness import ToolkitCouplings, toolkit_couplings

__all__ = ["SteppingImportance", "SteppingPruner", "ToolkitCouplings", "UnitMove", "toolkit_couplings"]

_HOME = {
    "SteppingImportance": "importance",
    "SteppingPruner": "pruner",
    "ToolkitCouplings": "witness",
    "UnitMove": "pruner",
    "toolkit_couplings": "witness",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
