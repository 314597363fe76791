"""The paper's networks and two small companions, as timm models.

- `lenet3c1l`: three convs and one linear layer (SteppingNet, Table I). The paper gives the name only; the
  definition is that of the any-width networks it compares with (https://arxiv.org/abs/2012.03153).
- `lenet5`: LeNet-5 with ReLU and max pooling (SteppingNet, Table I).
- `vgg16_cifar`: 13 convs with batch norm and two linear layers (SteppingNet, Table I).
- `resnet_tiny`: three stages of one basic block, the smallest net that has residual couplings.
- `resnet56_cifar`: the same with nine blocks per stage, the net of torch-pruning's CIFAR-10 tables.
- `digits_net`: three convs for 8x8 pictures.
- `vgg_tiny`: six convs with batch norm and two linear layers.
- `vit_pico`: timm's vision transformer with four blocks of 64 channels and patches of 4 pixels.

A width is `round(base * width_mult)`, at least 1: `width_mult=1.8` is the paper's expansion of LeNet-3C1L.
The models keep timm's conventions: `forward_features`, `forward_head`, `get_classifier`, `reset_classifier`,
`num_features` (channels of `forward_features`), `head_hidden_size` (inputs of the classifier), `default_cfg`.
Unlike most timm models, `default_cfg["input_size"]` tells the size and channels that the model was *built*
for, so that an example input can be made from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import timm
from timm.layers import to_2tuple
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from stepping_plugin.errors import SteppingError, closest

__all__ = [
    "DigitsNet",
    "LeNet3C1L",
    "LeNet5",
    "ResNet56",
    "ResNetTiny",
    "VGGCifar",
    "VGGTiny",
    "named_model",
    "require_model",
]

ImgSize = int | tuple[int, int]
NetT = TypeVar("NetT", bound=nn.Module)


def _width(base: int, width_mult: float) -> int:
    """Channels of a layer that has `base` of them at `width_mult` 1."""
    return max(1, round(base * width_mult))


def _conv_bn(in_chans: int, out_chans: int, kernel_size: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    """Conv with bias, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding),
        nn.BatchNorm2d(out_chans),
        nn.ReLU(),
    )


class _SmallNet(nn.Module):
    """What the networks share: timm's classifier methods around `forward_features` and `_pre_logits`."""

    fc: nn.Module
    default_cfg: dict[str, Any]  # set by timm's builder

    def __init__(self, num_classes: int, in_chans: int, num_features: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = num_features

    def _add_classifier(self, head_hidden_size: int) -> None:
        """Last call of every `__init__`: the classifier, over `head_hidden_size` inputs."""
        self.head_hidden_size = head_hidden_size
        self.fc = nn.Linear(head_hidden_size, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier on the net, on its device; 0 classes: none (the pre-logits come out)."""
        weight = next(self.parameters())
        self.num_classes = num_classes
        self._add_classifier(self.head_hidden_size)
        self.fc.to(device=weight.device, dtype=weight.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to a feature map (B, num_features, h, w)."""
        raise NotImplementedError

    def _pre_logits(self, x: Tensor) -> Tensor:
        """Feature map to what the classifier reads, (B, head_hidden_size)."""
        return x.flatten(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self._pre_logits(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _lenet_map(model: str, img_size: ImgSize, padding: int = 0) -> tuple[int, int]:
    """Feature map of both LeNets: twice, 4 pixels lost to kernels and the rest halved (32, 28, 14, 10, 5)."""
    height, width = to_2tuple(img_size)
    sides = [((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width)]
    if min(sides) < 1:
        raise SteppingError(
            f"{model}: img_size {height}x{width} leaves no pixel after its convolutions and poolings; "
            f"give images of at least 16x16, for example img_size=32."
        )
    return sides[0], sides[1]


class LeNet3C1L(_SmallNet):
    """LeNet-3C1L: conv3-conv3-pool-conv5-pool-linear, batch norm and ReLU after each conv, no padding.

    With 3x32x32 images and `width_mult` 1: 10,570,944 MACs and 43,978 parameters.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: ImgSize = 32,
        width_mult: float = 1.0,
    ) -> None:
        width = _width(32, width_mult)
        height, breadth = _lenet_map("lenet3c1l", img_size)
        super().__init__(num_classes, in_chans, num_features=width)
        self.conv1 = _conv_bn(in_chans, width, 3)
        self.conv2 = _conv_bn(width, width, 3)
        self.conv3 = _conv_bn(width, width, 5)
        self.pool = nn.MaxPool2d(2)
        self._add_classifier(width * height * breadth)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv2(self.conv1(x)))
        return self.pool(self.conv3(x))


class LeNet5(_SmallNet):
    """LeNet-5: conv5-pool-conv5-pool-linear120-linear84-linear; ReLU, max pooling, no norm.

    28x28 images are padded by 2 in the first conv, so that they give the 5x5 feature map of 32x32 images.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: ImgSize = 32,
        width_mult: float = 1.0,
    ) -> None:
        widths = [_width(base, width_mult) for base in (6, 16, 120, 84)]
        padding = 2 if to_2tuple(img_size) == (28, 28) else 0
        height, breadth = _lenet_map("lenet5", img_size, padding)
        super().__init__(num_classes, in_chans, num_features=widths[1])
        self.conv1 = nn.Conv2d(in_chans, widths[0], 5, padding=padding)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 5)
        self.pool = nn.MaxPool2d(2)
        self.act = nn.ReLU()
        self.fc1 = nn.Linear(widths[1] * height * breadth, widths[2])
        self.fc2 = nn.Linear(widths[2], widths[3])
        self._add_classifier(widths[3])

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.conv1(x)))
        return self.pool(self.act(self.conv2(x)))

    def _pre_logits(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x.flatten(1)))
        return self.act(self.fc2(x))


