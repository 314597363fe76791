"""The toolkit's own pruners, brought to a budget in MACs: what SteppingNet is compared with.

The toolkit takes ratios. Here the ratio is found by bisection on exact MACs (`count_macs`). In a small net many layers
lose a channel at the same ratio, so afterwards layers get single channels back, in turn, as long as the budget holds.

Settings are those of the toolkit's own CIFAR experiments: local pruning, p = 2, `reg` 5e-4, `delta_reg` 1e-4, hundred
increments of the growing regularisation.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from stepping_plugin.errors import BudgetError, CaptureError, SteppingError, explain, nearest
from stepping_plugin.integrations.fvcore import count_macs

__all__ = ["PRUNERS", "ToolkitPruner", "loss_gradients", "prune_to_budget", "sparsity_regulariser"]

GROWTH_STEPS = 100  # increments of the growing regularisation
_CLOSE = 1e-4  # the bisection's last step of the ratio


@dataclass(frozen=True)
class ToolkitPruner:
    """One of the toolkit's methods.

    Attributes:
        pruner: class, called with (model, images, importance=..., ...).
        importance: makes a fresh importance.
        gradients: whether the importance reads the gradients of a loss.
        sparse: whether the weights are regularised towards sparsity before they are pruned.
        options: further arguments of the pruner.
    """

    pruner: Callable[..., Any]
    importance: Callable[[], Any]
    gradients: bool = False
    sparse: bool = False
    options: tuple[tuple[str, Any], ...] = ()


PRUNERS: dict[str, ToolkitPruner] = {
    "magnitude": ToolkitPruner(tp.pruner.MagnitudePruner, lambda: tp.importance.GroupMagnitudeImportance(p=2)),
    "taylor": ToolkitPruner(tp.pruner.MagnitudePruner, tp.importance.GroupTaylorImportance, gradients=True),
    "bn-scale": ToolkitPruner(
        tp.pruner.BNScalePruner, tp.importance.BNScaleImportance, sparse=True, options=(("reg", 5e-4),)
    ),
    "group-norm": ToolkitPruner(
        tp.pruner.GroupNormPruner,
        lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer="max"),
        sparse=True,
        options=(("reg", 5e-4),),
    ),
    "growing-reg": ToolkitPruner(
        tp.pruner.GrowingRegPruner,
        lambda: tp.importance.GroupMagnitudeImportance(p=2),
        sparse=True,
        options=(("reg", 5e-4), ("delta_reg", 1e-4)),
    ),
    "random": ToolkitPruner(tp.pruner.MagnitudePruner, tp.importance.RandomImportance),
}


def prune_to_budget(
    model: nn.Module,
    images: Tensor,
    budget: int,
    method: str = "magnitude",
    *,
    gradients: Sequence[Tensor | None] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A copy of the model, pruned by the toolkit to at most `budget` MACs.

    Args:
        model: a timm classifier; not modified.
        images: one example, Tensor[1, C, H, W].
        budget: MACs of one image.
        method: a name in `PRUNERS`.
        gradients: of a loss, one per parameter, for methods that read them (`loss_gradients`).
        seed: of methods that draw at random.

    Returns:
        The pruned model in eval mode, with parameters of its own.

    Raises:
        BudgetError: the method cannot get down to the budget.
        CaptureError: the toolkit fails on this model.
        SteppingError: unknown method, or gradients are missing.
    """
    trial = _Trial(model, images, _method(method), gradients, seed)
    if count_macs(model, (images,)).total <= budget:
        return copy.deepcopy(model).eval()
    low, high = 0.0, 1.0
    floor = trial.macs(high)
    if floor > budget:
        got = f"{floor:,} MACs at a ratio of 1"
        raise BudgetError(explain(f"torch-pruning ({method}) cannot get down to {budget:,} MACs", got=got))
    while high - low > _CLOSE:
        middle = (low + high) / 2
        low, high = (middle, high) if trial.macs(middle) > budget else (low, middle)
    return trial.pruned(high, _given_back(trial, high, budget))


def _given_back(trial: _Trial, ratio: float, budget: int) -> dict[str, int]:
    """Channels that layers get back, by name, up to a quarter of what the ratio leaves them."""
    given: dict[str, int] = {}
    macs = trial.macs(ratio)
    most = {name: max(1, int(0.25 * size * (1 - ratio))) for name, size in trial.channels.items()}
    growing = list(most)
    while growing:
        for name in list(growing):
            larger = {**given, name: given.get(name, 0) + 1}
            found = trial.macs(ratio, larger)
            if macs < found <= budget:  # equal: another layer decides about these channels
                given, macs = larger, found
            if given.get(name, 0) != larger[name] or larger[name] >= most[name]:
                growing.remove(name)
    return given


