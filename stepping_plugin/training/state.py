"""What a checkpoint of a training run holds, checked before anything of it is taken over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from stepping_plugin.errors import CheckpointError
from stepping_plugin.training.checkpoint import ADVICE, check_random_state

__all__ = ["RunState", "TrainerState", "check_optimizer", "validated"]

Count = Annotated[int, Field(ge=0, le=10**12)]
_LIKE_THE_PARAMETER = ("momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg", "slow_buffer")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class TrainerState(_Strict):
    """See `Trainer.state_dict`."""

    net: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    ema: dict[str, Tensor] | None
    updates: Count
    lr: float


class RunState(_Strict):
    """Of a run of `fit`: epochs completed, batches `done` of the next one, random states of every process."""

    settings: dict[str, Any]
    trainer: dict[str, Any]
    epoch: Count
    done: Count
    losses: Tensor | None
    history: list[dict[str, Any]]
    random: Annotated[list[dict[str, Any]], Field(min_length=1)]
    start: Annotated[list[dict[str, Any]], Field(min_length=1)]

    def check(self, epochs: int, batches: int, per_update: int, processes: int, subnets: int) -> None:
        """Whether the numbers fit together, and to a run of so many epochs, batches per epoch and update, processes.

        Raises:
            CheckpointError: they do not.
        """
        updates = self.epoch * math.ceil(batches / per_update) + math.ceil(self.done / per_update)
        losses = self.losses
        wrong = {
            f"epoch {self.epoch} of {epochs}": self.epoch > epochs,
            f"{self.done} batches of {batches} done": self.done > batches or (self.epoch == epochs and self.done > 0),
            f"a history of {len(self.history)} epochs, {self.epoch} completed": len(self.history) != self.epoch,
            f"{self.trainer.get('updates')} updates, expected {updates}": self.trainer.get("updates") != updates,
            "losses": (losses is None) != (self.done == 0)
            or (losses is not None and (losses.shape != (subnets,) or not _are_numbers(losses))),
            f"random states of {len(self.random)} processes": not len(self.random) == len(self.start) == processes,
        }
        if named := [what for what, is_wrong in wrong.items() if is_wrong]:
            raise CheckpointError(
                f"damaged: {'; '.join(named)}. Delete it to start anew, or take a copy that is whole."
            )
        for state in [*self.random, *self.start]:
            check_random_state(state)
            if not isinstance(state.get("loader"), list):
                raise CheckpointError(f"damaged: the state of the loader's generators. {ADVICE}")


def _are_numbers(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float64) and bool(tensor.isfinite().all())


def validated(kind: type[Any], state: Mapping[str, Any]) -> Any:
    """A state as an object.

    Raises:
        CheckpointError: a part is missing, unknown, or of another type.
    """
    try:
        return kind.model_validate(state)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'state'}: {e['msg']}" for e in error.errors(include_url=False)]
        raise CheckpointError(f"damaged: {'; '.join(problems[:3])}. {ADVICE}") from None


def check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """What torch lets pass when it loads an optimizer's state, and then fails on, or computes with.

    Raises:
        CheckpointError: sizes or numbers that cannot belong to this optimizer.
    """
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        first: dict[str, Any] = next(iter(state["state"].values()), {})
        for number, entry in state["state"].items():
            if entry.keys() != first.keys():
                raise ValueError(f"parameter {number} has {sorted(entry)}, others {sorted(first)}")
            for name, value in entry.items():
                if not isinstance(value, Tensor):
                    if name in _LIKE_THE_PARAMETER and value is not None:
                        raise ValueError(f"{name} of parameter {number} is {value!r}")
                    continue
                if not bool(value.isfinite().all()):
                    raise ValueError(f"{name} of parameter {number} is not finite")
                if name == "step" and (value.numel() != 1 or not value.is_floating_point()):
                    raise ValueError(f"step of parameter {number} is no number")
                if name in _LIKE_THE_PARAMETER and value.shape != parameters[number].shape:
                    raise ValueError(f"{name} of parameter {number} has shape {tuple(value.shape)}")
        for own, group in zip(optimizer.param_groups, state["param_groups"]):
            if wrong := [k for k in own if k != "params" and not _alike(own[k], group[k])]:
                raise ValueError(f"{wrong[0]} is {group[wrong[0]]!r}")
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"damaged: the state of the optimizer ({error}).") from None


def _alike(own: Any, stored: Any) -> bool:
    """Same kind of value; numbers must be finite."""
    if isinstance(own, bool) or own is None or stored is None:
        return isinstance(stored, bool) or own is None or stored is None
    if isinstance(own, (int, float)):
        return isinstance(stored, (int, float, Tensor)) and bool(torch.as_tensor(stored).isfinite().all())
    return True