class VGGCifar(_SmallNet):
    """VGG-16 for 32x32 images: 13 convs 3x3 with batch norm, global average, linear 512-512-classes.

    The usual CIFAR form of https://arxiv.org/abs/1409.1556, whose own two linear layers of 4096 would hold
    most of the weights at this image size.
    """

    STAGES: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(
        self,
        num_classes: int = 100,
        in_chans: int = 3,
        width_mult: float = 1.0,
        drop_rate: float = 0.0,
    ) -> None:
        hidden = _width(self.STAGES[-1][-1], width_mult)
        super().__init__(num_classes, in_chans, num_features=hidden)
        layers: list[nn.Module] = []
        for stage in self.STAGES:
            for base in stage:
                width = _width(base, width_mult)
                layers.append(_conv_bn(in_chans, width, 3, padding=1))
                in_chans = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(hidden, hidden)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(drop_rate)
        self._add_classifier(hidden)
        _init_convs(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def _pre_logits(self, x: Tensor) -> Tensor:
        return self.drop(self.act(self.hidden(x.mean((2, 3)))))


class VGGTiny(VGGCifar):
    """The same with six convs of 16, 32 and 64 channels, for images from 8x8 up."""

    STAGES = ((16, 16), (32, 32), (64, 64))


class _BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn plus shortcut (projected when the shape changes), then ReLU."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.act = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_chans != out_chans:
            conv = nn.Conv2d(in_chans, out_chans, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_chans))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.act(branch + self.downsample(x))


class _ResNet(_SmallNet):
    """Stem, basic blocks of 16, 32 and 64 channels, mean over the positions (https://arxiv.org/abs/1512.03385)."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width_mult: float = 1.0) -> None:
        widths = [_width(base, width_mult) for base in (16, 32, 64)]
        super().__init__(num_classes, in_chans, num_features=widths[2])
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act = nn.ReLU()
        self._add_blocks(widths)
        self._add_classifier(widths[2])
        _init_convs(self)

    def _add_blocks(self, widths: list[int]) -> None:
        raise NotImplementedError

    def _pre_logits(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class ResNetTiny(_ResNet):
    """Residual net of three basic blocks, for images from 16x16 up."""

    def _add_blocks(self, widths: list[int]) -> None:
        self.layer1 = _BasicBlock(widths[0], widths[0], 1)
        self.layer2 = _BasicBlock(widths[0], widths[1], 2)
        self.layer3 = _BasicBlock(widths[1], widths[2], 2)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


class ResNet56(_ResNet):
    """ResNet-56 for CIFAR, shortcuts projected where the shape changes."""

    BLOCKS = 9

    def _add_blocks(self, widths: list[int]) -> None:
        blocks, before = [], widths[0]
        for stage, width in enumerate(widths):
            for k in range(self.BLOCKS):
                blocks.append(_BasicBlock(before, width, 2 if stage and not k else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(self.act(self.bn1(self.conv1(x))))


class DigitsNet(_SmallNet):
    """Three padded 3x3 convs of 16, 32 and 64 channels with batch norm, for pictures of about 8x8 pixels."""

    def __init__(self, num_classes: int = 10, in_chans: int = 1, width_mult: float = 1.0) -> None:
        widths = [_width(base, width_mult) for base in (16, 32, 64)]
        super().__init__(num_classes, in_chans, num_features=widths[2])
        self.conv1 = _conv_bn(in_chans, widths[0], 3, padding=1)
        self.conv2 = _conv_bn(widths[0], widths[1], 3, padding=1)
        self.conv3 = _conv_bn(widths[1], widths[2], 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self._add_classifier(widths[2])

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv3(self.pool(self.conv2(self.conv1(x))))

    def _pre_logits(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def _init_convs(model: nn.Module) -> None:
    """He initialisation of the convs, as timm's VGG and ResNet use it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _cfg(input_size: tuple[int, int, int], num_classes: int, first_conv: str, **kwargs: Any) -> dict[str, Any]:
    channels = input_size[0]
    return {
        "input_size": input_size,
        "num_classes": num_classes,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
        "first_conv": first_conv,
        "classifier": "fc",
        **kwargs,
    }


