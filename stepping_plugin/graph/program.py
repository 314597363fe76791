"""A captured model: a functional ATen graph of one result per node, whose tensors are named.

Every other part of the package reads models through `Program`: the labels live on its nodes, and the nested
training form, the standalone subnets and the step programs of the engine are rewrites of its graph.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .structure import ONE_TENSOR, Structure

__all__ = [
    "Program", "add_constant", "batch_hint", "call_arg", "is_random", "is_static", "op_name", "random_operators",
    "tensor_inputs", "unwrap",
]  # fmt: skip


@dataclass
class Program:
    """One mode (eval or train) of a model as a graph.

    Node metadata used throughout: `shape` (tuple of int with the batch size counted as 1), `dtype`,
    `tensor` (placeholders only: the name of a parameter, buffer or constant), `module` (path of the module
    that ran the operator), `static` (depends on parameters only) and `batch` (an integer node that is k
    times the batch size, k as value).

    Attributes:
        graph: nodes with exactly one result each; the output node returns `(*outputs, *mutated buffers)`.
        image: the placeholder of the input, shape (1, C, H, W).
        constants: tensors that the model's code made itself (lifted by the tracer), by name.
        mutations: names of the buffers that the extra outputs update, in output order.
        training: whether the graph was captured in train mode.
        other_mode: paths of modules that were captured in the other mode: frozen parts of a model in train mode.
        structure: how the model puts its outputs together.
    """

    graph: fx.Graph
    image: fx.Node
    training: bool
    constants: dict[str, Tensor] = field(default_factory=dict)
    mutations: list[str] = field(default_factory=list)
    other_mode: frozenset[str] = frozenset()
    structure: Structure = ONE_TENSOR

    @property
    def outputs(self) -> list[fx.Node]:
        """The tensors that leave the model, in the order of its structure; one may leave it twice."""
        return list(self.graph.output_node().args[0][: self.structure.count])

    @property
    def num_classes(self) -> int | None:
        """Number of class scores, if the result is class scores (B, classes) and nothing else."""
        shape = self.outputs[0].meta["shape"]
        return int(shape[1]) if self.structure.is_tensor and len(shape) == 2 else None

    @property
    def mutated(self) -> list[fx.Node]:
        """New values of the buffers in `mutations`."""
        return list(self.graph.output_node().args[0][self.structure.count :])

    def tensor_nodes(self) -> Iterator[fx.Node]:
        """Placeholders of parameters, buffers and constants, in order."""
        return (n for n in self.graph.nodes if n.op == "placeholder" and n is not self.image)

    def operators(self) -> Iterator[fx.Node]:
        """Operator nodes that depend on the image."""
        return (n for n in self.graph.nodes if n.op == "call_function" and not is_static(n) and "batch" not in n.meta)


def op_name(node: fx.Node) -> str:
    """Operator name without namespace and with its overload, e.g. `conv2d`, `add.Tensor`, `mean.dim`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        overload = target._overloadname
        name = target._schema.name.split("::")[1]
        return name if overload == "default" else f"{name}.{overload}"
    return getattr(target, "__name__", str(target))


def is_static(node: Any) -> bool:
    """Whether a value depends on parameters, buffers and constants only."""
    return isinstance(node, fx.Node) and bool(node.meta.get("static"))


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers. Dropout that is off, or of a share of 0 as in attention, does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    idle = call_arg(node, "train", True) is False or call_arg(node, "dropout_p") == 0
    return not (idle or ("dropout" in op_name(node) and call_arg(node, "p") == 0))


def random_operators(program: Program) -> list[str]:
    """What draws random numbers on the way to the outputs, `operator in module`, each once."""
    drawing = (n for n in program.operators() if is_random(n))
    return list(dict.fromkeys(f"{op_name(n)} in {n.meta.get('module') or 'forward'}" for n in drawing))


def batch_hint(value: Any, batch: int = 1) -> Any:
    """Replace integer nodes (multiples of the batch size) inside an argument by numbers for that batch size."""
    if isinstance(value, fx.Node):
        return value.meta["batch"] * batch if "batch" in value.meta else value
    if isinstance(value, (list, tuple)):
        return type(value)(batch_hint(v, batch) for v in value)
    return value


