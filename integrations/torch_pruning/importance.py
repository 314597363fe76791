"""The paper's neuron importance (Eq. 2 and 3) as an importance of torch-pruning, for any of its pruners.

Eq. 2 puts a gate r = 1 on the weighted sum of neuron j and takes dL/dr. No gate is needed for that:

    dL/dr_j = sum over incoming weights of w * dL/dw.

Behind a norm this is no measure: batch norm undoes the scale of a channel, so a gate before it has gradient
zero in train mode. The gate then goes behind the norm, where it is gamma * dL/dgamma. Eq. 3 adds up absolute
values over the subnets that contain the neuron, M_j = sum over k of alpha^(k-1) * |dL_k/dr_j|; here also
over batches, and never the other way round: signs of different batches would cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner import function

from stepping_plugin.errors import SteppingError, explain

__all__ = ["SteppingImportance"]

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
)
_LAYER_OUTPUTS = (
    function.prune_conv_out_channels,
    function.prune_depthwise_conv_out_channels,
    function.prune_linear_out_channels,
)
_REDUCTIONS = ("mean", "sum", "max", "first")
_NORMALIZERS = (None, "mean", "sum", "max")


class SteppingImportance(tp.importance.Importance):
    """Importance of channels from the gradients of one or several losses.

    >>> importance = SteppingImportance()                                      # doctest: +SKIP
    >>> for images, labels in batches:
    ...     model.zero_grad()
    ...     loss(model(images), labels).backward()
    ...     importance.accumulate(model)
    >>> tp.pruner.BasePruner(model, images, importance, pruning_ratio=0.5).step()

    A group is scored by the norms in it and by the convolutions and linear layers in it whose outputs reach
    another layer past no norm. A residual stream has several; ``reduction`` makes one score of theirs.

    Args:
        alpha: weight of each larger subnet's loss relative to the next smaller one (Eq. 3; the paper's 1.5).
        reduction: "mean", "sum" or "max" over the layers of a group that score a channel; "first": the first
        only.
        bias: the gate also scales the bias (and a norm's beta). Eq. 2 leaves it out.
        normalizer: divide the scores of a group by their "mean", "sum" or "max", which makes groups
        comparable
            under global pruning; None keeps the values of Eq. 3.
    """

    def __init__(
        self,
        alpha: float = 1.5,
        reduction: str = "mean",
        bias: bool = False,
        normalizer: str | None = None,
    ) -> None:
        for name, value, valid in (
            ("reduction", reduction, _REDUCTIONS),
            ("normalizer", normalizer, _NORMALIZERS),
        ):
            if value not in valid:
                raise SteppingError(explain(f"unknown {name}", got=value, expected=f"one of {valid}"))
        if not alpha > 0:
            raise SteppingError(explain("alpha weighs losses", got=alpha, expected="a number above 0"))
        self.alpha = alpha
        self.reduction = reduction
        self.bias = bias
        self.normalizer = normalizer
        self._terms: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()

    def zero(self) -> None:
        """Forgets everything accumulated."""
        self._terms.clear()

    @torch.no_grad()
    def accumulate(self, model: nn.Module, subnet: int = 1) -> None:
        """Adds the terms of one loss: call after each ``loss.backward()``, with gradients of that loss alone.

        Args:
            model: the model that holds the gradients. Parameters without one (frozen) do not score.
            subnet: number (1..N) of the subnet whose loss it was; its terms weigh alpha^(subnet - 1).

        Raises:
            SteppingError: no gradients, or no such subnet.
        """
        if subnet < 1:
            raise SteppingError(explain("subnets count from 1", got=subnet, expected="1 to N"))
        found = False
        for module in model.modules():
            term = _gate_gradient(module, self.bias)
            if term is not None:
                found = True
                term = self.alpha ** (subnet - 1) * term.abs()
                known = self._terms.get(module)
                self._terms[module] = term if known is None else known + _checked(known, term, module)
        if not found:
            raise SteppingError(explain("no gradients to accumulate", action="Call accumulate after loss.backward()."))

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Scores of a group's root channels.

        Args:
            group: a ``torch_pruning.dependency.Group``, over all or some channels of its root.

        Returns:
            (R,) one score per root index, in the order in which the group was asked for; None when nothing
            in the group scores (all frozen), which pruners take for "leave it alone".
        """
        if not self._terms:
            raise SteppingError(
                explain(
                    "nothing has been accumulated yet",
                    where=type(self).__name__,
                    action="Call accumulate(model) after each loss.backward(), then prune.",
                )
            )
        # A root that is tied to itself (inputs of a flattened map) lists root indices again for what follows.
        root = {channel: row for row, channel in enumerate(dict.fromkeys(group[0].root_idxs))}
        scores, rows = [], []
        for k in range(len(group)):
            dep, idxs = group[k]
            if not self._scores(dep) or any(channel not in root for channel in group[k].root_idxs):
                continue  # a toolkit mapping that has lost its root indices says nothing about them
            term = self._terms[dep.target.module]
            _checked(term, dep.target.module.weight, dep.target.module)
            scores.append(term[idxs])
            rows.append(torch.tensor([root[channel] for channel in group[k].root_idxs], device=term.device))
        if not scores:
            return None
        return self._normalized(self._reduced(scores, rows, len(root)))

    def _scores(self, dep: Any) -> bool:
        """Whether this member of a group carries a gate."""
        module = dep.target.module
        if not isinstance(module, nn.Module) or module not in self._terms:
            return False
        if isinstance(module, _NORMS):
            return True
        return dep.handler in _LAYER_OUTPUTS and not self._norm_follows(dep.target)

    def _norm_follows(self, node: Any) -> bool:
        """Whether every way from a layer's output meets a scoring norm before another layer or the end."""
        todo, seen = list(node.outputs), set()
        if not todo:
            return False
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node.module, _NORMS) and node.module in self._terms:
                continue
            if isinstance(node.module, (*_LAYERS, nn.MultiheadAttention)) or not node.outputs:
                return False
            todo += node.outputs
        return True

    def _reduced(self, scores: Sequence[Tensor], rows: Sequence[Tensor], count: int) -> Tensor:
        if self.reduction == "first":
            scores, rows = scores[:1], rows[:1]
        total = scores[0].new_zeros(count)
        if self.reduction == "max":
            for score, row in zip(scores, rows):
                total.scatter_reduce_(0, row, score, "amax")
            return total
        layers = torch.zeros_like(total)
        for score, row in zip(scores, rows):
            total.index_add_(0, row, score.to(total))
            layers[row] += 1
        return total / layers.clamp(min=1) if self.reduction == "mean" else total

    def _normalized(self, scores: Tensor) -> Tensor:
        if self.normalizer is None:
            return scores
        size = getattr(scores, self.normalizer)()
        return scores / size if size > 0 else scores


