"""Importance of units from gradients (paper III-A2, Eq. 2 and 3).

The paper multiplies the weighted input of neuron j by a factor r_j (Eq. 1), which is 1, and asks for the gradient of the
cost L_k of every subnet with respect to it (Eq. 2). No factor has to run: with z the weighted input without bias,

    dL_k/dr_j = sum over samples and positions of z * dL_k/dz = sum over the incoming weights of w * dL_k/dw.

Where a norm follows, r_j stands behind it: batch norm undoes any factor before it, so that the gradient there is 0 (in
train mode). With z = gamma * (x - mean) / sigma, the norm's output without beta, it is

    dL_k/dr_j = sum over samples and positions of z * dL_k/dz = gamma * dL_k/dgamma.

A unit may have many channels in many layers (a residual stream, an attention head); r_j multiplies all of them, and its
gradient is the sum over them. The units of subnet i are ranked by

    M_j = sum_{k >= i} alpha_k |dL_k/dr_j|,  alpha_k = alpha^(k - 1).                                            (Eq. 3)

The absolute value is taken per sample, or, as in the paper, per batch; never after adding up batches, in which gradients
of either sign cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.program import call_arg, op_name
from ..net import SteppingNet
from ..nested import functional

__all__ = ["GradientImportance", "Site", "find_sites"]

# What lets a factor on a channel pass as a factor: views, sums, pools, products with something that carries no units.
_PASSING = frozenset(
    "add.Tensor sub.Tensor cat stack mul.Scalar div.Scalar neg clone contiguous alias dropout feature_dropout _to_copy to.dtype "
    "reshape view permute transpose.int t unsqueeze squeeze squeeze.dim squeeze.dims expand flatten.using_ints unflatten.int "
    "slice.Tensor select.int roll flip index.Tensor index_select getitem chunk split.Tensor split_with_sizes unbind.int "
    "avg_pool2d adaptive_avg_pool2d mean.dim pixel_shuffle pixel_unshuffle im2col pad constant_pad_nd".split()
)
_NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "prefix_norm")
_BIAS = {"prefix_norm": 6}  # place of the bias among the arguments of operators without a schema


@dataclass(frozen=True)
class Site:
    """A place of r_j: output of a weight or norm, `bias` to be taken off it, and the unit per channel (-1: none)."""

    node: fx.Node
    bias: fx.Node | None
    axis: int
    units: Tensor


class GradientImportance:
    """Collects |dL_k/dr_j| over batches.

        importance = GradientImportance(net, "per-sample")
        importance.add(images, losses)      # for some batches
        importance.gradients                # float64 (N, num_units)

    Args:
        net: the levels that it has when `add` is called count.
        estimator: "per-sample" or "per-batch": where the absolute value is taken.
        reduce: mean over all processes of a tensor, in distributed training. Every process must call `add` for its
            share of the same batch.
    """

    def __init__(
        self, net: SteppingNet, estimator: str = "per-sample", reduce: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.net, self.per_sample = net, estimator == "per-sample"
        self.reduce = reduce or (lambda tensor: tensor)
        self.training = True in net._graphs
        self.module = net._graphs[self.training].module
        self.sites = find_sites(self.module.graph)
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.total = torch.zeros(self.net.num_subnets, self.net.analysis.num_units, dtype=torch.float64)
        self.batches = 0

    @property
    def gradients(self) -> Tensor:
        """Mean of |dL_k/dr_j| over the batches, float64 (N, num_units) on the CPU; 0 for units not in subnet k.

        Per sample it is the mean over samples of the gradient of a sample's own loss (times the loss's weight).
        """
        return self.total / max(1, self.batches)

    def add(self, images: Tensor, losses: Callable[[Tensor], Tensor]) -> None:
        """One forward and N backward passes; parameters, their gradients and statistics of norms stay as they are.

        Args:
            images: (B, C, H, W).
            losses: from class scores (N, B, classes) to L_1..L_N, each a mean over the batch.
        """
        with torch.enable_grad():
            recorder = _Recorder(self.module, self.sites)
            scores = recorder.run(images, *self._inputs())[0]
            values = losses(scores)
        outputs = [recorder.outputs[site] for site in range(len(self.sites))]
        inputs = [_weighted_input(output, recorder.biases[s], self.sites[s].axis) for s, output in enumerate(outputs)]
        for k in range(self.net.num_subnets):
            last = k == self.net.num_subnets - 1
            gradients = torch.autograd.grad(values[k], outputs, retain_graph=not last, allow_unused=True)
            self.total[k] += self._magnitude(inputs, gradients, len(images))
        self.batches += 1

    def _inputs(self) -> list[Tensor]:
        """Inputs of the graph; buffers as copies, since norms in train mode write to theirs."""
        graph = self.net._graphs[self.training]
        tensors = self.net._tensors(graph, self.training)
        return [t if isinstance(t, torch.nn.Parameter) else t.clone() for t in tensors]

    def _magnitude(self, inputs: list[Tensor], gradients: tuple[Tensor | None, ...], batch: int) -> Tensor:
        """|dL_k/dr_j| of one batch, summed over samples or taken of their sum, float64 (num_units,)."""
        total = torch.zeros(batch, self.net.analysis.num_units, dtype=torch.float64, device=self.net.unit_levels.device)
        for site, value, gradient in zip(self.sites, inputs, gradients):
            if gradient is None:  # the subnet does not use this layer
                continue
            product = (value * gradient).movedim(site.axis, 1)
            product = product.reshape(batch, -1, *product.shape[1:]) if len(product) != batch else product.unsqueeze(1)
            per_channel = product.transpose(1, 2).flatten(2).sum(2).double()  # (B, channels)
            movable = site.units >= 0
            units = site.units[movable].to(total.device)
            total.index_add_(1, units, per_channel[:, movable.to(total.device)])
        if self.per_sample:
            return self.reduce(total.abs().sum(0)).cpu()
        return self.reduce(total.sum(0)).abs().cpu()


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the outputs and biases of the sites."""

    def __init__(self, module: fx.GraphModule, sites: list[Site]) -> None:
        super().__init__(module)
        self.index = {site.node: number for number, site in enumerate(sites)}
        self.sites = sites
        self.outputs: dict[int, Tensor] = {}
        self.biases: dict[int, Tensor | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.index:
            number = self.index[n]
            bias = self.sites[number].bias
            if not result.requires_grad:  # frozen parameters: nothing before this needs a gradient
                result = result.detach().requires_grad_()
            self.outputs[number] = result
            self.biases[number] = None if bias is None else self.env[bias].detach()
        return result


def _weighted_input(output: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """z: the output of a weight or norm without its bias."""
    output = output.detach()
    if bias is None:
        return output
    if bias.dim() == 1:
        bias = bias.reshape([-1 if d == axis else 1 for d in range(output.dim())])
    return output - bias


# ------------------------------------------------------------------------------------------------- sites


def find_sites(graph: fx.Graph) -> list[Site]:
    """Where r_j stands: behind every weight whose output is used as it is, and behind every norm, but not both.

    A weight whose output only norms read, by whatever sums and views it gets there, is left out in favour of those norms.
    A norm counts only if it takes the place of a weight like that.
    """
    weights = [n for n in graph.nodes if _is_weighted(n) and _units(n) is not None]
    own, norms = [], set()
    for node in weights:
        readers = _readers(node)
        if readers and all(op_name(r) in _NORMS for r in readers):
            norms |= readers
        else:
            own.append(node)
    chosen = set(own) | {n for n in norms if _units(n) is not None}
    return [_site(n) for n in graph.nodes if n in chosen]


def _site(node: fx.Node) -> Site:
    name = op_name(node)
    if name in _BIAS:
        bias = node.args[_BIAS[name]]
    else:
        bias = call_arg(node, "bias") if name != "rms_norm" else None
    return Site(node, bias, node.meta["axis"], node.meta["units"])  # type: ignore[arg-type]


def _is_weighted(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    name = op_name(node)
    return name == "linear" or name.startswith("conv")


def _units(node: fx.Node) -> Tensor | None:
    """Unit per channel if the node carries units along the channels that it makes."""
    units = node.meta.get("units")
    if units is None:
        return None
    if _is_weighted(node):
        own = node.args[1].meta.get("shape")  # type: ignore[union-attr]
        del own
    return units


def _readers(node: fx.Node) -> set[fx.Node]:
    """Operators that do more with a value than to pass it on."""
    found: set[fx.Node] = set()
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.op == "call_function" and op_name(user) in _PASSING:
                pending.append(user)
            else:
                found.add(user)
    return found
