"""MACs of `torch.einsum`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

__all__ = ["einsum_macs"]


def einsum_macs(equation: str, shapes: Sequence[Sequence[int]], path: Sequence[int] | None = None) -> int:
    """MACs of ``torch.einsum``, contracting two operands at a time as torch does.

    Each contraction costs the product of the sizes of all labels that take part. A label of one operand alone
    that is not kept is summed before the product; a pair with nothing to contract is an elementwise product:
    0 MACs.

    Args:
        equation: with or without ``->``, ellipsis allowed.
        shapes: one per operand.
        path: flat pairs of operand positions (opt_einsum's order); left to right when None.

    >>> einsum_macs("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)])
    120
    """
    terms, output = _einsum_labels(equation, shapes)
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes):
        for label, size in zip(term, shape):
            sizes[label] = max(size, sizes.get(label, 1))
    operands, order, total = [set(term) for term in terms], list(path or []), 0
    while len(operands) > 1:
        first, second = sorted(order[:2]) if order else (0, 1)
        order = order[2:]
        b, a = operands.pop(second), operands.pop(first)
        kept = output.union(*operands)
        if (a & b) - kept:
            total += math.prod(sizes[label] for label in (a & b) | ((a | b) & kept))
        operands.append((a | b) & kept) if path else operands.insert(0, (a | b) & kept)
    return total


def _einsum_labels(equation: str, shapes: Sequence[Sequence[int]]) -> tuple[list[list[str]], set[str]]:
    """One label per dimension of every operand, and the labels of the output; digits stand for "..."."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = []
    for term, shape in zip(left.split(","), shapes):
        head, dots, tail = term.partition("...")
        hidden = len(shape) - len(head) - len(tail)  # counted from the right: ellipses broadcast
        terms.append([*head, *(str(hidden - 1 - i) for i in range(hidden if dots else 0)), *tail])
    seen = Counter(label for term in terms for label in term)
    hidden_labels = {label for label in seen if label.isdigit()}
    if not arrow:
        return terms, {label for label, times in seen.items() if times == 1} | hidden_labels
    return terms, set(right.replace("...", "")) | (hidden_labels if "..." in right else set())