def _gate_gradient(module: nn.Module, with_bias: bool) -> Tensor | None:
    """dL/dr (signed) per output channel of a layer or an affine norm with gradients, else None."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, (*_LAYERS, *_NORMS)) or weight is None or weight.grad is None:
        return None
    term = _per_channel(module, weight * weight.grad)
    bias = getattr(module, "bias", None)
    if with_bias and bias is not None and bias.grad is not None:
        term = term + _per_channel(module, bias * bias.grad)
    return term


def _per_channel(module: nn.Module, product: Tensor) -> Tensor:
    """Sums a parameter-shaped tensor to (channels,)."""
    if isinstance(module, nn.LayerNorm):  # the toolkit's channels are its last dimension
        return product.reshape(-1, product.shape[-1]).sum(0)
    if getattr(module, "transposed", False) and product.dim() > 1:  # (in, out / groups, *kernel)
        grouped = product.unflatten(0, (module.groups, -1))
        return grouped.flatten(3).sum((1, 3)).flatten()
    return product.flatten(1).sum(1) if product.dim() > 1 else product


def _checked(term: Tensor, now: Tensor, module: nn.Module) -> Tensor:
    """``now`` if the layer still is as wide as when ``term`` was accumulated."""
    width = getattr(module, "out_channels", None) or getattr(module, "out_features", None) or now.shape[-1]
    if len(term) != width:
        raise SteppingError(
            explain(
                f"{type(module).__name__} has changed its width since importance was accumulated",
                got=f"{width} channels",
                expected=str(len(term)),
                action="Call zero() after pruning and accumulate again.",
            )
        )
    return now
