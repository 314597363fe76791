"""What test_toolkit_witness.py and test_toolkit_walk.py share."""

from torch import nn

from stepping_plugin.integrations.torch_pruning.walk import IN, OUT, State


def state(name: str, width: int | None) -> State:
    return State(name, nn.Identity(), (OUT, IN), width)
