"""torch-pruning: its account of coupled channels for our analysis, our importance for its pruners."""

from stepping_plugin.integrations.torch_pruning.importance import SteppingImportance
from stepping_plugin.integrations.torch_pruning.witness import ToolkitCouplings, toolkit_couplings

__all__ = ["SteppingImportance", "ToolkitCouplings", "toolkit_couplings"]