class _Trial:
    """Prune copies of one model by one method, at different ratios."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        method: ToolkitPruner,
        gradients: Sequence[Tensor | None] | None,
        seed: int,
    ) -> None:
        if method.gradients and gradients is None:
            raise SteppingError("this method reads gradients: pass gradients=loss_gradients(model, batches).")
        self.model, self.images, self.method = model, images, method
        self.gradients, self.seed = gradients, seed
        self.channels = {name: channels for name, channels, _ in _layers(model)}

    def macs(self, ratio: float, given: Mapping[str, int] | None = None) -> int:
        return count_macs(self.pruned(ratio, given or {}), (self.images,)).total

    def pruned(self, ratio: float, given: Mapping[str, int]) -> nn.Module:
        """Every layer pruned at the ratio, except for channels that it is given back."""
        model = copy.deepcopy(self.model).eval()
        for parameter, gradient in zip(model.parameters(), self.gradients or ()):
            parameter.grad = None if gradient is None else gradient.clone()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            try:
                _make(self.method, model, self.images, ratio, given).step()
                repair_attention(model)
            except Exception as error:
                name = type(self.model).__name__
                raise CaptureError(f"torch-pruning fails on {name}: {type(error).__name__}: {error}") from error
        for parameter in model.parameters():
            parameter.grad = None
        return model


def _make(
    method: ToolkitPruner, model: nn.Module, images: Tensor, ratio: float, given: Mapping[str, int] | None = None
) -> Any:
    """The toolkit's pruner. Every dictionary is fresh: its defaults are shared between all pruners of a process."""
    classifier = cast(Any, model).get_classifier() if hasattr(model, "get_classifier") else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters detected")  # pruned along their last axis, as is right
        return method.pruner(
            model,
            images,
            importance=method.importance(),
            pruning_ratio=ratio,
            pruning_ratio_dict=_ratios(model, ratio, given or {}),
            ignored_layers=[] if classifier is None else [classifier],
            num_heads={m.qkv: m.num_heads for m in _attentions(model)},
            in_channel_groups={},
            out_channel_groups={},
            **dict(method.options),
        )


def _ratios(model: nn.Module, ratio: float, given: Mapping[str, int]) -> dict[nn.Module, float]:
    """Ratio per layer. One channel stays: at larger ratios the toolkit would leave the layer as it is."""
    modules = dict(model.named_modules())
    ratios = {}
    for name, channels, heads in _layers(model):
        limit = 1 - (1 + 1e-6) * heads / channels  # 1e-6: the toolkit truncates
        ratios[modules[name]] = max(0.0, min(ratio, limit) - heads * given.get(name, 0) / channels)
    return ratios


def _layers(model: nn.Module) -> list[tuple[str, int, int]]:
    """Name, output channels and heads (1: no attention) of all convolutions and linear layers."""
    heads = {layer: m.num_heads for m in _attentions(model) for layer in (m.qkv, m.proj)}
    return [
        (name, m.out_features if isinstance(m, nn.Linear) else m.out_channels, heads.get(m, 1))
        for name, m in model.named_modules()
        if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))
    ]


def sparsity_regulariser(
    model: nn.Module, images: Tensor, method: str, updates: int
) -> Callable[[torch.optim.Optimizer, Any, Any], None] | None:
    """A pre-step hook (`Optimizer.register_step_pre_hook`) that regularises the weights towards sparsity.

    Args:
        model: trained with it, in place; left in the mode it has.
        images: one example.
        method: a name in `PRUNERS`.
        updates: how many there will be; the growing regularisation spreads its increments over them.

    Returns:
        The hook, None for methods that prune the weights as they are.
    """
    chosen = _method(method)
    if not chosen.sparse:
        return None
    mode = model.training
    pruner = _make(chosen, model, images, 0.0)
    model.train(mode)
    every, done = max(1, updates // GROWTH_STEPS), 0

    def hook(*_: Any) -> None:
        nonlocal done
        with torch.no_grad():
            pruner.regularize(model)
            done += 1
            if done % every == 0 and hasattr(pruner, "update_reg"):
                pruner.update_reg()

    return hook


def loss_gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
    """Gradient of the cross entropy, summed over batches of (images, labels), one per parameter."""
    model = copy.deepcopy(model).eval()
    model.zero_grad()
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def repair_attention(model: nn.Module) -> None:
    """What timm's attention remembers of its widths, after the toolkit changed them."""
    for module in _attentions(model):
        module.head_dim = module.qkv.out_features // (3 * module.num_heads)
        module.attn_dim = module.head_dim * module.num_heads
        module.scale = module.head_dim**-0.5


def _attentions(model: nn.Module) -> list[Any]:
    found: list[Any] = list(model.modules())
    return [m for m in found if isinstance(getattr(m, "qkv", None), nn.Linear) and hasattr(m, "num_heads")]


def _method(name: str) -> ToolkitPruner:
    if name not in PRUNERS:
        raise SteppingError(f"method: got {name!r}; {nearest(name, PRUNERS)}")
    return PRUNERS[name]
