"""`apply_steppingnet`: from a trained classifier and a list of budgets to nested subnets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .construction.config import ConstructionConfig
from .construction.flow import Construction, start_network
from .construction.importance import magnitude_scores
from .construction.policies import assign
from .errors import CaptureError, SteppingError, explain
from .graph.program import copy_model
from .integrations.fvcore import count_macs
from .levels import parse_budgets
from .macs import MacModel, static_macs
from .net import SteppingNet
from .serialization import describe_origin
from .witness import find_units

__all__ = ["apply_steppingnet", "check_model", "reference_notes"]


@torch.inference_mode(False)  # the net's tensors must be ordinary ones, wherever it is made
def apply_steppingnet(
    model: nn.Module,
    budgets: Sequence[float | int | str],
    *,
    example_inputs: Tensor | None = None,
    train_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    policy: str = "steppingnet",
    config: ConstructionConfig | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> SteppingNet:
    """Turn a trained classifier into N nested subnets, one per budget.

    Args:
        model: timm model, or any module that maps images (B, C, H, W) to class scores (B, classes). Not modified.
        budgets: ascending MAC budgets of subnets 1..N: floats in (0, 1] are fractions of the model's own MACs M_t,
            integers are MACs, strings may be "40%", "300M", "1.2G".
        example_inputs: images (B, C, H, W) of the size that the net is to be used with; by default one random image
            of the size in the model's own configuration (timm models have one).
        train_loader: batches of (images, labels) for the construction of the paper (Fig. 3). None: one shot, by the
            magnitude of the weights.
        policy: "steppingnet"; or, always in one shot, "any-width" (regular pattern) or "random".
        config: knobs of the construction; without `train_loader` only its `expansion` matters (widen the network first,
            without changing its function, so that the largest subnets can use up their budgets).
        device: where to put the net; by default where the model is.
        seed: of everything random.

    Returns:
        The net, in the model's train/eval mode. Constructed on data, it has no spare units, and is best retrained:
        `net.fit(...)`, or any loop of your own over `net.forward_all`.

    Raises:
        BudgetError: malformed budgets, or budgets that no assignment of units can meet.
        CaptureError: the model cannot be captured, or has no units that can move.
        SteppingError: unsuitable arguments.
    """
    image_size = check_model(model, example_inputs)
    settings = _settings(config)
    owner = _private_copy(model)
    analysis = find_units(owner, image_size)
    reference = MacModel(analysis).total
    notes = reference_notes(owner, image_size, reference, static_macs(analysis.eval_program))
    allowed = parse_budgets(budgets, reference, limit=int(reference * settings.expansion**2) + 1)
    origin = describe_origin(model, image_size)
    net = start_network(owner, analysis, allowed, settings, reference, origin, seed)
    net.notes = notes + net.notes
    if train_loader is not None and policy == "steppingnet":
        where = str(device or next(owner.parameters()).device)
        construction = Construction(net, train_loader, settings, seed=seed, device=where)
        for _ in construction:
            pass
        construction.finish()
        net = net.eval().compact()
    else:
        scores = magnitude_scores(net.model, net.analysis)
        generator = torch.Generator().manual_seed(seed)
        assigned = assign(
            net.analysis,
            net.macs_model,
            allowed,
            scores,
            policy=policy,
            generator=generator,
            reference_macs=reference,
            lineage=net.lineage,
        )
        net.set_levels(assigned.levels)
        net.notes += assigned.notes
    net.train(model.training)
    return net if device is None else net.to(device)


def _settings(config: ConstructionConfig | None) -> ConstructionConfig:
    if config is None:
        return ConstructionConfig()
    if not isinstance(config, ConstructionConfig):
        raise SteppingError(
            explain("wrong type", where="config", got=type(config).__name__, expected="a ConstructionConfig")
        )
    return config


def check_model(model: nn.Module, example_inputs: Any) -> tuple[int, ...]:
    """Refuse what cannot be converted; returns the image size (C, H, W).

    Raises:
        SteppingError: not a module, no weights, half precision, no or a wrong example.
    """
    image_size = _image_size(model, example_inputs)
    _check_precision(model)
    return image_size


def _image_size(model: Any, example_inputs: Any) -> tuple[int, ...]:
    if not isinstance(model, nn.Module):
        raise SteppingError(
            explain("not a model", where="model", got=type(model).__name__, expected="a torch.nn.Module")
        )
    if isinstance(example_inputs, (tuple, list)) and len(example_inputs) == 1:
        example_inputs = example_inputs[0]
    if example_inputs is not None:
        if not isinstance(example_inputs, Tensor) or example_inputs.dim() != 4:
            got = (
                str(tuple(example_inputs.shape))
                if isinstance(example_inputs, Tensor)
                else type(example_inputs).__name__
            )
            raise SteppingError(
                explain(
                    "wrong shape",
                    where="example_inputs",
                    got=got,
                    expected="one Tensor of images (B, C, H, W)",
                )
            )
        return tuple(example_inputs.shape[1:])
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if hasattr(config, "get") else None
    if not size:
        raise SteppingError(
            f"example_inputs: {type(model).__name__} does not say which image size it takes. Pass example_inputs, for "
            "example torch.zeros(1, 3, 224, 224)."
        )
    return tuple(size)


def _check_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise SteppingError(f"{name}: the model has no weights (it is on the meta device). Load them first.")
        if parameter.dtype in (torch.float16, torch.bfloat16):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise SteppingError(
                explain(
                    "half-precision weights",
                    where=name,
                    got=kind,
                    expected="float32 or float64",
                    action="Convert model.float() and train or run the net under torch.autocast.",
                )
            )


def _private_copy(model: nn.Module) -> nn.Module:
    try:
        return copy_model(model)
    except Exception as error:
        raise SteppingError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Pass a "
            "model that copy.deepcopy can copy, for example a freshly built one with its weights loaded."
        ) from error


def reference_notes(model: nn.Module, image_size: tuple[int, ...], expected: int, static: int = 0) -> list[str]:
    """Count the original network with fvcore, operator by operator, as a check of the channel graph's own count.

    Args:
        model: the original network.
        image_size: (C, H, W).
        expected: MACs of the captured graph.
        static: MACs of the graph that depend on parameters only, see `macs.static_macs`.
    """
    reference = next(model.parameters())
    image = torch.zeros(1, *image_size, dtype=reference.dtype, device=reference.device)
    try:
        counted = count_macs(model, (image,)).total
    except SteppingError as error:
        return [f"fvcore could not count the original network ({error}); its MACs are those of the captured graph."]
    if counted != expected + static:
        raise CaptureError(
            f"The captured graph has {expected + static:,} MACs, fvcore counts {counted:,} on the model itself. One of "
            "them misses an operator; please report the model."
        )
    if static:
        return [f"{static:,} MACs depend on parameters only; they are computed once and count in no subnet."]
    return []
