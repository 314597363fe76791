"""Capture a model as a `Program`: torch.export, functionalised, brought to one output per node.

The example batch has a large prime size (`BATCH`). Tracing runs on fake tensors, so this costs nothing, and
every integer that is a multiple of the prime (view sizes, window counts) is recognised as derived from the
batch size and recomputed at run time: one capture serves every batch size.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import CaptureError
from .batch import BATCH, depends_on_batch, takes_part_of_batch
from .decompositions import DECOMPOSITIONS
from .diagnosis import capture_failure, changed_parameter, no_tensors, part_of_batch, refuse_data_dependence
from .peephole import fuse_shuffles
from .program import (
    Program,
    batch_expression,
    call_arg,
    flat_nodes,
    is_random,
    is_static,
    named_tensors,
    op_name,
    static_value,
)
from .structure import Structure

__all__ = ["BATCH", "capture"]

aten = torch.ops.aten


def capture(model: nn.Module, image_size: tuple[int, ...], training: bool = False) -> Program:
    """Trace one mode of a model.

    Args:
        model: takes one image batch and returns tensors; its training flags are restored afterwards.
        image_size: (C, H, W) of one image.
        training: capture the train-mode graph (batch statistics, dropout, drop path) instead of the eval one.

    Raises:
        CaptureError: the tracer cannot follow the model (data-dependent control flow, an unknown class as result, ...).
    """
    modes = {m: m.training for m in model.modules()}
    model.train()  # lets modules drop what they keep for inference: a cached table would hide its parameters
    model.train(training)
    for module, flag in modes.items():  # a part that the user froze stays frozen in train mode
        if training and modes[model]:
            module.training = flag
    parameters = {m: dict(m._parameters) for m in modes}
    values = {p: p.data for own in parameters.values() for p in own.values() if p is not None}
    try:
        exported = _export(model, image_size)
    except CaptureError:
        for parameter, value in values.items():  # a forward that assigns to them left the tracer's
            parameter.data = value
        raise
    finally:
        for module, own in parameters.items():
            module._parameters.update(own)
        other_mode = frozenset(path for path, module in model.named_modules() if module.training is not training)
        model.train()  # drops the tracer's fake tensors
        for module, flag in modes.items():
            module.training = flag
    program = _Canonicaliser(exported, model, training).run()
    program.other_mode = other_mode
    return program


def _export(model: nn.Module, image_size: tuple[int, ...]) -> torch.export.ExportedProgram:
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.zeros(1, dtype=reference.dtype, device=reference.device).expand(BATCH, *image_size)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, (image,), strict=False).run_decompositions(DECOMPOSITIONS)
    except Exception as error:
        raise capture_failure(model, image_size, error) from error
    refuse_data_dependence(model, exported.graph)
    return exported


# Operators whose first output is all that inference needs: (single-output form, arguments that it takes).
_FIRST_OUTPUT: dict[str, Callable[..., Tensor]] = {
    "max_pool2d_with_indices": torch.nn.functional.max_pool2d,
    "max_pool3d_with_indices": torch.nn.functional.max_pool3d,
    "adaptive_max_pool2d": torch.nn.functional.adaptive_max_pool2d,
    "adaptive_max_pool1d": torch.nn.functional.adaptive_max_pool1d,
}
_BATCH_NORMS = {f"_native_batch_norm_legit{kind}" for kind in ("", "_no_training", "_functional", ".no_stats")}
# Tensors made from a size: those of a batch-dependent size are made beside the image, on its device.
_FACTORIES = {
    "zeros": aten.new_zeros.default,
    "ones": aten.new_ones.default,
    "empty.memory_format": aten.new_empty.default,
    "full": aten.new_full.default,
}
_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "_assert_async.msg"}


class _Canonicaliser:
    """Copies the exported graph into a `Program`, one rewrite per multi-output operator."""

    def __init__(self, exported: torch.export.ExportedProgram, model: nn.Module, training: bool) -> None:
        self.exported, self.model, self.own = exported, model, named_tensors(model)
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.batches: dict[int, fx.Node] = {}
        self.running_stats: set[fx.Node] = set()
        self.program = Program(self.graph, None, training)  # the image is the first placeholder
        self.has_image = False

    def run(self) -> Program:
        nodes = list(self.exported.graph.nodes)
        self._placeholders([n for n in nodes if n.op == "placeholder"])
        for node in nodes:
            if node.op == "call_function":
                self._operator(node)
        self._output(next(n for n in nodes if n.op == "output"))
        self.graph.eliminate_dead_code()
        _mark_static(self.program)
        fuse_shuffles(self.program)
        self._fold_constants()
        self.graph.lint()
        return self.program

    def _fold_constants(self) -> None:
        """Evaluate what depends on no parameter or buffer (index tables, shift masks) once and for all."""
        program = self.program
        fixed = {n for n in program.tensor_nodes() if n.meta["tensor"] in program.constants}
        memo: dict[fx.Node, Tensor] = {}
        for node in list(self.graph.nodes):
            inputs = node.all_input_nodes
            if node.op == "call_function" and is_static(node) and all(n in fixed for n in inputs):
                fixed.add(node)
                if "shape" in node.meta:
                    static_value(node, program.constants.__getitem__, memo)
        anchor = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        for node in [n for n in self.graph.nodes if n in fixed and n.op == "call_function" and "shape" in n.meta]:
            if all(user in fixed for user in node.users):
                continue
            name = f"constant.{node.name}"
            program.constants[name] = memo[node]
            with self.graph.inserting_after(anchor):
                anchor = self.graph.placeholder(f"c_{node.name}")
            anchor.meta = {**node.meta, "tensor": name}
            if not memo[node].is_floating_point() and not memo[node].is_meta:
                anchor.meta["value"] = memo[node].cpu()
            node.replace_all_uses_with(anchor)
        for node in reversed(list(self.graph.nodes)):
            if node in fixed and node.op == "call_function" and not node.users:
                self.graph.erase_node(node)

    # -- inputs and outputs

    def _placeholders(self, nodes: list[fx.Node]) -> None:
        signature = self.exported.graph_signature
        names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        first_name: dict[int, str] = {}
        for name, tensor in self.own.items():
            first_name.setdefault(id(tensor), name)
        seen: dict[str, fx.Node] = {}
        for node in sorted(nodes, key=lambda n: n.name in names):  # the image comes first
            if node.name not in names:
                assert not self.has_image, "torch.export was given one input"
                self.has_image = True
                self.program.image = self.values[node] = self._new_placeholder("x", node)
                continue
            name = names[node.name]
            if name in self.own:
                name = first_name[id(self.own[name])]
            else:
                self.program.constants[name] = self.exported.constants[name].detach()
            if name not in seen:
                seen[name] = self._new_placeholder(f"t_{len(seen)}", node)
                seen[name].meta["tensor"] = name
                self._remember_indices(seen[name], name)
            self.values[node] = seen[name]

    def _remember_indices(self, node: fx.Node, name: str) -> None:
        """Integer tensors may index channels, so the label rules need their values."""
        tensor = self.program.constants.get(name, self.own.get(name))
        if tensor is not None and not tensor.is_floating_point() and not tensor.is_meta:
            node.meta["value"] = tensor.detach().cpu()

    def _new_placeholder(self, name: str, source: fx.Node) -> fx.Node:
        created = self.graph.placeholder(name)
        self._describe(created, source)
        return created

    def _output(self, node: fx.Node) -> None:
        signature = self.exported.graph_signature
        mutated = signature.buffers_to_mutate
        results = []
        kept_mutations = []
        for out in node.args[0]:
            if isinstance(out, fx.Node) and out.name in signature.parameters_to_mutate:
                raise changed_parameter(self.model, signature.parameters_to_mutate[out.name], out)
            if isinstance(out, fx.Node) and out.name in mutated:
                if out not in self.running_stats:
                    kept_mutations.append((mutated[out.name], self.values[out]))
            else:
                results.append(out)
        if not any(isinstance(out, fx.Node) for out in results) or depends_on_batch(results):
            raise no_tensors(self.model, results, self.program.training)
        fixed = {k: out for k, out in enumerate(results) if not isinstance(out, fx.Node)}
        self.program.structure = Structure(self.exported.call_spec.out_spec, fixed)
        self.program.mutations = [name for name, _ in kept_mutations]
        leaving = [self.values[out] for out in results if isinstance(out, fx.Node)]
        self.graph.output((*leaving, *[value for _, value in kept_mutations]))

    # -- operators

    def _operator(self, node: fx.Node) -> None:
        name = op_name(node)
        if name in _CHECKS:
            return
        if takes_part_of_batch(node) and self._reads_image(node.args[0]):
            raise part_of_batch(self.model, node)
        if node.target is operator.getitem:
            self._getitem(node)
        elif name in _BATCH_NORMS:
            self.values[node] = self._batch_norm(node, name)
        elif name in _FIRST_OUTPUT:
            args, kwargs = self._arguments(node)
            self.values[node] = self._emit(_FIRST_OUTPUT[name], args, kwargs, _first(node))
        elif name == "native_dropout":
            x, p, _ = node.args
            self.values[node] = self._emit(aten.dropout.default, (self.values[x], p, True), {}, _first(node))
        elif name == "_to_copy" and (anchor := self._cast_back(node)) is not None:
            self.values[node] = self._emit(aten.type_as.default, (self.values[node.args[0]], anchor), {}, node)
        elif name == "matmul" and self._is_layer(node.args[1]):
            self.values[node] = self._linear(node)
        elif name == "copy" and node.args[0].meta["val"].shape == node.args[1].meta["val"].shape:
            self.values[node] = self.values[node.args[1]]  # what an assignment to a slice leaves
        elif name == "scaled_dot_product_attention" and _has_one_head(node):
            self.values[node] = self._attention_of_one_head(node)
        elif name in _FACTORIES and depends_on_batch(node.args):
            args, kwargs = self._arguments(node)
            kwargs.pop("device", None)
            self.values[node] = self._emit(_FACTORIES[name], (self.program.image, *args), kwargs, node)
        elif isinstance(node.meta.get("val"), Tensor):
            args, kwargs = self._arguments(node)
            if name == "cat":
                args = ([self.values[p] for p in _not_empty(node.args[0])], *args[1:])
            if name in ("view", "_unsafe_view", "reshape"):  # a literal -1 would hide the batch size
                args = (args[0], self._convert(list(node.meta["val"].shape)))
            target = aten.reshape.default if name in ("view", "_unsafe_view") else node.target
            self.values[node] = self._emit(target, args, kwargs, node)
        # what is left has several outputs and is written when an output is taken

    def _reads_image(self, node: fx.Node) -> bool:
        """Whether a tensor depends on the pictures, not only on how many they are."""
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            if self.values.get(current) is self.program.image:
                return True
            new = [n for n in current.all_input_nodes if n not in seen]
            seen.update(new)
            pending.extend(new)
        return False

    def _attention_of_one_head(self, node: fx.Node) -> fx.Node:
        """Attention as two products: with one head, queries and keys are one unit, but values may still move."""
        query, key, value = (self.values[n] for n in node.args[:3])
        mask, scale = call_arg(node, "attn_mask"), call_arg(node, "scale")
        q, k = (n.meta["val"] for n in node.args[:2])
        weights = (node, q.new_empty(*q.shape[:-1], k.shape[-2]))
        size = q.shape[-1]
        scaled = self._emit(aten.mul.Tensor, (query, size**-0.5 if scale is None else scale), {}, node.args[0])
        turned = self._emit(aten.transpose.int, (key, -2, -1), {}, (node, k.transpose(-2, -1)))
        product = self._emit(aten.matmul.default, (scaled, turned), {}, weights)
        if mask is not None:
            product = self._emit(aten.add.Tensor, (product, self.values[mask]), {}, weights)
        result = self._emit(aten.softmax.int, (product, -1), {}, weights)
        if dropped := call_arg(node, "dropout_p", 0.0):
            result = self._emit(aten.dropout.default, (result, dropped, True), {}, weights)
        return self._emit(aten.matmul.default, (result, value), {}, node)

    def _is_layer(self, matrix: fx.Node) -> bool:
        """Whether a product with a matrix (I, O) is a linear layer: it is made from parameters and buffers only."""
        pending, seen = [self.values[matrix]], {self.values[matrix]}
        while pending:
            new = [n for n in pending.pop().all_input_nodes if n not in seen]
            seen.update(new)
            pending.extend(new)
        named = [n.meta.get("tensor") in self.own for n in seen if n.op == "placeholder"]
        return matrix.meta["val"].dim() == 2 and bool(named) and all(named) and not any(map(is_random, seen))

    def _linear(self, node: fx.Node) -> fx.Node:
        """A product with a matrix (I, O) as a linear layer. What turned a parameter (O, I) is left out."""
        x, matrix = (self.values[n] for n in node.args)
        turned = op_name(matrix) == "t" or (op_name(matrix) == "transpose.int" and len(matrix.meta["shape"]) == 2)
        if matrix.op == "call_function" and turned:
            weight = matrix.args[0]
        else:
            weight = self._emit(aten.t.default, (matrix,), {}, (node, node.args[1].meta["val"].t()))
        return self._emit(aten.linear.default, (x, weight, None), {}, node)

    def _cast_back(self, node: fx.Node) -> fx.Node | None:
        """The parameter to whose type a value made from it is cast (a resampled position embedding), if that is all.

        The type of the capture must not be baked in: the net may be cast later.
        """
        source = self.values[node.args[0]]
        while source.op == "call_function" and len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        changes_only_type = set(node.kwargs) <= {"dtype"}
        is_parameter = source.op == "placeholder" and source.meta.get("tensor") in self.own
        return source if changes_only_type and is_parameter and source.meta["dtype"] == node.kwargs["dtype"] else None

    def _getitem(self, node: fx.Node) -> None:
        source, index = node.args
        name = op_name(source)
        if name in _BATCH_NORMS:
            if index == 0:
                self.values[node] = self.values[source]
            else:
                self.running_stats.add(node)
                if index in (3, 4) and len(source.args) > 4:  # updated in place: what a second call reads, too
                    self.values[node] = self.values[source.args[index]]
        elif name in _FIRST_OUTPUT or name == "native_dropout":
            if index == 0:
                self.values[node] = self.values[source]
        else:
            self.values[node] = self._take_output(node, source, index, name)

    def _take_output(self, node: fx.Node, source: fx.Node, index: int, name: str) -> fx.Node:
        """Single-output form of output `index` of an operator with several outputs."""
        x = source.args[0]
        if name in ("split.Tensor", "split_with_sizes", "chunk", "tensor_split.sections"):
            dim = call_arg(source, "dim", 0) % x.meta["val"].dim()
            sizes = [v.shape[dim] for v in source.meta["val"]]
            start = sum(sizes[:index])
            bounds = self._convert([start, start + sizes[index]])
            return self._emit(aten.slice.Tensor, (self.values[x], dim, *bounds), {}, node)
        if name == "unbind.int":
            dim = call_arg(source, "dim", 0) % x.meta["val"].dim()
            return self._emit(aten.select.int, (self.values[x], dim, index), {}, node)
        if name == "max.dim" and index == 0:
            dim, keep = call_arg(source, "dim"), call_arg(source, "keepdim", False)
            return self._emit(aten.amax.default, (self.values[x], [dim], keep), {}, node)
        if name == "min.dim" and index == 0:
            dim, keep = call_arg(source, "dim"), call_arg(source, "keepdim", False)
            return self._emit(aten.amin.default, (self.values[x], [dim], keep), {}, node)
        if name == "var_mean.correction":
            dim, keep = call_arg(source, "dim"), call_arg(source, "keepdim", False)
            if index == 1:
                return self._emit(aten.mean.dim, (self.values[x], dim, keep), {}, node)
            correction = {"correction": call_arg(source, "correction"), "keepdim": keep}
            return self._emit(aten.var.correction, (self.values[x], dim), correction, node)
        if source not in self.values:
            args, kwargs = self._arguments(source)
            self.values[source] = self._emit(source.target, args, kwargs, source)
        return self._emit(operator.getitem, (self.values[source], index), {}, node)

    def _batch_norm(self, node: fx.Node, name: str) -> fx.Node:
        x, weight, bias = (self.values.get(a) for a in node.args[:3])
        if name == "_native_batch_norm_legit.no_stats":
            mean = var = None
            training, momentum, eps = node.args[3:6]
        elif name == "_native_batch_norm_legit_no_training":
            mean, var = self.values[node.args[3]], self.values[node.args[4]]
            training, momentum, eps = False, *node.args[5:7]
        else:
            mean, var = self.values[node.args[3]], self.values[node.args[4]]
            training, momentum, eps = node.args[5:8]
        args = (x, weight, bias, mean, var, training, momentum, eps, True)
        return self._emit(aten.batch_norm.default, args, {}, _first(node))

    def _arguments(self, node: fx.Node) -> tuple[tuple, dict]:
        """Converted arguments. The device is left out where the operator has a tensor to follow."""
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("pin_memory", "layout")}
        if node.all_input_nodes:
            kwargs.pop("device", None)
        return self._convert(tuple(node.args)), {k: self._convert(v) for k, v in kwargs.items()}

    def _convert(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.values[value]
        if isinstance(value, (list, tuple)):
            converted = [self._convert(v) for v in value]
            return converted if isinstance(value, list) else tuple(converted)
        if isinstance(value, int) and depends_on_batch(value):
            return batch_expression(self.graph, self.program.image, self.batches, value // BATCH)
        return value

    def _emit(self, target: Any, args: tuple, kwargs: dict, source: Any) -> fx.Node:
        created = self.graph.call_function(target, args, kwargs)
        self._describe(created, source)
        return created

    def _describe(self, created: fx.Node, source: Any) -> None:
        value = source.meta["val"] if isinstance(source, fx.Node) else source[1]
        origin = source if isinstance(source, fx.Node) else source[0]
        if isinstance(value, Tensor):
            created.meta["shape"] = tuple(s // BATCH if s and s % BATCH == 0 else int(s) for s in value.shape)
            created.meta["dtype"] = value.dtype
            created.meta["batch_axis"] = next((d for d, s in enumerate(value.shape) if s and s % BATCH == 0), None)
        stack = origin.meta.get("nn_module_stack") or {}
        created.meta["module"] = next(reversed(stack.values()))[0].replace("L['self'].", "") if stack else ""
        created.meta["code"] = origin.meta.get("stack_trace", "")


def _has_one_head(node: fx.Node) -> bool:
    """Whether an attention has one head and no mask that would need more than an addition."""
    query, mask = node.args[0].meta["val"], call_arg(node, "attn_mask")
    one = query.shape[1] == 1 if query.dim() == 4 else query.dim() == 3 and query.shape[0] == BATCH
    plain = mask is None or mask.meta["val"].is_floating_point()
    return one and plain and not call_arg(node, "is_causal", False) and not call_arg(node, "enable_gqa", False)


def _not_empty(pieces: Sequence[fx.Node]) -> Sequence[fx.Node]:
    """Pieces of a concatenation that hold something (models without prefix tokens concatenate none of them)."""
    return [p for p in pieces if p.meta["val"].numel() > 0] or pieces


def _first(node: fx.Node) -> tuple[fx.Node, Tensor]:
    return node, node.meta["val"][0]


def _mark_static(program: Program) -> None:
    """Mark nodes that depend on parameters only. Random operators are not static."""
    for node in program.graph.nodes:
        if node.op == "placeholder":
            node.meta["static"] = node is not program.image
        elif node.op == "call_function":
            inputs = list(flat_nodes((node.args, tuple(node.kwargs.values()))))
            random = is_random(node)
            made_of_batch = any("batch" in n.meta for n in inputs)
            node.meta["static"] = not random and not made_of_batch and all(n.meta.get("static") for n in inputs)
