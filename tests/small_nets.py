"""What test_training.py and test_training_faults.py share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stepping_plugin.net import SteppingNet
from stepping_plugin.training.loop import TrainConfig
from stepping_plugin.units.analysis import Analysis, analyse

CLASSES, SIZE = 4, (1, 6, 6)
PLAIN_SGD = TrainConfig(epochs=2, opt="momentum", lr=0.05, sched="none", weight_decay=0.0)


def small_model(norm: bool = True, classes: int = CLASSES) -> nn.Module:
    normalise: Callable[[int], nn.Module] = nn.BatchNorm2d if norm else lambda width: nn.Identity()
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), normalise(8), nn.ReLU(), nn.Conv2d(8, 12, 3), normalise(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, classes),
    )  # fmt: skip


_analyses: dict[bool, Analysis] = {}


def small_net(norm: bool = True, subnets: int = 3) -> SteppingNet:
    model = small_model(norm).double()
    if norm not in _analyses:
        _analyses[norm] = analyse(model, SIZE)
    levels = torch.arange(_analyses[norm].num_units) % (subnets + 1) + 1
    return SteppingNet(model, _analyses[norm], levels, [1] * subnets, 1)


def data(samples: int = 32, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Pictures of four patterns."""
    labels = torch.arange(samples) % CLASSES
    patterns = torch.randn(CLASSES, *SIZE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return patterns[labels] + noise * torch.randn(samples, *SIZE, dtype=torch.float64), labels


def loader(batch_size: int = 8, samples: int = 32, **kwargs: Any) -> DataLoader:
    return DataLoader(TensorDataset(*data(samples)), batch_size, **kwargs)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_close(net: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(tensors(net), tensors(other), rtol=0, atol=tolerance)
