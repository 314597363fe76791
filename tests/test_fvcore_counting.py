"""MACs against independent counters: torch's FlopCounterMode, unrolled cells, and arithmetic by hand."""

import logging
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stepping_plugin.errors import CaptureError, SteppingError
from stepping_plugin.integrations.fvcore import count_macs, einsum_macs
from stepping_plugin.integrations.fvcore.counting import _HANDLES, _is_free


@pytest.fixture
def unfused():
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    yield
    timm.layers.set_fused_attn(before)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def torch_count(module, *inputs: Tensor) -> int:
    """What torch's own counter sees: it counts 2 per MAC, on dispatched operators instead of a trace."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def image_model(name: str) -> tuple[nn.Module, Tensor]:
    model = timm.create_model(name, num_classes=10).eval().requires_grad_(False)
    return model, torch.randn(1, *model.default_cfg["input_size"])


# -- whole models


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnext26ts",  # grouped
        "mobilenetv3_small_050",  # depthwise, squeeze and excite
        "convnext_atto",
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "levit_128s",
        "mixer_s32_224",
    ],
)
def test_equals_torch_counter_on_timm_models(unfused, name):
    model, x = image_model(name)
    count = count_macs(model, (x,))
    assert count.total == torch_count(model, x) > 0
    assert count.total == sum(count.by_operator.values()) == count.by_module[""]


def test_fused_attention_counts_like_unfused(unfused):
    model, x = image_model("vit_tiny_patch16_224")
    plain = count_macs(model, (x,))
    timm.layers.set_fused_attn(True)
    fused = count_macs(image_model("vit_tiny_patch16_224")[0], (x,))
    assert "attention" in fused.by_operator and "attention" not in plain.by_operator
    assert fused.total == plain.total
    # 12 blocks, 3 heads, 197 tokens, head width 64, q.k and p.v: what fvcore's own table misses
    assert plain.fvcore_default - fused.fvcore_default == 12 * 3 * 2 * 197 * 197 * 64


def test_fvcore_default_is_fvcores_own_number():
    from fvcore.nn import FlopCountAnalysis

    model, x = image_model("mobilenetv3_small_050")
    count = count_macs(model, (x,))
    assert count.fvcore_default == FlopCountAnalysis(model, x).total() > count.total


def test_by_module_adds_up_and_names_submodules():
    model, x = image_model("resnet18")
    count = count_macs(model, (x,))
    assert count.by_module["conv1"] == 112 * 112 * 64 * 3 * 7 * 7
    assert count.by_module["bn1"] == 0
    convs = [f"layer1.{block}.conv{k}" for block in (0, 1) for k in (1, 2)]
    assert count.by_module["layer1"] == sum(count.by_module[name] for name in convs)
    assert count.total == sum(n for name, n in count.by_module.items() if name.count(".") == 0 and name)


def test_batch_multiplies():
    model, x = image_model("mobilenetv3_small_050")
    assert count_macs(model, (x.repeat(3, 1, 1, 1),)).total == 3 * count_macs(model, (x,)).total


# -- graphs of ATen operators


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_graphs_count_like_their_models(name, decomposed):
    model, x = image_model(name)
    program = torch.export.export(model, (x,))
    graph = (program.run_decompositions() if decomposed else program).module()
    assert count_macs(graph, (x,)).total == count_macs(model, (x,)).total


def test_graph_module_with_several_inputs_and_nested_outputs():
    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    both = graph.call_function(torch.ops.aten.cat.default, ([a, b], 1))
    bias, weight = graph.get_attr("bias"), graph.get_attr("weight")
    out = graph.call_function(torch.ops.aten.addmm.default, (bias, both, weight))
    graph.output({"logits": out, "cache": [both, a]})
    module = nn.Module()
    module.bias, module.weight = torch.randn(7), torch.randn(5, 7)  # plain tensors, as in a step program
    count = count_macs(torch.fx.GraphModule(module, graph), (torch.randn(4, 2), torch.randn(4, 3)))
    assert count.total == 4 * 5 * 7


# -- operators

CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 11)),
    "conv2d_grouped": (nn.Conv2d(6, 9, (3, 2), groups=3, bias=False), (2, 6, 8, 7)),
    "conv2d_depthwise": (nn.Conv2d(6, 12, 3, groups=6), (1, 6, 8, 7)),
    "conv2d_dilated": (nn.Conv2d(3, 5, 3, dilation=2, padding=2), (1, 3, 9, 9)),
    "conv2d_same": (nn.Conv2d(3, 5, 3, padding="same"), (2, 3, 9, 9)),
    "conv2d_same_grouped": (nn.Conv2d(4, 6, 3, padding="same", groups=2), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(2, 3, 3), (1, 2, 5, 6, 7)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 7)),
    "conv_transpose2d_grouped": (nn.ConvTranspose2d(4, 6, 3, 2, 0, 1, groups=2), (1, 4, 5, 6)),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 3, 3), (1, 2, 4, 3, 4)),
    "unbatched_conv2d": (nn.Conv2d(3, 5, 3), (3, 8, 8)),
    "unbatched_conv2d_same": (nn.Conv2d(3, 5, 3, padding="same"), (3, 8, 8)),
    "unbatched_conv_transpose2d": (nn.ConvTranspose2d(3, 5, 3), (3, 8, 8)),
}


@pytest.mark.parametrize("layer, shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(layer, shape):
    x = torch.randn(shape)
    assert count_macs(layer, (x,)).total == torch_count(layer, x) > 0


def test_convolution_by_hand():
    x = torch.randn(1, 6, 6, 6)
    # 4 x 4 output positions, 10 filters of (6 / 2 groups) x 3 x 3 weights: every one used once per position
    assert count_macs(nn.Conv2d(6, 10, 3, groups=2), (x,)).total == 4 * 4 * 10 * 3 * 3 * 3
    # transposed: every weight used once per input position
    assert count_macs(nn.ConvTranspose2d(6, 10, 3, groups=2, stride=2), (x,)).total == 6 * 6 * 6 * 5 * 3 * 3


ATEN = torch.ops.aten
PRODUCTS = {
    "matmul": (torch.matmul, [(3, 4), (4, 5)], 60),
    "matmul_broadcast_left": (torch.matmul, [(3, 4), (2, 6, 4, 5)], 2 * 6 * 60),
    "matmul_broadcast_both": (torch.matmul, [(2, 1, 3, 4), (6, 4, 5)], 2 * 6 * 60),
    "matmul_vector_right": (torch.matmul, [(2, 3, 4), (4,)], 24),
    "matmul_vector_left": (torch.matmul, [(4,), (2, 4, 5)], 40),
    "dot": (torch.dot, [(7,), (7,)], 7),
    "mv": (torch.mv, [(3, 4), (4,)], 12),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)], 120),
    "baddbmm": (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 120),
    "addbmm": (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], 120),
    "addmm": (torch.addmm, [(5,), (3, 4), (4, 5)], 60),
    "addmv": (torch.addmv, [(3,), (3, 4), (4,)], 12),
    "linear_3d": (F.linear, [(2, 3, 4), (5, 4), (5,)], 120),
    "linear_vector": (F.linear, [(2, 3, 4), (4,)], 24),
    "tensordot": (lambda a, b: torch.tensordot(a, b, ([1, 2], [0, 1])), [(3, 4, 5), (4, 5, 6)], 3 * 20 * 6),
    "inner_through_sum": (lambda a, b: (a * b).sum(), [(3, 4), (3, 4)], 0),  # pointwise, then a reduction
    "outer": (torch.outer, [(3,), (4,)], 0),
    "aten_linear": (ATEN.linear.default, [(2, 3, 4), (5, 4)], 120),
    "aten_mm": (ATEN.mm.default, [(3, 4), (4, 5)], 60),
    "attention": (F.scaled_dot_product_attention, [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)], 6 * 5 * 7 * 10),
    "attention_grouped_query": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [(2, 6, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
        12 * 5 * 7 * 8,
    ),
    "attention_flash_cpu": (
        lambda q, k, v: ATEN._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)[0],
        [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
        6 * 5 * 7 * 8,
    ),
}


@pytest.mark.parametrize("function, shapes, expected", PRODUCTS.values(), ids=PRODUCTS)
def test_products_by_hand(function, shapes, expected):
    count = count_macs(Call(function), tuple(torch.randn(shape) for shape in shapes))
    assert count.total == expected


EINSUMS = {
    "bij,bjk->bik": [(2, 3, 4), (2, 4, 5)],
    "b h i d, b h j d -> b h i j": [(2, 3, 4, 5), (2, 3, 6, 5)],
    "bhwc,hkc->bhwk": [(2, 3, 3, 4), (3, 6, 4)],  # relative position, shared over the batch
    "ij,jk,kl->il": [(2, 3), (3, 4), (4, 5)],
    "ij,jk,kl->": [(2, 3), (3, 4), (4, 5)],
    "ijk,jl->il": [(2, 3, 7), (3, 5)],  # k is summed before the product
    "...i,ij->...j": [(2, 3, 4), (4, 5)],
    "...ij,...jk": [(2, 1, 3, 4), (6, 4, 5)],
    "ij,jk": [(2, 3), (3, 4)],
    "bij,bij->b": [(2, 3, 4), (2, 3, 4)],
    "bhi,bhj->bhij": [(2, 3, 4), (2, 3, 5)],  # nothing contracted
    "bij,ij->bij": [(2, 3, 4), (3, 4)],
    "ii->i": [(3, 3)],
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum_equals_torch_counter(equation):
    operands = [torch.randn(shape) for shape in EINSUMS[equation]]
    expected = torch_count(Call(lambda *args: torch.einsum(equation, *args)), *operands)
    assert einsum_macs(equation, EINSUMS[equation]) == expected
    assert count_macs(Call(lambda *args: torch.einsum(equation, *args)), tuple(operands)).total == expected


def test_einsum_follows_the_given_path():
    shapes = [(2, 9), (9, 9), (9, 3)]
    right_first = 9 * 9 * 3 + 2 * 9 * 3
    assert einsum_macs("ij,jk,kl->il", shapes, path=[1, 2, 0, 1]) == right_first
    assert einsum_macs("ij,jk,kl->il", shapes) == 2 * 9 * 9 + 2 * 9 * 3


@pytest.mark.parametrize("cell, layer", [(nn.LSTMCell, nn.LSTM), (nn.GRUCell, nn.GRU), (nn.RNNCell, nn.RNN)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_cost_what_their_unrolled_cells_cost(cell, layer, bidirectional):
    width, hidden, steps, batch = 5, 7, 4, 3
    directions = 2 if bidirectional else 1
    expected = 0
    for depth in range(2):
        inputs = width if depth == 0 else hidden * directions
        one = torch_count(cell(inputs, hidden), torch.randn(batch, inputs))
        expected += one * steps * directions
    stacked = layer(width, hidden, num_layers=2, bidirectional=bidirectional, batch_first=True)
    assert count_macs(stacked, (torch.randn(batch, steps, width),)).total == expected > 0


def test_fused_encoder_path_hides_nothing():
    tokens, width, hidden = 5, 16, 32
    layer = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True).eval().requires_grad_(False)
    expected = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    with torch.no_grad():
        assert count_macs(layer, (torch.randn(1, tokens, width),)).total == expected
    attention = nn.MultiheadAttention(width, 4, batch_first=True).eval().requires_grad_(False)
    called = Call(lambda q, k: attention(q, k, k)[0])
    called.attention = attention
    query, key = torch.randn(1, 3, width), torch.randn(1, tokens, width)
    expected = (2 * 3 + 2 * tokens) * width * width + 2 * 3 * tokens * width
    assert count_macs(called, (query, key)).total == expected


def test_free_operators_are_free_and_costly_ones_are_not_listed_as_free():
    x = torch.randn(2, 6, 8, 8)
    free = nn.Sequential(
        nn.BatchNorm2d(6),
        nn.GroupNorm(2, 6),
        nn.InstanceNorm2d(6),
        nn.GELU(),
        nn.PReLU(6),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Softmax(1),
        nn.PixelShuffle(1),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.LayerNorm(54),
        nn.Dropout(),
    )
    count = count_macs(free, (x,))
    assert count.total == 0 and count.fvcore_default > 0
    assert not any(_is_free(kind) for kind in _HANDLES)


# -- unknown operators


@torch.library.custom_op("stepping_test::mix", mutates_args=())
def mix(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


@torch.library.custom_op("stepping_test::my_matmul", mutates_args=())
def my_matmul(x: Tensor) -> Tensor:
    return x @ x.mT


@torch.library.custom_op("stepping_test::gate", mutates_args=())
def gate(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale


class Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("width", [5, 3])  # 3: square, so the shapes fit a pointwise operator too
def test_unknown_product_is_an_error_that_names_it(width):
    module = Call(lambda x, w: torch.ops.stepping_test.mix(torch.ops.stepping_test.mix(x, w), w))
    inputs = torch.randn(width, 3, width), torch.randn(width, width)
    with pytest.raises(SteppingError, match=r"stepping_test::mix \(2x\)"):
        count_macs(module, inputs)


def test_unknown_product_is_recognised_by_name():
    with pytest.raises(SteppingError, match="stepping_test::my_matmul"):
        count_macs(Call(torch.ops.stepping_test.my_matmul), (torch.randn(3, 3),))


def test_unknown_autograd_function_with_a_product_is_an_error():
    with pytest.raises(SteppingError, match=r"prim::PythonOp\.Mix \(1x\)"):
        count_macs(Call(Mix.apply), (torch.randn(3, 4), torch.randn(4, 6)))


def test_unknown_pointwise_operators_are_free():
    module = Call(lambda x, s, w: F.linear(Swish.apply(torch.ops.stepping_test.gate(x, s)), w))
    count = count_macs(module, (torch.randn(2, 3, 4), torch.randn(4), torch.randn(5, 4)))
    assert count.total == 2 * 3 * 4 * 5


def test_extra_handles_resolve_an_unknown_operator():
    def handle(inputs, outputs):
        (rows, inner), (_, columns) = (value.type().sizes() for value in inputs)
        return rows * inner * columns

    inputs = torch.randn(3, 4), torch.randn(4, 6)
    handles = {"stepping_test::mix": handle, "prim::PythonOp.Mix": handle}
    for function in (torch.ops.stepping_test.mix, Mix.apply):
        assert count_macs(Call(function), inputs, extra_handles=handles).total == 3 * 4 * 6


# -- manners


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        self.inner(x)
        raise ValueError("planted")


@pytest.mark.parametrize("module", [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), Breaks()])
def test_module_is_left_as_it_was(module):
    module.train()
    module[1].eval() if isinstance(module, nn.Sequential) else module.inner[1].eval()
    seen = []
    module.register_forward_hook(lambda m, i, o: seen.append(m.training))
    modes = [part.training for part in module.modules()]
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()]
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    if isinstance(module, Breaks):
        with pytest.raises(CaptureError, match="planted"):
            count_macs(module, (torch.randn(1, 4),))
    else:
        assert count_macs(module, (torch.randn(1, 4),)).total == 16  # one sample: batch norm needs eval mode
        assert seen == [False]
    assert [part.training for part in module.modules()] == modes
    assert [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()] == hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == fast and torch.is_grad_enabled()


def test_counting_is_silent(caplog):
    model = Call(lambda x: F.gelu(F.linear(x, x)) if x.sum() > -1e9 else x)  # the tracer warns about branches
    model.unused = nn.Linear(3, 3)  # never called: fvcore logs it
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_macs(model, (torch.randn(3, 3),)).total == 27
    assert not caplog.records


def test_inputs_must_be_a_tuple_of_tensors():
    for wrong in (torch.randn(1, 4), (1.0,)):
        with pytest.raises(SteppingError, match="tuple of tensors"):
            count_macs(nn.Linear(4, 4), wrong)
