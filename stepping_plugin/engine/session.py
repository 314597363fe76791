"""A session: some images being stepped up through the subnets. It owns the caches, and a copy of the images."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import SteppingError, explain
from ..graph.structure import Structure
from .emit import IMAGE, output_names
from .plan import BatchAxis
from .rows import take_rows

__all__ = ["Session"]


class Stepper(Protocol):
    """What a session asks of the engine that made it."""

    macs: list[int]
    cache_axes: dict[str, BatchAxis | None]
    structure: Structure

    @property
    def num_subnets(self) -> int: ...

    def run_step(self, level: int, caches: dict[str, Tensor], samples: int) -> list[Tensor]: ...


class Session:
    """What one batch of images has computed so far. Made by `Engine.start`, which runs subnet 1.

    Reading is safe from other threads while a step runs: results appear at once when the step is done.
    """

    def __init__(self, engine: Stepper, images: Tensor, borrow: bool = False) -> None:
        self._engine = engine
        self._lock = threading.RLock()
        self._caches: dict[str, Tensor] = {IMAGE: images if borrow else images.clone()}
        self._size = len(images)
        self._history: tuple[list[Tensor], ...] = ()  # the outputs of every subnet
        self.step()

    # ------------------------------------------------------------------------------------------ results

    @property
    def subnet(self) -> int:
        """Number of the largest subnet that has run, 1..N."""
        return len(self._history)

    @property
    def outputs(self) -> Any:
        """What the model returns, from `subnet`: class scores (B, classes), or whatever it returns else."""
        return self._engine.structure.build(self._history[-1])

    @property
    def logits(self) -> Any:
        """Class scores (B, classes) of `subnet`; another name of `outputs`."""
        return self.outputs

    @property
    def history(self) -> tuple[Any, ...]:
        """Outputs of subnets 1..`subnet`, for the samples that are still in the session."""
        return tuple(self._engine.structure.build(outputs) for outputs in self._history)

    def logits_of(self, subnet: int) -> Any:
        """Class scores (B, classes), or other outputs, of a subnet that has run: going back down costs nothing."""
        if isinstance(subnet, bool) or not isinstance(subnet, int) or not 1 <= subnet <= self.subnet:
            raise SteppingError(
                explain(
                    "this subnet has not run",
                    got=subnet,
                    expected=f"1..{self.subnet}",
                    action="Call step() first.",
                )
            )
        return self._engine.structure.build(self._history[subnet - 1])

    @property
    def macs(self) -> int:
        """MACs executed so far, per sample that is still in the session."""
        return self._engine.macs[self.subnet - 1]

    @property
    def batch_size(self) -> int:
        """Number of samples that are still in the session."""
        return self._size

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

    def step(self) -> Any:
        """Run the next subnet's new units.

        Returns:
            Class scores (B, classes), or other outputs, of the next subnet.

        Raises:
            SteppingError: the last subnet has run already.
        """
        with self._lock:
            if self.subnet == self._engine.num_subnets:
                raise SteppingError(
                    f"Subnet {self.subnet} of {self._engine.num_subnets} has run; there is no larger one. "
                    "Check session.subnet before stepping, or iterate over engine.steps(x)."
                )
            outputs = self._engine.run_step(self.subnet + 1, self._caches, self._size)
            if self.subnet + 1 == self._engine.num_subnets:
                self._caches.clear()
            self._history = (*self._history, outputs)
            return self.outputs

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
                self._caches = {name: take_rows(c, axes[name], size, kept) for name, c in self._caches.items()}
            own = [axes[name] for name in output_names(self._engine.structure.count)]
            self._history = tuple(
                [take_rows(output, axis, size, kept) for output, axis in zip(outputs, own)] for outputs in self._history
            )
            self._size = len(kept)

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
        return mask.to(self._history[-1][0].device)