def call_arg(node: fx.Node, name: str, default: Any = None) -> Any:
    """Argument of an ATen call by its schema name, wherever it stands.

    Args:
        node: a call of an `OpOverload`.
        name: the argument's name in the operator's schema.
        default: returned when the call leaves the argument out and the schema has no default for it.
    """
    if name in node.kwargs:
        return node.kwargs[name]
    schema = node.target._schema.arguments
    for position, argument in enumerate(schema):
        if argument.name == name:
            if position < len(node.args):
                return node.args[position]
            return argument.default_value if argument.has_default_value() else default
    return default


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Inputs of a node that are tensors (integer nodes left out), in order, with repetitions removed."""
    return [n for n in node.all_input_nodes if "batch" not in n.meta]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by every name they have (aliases of shared tensors included)."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def cached_results(model: nn.Module) -> dict[int, Tensor]:
    """Detached copies of results that modules keep from an earlier forward pass, by id: a memo for `copy.deepcopy`.

    deepcopy refuses tensors with a gradient history, and LeViT's attention keeps such ones.
    """
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        for tensor in _tensors_in(vars(module)):
            if not tensor.is_leaf or tensor.is_inference():
                copied = tensor.detach().clone()
                if isinstance(tensor, nn.Parameter):  # made in inference mode
                    copied = nn.Parameter(copied, copied.is_floating_point())
                memo.setdefault(id(tensor), copied)
    return memo


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, DataParallel, DistributedDataParallel and averaged models."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    while isinstance(inside := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module) or isinstance(
        model, wrappers
    ):
        model = inside if isinstance(inside, nn.Module) else model.module
    return model


def copy_model(model: nn.Module) -> nn.Module:
    """Independent copy of a model, used before or not."""
    return copy.deepcopy(model, {**cached_results(model)})


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple, set)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def static_value(node: fx.Node, lookup: Callable[[str], Tensor], memo: dict[fx.Node, Tensor] | None = None) -> Tensor:
    """Evaluate a static node.

    Args:
        node: a node with `meta["static"]`.
        lookup: gives the tensor of a name.
        memo: values already computed, extended in place.
    """
    memo = {} if memo is None else memo
    pending = [node]
    while pending:
        current = pending[-1]
        if current in memo:
            pending.pop()
            continue
        if current.op == "placeholder":
            memo[current] = lookup(current.meta["tensor"]).detach()
            continue
        missing = [n for n in current.all_input_nodes if n not in memo]
        if missing:
            pending.extend(missing)
            continue
        args, kwargs = fx.node.map_arg((current.args, dict(current.kwargs)), lambda n: memo[n])
        with torch.no_grad():
            memo[current] = current.target(*args, **kwargs)
    return memo[node]


def batch_expression(graph: fx.Graph, image: fx.Node, memo: dict[int, fx.Node], factor: int) -> fx.Node:
    """Integer node `factor * batch size`, made once per factor and placed behind the placeholders."""
    if factor not in memo:
        if 1 not in memo:
            last = [n for n in graph.nodes if n.op == "placeholder"][-1]
            with graph.inserting_after(last):
                memo[1] = graph.call_function(torch.ops.aten.sym_size.int, (image, 0))
            memo[1].meta["batch"] = 1
        if factor != 1:
            with graph.inserting_after(memo[1]):
                memo[factor] = graph.call_function(operator.mul, (memo[1], factor))
            memo[factor].meta["batch"] = factor
    return memo[factor]


def flat_nodes(value: Any) -> Iterable[fx.Node]:
    """All nodes inside a nested argument."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from flat_nodes(v)


def add_constant(program: Program, prefix: str, value: Tensor) -> fx.Node:
    """A new constant of a program, named `prefix.NUMBER`, behind its other inputs."""
    name = f"{prefix}.{len(program.constants)}"
    program.constants[name] = value
    last = [n for n in program.graph.nodes if n.op == "placeholder"][-1]
    with program.graph.inserting_after(last):
        constant = program.graph.placeholder(name.replace(".", "_"))
    constant.meta = {"tensor": name, "static": True, "shape": tuple(value.shape), "dtype": value.dtype, "value": value}
    return constant
