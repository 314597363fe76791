"""Reconstruction: the parameters of a nested net in closed form, so that it comes near the original network.

A nested net lacks the synapses from larger to smaller subnets, and a network whose synapses are merely cut answers by
chance. Here every layer is fitted anew, in the order of execution and level by level: the value of a unit is to be as
near as possible to that of the original network's unit it descends from, given the inputs that the nesting rule allows,
which are the net's own values, already reconstructed (least squares on unlabelled images with a ridge towards the
present weights). Where a branch ends in a sum, as in residual networks, its last layer is fitted to what the sum still
lacks. The classifier, shared by all subnets, is fitted to the original's scores for all of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..console.progress import track
from ..errors import SteppingError, expect, explain
from ..nested.net import NestedNet
from .classifier import fit_classifier
from .fits import LayerFit, plan
from .fitting import FittedLayer, fit_layer, fit_norm
from .twins import Twins

__all__ = ["FittedLayer", "Reconstruction", "reconstruct"]

RIDGE = 1e-3
LIMIT = 2 << 30
BATCH = 32
PATIENCE = 5.0  # seconds of silence


@dataclass
class Reconstruction:
    """What `reconstruct` did.

    Attributes:
        layers: in the order in which they were fitted.
        left_alone: layers that keep their parameters -> why.
        notes: what else is to be known.
        seconds: wall time.
    """

    layers: list[FittedLayer] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def dead(self) -> dict[str, list[int]]:
        """Layers with channels of the original that never fire on the images -> those channels."""
        return {layer.name: layer.dead for layer in self.layers if layer.dead}

    def __str__(self) -> str:
        lines = [f"{layer.name:40} R2 {_shown(layer.r2)}  {layer.seconds:5.1f} s" for layer in self.layers]
        lines += [f"{name:40} left alone: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join([*lines, *self.notes])


@torch.inference_mode(False)  # wherever it is called: the classifier is fitted by gradients
@torch.no_grad()
def reconstruct(
    net: NestedNet,
    original: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    ridge: float = RIDGE,
    limit: int = LIMIT,
    say: Callable[[str], None] | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Fit the parameters of a nested net to the original network, without labels and without gradients.

    With all units at level 1 nothing changes but the statistics of batch norms, which become those of the images (and
    their affine parameters with them, so that the function stays).

    Args:
        net: the net; its parameters and batch norm statistics are overwritten, its levels, masks, dtype, device kept.
        original: the model that the net was made from, trained. Not modified.
        images: (P, C, H, W) of the net's image size; or batches of such, or of (images, labels), whose labels are not
            used. A few hundred to a few thousand, normalised as for training.
        ridge: pull towards the present weights, relative to the mean square of a layer's inputs.
        limit: bytes of values that may be kept between layers. Where all images do not fit, early layers use fewer.
        say: called with a line per layer once it has taken over 5 seconds.
        seed: of the choice of positions where there are more than needed.

    Raises:
        SteppingError: no images, images of another shape, values that are not finite, or another model.
    """
    expect(original, nn.Module, "original", "the model that the net was made from")
    if not ridge >= 0:
        raise SteppingError(explain("out of range", where="ridge", got=ridge, expected="a number from 0 up"))
    start = time.perf_counter()
    batches = list(_batches(images, net))
    fits, left_alone = plan(net.analysis.eval_program, net._graphs[False])
    twins = Twins(net, original, fits)
    generator = torch.Generator().manual_seed(seed)
    report = Reconstruction(left_alone=left_alone)
    allowed = _pictures_allowed(twins, batches[0][:2].clone(), limit)
    pairs = [twins.start(batch) for batch in batches]
    sizes = torch.tensor([len(batch) for batch in batches]).cumsum(0)
    fits_with_room = track(list(zip(twins.fits, allowed)), "reconstruction by least squares")
    for number, (fit, pictures) in enumerate(fits_with_room, start=1):
        begun = time.perf_counter()
        active = pairs[: max(1, int((sizes <= pictures).sum()))]
        if isinstance(fit, LayerFit):
            layer = fit_layer(twins, fit, active, ridge, generator)
            if net.analysis.eval_program.outputs == [fit.node]:
                twins.walk.renew()
                fit_classifier(twins, fit, active)
        else:
            layer = fit_norm(twins, fit, active, ridge)
        twins.walk.renew()
        twins.done(number, pairs)
        layer.pictures, layer.seconds = int(sizes[len(active) - 1]), time.perf_counter() - begun
        report.layers.append(layer)
        if say and time.perf_counter() - start > PATIENCE:
            say(f"reconstruct {number}/{len(fits)} {fit.name}: R2 {_shown(layer.r2)}")
    report.notes = _notes(report.layers, int(sizes[-1]), limit)
    report.seconds = time.perf_counter() - start
    return report