# fixed_input_size: timm hands img_size to the class, because the first linear layer depends on it.
default_cfgs = generate_default_cfgs(
    {
        "lenet3c1l": _cfg((3, 32, 32), 10, "conv1.0", fixed_input_size=True),
        "lenet5": _cfg((3, 32, 32), 10, "conv1", fixed_input_size=True),
        "vgg16_cifar": _cfg((3, 32, 32), 100, "features.0.0"),
        "resnet_tiny": _cfg((3, 32, 32), 10, "conv1"),
        "resnet56_cifar": _cfg((3, 32, 32), 10, "conv1"),
        "digits_net": _cfg((1, 8, 8), 10, "conv1.0"),
        "vgg_tiny": _cfg((3, 32, 32), 10, "features.0.0"),
        "vit_pico": _cfg((3, 28, 28), 10, "patch_embed.proj", classifier="head", fixed_input_size=True),
    }
)


def _create(cls: Callable[..., NetT], variant: str, pretrained: bool, kwargs: dict[str, Any]) -> NetT:
    """Build by timm's own builder, then let `default_cfg` tell what the model was built for."""
    if pretrained:
        raise SteppingError(f"{variant} has no pretrained weights: use pretrained=False and train it.")
    fixed = default_cfgs[variant].default.fixed_input_size
    img_size = kwargs.get("img_size") if fixed else kwargs.pop("img_size", None)  # the others take any size
    model: Any = build_model_with_cfg(cls, variant, pretrained, **kwargs)
    cfg: dict[str, Any] = model.default_cfg
    height, width = to_2tuple(img_size or cfg["input_size"][1:])
    in_chans = kwargs.get("in_chans", cfg["input_size"][0])
    cfg["input_size"] = (in_chans, height, width)
    cfg["num_classes"] = model.num_classes
    cfg["mean"] = cfg["std"] = (0.5,) * in_chans
    return model


_VARIANTS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {  # name -> class, arguments of its own
    "lenet3c1l": (LeNet3C1L, {}),
    "lenet5": (LeNet5, {}),
    "vgg16_cifar": (VGGCifar, {}),
    "resnet_tiny": (ResNetTiny, {}),
    "resnet56_cifar": (ResNet56, {}),
    "digits_net": (DigitsNet, {}),
    "vgg_tiny": (VGGTiny, {"num_classes": 10}),
    "vit_pico": (VisionTransformer, {"img_size": 28, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4,
                                     "num_classes": 10}),
}  # fmt: skip


def _register(variant: str) -> None:
    cls, own = _VARIANTS[variant]

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(cls, variant, pretrained, {**own, **kwargs})

    create.__name__ = create.__qualname__ = variant  # timm registers functions by name
    globals()[variant] = register_model(create)


for _variant in _VARIANTS:
    _register(_variant)


def require_model(name: str) -> None:
    """Make sure that timm, or this module, has a model of that name.

    Raises:
        SteppingError: it has not; names the nearest one.
    """
    if not timm.is_model(name):
        hint = closest(name, timm.list_models()) or "timm.list_models() lists all."
        raise SteppingError(f"model: timm has no model {name!r}. {hint}")


def named_model(name: str, img_size: int | tuple[int, int] | None = None, **kwargs: Any) -> nn.Module:
    """A timm model by name, for images of a size if it needs to know.

    Args:
        name: timm name.
        img_size: height and width; None: the model's own.
        kwargs: of `timm.create_model`; those that are None are left out.

    Raises:
        SteppingError: no such model (names the nearest one), or it cannot be made with these arguments.
    """
    require_model(name)
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    try:
        if img_size is not None:
            with contextlib.suppress(TypeError):  # convolutional models take any size
                return timm.create_model(name, img_size=img_size, **kwargs)
        return timm.create_model(name, **kwargs)
    except SteppingError:
        raise
    except Exception as error:  # what models raise for arguments that they cannot be made with, or without a network
        shown = ", ".join(f"{key}={str(value)[:40]}" for key, value in kwargs.items())
        reason = " ".join(str(error).split())[:300]
        raise SteppingError(f"model {name} cannot be made with {shown or 'its defaults'}: {reason}") from error
