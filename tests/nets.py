"""What many tests need: models whose every parameter matters, random levels, plain user networks."""

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

import timm
import torch
from torch import Tensor, nn

import stepping_plugin.integrations.timm  # noqa: F401 - registers the paper's networks
from stepping_plugin.net import SteppingNet
from stepping_plugin.studies.coverage.check import perturb as randomise
from stepping_plugin.units.analysis import Analysis
from stepping_plugin.units.witness import find_units

# One small model per kind of structure: residual, attention, LayerNorm convolutions, weight standardisation, ...
FAMILIES = [
    "lenet3c1l",
    "lenet5",
    "test_resnet",
    "test_vit",
    "test_vit2",
    "test_convnext",
    "test_convnext2",
    "test_convnext3",
    "test_efficientnet",
    "test_nfnet",
    "test_byobnet",
    "test_mambaout",
]

# The architectures of the acceptance list; a sweep over them is marked slow.
ARCHITECTURES = [
    "vgg11_bn", "resnet18", "resnet50", "resnext26ts", "regnety_002", "mobilenetv3_small_050", "efficientnet_lite0",
    "densenet121", "convnext_atto", "convnextv2_atto", "ghostnet_050", "res2net50_26w_4s", "skresnet18",
    "ecaresnet26t", "nf_regnet_b0", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224", "mixer_s32_224", "poolformer_s12", "hrnet_w18_small", "levit_128s",
    "mobilevit_xxs", "coat_lite_tiny",
]  # fmt: skip


def make(name: str, **kwargs) -> nn.Module:
    """A timm model in float64, eval mode, in which zero-initialised parameters and statistics are random."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **kwargs)).double().eval()


def image_size(model: nn.Module) -> tuple[int, ...]:
    return tuple(model.default_cfg["input_size"])


def images(size: tuple[int, ...], batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_levels(analysis: Analysis, n: int, seed: int = 0, spare: bool = False) -> Tensor:
    """Random levels in which about a quarter of the groups lack one level, every anchor keeping level 1."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(1, n + 1 + spare, (analysis.num_units,), generator=generator)
    for group in analysis.groups:
        if n > 1 and torch.rand(1, generator=generator) < 0.25:
            empty = int(torch.randint(2, n + 1, (1,), generator=generator))
            own = levels[group.units]
            levels[group.units] = torch.where(own == empty, empty - 1, own)
    for anchor in analysis.anchors:
        if int(levels[anchor].min()) > 1:
            levels[anchor[0]] = 1
    return levels


_ANALYSES: WeakKeyDictionary[nn.Module, Analysis] = WeakKeyDictionary()  # tracing is what takes time in these tests


def nested(model: nn.Module, n: int = 4, seed: int | None = 0, size: tuple[int, ...] | None = None) -> SteppingNet:
    """A net on a copy of the model; seed None puts all units at level 1."""
    size = size or image_size(model)
    if model not in _ANALYSES:
        _ANALYSES[model] = find_units(model, size)
    analysis = _ANALYSES[model]
    levels = torch.ones(analysis.num_units).long() if seed is None else random_levels(analysis, n, seed)
    net = SteppingNet(copy.deepcopy(model), analysis, levels, list(range(1, n + 1)), 1)
    return net.train(model.training)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


class Plain(nn.Module):
    """A user's network with functional code: residual, split, concat, gate and reused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(4, 6, 3, padding=1)
        self.right = nn.Conv2d(4, 6, 1)
        self.mix = nn.Conv2d(12, 8, 1)
        self.norm = nn.GroupNorm(4, 8)
        self.gate = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        a, b = x.chunk(2, dim=1)
        y = self.mix(torch.cat([self.left(a), self.right(b)], dim=1))
        x = self.norm(x + y)
        pooled = x.mean((2, 3))
        return self.head(pooled * torch.sigmoid(self.gate(pooled)))