def _pictures_allowed(twins: Twins, probe: Tensor, limit: int) -> list[int]:
    """Images whose values may be kept at every fit, found by one small batch that goes ahead."""
    kept, pair, needed = set(twins.source.kept), twins.start(probe), []
    for number, fit in enumerate(twins.fits, start=1):
        twins.advance(fit, pair)
        needed.append(sum(run.size() for run in pair))
        twins.done(number, [pair])
    twins.source.kept = kept
    largest, allowed = 1, []
    for size in reversed(needed):  # images may join later, but never leave
        largest = max(largest, size)
        allowed.append(limit * len(probe) // largest)
    return allowed[::-1]


def _shown(r2: list[float | None]) -> str:
    return " ".join(" - " if v is None else f"{v:.2f}" for v in r2)


def _notes(layers: list[FittedLayer], pictures: int, limit: int) -> list[str]:
    notes = []
    few = [layer.name for layer in layers if layer.samples < layer.unknowns]
    if few:
        notes.append(
            f"{len(few)} layers have fewer samples than unknowns, so the ridge decides: {', '.join(few[:4])}"
            f"{', ...' if len(few) > 4 else ''}. More images would help."
        )
    fewer = [layer.pictures for layer in layers if layer.pictures < pictures]
    if fewer:
        notes.append(
            f"{len(fewer)} layers use fewer than the {pictures} images, {min(fewer)} at least, so that values kept "
            f"between layers take no more than about {limit >> 20} MiB."
        )
    dead = {layer.name: len(layer.dead) for layer in layers if layer.dead}
    if dead:
        listed = ", ".join(f"{count} in {name}" for name, count in list(dead.items())[:6])
        notes.append(
            f"{sum(dead.values())} units of the original never fire on these images, and neither do those that descend "
            f"from them: {listed}{', ...' if len(dead) > 6 else ''}."
        )
    return notes


def _batches(images: Any, net: NestedNet) -> Iterator[Tensor]:
    """Images in the net's dtype and on its device, some at a time."""
    reference = next(net.model.parameters())
    empty = True
    for item in [images] if isinstance(images, Tensor) else images:
        batch = item[0] if isinstance(item, (tuple, list)) and item else item
        size = net.analysis.image_size
        if not isinstance(batch, Tensor) or batch.dim() != 4 or tuple(batch.shape[1:]) != size:
            got = str(tuple(batch.shape)) if isinstance(batch, Tensor) else type(batch).__name__
            expected = f"images (B, {', '.join(map(str, size))}), or batches of them, with or without labels"
            raise SteppingError(explain("wrong shape", where="images", got=got, expected=expected))
        if not batch.is_floating_point() or not bool(batch.isfinite().all()):
            got = str(batch.dtype) if not batch.is_floating_point() else "values that are not finite"
            raise SteppingError(
                explain("cannot be used", where="images", got=got, expected="floats, normalised as for training")
            )
        for part in batch.split(BATCH):
            if len(part):
                empty = False
                yield part.to(reference.device, reference.dtype)
    if empty:
        raise SteppingError(explain("there are none", where="images", expected="at least one image"))
