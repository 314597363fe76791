"""A subnet as a module of its own, physically without the units that it does not contain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..graph.program import named_tensors
from ..units.analysis import Analysis, restrict
from .module import NestedModule, direct_weights, sliced_copy

__all__ = ["Subnet", "extract_subnet"]


class Subnet(NestedModule):
    """Subnet i as a standalone module: images (B, C, H, W) to class scores (B, classes), or whatever the model returns.

    Dead synapses are zeros in its weights, and dense kernels multiply them: it executes more MACs than the subnet is
    named for (`SteppingNet.summary` shows both numbers). Training it further may revive them: the result is an ordinary
    network, not a subnet any more.
    """

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


def extract_subnet(model: nn.Module, analysis: Analysis, levels: Tensor, subnet: int) -> Subnet:
    """Cut subnet `subnet` out of a nested net.

    Args:
        model: owner of the parameters; not modified.
        analysis: its units.
        levels: LongTensor (num_units,).
        subnet: 1..N.
    """
    kept = levels <= subnet
    restricted, slices = restrict(analysis, kept.long())
    model = sliced_copy(model, slices)
    result = Subnet(model, restricted, subnet, standalone=True)
    result.refresh(levels[kept])
    tensors = named_tensors(model)
    with torch.no_grad():
        for name in direct_weights(restricted):
            tensors[name].mul_(result.live_mask(name, levels[kept]).to(tensors[name].device))
    for buffer in [b for b in result._buffers if b.startswith("_mask_")]:
        if not any(
            kind == "mask" and result._masks[name] == buffer for g in result._graphs.values() for kind, name in g.inputs
        ):
            del result._buffers[buffer]
    return result
