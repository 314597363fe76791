"""How the tensors that leave a model are put together: alone, or in tuples, lists, dictionaries and classes of them.

Structures are those of `torch.utils._pytree`, as in torch.export: classes that it knows (named tuples, registered
dataclasses) come back as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from ..errors import SteppingError, explain

__all__ = ["ONE_TENSOR", "Structure", "class_scores", "map_tensors", "tensors_of"]


@dataclass(frozen=True)
class Structure:
    """What a model returns, without its tensors.

    Attributes:
        spec: of all leaves.
        fixed: leaves that are no tensors (None, numbers, texts) by their place among the leaves.
    """

    spec: _pytree.TreeSpec
    fixed: dict[int, Any]

    @property
    def count(self) -> int:
        """Number of tensors."""
        return self.spec.num_leaves - len(self.fixed)

    @property
    def is_tensor(self) -> bool:
        """Whether the result is one tensor and nothing else."""
        return self.spec.is_leaf() and not self.fixed

    def build(self, tensors: Sequence[Any]) -> Any:
        """The result with these tensors (or anything in their places), in order."""
        if self.is_tensor:
            return tensors[0]
        given = iter(tensors)
        leaves = [self.fixed[k] if k in self.fixed else next(given) for k in range(self.spec.num_leaves)]
        return _pytree.tree_unflatten(leaves, self.spec)

    def described(self) -> Any:
        """As JSON, for files that outlive the model's code: None for one tensor; named classes become dictionaries."""
        return None if self.is_tensor else _describe(self.build([None] * self.count), iter(self._is_tensor()))

    @staticmethod
    def from_description(text: Any) -> Structure:
        """What `described` wrote.

        Raises:
            ValueError: it wrote something else.
        """
        if text is None:
            return ONE_TENSOR
        leaves, spec = _pytree.tree_flatten(_rebuild(text))
        return Structure(spec, {k: leaf for k, leaf in enumerate(leaves) if leaf is not _TENSOR})

    def _is_tensor(self) -> list[bool]:
        return [k not in self.fixed for k in range(self.spec.num_leaves)]

    def names(self) -> list[str]:
        """What the tensors are called, such as `out`, `boxes.0`; one tensor alone has the empty name."""
        built = _pytree.tree_unflatten(range(self.spec.num_leaves), self.spec)
        paths = [path for path, _ in _pytree.tree_flatten_with_path(built)[0]]
        return [".".join(map(_step, path)) for k, path in enumerate(paths) if k not in self.fixed]


def class_scores(outputs: Any, what: str, where: str, action: str, rank: int = 3) -> Tensor:
    """Outputs that are class scores and nothing else.

    Args:
        outputs: what a model returned, or all subnets.
        what, where, action: of the error, see `errors.explain`.
        rank: 3 for class scores of all subnets (N, B, classes), 2 for those of one.

    Raises:
        SteppingError: they are something else.
    """
    if isinstance(outputs, Tensor) and outputs.dim() == rank:
        return outputs
    got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
    expected = f"one tensor ({'N, ' if rank == 3 else ''}B, classes)"
    raise SteppingError(explain(what, where=where, got=f"outputs of {got}", expected=expected, action=action))


_TENSOR = object()


def _describe(part: Any, is_tensor: Iterator[bool]) -> Any:
    """Tensors are "tensor", tuples and lists say so, everything else is a constant or has names."""
    children, _ = _pytree.tree_flatten_with_path(part, is_leaf=lambda x: x is not part)
    if len(children) == 1 and not children[0][0]:
        if next(is_tensor):
            return "tensor"
        if part is None or isinstance(part, (bool, int, float, str)):
            return {"constant": part}
        raise ValueError(f"a constant of type {type(part).__name__} cannot be written")
    inside = [(_step(path[0]), _describe(child, is_tensor)) for path, child in children]
    if type(part) in (tuple, list):
        return {type(part).__name__: [entry for _, entry in inside]}
    return {"dict": dict(inside)}


def _rebuild(text: Any) -> Any:
    if text == "tensor":
        return _TENSOR
    if not isinstance(text, dict) or len(text) != 1:
        raise ValueError(f"{text!r} is no structure")
    ((kind, content),) = text.items()
    if kind == "dict" and isinstance(content, dict):
        return {name: _rebuild(entry) for name, entry in content.items()}
    if kind in ("tuple", "list") and isinstance(content, list):
        return {"tuple": tuple, "list": list}[kind](map(_rebuild, content))
    if kind == "constant" and (content is None or isinstance(content, (bool, int, float, str))):
        return content
    raise ValueError(f"{text!r} is no structure")


def _step(key: Any) -> str:
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


ONE_TENSOR = Structure(_pytree.tree_structure(0), {})


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Any], result: Any) -> Any:
    """The result with a function applied to each of its tensors."""
    if isinstance(result, Tensor):
        return function(result)
    return _pytree.tree_map_only(torch.Tensor, function, result)
