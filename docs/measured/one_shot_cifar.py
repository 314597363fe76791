"""One shot from pretrained CIFAR-10 residual nets, reconstructed or not, beside torch-pruning's one-shot nets.

    python docs/measured/one_shot_cifar.py --photos FOLDER --weights resnet20.th --depth 20 >> one_shot_cifar.jsonl

FOLDER has train/CLASS/*.png and test/CLASS/*.png; the weights are those of akamaster/pytorch_resnet_cifar10. Nothing is
trained: 1,000 unlabelled training pictures are all that is used. The pruned nets get new batch norm statistics from the
same pictures. Accuracy on all 10,000 test pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from stepping_plugin import ConstructionConfig, SteppingNet, apply_steppingnet
from stepping_plugin.integrations.fvcore import count_macs
from stepping_plugin.integrations.torch_pruning.to_budget import prune_to_budget

BUDGETS = (0.30, 0.50, 0.85)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # what the nets were trained with


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:  # shortcut of kind A: every other position, new channels are 0
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(branch + x)


class ResNet(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        before = 16
        for number, width in enumerate((16, 32, 64), start=1):
            blocks = []
            for k in range((depth - 2) // 6):
                blocks.append(Block(before, width, 2 if number > 1 and k == 0 else 1))
                before = width
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def pictures(folder: Path, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (P, 3, 32, 32) and classes, in an order that does not depend on the class."""
    files = [(path, k) for k, group in enumerate(sorted(folder.iterdir())) for path in sorted(group.glob("*.png"))]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
    images = torch.from_numpy(np.stack([np.asarray(Image.open(files[k][0]).convert("RGB")) for k in order]))
    images = (images.float() / 255 - MEAN) / STD
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor([files[k][1] for k in order])


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    right: Tensor | int = 0
    for x, y in zip(images.split(250), labels.split(250)):
        scores = net.eval().forward_all(x) if isinstance(net, SteppingNet) else net.eval()(x)[None]
        right = right + (scores.argmax(-1) == y).sum(1)
    return [float(r) / len(labels) for r in torch.as_tensor(right)]


@torch.no_grad()
def renew_statistics(net: nn.Module, images: Tensor) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    net.train()
    for x in images.split(250):
        net(x)
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--pictures", type=int, default=1000, help="unlabelled training pictures (1000)")
    arguments = parser.parse_args()
    model = ResNet(arguments.depth)
    state = torch.load(arguments.weights, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    model.eval()
    calibration, _ = pictures(arguments.photos / "train", arguments.pictures)
    test = pictures(arguments.photos / "test")
    total = count_macs(model, (calibration[:1],)).total

    def report(method: str, macs: list[int], scores: list[float], seconds: float) -> None:
        shares = [round(m / total, 4) for m in macs]
        row = {"net": f"ResNet-{arguments.depth}", "method": method, "pictures": arguments.pictures, "macs": shares,
               "accuracy": scores, "seconds": round(seconds, 1)}  # fmt: skip
        print(json.dumps(row), flush=True)

    report("original", [total], accuracy(model, *test), 0)
    for policy in ("steppingnet", "any-width"):
        for used in (None, calibration):
            start = time.perf_counter()
            net = apply_steppingnet(model, BUDGETS, example_inputs=calibration[:1], calibration=used, policy=policy,
                                    config=ConstructionConfig())  # fmt: skip
            name = policy + (", cut" if used is None else ", reconstructed")
            report(name, net.macs, accuracy(net, *test), time.perf_counter() - start)
    pruned = [prune_to_budget(copy.deepcopy(model), calibration[:1], int(b * total), "magnitude") for b in BUDGETS]
    macs = [count_macs(net, (calibration[:1],)).total for net in pruned]
    report("torch-pruning, group magnitude, cut", macs, [accuracy(net, *test)[0] for net in pruned], 0)
    renewed = [renew_statistics(net, calibration) for net in pruned]
    report("torch-pruning, group magnitude, new statistics", macs, [accuracy(n, *test)[0] for n in renewed], 0)


if __name__ == "__main__":
    main()
