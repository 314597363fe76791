"""Importance of units from gradients (paper III-A2, Eq. 2 and 3).

The paper multiplies the weighted input of neuron j by a factor r_j (Eq. 1), which is 1, and asks for the
gradient of the cost L_k of every subnet with respect to it (Eq. 2). No factor has to run: with z the
weighted input without bias,

    dL_k/dr_j = sum over samples and positions of z * dL_k/dz = sum over the incoming weights of w * dL_k/dw.

Where a norm follows, r_j stands behind it: batch norm undoes any factor before it, so that the gradient
there is 0 (in train mode). With z = gamma * (x - mean) / sigma, the norm's output without beta, it is

    dL_k/dr_j = sum over samples and positions of z * dL_k/dz = gamma * dL_k/dgamma.

A unit may have many channels in many layers (a residual stream, an attention head); r_j multiplies all of
them, and its gradient is the sum over them. The units of subnet i are ranked by

    M_j = sum_{k >= i} alpha_k |dL_k/dr_j|,  alpha_k = alpha^(k - 1).
    (Eq. 3)

The absolute value is taken per sample, or, as in the paper, per batch; never after adding up batches, in
which gradients of either sign cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.program import call_arg, op_name
from ..nested.build import NestedGraph
from ..nested.net import NestedNet

__all__ = ["GradientImportance", "Site", "find_sites"]

_NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "prefix_norm")
# What passes a positive factor on a channel unchanged: views, sums, pools.
_PASSING = {
    "add.Tensor", "sub.Tensor", "cat", "stack", "mul.Scalar", "div.Scalar", "clone", "contiguous", "alias",
    "dropout", "feature_dropout", "to.dtype", "_to_copy", "reshape", "view", "permute", "transpose.int", "t",
    "unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims", "expand", "flatten.using_ints", "unflatten.int",
    "slice.Tensor", "select.int", "roll", "flip", "index.Tensor", "index_select", "narrow", "pixel_shuffle",
    "pixel_unshuffle", "im2col", "pad", "constant_pad_nd", "relu", "leaky_relu", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d",
}  # fmt: skip
_SCALING = ("mul.Tensor", "div.Tensor")  # pass it unless the other operand is computed and belongs to units


@dataclass(frozen=True)
class Site:
    """A place of r_j: the output of a weight or norm, of which `bias` is to be taken off.

    `units` holds the unit per position of `axis`, -1 for none; `bias_axis` is the axis of a bias vector,
    None if the bias broadcasts as it is.
    """

    node: fx.Node
    axis: int
    units: Tensor
    bias: fx.Node | None
    bias_axis: int | None

    def weighted_input(self, output: Tensor, bias: Tensor | None) -> Tensor:
        """z, detached, in float32 or better."""
        output = output.detach().to(torch.promote_types(output.dtype, torch.float32))
        if bias is None:
            return output
        if self.bias_axis is not None:
            bias = bias.reshape([-1 if d == self.bias_axis else 1 for d in range(output.dim())])
        return output - bias.detach()

    def per_unit(self, product: Tensor, batch: int, num_units: int) -> Tensor:
        """Sum z * dL/dz over positions and channels, (batch, num_units)."""
        product = product.movedim(self.axis, 1).flatten(2) if product.dim() > 2 else product.unsqueeze(-1)
        channels = product.sum(2, dtype=_precise(product.device))
        channels = channels.reshape(batch, -1, channels.shape[1]).sum(1)  # windows or tokens joined with the batch
        movable = (self.units >= 0).nonzero().flatten()
        total = channels.new_zeros(batch, num_units)
        return total.index_add_(1, self.units[movable].to(total.device), channels[:, movable.to(total.device)])


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which knows no float64


class GradientImportance:
    """Collects |dL_k/dr_j| over batches.

        importance = GradientImportance(net, "per-sample")
        importance.add(images, losses)      # for some batches
        importance.gradients                # float64 (N, num_units)

    Args:
        net: the levels that it has when `add` is called count.
        estimator: "per-sample" or "per-batch": where the absolute value is taken.
        reduce: mean over all processes of a tensor, in distributed training. Every process must call `add`
            for its share of the same batch.
    """

    def __init__(
        self,
        net: NestedNet,
        estimator: str = "per-sample",
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.net, self.per_sample = net, estimator == "per-sample"
        self.reduce = reduce or (lambda tensor: tensor)
        self.training = True in net._graphs
        self.module = net._graphs[self.training].module
        self.sites = find_sites(net._graphs[self.training])
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.total = torch.zeros(self.net.num_subnets, self.net.analysis.num_units, dtype=torch.float64)
        self.batches = 0

    @property
    def gradients(self) -> Tensor:
        """Mean of |dL_k/dr_j| over the batches, float64 (N, num_units); 0 for units not in subnet k.

        Per sample, a gradient is that of the sample's share of the mean loss, and they are added up.
        """
        return self.total / max(1, self.batches)

    def add(self, images: Tensor, losses: Callable[[Any], Tensor]) -> None:
        """One forward and N backward passes, which change no parameter, gradient or statistic of a norm.

        Args:
            images: (B, C, H, W).
            losses: from class scores (N, B, classes), or the outputs that the model has, to L_1..L_N, each a mean over
                the batch.
        """
        with torch.enable_grad():
            recorder = _Recorder(self.module, self.sites)
            structure = self.net._graphs[self.training].structure
            values = losses(structure.build(recorder.run(images, *self._inputs())[: structure.count]))
        numbers = range(len(self.sites))
        outputs = [recorder.outputs[s] for s in numbers]
        inputs = [self.sites[s].weighted_input(outputs[s], recorder.biases[s]) for s in numbers]
        for k in range(self.net.num_subnets):
            last = k == self.net.num_subnets - 1
            gradients = torch.autograd.grad(values[k], outputs, retain_graph=not last, allow_unused=True)
            found = torch.zeros(
                len(images), self.net.analysis.num_units, dtype=_precise(images.device), device=images.device
            )
            for site, value, gradient in zip(self.sites, inputs, gradients):
                if gradient is not None:  # else the subnet does not use this layer
                    found += site.per_unit(value * gradient, len(images), found.shape[1])
            if self.per_sample:
                self.total[k] += self.reduce(found.abs().sum(0)).cpu()
            else:
                self.total[k] += self.reduce(found.sum(0)).abs().cpu()
        self.batches += 1

    def _inputs(self) -> list[Tensor]:
        """Inputs of the graph; the model's buffers as copies, since norms in train mode write to theirs."""
        graph = self.net._graphs[self.training]
        tensors = self.net._tensors(graph, self.training)
        return [
            t.clone() if kind == "tensor" and not isinstance(t, torch.nn.Parameter) else t
            for (kind, _), t in zip(graph.inputs, tensors)
        ]


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


