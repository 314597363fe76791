"""Step programs as they run: rewritten so that the kernels are few, work in place and have their constants at hand.

The rewritten graph computes the same function. What a program means, what is saved, exported and counted is the
program; what runs is made from it here, for one device and one type of numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.program import call_arg, op_name
from . import fast, kernels
from .emit import IMAGE, StepProgram

__all__ = ["fuse"]

aten = torch.ops.aten
Function = Callable[..., Any]

# Operators in the form with the least between Python and the kernel.
_DIRECT: dict[Any, Function] = {
    aten.adaptive_avg_pool2d.default: nn.functional.adaptive_avg_pool2d,
    aten.add.Tensor: torch.add,
    aten.cat.default: torch.cat,
    aten.max_pool2d.default: torch.max_pool2d,
    aten.mean.dim: torch.mean,
    aten.mul.Tensor: torch.mul,
    aten.permute.default: torch.permute,
    aten.relu.default: torch.relu,
    aten.reshape.default: torch.reshape,
    aten.scaled_dot_product_attention.default: nn.functional.scaled_dot_product_attention,
    aten.select.int: torch.select,
    aten.transpose.int: torch.transpose,
    aten.unbind.int: torch.unbind,
}
_INTO: dict[Any, Function] = {aten.add.Tensor: fast.add_into, aten.mul.Tensor: fast.multiply_into}
# Operators whose result shares no memory with their operands.
_SEPARATE = {
    *fast.ACTIVATIONS, *_INTO, *_INTO.values(), *kernels.KERNELS.values(), aten.cat.default, aten.mean.dim,
    aten.adaptive_avg_pool2d.default, aten.sum.dim_IntList, aten.conv2d.default, aten.linear.default,
}  # fmt: skip


def fuse(program: StepProgram, dtype: torch.dtype, device: torch.device) -> Function:
    """The function that computes what a step program computes, tensors in and out in the same order.

    Args:
        dtype, device: of everything it computes.
    """
    graph, module = fx.Graph(), program.module
    graph.output(graph.graph_copy(module.graph, {}))
    one_dnn = device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
    constants = dict(module.named_buffers())
    image = program.inputs.index(IMAGE) if IMAGE in program.inputs else None
    _Fuser(graph, constants, one_dnn).run(image)
    used = {n.target for n in graph.nodes if n.op == "get_attr"}
    root = nn.Module()
    for name in used:
        root.register_buffer(name, constants[name])
    function = type(fx.GraphModule(root, graph)).forward
    holder = SimpleNamespace(**{name: constants[name] for name in used})  # cheaper to ask than a module
    return lambda *caches: function(holder, *caches)


class _Fuser:
    """Rewrites one graph in place.

    Args:
        constants: by name.
        one_dnn: see `fast`.
    """

    def __init__(self, graph: fx.Graph, constants: dict[str, Tensor], one_dnn: bool) -> None:
        self.graph, self.constants, self.one_dnn = graph, constants, one_dnn
        self.separate = set(_SEPARATE)

    def run(self, image: int | None) -> None:
        """Rewrite; `image` is the place of the images among the inputs."""
        images = None if image is None else [n for n in self.graph.nodes if n.op == "placeholder"][image]
        cut_only = images is None or all(op_name(user) in ("reshape", "sym_size.int") for user in images.users)
        calls = [n for n in self.graph.nodes if n.op == "call_function"]
        for node in calls:
            if op_name(node) in ("linear", "conv2d"):
                self._weighted(node)
        if images is not None and not cut_only:
            self._lay_out(images)
        self._work_in_place()
        for node in self.graph.nodes:
            if node.op == "call_function":
                node.target = _DIRECT.get(node.target, node.target)
        self.graph.eliminate_dead_code()

    def _lay_out(self, images: fx.Node) -> None:
        """Images come in any layout; the rest follows the layout of its operands. Later steps read them as they are
        then."""
        with self.graph.inserting_after(images):
            packed = self.graph.call_function(fast.channels_last, (images,))
        images.replace_all_uses_with(packed, delete_user_cb=lambda user: user is not packed)

    # -- weights

    def _weighted(self, node: fx.Node) -> None:
        weight, bias = (self._constant(call_arg(node, name)) for name in ("weight", "bias"))
        if weight is None or (bias is None and call_arg(node, "bias") is not None):
            return
        pointwise, further = self._kind(node, weight)
        last, activation = self._activation(node)
        shared = (bias, activation, self.one_dnn)
        inputs = [node.args[0]]
        if further:
            function = fast.convolution(weight, *shared, *further)
        else:
            inputs = self._pieces(inputs[0], (1, -3) if pointwise else (-1,))
            function = (fast.pointwise if pointwise else fast.linear)(weight.flatten(1), *shared, len(inputs))
        self.separate.add(function)
        with self.graph.inserting_before(node):
            new = self.graph.call_function(function, tuple(inputs))
        last.replace_all_uses_with(new)
        for old in (last, node) if last is not node else (node,):
            self.graph.erase_node(old)

    def _constant(self, node: Any) -> Tensor | None:
        return self.constants[node.target] if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def _kind(self, node: fx.Node, weight: Tensor) -> tuple[bool, tuple]:
        """Whether it is a 1x1 convolution, and what else any other convolution takes."""
        if op_name(node) == "linear":
            return False, ()
        stride, padding, dilation = (_pair(call_arg(node, k)) for k in ("stride", "padding", "dilation"))
        groups = call_arg(node, "groups")
        if tuple(weight.shape[2:]) == (1, 1) and groups == 1 and stride == [1, 1] and padding == [0, 0]:
            return True, ()
        return False, (stride, padding, dilation, groups)

    def _activation(self, node: fx.Node) -> tuple[fx.Node, fast.Activation | None]:
        """The activation that alone reads a node."""
        user = next(iter(node.users))
        if len(node.users) != 1 or user.target not in fast.ACTIVATIONS:
            return node, None
        return user, fast.Activation(user.target, tuple(user.args[1:]), dict(user.kwargs))

    def _pieces(self, joined: fx.Node, axes: tuple[int, ...]) -> list[fx.Node]:
        """Slices that are put together along the axis of the inputs for one product only, or else the tensor."""
        if joined.target is not aten.cat.default or len(joined.users) > 1 or joined.args[-1] not in axes:
            return [joined]
        return list(joined.args[0])

    # -- elementwise operators

    def _work_in_place(self) -> None:
        """Operators that may overwrite an operand: one that was made for them, or that nobody reads any more."""
        order = {node: k for k, node in enumerate(self.graph.nodes)}
        for node in list(self.graph.nodes):
            if node.target in fast.ACTIVATIONS and self._is_free(node.args[0], node, order):
                activation = fast.Activation(node.target, tuple(node.args[1:]), dict(node.kwargs))
                node.target, node.args, node.kwargs = fast.in_place(activation), node.args[:1], {}
                self.separate.add(node.target)
            elif node.target in _INTO and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args):
                for own, other in (node.args, node.args[::-1]):
                    if own is not other and self._is_free(own, node, order):
                        node.target, node.args = _INTO[node.target], (own, other)
                        break

    def _is_free(self, value: Any, reader: fx.Node, order: dict[fx.Node, int]) -> bool:
        if not isinstance(value, fx.Node) or value.target not in self.separate:
            return False
        others = [user for user in value.users if user is not reader]
        return all(user.target in self.separate and order[user] < order[reader] for user in others)


def _pair(value: Any) -> list[int]:
    pair = list(value) if isinstance(value, (list, tuple)) else [value]
    return pair * 2 if len(pair) == 1 else pair
