"""Exact MACs of any traceable module, counted by fvcore with handles of our own.

A MAC is one multiply-accumulate of a convolution, linear layer, matrix product (mm, bmm, matmul, einsum,
...), scaled dot product attention (q.k and p.v) or recurrent layer. Bias, normalisation, activation, softmax,
pooling and resampling are no MACs. fvcore's own table differs: attention that runs fused counts 0 there,
norms and pools count a made-up weight per element, convolutions with ``padding="same"`` count 0, and an
operator without a handle is skipped with a log line. Here such an operator is an error as soon as it could
hide a matrix product.

Counts come from a trace of the inference form (eval mode, no gradients), so what a call really executes is
what is counted: a product with a masked weight costs the same as a dense one, a product with a sliced weight
costs less (fvcore: https://github.com/facebookresearch/fvcore/blob/main/docs/flop_count.md).
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stepping_plugin.errors import CaptureError, SteppingError, explain
from stepping_plugin.integrations.fvcore.einsum import einsum_macs

with warnings.catch_warnings():  # fvcore.nn compiles its losses by torch.jit.script, which torch calls deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn.flop_count import _DEFAULT_SUPPORTED_OPS as FVCORE_HANDLES
    from fvcore.nn.jit_analysis import JitModelAnalysis

__all__ = ["Handle", "MacCount", "count_macs"]

Handle = Callable[[list[Any], list[Any]], int]
"""MACs of one operator from its traced inputs and outputs (``torch._C.Value``), as fvcore wants it."""

_FVCORE = "fvcore default"  # key under which fvcore's own number travels beside ours


@dataclass(frozen=True)
class MacCount:
    """MACs of one call of a module.

    Attributes:
        total: MACs of the whole call (give a batch of 1 to get MACs per sample).
        by_module: MACs per submodule name, its children included; "" is the whole module. A module that is
            reached by several names is listed under the first, with all its calls.
        by_operator: MACs per operator kind ("conv", "linear", "attention", ...).
        fvcore_default: what fvcore reports without our handles. Shown because papers quote it, not comparable
            with ``total``; None where fvcore's own handles fail.
    """

    total: int
    by_module: dict[str, int]
    by_operator: dict[str, int]
    fvcore_default: int | None


def count_macs(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    extra_handles: Mapping[str, Handle] | None = None,
) -> MacCount:
    """Counts the MACs of ``module(*example_inputs)`` in eval mode.

    Args:
        module: any module that ``torch.jit`` can trace, an ``fx.GraphModule`` of ATen operators included.
            It is left as it was: training flags, hooks and parameters.
        example_inputs: positional tensors, usually of batch size 1. What no output depends on is not counted.
        extra_handles: handles for operators unknown here, by traced name (``"mylib::op"``, or
            ``"prim::PythonOp.Name"`` for a ``torch.autograd.Function``); they win over the built-in ones.

    Raises:
        CaptureError: the module cannot be traced with these inputs.
        SteppingError: an operator that may hide matrix products has no handle; the text names it.
    """
    if not isinstance(example_inputs, tuple) or not all(isinstance(x, Tensor) for x in example_inputs):
        got = type(example_inputs).__name__
        raise SteppingError(explain("count_macs takes a tuple of tensors", got=got, action="Pass (x,)."))
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    analysis = _Analysis(module, tuple(example_inputs), {**_HANDLES, **(extra_handles or {})})
    with _inference_form(module):
        try:
            counts = analysis.by_module_and_operator()
        except SteppingError:
            raise
        except Exception as err:
            raise CaptureError(
                explain(
                    f"tracing failed while counting MACs: {type(err).__name__}: {err}",
                    where=type(module).__name__,
                    action="Check that the module runs on example_inputs and returns tensors.",
                )
            ) from err
    if unknown := analysis.unsupported_ops(""):
        listed = ", ".join(f"{kind} ({times}x)" for kind, times in sorted(unknown.items()))
        raise SteppingError(
            explain(
                f"no MAC handle for {listed}, which may hide matrix products",
                where=type(module).__name__,
                action="Pass extra_handles={name: handle}; a handle for a harmless operator returns 0.",
            )
        )
    default = int(counts[""][_FVCORE])
    for operators in counts.values():
        operators.pop(_FVCORE, None)
    return MacCount(
        total=int(sum(counts[""].values())),
        by_module={name: int(sum(operators.values())) for name, operators in counts.items()},
        by_operator={operator: int(macs) for operator, macs in counts[""].items()},
        fvcore_default=None if analysis.default_failed else default,
    )


# --------------------------------------------------------------------------------------------------------
# The trace
# --------------------------------------------------------------------------------------------------------


class _Analysis(JitModelAnalysis):
    """fvcore's analysis with our handles; what has none and is not harmless ends in ``unsupported_ops``."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], handles: Mapping[str, Handle]) -> None:
        super().__init__(module, inputs)
        self.default_failed = False
        self.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        self._known = dict(handles)
        self.set_op_handle(**{kind: self._both(kind) for kind in {*handles, *FVCORE_HANDLES}})

    def _both(self, kind: str) -> Callable[[list[Any], list[Any]], Counter[str]]:
        """Our count and fvcore's from one trace, kept apart by their keys."""
        ours, theirs = self._known.get(kind), FVCORE_HANDLES.get(kind)

        def handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
            count: Counter[str] = Counter()
            if ours is not None:
                count[_LABELS.get(kind, kind.split("::")[-1])] = ours(inputs, outputs)
            if theirs is not None:
                try:
                    value = theirs(inputs, outputs)
                    count[_FVCORE] = int(sum(value.values()) if isinstance(value, Counter) else value)
                except Exception:  # fvcore's handles assert on shapes that they do not foresee
                    self.default_failed = True
            return count

        return handle

    def _should_ignore_node(self, node: Any) -> bool:
        """fvcore asks this for every operator without a handle."""
        kind: str = node.kind()
        if kind.startswith("prim::") and not kind.startswith(("prim::PythonOp", "prim::CallFunction")):
            return True
        label = f"{kind}.{node.pyname()}" if kind == "prim::PythonOp" else kind
        return _is_free(label) or not _may_hide_products(label, node)


