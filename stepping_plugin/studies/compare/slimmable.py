"""Slimmable networks (Yu et al. 2019, https://arxiv.org/abs/1812.08928), written from the paper, for any model with
known units.

One set of weights, N widths. A net of width i is *dense*: all of its units read all of its units, so nothing of a
smaller net can be reused by a larger one. Norms are switchable: every width has its own (their statistics differ
because their inputs do). A training step runs every width and adds up the losses (algorithm 1 there).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...graph.program import named_tensors
from ...nested.module import sliced_copy
from ...nested.subnet import Subnet
from ...units.analysis import Analysis, restrict

__all__ = ["Slimmable"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


class Slimmable(nn.Module):
    """N dense nets in one set of weights.

    Args:
        model: initial weights; not modified.
        analysis: its units.
        widths: one BoolTensor (num_units,) per net, ascending, from `dense.dense_units`.
    """

    def __init__(self, model: nn.Module, analysis: Analysis, widths: Sequence[Tensor]) -> None:
        super().__init__()
        union = torch.stack(list(widths)).any(0)
        shared, slices = restrict(analysis, union.long())
        self.model = sliced_copy(model, slices)
        private = _norm_tensors(self.model)
        self.shared = [name for name, _ in self.model.named_parameters() if name not in private]
        self._slices = []
        nets = []
        for width in widths:
            own, cut = restrict(shared, width[union].long())
            net = Subnet(sliced_copy(self.model, cut), own, 1, standalone=True)
            net.refresh(torch.ones(own.num_units, dtype=torch.long))
            self._slices.append(cut)
            nets.append(net)
        self.nets = nn.ModuleList(nets)
        for module in (self.model, *(net.model for net in nets)):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_((name in private) != (module is self.model))

    def forward_all(self, x: Tensor) -> Tensor:
        """Class scores (N, B, classes) of all widths for images (B, C, H, W): N passes."""
        return torch.stack([self.run(i, x) for i in range(1, len(self.nets) + 1)])

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, classes) of the widest net."""
        return self.run(len(self.nets), x)

    def run(self, width: int, x: Tensor) -> Tensor:
        """Class scores (B, classes) of net `width`, 1..N."""
        return functional_call(self.nets[width - 1], self._weights(width), (x,))

    def _weights(self, width: int) -> dict[str, Tensor]:
        slices, tensors = self._slices[width - 1], {}
        for name in self.shared:
            weight = self.model.get_parameter(name)
            tensors[f"model.{name}"] = slices[name].apply(weight) if name in slices else weight
        return tensors

    def extract(self, width: int) -> Subnet:
        """Net `width` (1..N) as a module of its own, with a copy of its weights."""
        net = copy.deepcopy(self.nets[width - 1])
        assert isinstance(net, Subnet)
        with torch.no_grad():
            for name, value in self._weights(width).items():
                net.get_parameter(name).copy_(value)
        return net.requires_grad_(True)

    def stored(self) -> int:
        """Numbers that have to be stored: the widest net's weights, and the norms of every width."""
        own = [named_tensors(net)[f"model.{name}"] for net in self.nets for name in _norm_tensors(self.model)]
        return sum(t.numel() for t in [*own, *(self.model.get_parameter(name) for name in self.shared)])


def _norm_tensors(model: nn.Module) -> list[str]:
    """Names of the parameters and statistics of all norms."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, _NORMS):
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            found += [f"{path}.{name}" for name, tensor in tensors if tensor.is_floating_point()]
    return found
