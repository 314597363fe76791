"""The batch size in a captured graph: a large prime, of which every multiple is recognised."""

from __future__ import annotations

from typing import Any

from torch import fx

from .program import call_arg, op_name

__all__ = ["BATCH", "depends_on_batch", "takes_part_of_batch"]

BATCH = 1009


def depends_on_batch(value: Any) -> bool:
    """Whether an argument holds a multiple of the batch size."""
    if isinstance(value, (list, tuple)):
        return any(depends_on_batch(v) for v in value)
    return isinstance(value, int) and not isinstance(value, bool) and value != 0 and value % BATCH == 0


_PICKING = {"slice.Tensor", "select.int", "narrow", "chunk", "split.Tensor", "split_with_sizes", "unbind.int",
            "tensor_split.sections"}  # fmt: skip


def takes_part_of_batch(node: fx.Node) -> bool:
    """Whether an operator takes some pictures of a batch: more or less than whole multiples of it."""
    name = op_name(node)
    if name not in _PICKING:
        return False
    before: Any = node.args[0].meta["val"].shape
    dim = call_arg(node, "dim", 0) % len(before)
    if before[dim] == 0 or before[dim] % BATCH:
        return False
    if name in ("select.int", "unbind.int"):
        return True
    results = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]
    return any(result.shape[dim] % BATCH for result in results)
