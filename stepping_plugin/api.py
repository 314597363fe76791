"""`apply_steppingnet`: from a trained model and a list of budgets to nested subnets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .console.progress import manner
from .construction.calibration import fixed_round_to
from .construction.config import ConstructionConfig
from .construction.flow import Construction
from .construction.start import convert, one_shot
from .errors import SteppingError, explain
from .graph.device import checked_seed, on_cpu_by_default, usable_device
from .graph.modes import ordinary_mode
from .graph.program import unwrap
from .net import SteppingNet
from .training.batches import images_at_hand
from .training.criteria import OwnCriterion
from .training.losses import SubnetLoss

__all__ = ["apply_steppingnet"]


@ordinary_mode  # the net's tensors must be ordinary ones and its graph hold no casts, wherever it is made
def apply_steppingnet(
    model: nn.Module,
    budgets: Sequence[float | int | str],
    *,
    example_inputs: Tensor | None = None,
    train_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    calibration: Tensor | Iterable[Any] | None = None,
    policy: str = "steppingnet",
    config: ConstructionConfig | None = None,
    criterion: str | OwnCriterion = "cross_entropy",
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> SteppingNet:
    """Turn a trained model into N nested subnets, one per budget.

    Args:
        model: timm model, or any module that maps images (B, C, H, W) to class scores (B, classes), or to any other
            tensor or tuple, list, dict or dataclass of tensors (score maps, boxes, feature maps). Not modified. Of a
            compiled model or one in DataParallel, the model inside is converted. Outputs of a last convolution or
            linear are whole in every subnet and become more exact with every level; units that leave the model
            themselves (feature maps, embeddings behind a norm) are 0 in subnets without them, see `net.output_levels`.
        budgets: ascending MAC budgets of subnets 1..N: floats in (0, 1] are fractions of the model's own MACs M_t,
            integers are MACs, strings may be "40%", "300M", "1.2G".
        example_inputs: images (B, C, H, W) of the size that the net is to be used with; by default the first of
            `train_loader` or `calibration`, else a random image of the size in the model's own configuration (timm
            models have one).
        train_loader: batches of (images, labels) for the construction of the paper (Fig. 3). None: one shot, by the
            magnitude of the weights.
        calibration: unlabelled images (P, C, H, W), or batches of them, with which the weights are fitted anew, so that
            the subnets come near the model, see `reconstruction.reconstruct`. None: weights stay as they are.
        policy: "steppingnet"; or, always in one shot, "any-width" (regular pattern) or "random".
        config: knobs of the construction; without `train_loader` only these matter: `expansion` (widen the network
            first, without changing its function, so that the largest subnets can use up their budgets) and `round_to`
            (channels that every level adds in multiples of, for speed).
        criterion: that the construction trains with, see `training.loop.fit`; without `train_loader` it is not used.
        device: where to put the net; by default where the model is.
        seed: of everything random.
        progress: show how far it is, on standard error, once that takes seconds; None: yes, unless switched off around
            it; False: no.

    Returns:
        The net, in the model's train/eval mode. Constructed on data, it has no spare units, and is best retrained:
        `net.fit(...)`, or any loop of your own over `net.forward_all`.

    Raises:
        BudgetError: malformed budgets, or budgets that no assignment of units can meet.
        CaptureError: the model cannot be captured, or has no units that can move.
        SteppingError: unsuitable arguments.
    """
    settings, seed, loss = _settings(config), checked_seed(seed), SubnetLoss(criterion=criterion)
    place = None if device is None else usable_device(device)
    notes = []
    if isinstance(model, nn.Module) and settings.round_to == "auto":
        settings = dataclasses.replace(settings, round_to=fixed_round_to(settings, place or model))
        notes.append(f"levels add multiples of {settings.round_to} channels, as measured in {settings.latency}")
    with manner(progress):
        with on_cpu_by_default():
            example = images_at_hand(train_loader, calibration) if example_inputs is None else example_inputs
            net = convert(model, budgets, settings, example, seed=seed)
            net.notes += [*notes, *_about_outputs(net)]
            if train_loader is None or policy != "steppingnet":
                net.take(one_shot(net, policy, round_to=int(settings.round_to), seed=seed))
        if train_loader is not None and policy == "steppingnet":
            where = str(place or next(net.parameters()).device)
            net = Construction(net, train_loader, settings, seed=seed, device=where, criterion=loss).run()
        net = net.train(model.training) if place is None else net.train(model.training).to(place)
        if calibration is not None:
            net.notes += net.reconstruct(unwrap(model), calibration, seed=seed).notes
    return net


def _about_outputs(net: SteppingNet) -> list[str]:
    """What to know about a vector (B, C) that looks like class scores and is none."""
    if not net.returns_class_scores or net.output_levels is None:
        return []
    return [
        "the result (B, C) is units of the network, for example behind a norm: subnet i has its channels of levels up "
        "to i and 0 for the others. That suits embeddings; for class scores end the model with a linear or convolution."
    ]


def _settings(config: ConstructionConfig | None) -> ConstructionConfig:
    if config is None:
        return ConstructionConfig()
    if not isinstance(config, ConstructionConfig):
        raise SteppingError(
            explain("wrong type", where="config", got=type(config).__name__, expected="a ConstructionConfig")
        )
    return config