# ------------------------------------------------------------------------------------------------- sites


def find_sites(nested: NestedGraph) -> list[Site]:
    """Where r_j stands in a nested graph: behind weights, or behind the norms that their outputs go to.

    A weight whose output only norms read, by whatever views and sums it gets there, has no site of its own.
    A norm is a site only if it stands in for a weight.
    """
    graph = nested.module.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"][1:]
    masks = {n for n, (kind, _) in zip(placeholders, nested.inputs) if kind == "mask"}
    chosen: set[fx.Node] = set()
    for node in graph.nodes:
        if _makes_units(node, masks):
            readers = _readers(node)
            normalised = bool(readers) and all(op_name(r) in _NORMS and _units(r) is not None for r in readers)
            chosen |= readers if normalised else {node}
    return [_site(n) for n in graph.nodes if n in chosen]


def _site(node: fx.Node) -> Site:
    name = op_name(node)
    if name == "prefix_norm":
        bias = node.args[6]
    else:
        bias = None if name == "rms_norm" else call_arg(node, "bias")
    bias_axis = 1 if name.startswith("conv") or name in ("batch_norm", "group_norm") else None
    units = _units(node)
    assert units is not None
    return Site(node, node.meta["axis"], units, bias, bias_axis)  # type: ignore[arg-type]


def _units(node: fx.Node) -> Tensor | None:
    return node.meta.get("units")


def _makes_units(node: fx.Node, masks: set[fx.Node]) -> bool:
    """Convolution or linear that makes units: its weight is masked, or its groups are units."""
    if node.op != "call_function" or _units(node) is None:
        return False
    name = op_name(node)
    if name != "linear" and not name.startswith("conv"):
        return False
    weight: fx.Node = node.args[1]  # type: ignore[assignment]
    grouped = name != "linear" and call_arg(node, "groups", 1) > 1 and node.meta["axis"] == 1
    return grouped or any(source in masks for source in weight.all_input_nodes)


def _readers(node: fx.Node) -> set[fx.Node]:
    """Operators that a factor on a weight's output reaches as a factor, and that do more than pass it on."""
    found: set[fx.Node] = set()
    pending, seen = [node], {node}
    while pending:
        source = pending.pop()
        for user in source.users:
            if user not in seen:
                seen.add(user)
                (pending.append if _passes(user, source) else found.add)(user)
    return found


def _passes(user: fx.Node, source: fx.Node) -> bool:
    if user.op != "call_function":
        return False
    if op_name(user) in _SCALING:
        others = [n for n in user.all_input_nodes if n is not source]
        return all(n.op == "placeholder" or _units(n) is None for n in others)
    return op_name(user) in _PASSING
