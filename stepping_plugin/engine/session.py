"""A session: some images being stepped up through the subnets. It owns the caches, and a copy of the images."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import SteppingError, explain
from .emit import IMAGE
from .plan import BatchAxis

__all__ = ["Session"]


class Stepper(Protocol):
    """What a session asks of the engine that made it."""

    macs: list[int]
    cache_axes: dict[str, BatchAxis | None]

    @property
    def num_subnets(self) -> int: ...

    def run_step(self, level: int, caches: dict[str, Tensor]) -> Tensor: ...


class Session:
    """What one batch of images has computed so far. Made by `Engine.start`, which runs subnet 1.

    Reading is safe from other threads while a step runs: results appear at once when the step is done.
    """

    def __init__(self, engine: Stepper, images: Tensor, borrow: bool = False) -> None:
        self._engine = engine
        self._lock = threading.RLock()
        self._caches: dict[str, Tensor] = {IMAGE: images if borrow else images.clone()}
        self._history: tuple[Tensor, ...] = ()
        self.step()

    # ------------------------------------------------------------------------------------------ results

    @property
    def subnet(self) -> int:
        """Number of the largest subnet that has run, 1..N."""
        return len(self._history)

    @property
    def logits(self) -> Tensor:
        """Class scores (B, classes) of `subnet`."""
        return self._history[-1]

    @property
    def history(self) -> tuple[Tensor, ...]:
        """Class scores (B, classes) of subnets 1..`subnet`, for the samples that are still in the session."""
        return self._history

    def logits_of(self, subnet: int) -> Tensor:
        """Class scores (B, classes) of a subnet that has run: going back down costs nothing."""
        if isinstance(subnet, bool) or not isinstance(subnet, int) or not 1 <= subnet <= self.subnet:
            raise SteppingError(
                explain(
                    "this subnet has not run",
                    got=subnet,
                    expected=f"1..{self.subnet}",
                    action="Call step() first.",
                )
            )
        return self._history[subnet - 1]

    @property
    def macs(self) -> int:
        """MACs executed so far, per sample that is still in the session."""
        return self._engine.macs[self.subnet - 1]

    @property
    def batch_size(self) -> int:
        """Number of samples that are still in the session."""
        return len(self._history[-1]) if self._history else len(self._caches[IMAGE])

    @property
    def cache_bytes(self) -> int:
        """Memory that the session holds for further steps."""
        return sum(
            {c.untyped_storage().data_ptr(): c.untyped_storage().nbytes() for c in self._caches.values()}.values()
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SteppingError(
            explain(
                "a session cannot be copied or pickled", action="Send the engine and the images, and start one there."
            )
        )

    # ------------------------------------------------------------------------------------------ acting

    def step(self) -> Tensor:
        """Run the next subnet's new units.

        Returns:
            Class scores (B, classes) of the next subnet.

        Raises:
            SteppingError: the last subnet has run already.
        """
        with self._lock:
            if self.subnet == self._engine.num_subnets:
                raise SteppingError(
                    f"Subnet {self.subnet} of {self._engine.num_subnets} has run; there is no larger one. "
                    "Check session.subnet before stepping, or iterate over engine.steps(x)."
                )
            scores = self._engine.run_step(self.subnet + 1, self._caches)
            if self.subnet + 1 == self._engine.num_subnets:
                self._caches.clear()
            self._history = (*self._history, scores)
            return scores

    def keep(self, mask: Tensor) -> None:
        """Go on with some of the samples only; what the session holds for the others is dropped.

        Args:
            mask: BoolTensor (B,), True = stays.

        Raises:
            SteppingError: the mask has another shape or type, or keeps nothing.
        """
        with self._lock:
            mask = self._checked_mask(mask)
            if bool(mask.all()):
                return
            size, kept = len(mask), torch.nonzero(mask).flatten()
            with torch.inference_mode():
                axes = self._engine.cache_axes
                self._caches = {name: _rows(c, axes[name], size, kept) for name, c in self._caches.items()}
            self._history = tuple(scores.index_select(0, kept) for scores in self._history)

    def __reduce__(self) -> tuple[Any, ...]:
        raise SteppingError(
            "A session cannot be pickled or copied: it belongs to a running engine. Save the engine (engine.save, "
            "stepping_plugin.engine.load_engine) and start a session where it is needed: engine.start(images)."
        )

    def _checked_mask(self, mask: Tensor) -> Tensor:
        size = self.batch_size
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (size,):
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise SteppingError(explain("wrong mask", where="keep", got=got, expected=f"torch.bool of shape ({size},)"))
        if not bool(mask.any()):
            raise SteppingError("keep: the mask keeps no sample. Drop the session instead.")
        return mask.to(self._history[-1].device)


def _rows(cache: Tensor, place: BatchAxis | None, size: int, kept: Tensor) -> Tensor:
    """The kept samples of a cache."""
    if place is None:
        return cache
    axis = place.axis
    if cache.shape[axis] != size:
        parts = cache.unflatten(axis, (place.outer, size, -1))
        return parts.index_select(axis + 1, kept).flatten(axis, axis + 2)
    if cache.dim() == 4 and not cache.is_contiguous():  # laid out as (B, H, W, C), which should stay so
        order, back = (0, 2, 3, 1), (0, 3, 1, 2)
        return cache.permute(order).index_select(order.index(axis), kept).permute(back)
    return cache.index_select(axis, kept)
