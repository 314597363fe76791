"""Small models whose result is not one vector of class scores, one per kind of output."""

from __future__ import annotations

from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = (3, 16, 16)


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class UNet(nn.Module):
    """Transposed convolutions, skips, a score map and a second one at half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = block(3, 8), block(8, 12, 2), block(12, 16, 2)
        self.up2 = nn.ConvTranspose2d(16, 12, 2, 2)
        self.up1 = nn.ConvTranspose2d(12, 8, 2, 2)
        self.mix2, self.mix1 = block(24, 12), block(16, 8)
        self.aux, self.head = nn.Conv2d(12, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.down1(x)
        b = self.down2(a)
        c = self.mix2(torch.cat([self.up2(self.down3(b)), b], 1))
        d = self.mix1(torch.cat([self.up1(c), a], 1))
        return {"out": self.head(d), "aux": F.interpolate(self.aux(c), scale_factor=2, mode="bilinear")}


class Detector(nn.Module):
    """Feature pyramid, one head for all its levels, predictions joined over anchors (RetinaNet, SSD)."""

    def __init__(self) -> None:
        super().__init__()
        self.c3, self.c4 = nn.Sequential(block(3, 8), block(8, 10, 2)), block(10, 12, 2)
        self.inner3, self.inner4 = nn.Conv2d(10, 8, 1), nn.Conv2d(12, 8, 1)
        self.layer3, self.layer4 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(8, 2 * 3, 3, padding=1), nn.Conv2d(8, 2 * 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        c3 = self.c3(x)
        p4 = self.inner4(self.c4(c3))
        p3 = self.inner3(c3) + F.interpolate(p4, scale_factor=2)
        pyramid = [self.layer3(p3), self.layer4(p4)]
        scores, boxes = [], []
        for level in pyramid:
            tower = self.tower(level)
            scores.append(self.classes(tower).permute(0, 2, 3, 1).reshape(len(x), -1, 3))
            boxes.append(self.boxes(tower).permute(0, 2, 3, 1).reshape(len(x), -1, 4))
        return torch.cat(scores, 1).sigmoid(), torch.cat(boxes, 1), pyramid


class Hourglass(nn.Module):
    """Keypoint heat maps in two stages; the maps of the first are read by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8, 2)
        self.stages = nn.ModuleList([block(8, 8), block(8, 8)])
        self.heads = nn.ModuleList([nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)])
        self.features, self.maps = nn.Conv2d(8, 8, 1), nn.Conv2d(5, 8, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        first = self.stages[0](x)
        maps = self.heads[0](first)
        x = x + self.features(first) + self.maps(maps)
        return [maps, self.heads[1](self.stages[1](x))]


class SuperResolution(nn.Module):
    """Residual blocks, pixel shuffle, the enlarged image added."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.up = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2))
        self.tail = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        y = self.tail(self.up(y + self.body(y)))
        return y + F.interpolate(x, scale_factor=2, mode="bicubic")


class Hierarchy(nn.Module):
    """Coarse classes, fine ones that read them, and one logit (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 12), block(12, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.hidden = nn.Linear(16, 12)
        self.coarse, self.fine, self.one = nn.Linear(16, 3), nn.Linear(12 + 3, 9), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        coarse = self.coarse(x)
        fine = self.fine(torch.cat([torch.relu(self.hidden(x)), coarse], 1))
        return {"coarse": coarse, "fine": fine, "one": self.one(x).squeeze(1)}


class Answer(NamedTuple):
    logits: Tensor
    aux: Tensor | None


class Auxiliary(nn.Module):
    """A second head in train mode only, with layers of its own (GoogLeNet, Inception)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(3, 10), block(10, 14, 2)
        self.aux = nn.Sequential(nn.Conv2d(10, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Answer:
        x = self.first(x)
        logits = self.head(self.second(x).mean((2, 3)))
        return Answer(logits, self.aux(x) if self.training else None)


class Tokens(nn.Module):
    """Scores per position (B, T, C), constants beside them, and a tensor that needs no image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 12, 4, 4), nn.LayerNorm(12)
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.head = nn.Linear(12, 7)
        self.anchors = nn.Parameter(torch.randn(16, 2))

    def forward(self, x: Tensor) -> tuple:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(x + self.mlp(self.norm(x))), (4, 4), self.anchors, None


class Autoencoder(nn.Module):
    """A code that the decoder reads (units leave the model), and the reconstruction."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(block(3, 8, 2), nn.Flatten(), nn.Linear(512, 10))
        self.decoder = nn.Sequential(
            nn.Linear(10, 64), nn.ReLU(), nn.Unflatten(1, (4, 4, 4)), nn.ConvTranspose2d(4, 3, 4, 4)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(x)
        return code, self.decoder(code)


class Segmenter(nn.Module):
    """A score map from the feature maps of a timm backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        widths = backbone.feature_info.channels()
        self.lateral = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in widths)
        self.smooth, self.head = block(8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [conv(m) for conv, m in zip(self.lateral, self.backbone(x))]
        y = maps[-1]
        for m in maps[-2::-1]:
            y = m + F.interpolate(y, size=m.shape[-2:], mode="nearest")
        return F.interpolate(self.head(self.smooth(y)), size=x.shape[-2:], mode="bilinear")


def backbone(**options) -> nn.Module:
    return timm.create_model("test_resnet", features_only=True, **options)


# What makes a model, and its heads: weights whose result accumulates. All other outputs are units.
NETS: dict[str, tuple] = {
    "unet": (UNet, {"head", "aux"}),
    "detector": (Detector, {"classes", "boxes"}),
    "hourglass": (Hourglass, {"heads.0", "heads.1"}),
    "super-resolution": (SuperResolution, {"tail"}),
    "hierarchy": (Hierarchy, {"coarse", "fine", "one"}),
    "auxiliary": (Auxiliary, {"head"}),
    "tokens": (Tokens, {"head"}),
    "autoencoder": (Autoencoder, {"decoder.3"}),
    "backbone": (backbone, set()),
    "segmenter": (lambda: Segmenter(backbone(out_indices=(1, 2, 3))), {"head"}),
    "no classifier": (lambda: timm.create_model("test_resnet", num_classes=0), set()),
}