def _tensors_only(_module: nn.Module, _inputs: Any, output: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


@contextmanager
def _inference_form(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no fused encoder path, tensors as outputs; all is put back afterwards."""
    training = {part: part.training for part in module.modules()}
    # fvcore leaves its scope hooks behind when the traced forward raises.
    hooks = {part: (list(part._forward_hooks), list(part._forward_pre_hooks)) for part in training}
    # The fused path of nn.TransformerEncoderLayer and nn.MultiheadAttention hides their projections.
    fused = torch.backends.mha.get_fastpath_enabled()
    module.register_forward_hook(_tensors_only)  # the tracer refuses dicts and non-tensor outputs
    try:
        for part in training:  # not module.eval(): exported graphs refuse it, and overrides have side effects
            part.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for part, mode in training.items():
            part.training = mode
        for part, (after, before) in hooks.items():
            for key in set(part._forward_hooks) - set(after):
                del part._forward_hooks[key]
            for key in set(part._forward_pre_hooks) - set(before):
                del part._forward_pre_hooks[key]


# --------------------------------------------------------------------------------------------------------
# Operators that cost MACs
# --------------------------------------------------------------------------------------------------------


def _shape(value: Any) -> list[int]:
    sizes = value.type().sizes() if value.isCompleteTensor() else None
    if sizes is None:
        kind = value.node().kind()
        raise SteppingError(explain("an output without a static shape", where=kind, action="Give extra_handles."))
    return list(sizes)


def _is_tensor(value: Any) -> bool:
    return value.type().isSubtypeOf(torch._C.TensorType.get())


def _members(value: Any) -> list[Any]:
    """The traced values of a list argument."""
    return list(value.node().inputs())


def _matmul_macs(a: Sequence[int], b: Sequence[int]) -> int:
    """(..., n, k) x (..., k, m) -> batch * n * k * m, with numpy's rules for vectors and broadcasting."""
    a = [1, *a] if len(a) == 1 else list(a)
    b = [*b, 1] if len(b) == 1 else list(b)
    batch = torch.broadcast_shapes(a[:-2], b[:-2])
    return math.prod(batch) * a[-2] * a[-1] * b[-1]


def _product(first: int) -> Handle:
    """Matrix product of inputs ``first`` and ``first + 1``; a summand may come before (addmm, baddbmm)."""
    return lambda inputs, outputs: _matmul_macs(_shape(inputs[first]), _shape(inputs[first + 1]))


def _tensordot(inputs: list[Any], outputs: list[Any]) -> int:
    """a (out_a x k) . b (k x out_b): numel(a) * numel(b) = numel(out) * k^2."""
    a, b, out = (math.prod(_shape(v)) for v in (inputs[0], inputs[1], outputs[0]))
    return out * math.isqrt(a * b // out) if out else 0


def _bilinear(inputs: list[Any], outputs: list[Any]) -> int:
    """A linear layer (..., I) -> (..., O * J) of the first input, and its product with the second (..., J)."""
    out, (_, first, second) = _shape(outputs[0]), _shape(inputs[2])
    return math.prod(out) * second * (first + 1)


def _linear(inputs: list[Any], outputs: list[Any]) -> int:
    """x (..., in), weight (out, in) or (in,)."""
    weight = _shape(inputs[1])
    return math.prod(_shape(inputs[0])) * (weight[0] if len(weight) == 2 else 1)


def _conv(transposed: int | bool) -> Handle:
    """Every weight is used once per output position (per input position when transposed) and sample.

    ``transposed``: the flag itself, or the index of the argument that holds it.
    """

    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        weight = _shape(inputs[1])
        flip = transposed if isinstance(transposed, bool) else inputs[transposed].toIValue()
        sites = _shape(inputs[0] if flip else outputs[0])
        batch = sites[0] if len(sites) == len(weight) else 1  # one rank less: no batch dimension
        return batch * math.prod(weight) * math.prod(sites[-(len(weight) - 2) :])

    return handle


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """q (..., L, E), k (..., S, E), v (..., S, Ev): q.k costs L*S*E, p.v L*S*Ev per head, masked or not."""
    q, k, out = _shape(inputs[0]), _shape(inputs[1]), _shape(outputs[0])
    return math.prod(out[:-1]) * k[-2] * (q[-1] + out[-1])


def _recurrent(inputs: list[Any], outputs: list[Any]) -> int:
    """Every weight matrix (input, hidden, projection; per layer, direction) is used once per step, sample."""
    steps = math.prod(_shape(inputs[0])[:-1])
    listed = [v for value in inputs if value.node().kind() == "prim::ListConstruct" for v in _members(value)]
    shapes = [_shape(v) for v in listed if _is_tensor(v)]
    return steps * sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def _cell(inputs: list[Any], outputs: list[Any]) -> int:
    """One step of a recurrent cell: x (B, I), state, w_ih (gates * H, I), w_hh (gates * H, H)."""
    return _shape(inputs[0])[0] * sum(math.prod(_shape(inputs[k])) for k in (2, 3))


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    path = inputs[2].toIValue() if len(inputs) > 2 else None
    return einsum_macs(inputs[0].toIValue(), [_shape(v) for v in _members(inputs[1])], path)


_ATTENTION = "scaled_dot_product_attention"
_GROUPS: dict[str, dict[str, Handle]] = {
    "conv": {
        **{name: _conv(6) for name in ("_convolution", "convolution")},
        "_convolution_mode": _conv(False),  # padding="same"; its argument 6 is groups
        **{f"conv{n}d": _conv(False) for n in (1, 2, 3)},
        **{f"conv_transpose{n}": _conv(True) for n in ("1d", "2d", "3d", "2d.input", "3d.input")},
    },
    "linear": {"linear": _linear, "mkldnn_linear": _linear, "bilinear": _bilinear},
    "matmul": {
        **{name: _product(0) for name in ("matmul", "mm", "bmm", "mv", "dot", "vdot", "linalg_matmul")},
        **{name: _product(1) for name in ("addmm", "addmv", "baddbmm", "addbmm")},
        "tensordot": _tensordot,
    },
    "einsum": {"einsum": _einsum},
    "attention": {
        name: _attention
        for name in (
            _ATTENTION,
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_attention_math_for_mps",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        )
    },
    "recurrent": {
        **{name: _recurrent for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
        **{f"{name}_cell": _cell for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    },
}
_HANDLES = {f"aten::{name}": handle for group in _GROUPS.values() for name, handle in group.items()}
_LABELS = {f"aten::{name}": label for label, group in _GROUPS.items() for name in group}


# --------------------------------------------------------------------------------------------------------
# Operators that cost none
# --------------------------------------------------------------------------------------------------------

# Pointwise operators, reductions and views are recognised by torch's own tags and alias notes; this holds the
# rest. An operator belongs here only if it multiplies nothing by anything and sums it up.
_ZERO_COST = re.compile(
    r"""
    \w*norm | _batch_norm_impl_index | _native_batch_norm_legit(_no_training)? | \w*softmax | softmin | glu
    | cum(sum|prod) | logcumsumexp | hardswish | prelu | \w*dropout | bernoulli | rand(n|int|perm)?(_like)?
    | \w*(avg|max|lp)_pool[123]d(_with_indices)? | _?upsample_\w+ | grid_sampler\w* | affine_grid_generator
    | cat | concat\w* | [hvd]?stack | copy | type_as | _to_copy | lift_fresh | constant_pad_nd | pad
    | _pad_\w+ | (reflection|replication)_pad[123]d | index\w* | gather | take(_along_dim)? | embedding
    | masked_(select|scatter) | scatter\w* | (slice|select|diagonal)_scatter | fill | zero
    | flip | roll | rot90 | repeat\w* | tile | pixel_(un)?shuffle | (native_)?channel_shuffle | im2col
    | col2im | tril | triu | diag(_embed)? | one_hot | meshgrid | cartesian_prod | broadcast_tensors
    | arange | linspace | logspace | eye | scalar_tensor | tensor | (new_)?(full|ones|zeros|empty)(_like)?
    | empty_strided | atleast_[123]d | sort | argsort | topk | kthvalue | median | unique\w* | searchsorted
    | bucketize | histc | nonzero | (sym_)?(size|numel) | dim | Int | Float | Bool | ScalarImplicit | item
    | _local_scalar_dense | is_floating_point | outer | ger | addr | kron | cross | floor_divide
    | fft_\w+ | view_as_(real|complex)
    """,
    re.VERBOSE,
)
_PRODUCT_WORDS = re.compile(
    r"mm|\w*matmul\w*|\w*gemm\w*|[a-z]{1,3}mm|mv|dot|inner|vecdot|tensordot|einsum|bilinear|linear|linalg"
    r"|conv\w*|attention|attn|mha|lstm|gru|rnn|cdist|cov|corrcoef|encoder"
)


def _is_free(kind: str) -> bool:
    """True when the operator is known to cost no MACs: listed, or tagged or annotated so by torch itself."""
    namespace, _, name = kind.partition("::")
    if namespace != "aten":
        return False
    if _ZERO_COST.fullmatch(name) or _ZERO_COST.fullmatch(name.rstrip("_").removesuffix("_copy")):
        return True
    packet = getattr(torch.ops.aten, name, None)
    for overload in packet.overloads() if packet is not None else ():
        op = getattr(packet, overload)
        if torch.Tag.pointwise in op.tags or torch.Tag.reduction in op.tags:
            return True
        returned = op._schema.returns[:1]
        if returned and returned[0].alias_info is not None and not returned[0].alias_info.is_write:
            return True  # a view of its input
    return False


def _may_hide_products(kind: str, node: Any) -> bool:
    """Whether an unknown operator could multiply matrices: by a word of its name, or by its shapes.

    Harmless are a map of one tensor that does not grow (activation, normalisation, reduction) and an operator
    whose output is the broadcast of its inputs (gates, affine maps). Shapes that fit both a broadcast and a
    matrix product, such as two square matrices, count as suspicious.
    """
    name = kind.split("::")[-1].removeprefix("PythonOp.")
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().split("_")
    if any(_PRODUCT_WORDS.fullmatch(word) for word in words):
        return True
    values = [part for v in node.inputs() for part in (_members(v) if _is_tensor_list(v) else [v])]
    inputs = [shape for v in values if (shape := _float_shape(v)) is not None]
    outputs = [shape for v in node.outputs() if (shape := _float_shape(v)) is not None]
    if not inputs or not outputs:
        return False
    if len(inputs) == 1:
        return math.prod(outputs[0]) > math.prod(inputs[0])
    try:
        broadcast = list(torch.broadcast_shapes(*inputs)) == outputs[0]
    except RuntimeError:
        broadcast = False
    return not broadcast or any(
        _is_product(a, b, outputs[0]) for i, a in enumerate(inputs) for j, b in enumerate(inputs) if i != j
    )


def _is_tensor_list(value: Any) -> bool:
    return value.node().kind() == "prim::ListConstruct" and str(value.type()).startswith("List[Tensor")


def _float_shape(value: Any) -> list[int] | None:
    """Shape of a floating point or complex tensor, None for anything else."""
    if not _is_tensor(value) or not value.isCompleteTensor():
        return None
    dtype = value.type().dtype()
    multiplies = dtype is not None and (dtype.is_floating_point or dtype.is_complex)
    return list(value.type().sizes()) if multiplies else None


def _is_product(a: Sequence[int], b: Sequence[int], out: Sequence[int]) -> bool:
    """Whether ``out`` has the shape of a @ b or a @ b^T, for matrices of more than one row and column."""
    if min(len(a), len(b), len(out)) < 2 or a[-1] == 1:
        return False
    rows, inner = a[-2], a[-1]
    return any(b[-1 - i] == inner and list(out[-2:]) == [rows, b[-2 + i]] for i in (0, 1))
