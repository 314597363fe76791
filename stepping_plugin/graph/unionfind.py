"""Union-find over integer labels, vectorised for the few-large-batches pattern of label propagation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FREE", "PINNED", "UnionFind"]

FREE = 0  # belongs to no unit: always available, joins nothing (the image, constants, zero padding)
PINNED = 1  # stays at level 1: always available, too, so it joins nothing either


class UnionFind:
    """Disjoint sets of unit labels. Label 0 is `FREE`, label 1 is `PINNED`; only `pin` joins anything with them.

    `parent` is kept flat (every label points at its root) after each `union`, so `find` is one gather. The root of a
    set is its smallest label, hence everything joined with `PINNED` has root `PINNED`.
    """

    def __init__(self) -> None:
        self.parent = torch.arange(2)
        self.version = 0  # grows with every union that changed something

    def new(self, count: int) -> Tensor:
        """`count` fresh labels, LongTensor (count,)."""
        labels = torch.arange(len(self.parent), len(self.parent) + count)
        self.parent = torch.cat([self.parent, labels])
        return labels

    def find(self, labels: Tensor) -> Tensor:
        """Roots of labels, same shape."""
        return self.parent[labels]

    def union(self, a: Tensor, b: Tensor) -> None:
        """Join labels pairwise (broadcast against each other); pairs with `FREE` or `PINNED` are skipped."""
        a, b = torch.broadcast_tensors(self.find(a), self.find(b))
        different = (a != b) & (a > PINNED) & (b > PINNED)
        if different.any():
            self._join(torch.stack([a[different], b[different]], 1))

    def pin(self, labels: Tensor) -> bool:
        """Join labels with `PINNED` for good; says whether that changed anything."""
        roots = torch.unique(self.find(labels))
        roots = roots[roots > PINNED]
        if len(roots):
            self._join(torch.stack([roots, torch.full_like(roots, PINNED)], 1))
        return len(roots) > 0

    def _join(self, pairs: Tensor) -> None:
        pairs = torch.unique(pairs, dim=0)
        for x, y in pairs.tolist():
            x, y = self._root(x), self._root(y)
            if x != y:
                self.parent[max(x, y)] = min(x, y)
        self.version += 1
        self._flatten()

    def _root(self, label: int) -> int:
        while (parent := int(self.parent[label])) != label:
            label = parent
        return label

    def _flatten(self) -> None:
        while not torch.equal(shortened := self.parent[self.parent], self.parent):
            self.parent = shortened
