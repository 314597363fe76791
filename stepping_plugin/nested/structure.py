"""What a net was made from, remembered: modules, their numbers and words, names and shapes of their parameters.

A net computes the graphs that were captured. What is changed in its model afterwards is either in those graphs' inputs
(the values of parameters and buffers) or has no effect, and then nobody must believe that it has.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Change", "Structure"]

_FREE = {*vars(nn.Module()), "grad_checkpointing"}  # looked at apart; of memory only
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), Tensor, torch.dtype, torch.Size, torch.memory_format,
           types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial, type)  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Change:
    """Where a model is not what it was: path of a module, what happened to it, and what helps if not the usual."""

    path: str
    what: str
    action: str = ""


class Structure:
    """A snapshot of a model, to be compared with what has become of it.

    Looking costs a microsecond or two per module: a net looks at every call.

    Args:
        model: as it was captured.
        other_mode: per mode that was captured, see `Program.other_mode`.
    """

    def __init__(self, model: nn.Module, other_mode: Mapping[bool, Collection[str]]) -> None:
        self.model = model
        self._parts = [_Part.of(path, module) for path, module in model.named_modules(remove_duplicate=False)]
        self._asking = [
            (path, module, {training: path in paths for training, paths in other_mode.items()})
            for path, module in model.named_modules()
            if _asks_for_mode(type(module))
        ]

    def change(self, net: nn.Module, model: nn.Module, training: bool | None = None) -> Change | None:
        """The first difference.

        Args:
            net: the owner. Tools that hook it with everything inside (counters, tracers) are let pass.
            model: what it holds now.
            training: the mode of the net; modules that ask for theirs must have the same one. None: any.
        """
        if model is not self.model:
            return Change("", _replaced(model))
        hooked = any(_hooks(net))
        for part in self._parts:
            if found := part.change(hooked):
                return found
        if training is None:
            return None
        for path, module, other in self._asking:
            if module.training is not training and not other.get(training):
                now, mode = ("train" if t else "eval" for t in (module.training, training))
                return Change(
                    path,
                    f"is in {now} mode while the net is in {mode} mode",
                    "Call train() and eval() of the net only. What is to stay in eval mode must be so before the "
                    "conversion, in a model that is in train mode.",
                )
        return None


@dataclass
class _Part:
    """A module of the model as it was."""

    path: str
    module: nn.Module
    kind: type
    forward: Any  # one that was set on the instance
    children: dict[str, nn.Module | None]
    hooks: tuple[int, ...]
    shapes: tuple[Any, ...]
    names: tuple[str, ...]
    values: Any
    read: Callable[[dict[str, Any]], Any] = field(repr=False)

    @classmethod
    def of(cls, path: str, module: nn.Module) -> _Part:
        own = vars(module)
        changes_itself = type(module).train is not nn.Module.train  # its values may depend on the mode
        names = tuple(n for n in own if n not in _FREE and n != "forward" and _is_plain(own[n]) and not changes_itself)
        read = operator.itemgetter(*names) if names else _nothing
        values = tuple(map(_frozen, read(own))) if len(names) > 1 else _frozen(read(own))
        return cls(path, module, type(module), own.get("forward"), dict(module._modules), _hooks(module),
                   _shapes(module), names, values, read)  # fmt: skip

    def change(self, hooked: bool) -> Change | None:
        module, own = self.module, self.module.__dict__
        if type(module) is not self.kind:
            return Change(self.path, f"became a {type(module).__name__}")
        if own.get("forward") is not self.forward:
            return Change(self.path, "was given another forward")
        if module._modules != self.children:
            return self._child()
        if _shapes(module) != self.shapes:
            return self._parameter()
        if not hooked and _hooks(module) != self.hooks:
            return Change(
                self.path, "was given a hook", "Register hooks on the net itself; those inside are never called."
            )
        try:
            same = bool(self.read(own) == self.values)
        except (KeyError, RuntimeError, ValueError):
            same = False
        return None if same else self._attribute()

    def _child(self) -> Change:
        now, then = self.module._modules, self.children
        name = next(n for n in [*then, *now] if n not in now or n not in then or now[n] is not then[n])
        path = f"{self.path}.{name}".lstrip(".")
        if name not in then:
            return Change(path, "was added")
        return Change(path, _replaced(now.get(name)))

    def _parameter(self) -> Change:
        now, then = dict(_shapes(self.module)), dict(self.shapes)
        name = next(n for n in [*then, *now] if now.get(n, 0) != then.get(n, 0))
        got = "removed" if now.get(name) is None else f"replaced by one of shape {tuple(now[name])}"
        return Change(f"{self.path}.{name}".lstrip("."), f"was {got if then.get(name) is not None else 'added'}")

    def _attribute(self) -> Change | None:
        own = self.module.__dict__
        then = self.values if len(self.names) > 1 else (self.values,)
        for name, value in zip(self.names, then):
            if name not in own:
                return Change(f"{self.path}.{name}".lstrip("."), "was removed")
            if not _same(own[name], value):
                got = f"changed from {_shown(value)} to {_shown(own[name])}"
                return Change(f"{self.path}.{name}".lstrip("."), f"was {got}")
        return None


def _nothing(own: dict[str, Any]) -> tuple[()]:
    return ()


def _replaced(now: nn.Module | None) -> str:
    return "was removed" if now is None else f"was replaced by another {type(now).__name__}"


def _shapes(module: nn.Module) -> tuple[Any, ...]:
    """Names and shapes of a module's own parameters and buffers; their values may change."""
    own = (*module._parameters.items(), *module._buffers.items())
    return tuple([(name, None if tensor is None else tensor.shape) for name, tensor in own])


def _hooks(module: nn.Module) -> tuple[int, ...]:
    return tuple([len(module.__dict__[name]) for name in _HOOKS])


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether a value can be compared in no time; tensors are by identity. Empty dicts are caches."""
    if isinstance(value, dict):
        return bool(value) and all(isinstance(k, str) for k in value) and _is_plain(list(value.values()), depth)
    if isinstance(value, (tuple, list)):
        return depth > 0 and len(value) <= 64 and all(_is_plain(v, depth - 1) for v in value)
    return isinstance(value, _SIMPLE)


def _frozen(value: Any) -> Any:
    """A copy of what may be changed in place."""
    if isinstance(value, dict):
        return {k: _frozen(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_frozen(v) for v in value]
    return tuple(map(_frozen, value)) if type(value) is tuple else value


def _same(a: Any, b: Any) -> bool:
    """Equal, or the same NaN; tensors are no other ones."""
    try:
        return a is b or bool(a == b)
    except (RuntimeError, ValueError):
        return False


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return getattr(value, "__name__", None) or repr(value)[:60]


@cache
def _asks_for_mode(kind: type) -> bool:
    own = [k for k in kind.__mro__ if k not in (nn.Module, object)]
    codes = [f.__code__ for k in own for f in vars(k).values() if isinstance(f, types.FunctionType)]
    return any("training" in code.co_names for code in codes)
