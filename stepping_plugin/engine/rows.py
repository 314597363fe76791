"""The samples of a tensor that holds them on some axis, perhaps folded together with windows, heads or tokens."""

from __future__ import annotations

from torch import Tensor

from .plan import BatchAxis

__all__ = ["put_rows", "take_rows"]


def take_rows(tensor: Tensor, place: BatchAxis | None, size: int, kept: Tensor) -> Tensor:
    """Some samples.

    Args:
        tensor: of `size` samples.
        place: where they are; None: the tensor is the same for all.
        kept: LongTensor, their numbers.
    """
    if place is None:
        return tensor
    axis = place.axis
    if tensor.shape[axis] != size:
        parts = tensor.unflatten(axis, (place.outer, size, -1))
        return parts.index_select(axis + 1, kept).flatten(axis, axis + 2)
    if tensor.dim() == 4 and not tensor.is_contiguous():  # laid out as (B, H, W, C), which should stay so
        order, back = (0, 2, 3, 1), (0, 3, 1, 2)
        return tensor.permute(order).index_select(order.index(axis), kept).permute(back)
    return tensor.index_select(axis, kept)


def put_rows(tensor: Tensor, place: BatchAxis | None, size: int, where: Tensor, rows: Tensor) -> None:
    """Overwrite the samples `where` of a tensor of `size` samples by those of another one, in place."""
    if place is None:
        return
    axis = place.axis
    tensor.unflatten(axis, (place.outer, size, -1)).index_copy_(
        axis + 1, where, rows.unflatten(axis, (place.outer, len(where), -1))
    )
