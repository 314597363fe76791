"""The toolkit's own pruners, brought to a budget in MACs: what SteppingNet is compared with.

The toolkit takes ratios. Here the ratio is found by bisection on exact MACs (`count_macs`); between the last ratio
above the budget and the first one below it, layers are pruned one after the other until the budget holds, because a
small net has many layers that lose a channel at the same ratio.

Settings are those of the toolkit's own CIFAR experiments: local pruning, p = 2, `reg` 5e-4, `delta_reg` 1e-4, hundred
increments of the growing regularisation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from stepping_plugin.errors import BudgetError, SteppingError, explain, nearest
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
        SteppingError: unknown method, or the toolkit fails on this model.
    """
    trial = _Trial(model, images, _method(method), gradients, seed)
    low, high = 0.0, 1.0
    if trial.macs_at(0.0) <= budget:
        return trial.at(0.0)
    floor = trial.macs_at(high)
    if floor > budget:
        share = f"{floor:,} MACs at a ratio of 1"
        raise BudgetError(explain(f"torch-pruning ({method}) cannot get down to {budget:,} MACs", got=share))
    while high - low > _CLOSE:
        middle = (low + high) / 2
        low, high = (middle, high) if trial.macs_at(middle) > budget else (low, middle)
    return trial.between(low, high, budget)


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

    def macs_at(self, ratio: float) -> int:
        return count_macs(self.at(ratio), (self.images,)).total

    def at(self, ratio: float) -> nn.Module:
        """Everything pruned at one ratio."""
        return self.between(ratio, ratio, 0)

    def between(self, low: float, high: float, budget: int) -> nn.Module:
        """Pruned at `low`, then layer by layer at `high` until the budget holds."""
        model = copy.deepcopy(self.model).eval()
        for parameter, gradient in zip(model.parameters(), self.gradients or ()):
            parameter.grad = None if gradient is None else gradient.clone()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            try:
                self._prune(model, low, high, budget)
            except SteppingError:
                raise
            except Exception as error:
                name = type(self.model).__name__
                raise SteppingError(f"torch-pruning fails on {name}: {type(error).__name__}: {error}") from error
        for parameter in model.parameters():
            parameter.grad = None
        return model

    def _prune(self, model: nn.Module, low: float, high: float, budget: int) -> None:
        pruner = _make(self.method, model, self.images, low, high)
        pruner.step()
        repair_attention(model)
        if high > low:
            for group in pruner.step(interactive=True):
                group.prune()
                repair_attention(model)
                if count_macs(model, (self.images,)).total <= budget:
                    return


def _make(method: ToolkitPruner, model: nn.Module, images: Tensor, low: float, high: float) -> Any:
    """The toolkit's pruner of two steps: to the ratio `low`, then to `high`.

    Every dictionary is fresh: the toolkit's defaults are shared between all pruners of a process.
    """
    return method.pruner(
        model,
        images,
        importance=method.importance(),
        pruning_ratio=1.0,
        pruning_ratio_dict=_limits(model),
        iterative_steps=2,
        iterative_pruning_ratio_scheduler=lambda limit, steps: [0.0, min(low, limit), min(high, limit)],
        ignored_layers=[m for m in [_classifier(model)] if m is not None],
        num_heads={m.qkv: m.num_heads for m in _attentions(model)},
        in_channel_groups={},
        out_channel_groups={},
        **dict(method.options),
    )


def _limits(model: nn.Module) -> dict[nn.Module, float]:
    """Largest ratio per layer: one channel stays. Beyond it the toolkit would leave the layer as it is."""
    heads = {layer: m.num_heads for m in _attentions(model) for layer in (m.qkv, m.proj)}
    limits: dict[nn.Module, float] = {}
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            limits[module] = max(0.0, 1 - (1 + 1e-6) * heads.get(module, 1) / channels)  # 1e-6: the toolkit truncates
    return limits


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
    pruner = _make(chosen, model, images, 0.0, 0.0)
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


def _classifier(model: Any) -> nn.Module | None:
    return model.get_classifier() if hasattr(model, "get_classifier") else None


def _method(name: str) -> ToolkitPruner:
    if name not in PRUNERS:
        raise SteppingError(f"method: got {name!r}; {nearest(name, PRUNERS)}")
    return PRUNERS[name]
