"""A module that runs nested graphs on the parameters of a model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..errors import SteppingError, explain, image_shape_error
from ..graph.labels import Role
from ..graph.program import named_tensors, op_name
from ..graph.slicing import ParameterSlice
from ..graph.weights import is_direct, weight_key
from ..units.analysis import Analysis
from ..units.levels import channel_levels
from .build import NestedGraph, build_nested
from .structure import Change, Structure

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["NestedModule", "copy_with", "direct_weights", "sliced_copy", "weight_layouts"]

# What timm users call on a model and stays meaningful: the classifier and the structure of parameter groups.
_DELEGATED = (
    "default_cfg",
    "pretrained_cfg",
    "num_classes",
    "num_features",
    "get_classifier",
    "no_weight_decay",
    "group_matcher",
)


class NestedModule(nn.Module):
    """Owns a model's tensors and calls the nested graphs with them.

    `model` keeps the parameters under their original names, and timm's attributes; its own forward is the network
    before nesting and is not used.

    Args:
        model: owner of the parameters.
        analysis: units of the model.
        n: number of subnets.
        standalone: see `build_nested`.
    """

    def __init__(self, model: nn.Module, analysis: Analysis, n: int, standalone: bool = False) -> None:
        super().__init__()
        self.model = model
        self._form = n, standalone
        self._adopt(analysis)

    def _adopt(self, analysis: Analysis) -> None:
        """Build the graphs, without masks and levels: `refresh` is to follow."""
        for name in [b for b in self._buffers if b.startswith(("_mask_", "_constant_", "_levels_"))]:
            del self._buffers[name]
        self.analysis = analysis
        self._graphs = {t: build_nested(p, *self._form) for t, p in analysis.programs.items()}
        self._slots: dict[bool, list[tuple[nn.Module, str]]] = {}
        self._structure = Structure(self.model, {t: p.other_mode for t, p in analysis.programs.items()})
        self._masks = {name: f"_mask_{k}" for k, name in enumerate(analysis.weight_units)}
        self._layouts = weight_layouts(analysis)
        self._constants: dict[tuple[bool, str], str] = {}
        for training, graph in self._graphs.items():
            for name, value in graph.constants.items():
                self._constants[training, name] = f"_constant_{len(self._constants)}"
                self._set_buffer(self._constants[training, name], value)

    def refresh(self, levels: Tensor) -> None:
        """Recompute masks and level vectors from the level of every unit, LongTensor (num_units,) on the CPU."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for name, buffer in self._masks.items():
            self._set_buffer(buffer, self.live_mask(name, levels).to(device))
        for training, graph in self._graphs.items():
            for key, units in graph.level_vectors.items():
                self._set_buffer(f"_levels_{int(training)}_{key}", channel_levels(levels, units).to(device))

    def live_mask(self, weight: str, levels: Tensor) -> Tensor:
        """Live synapses of a weight (nesting rule), BoolTensor that broadcasts against the weight."""
        out_units, in_units = self.analysis.weight_units[weight]
        live = channel_levels(levels, in_units)[None, :] <= channel_levels(levels, out_units)[:, None]
        shape, transposed = self._layouts[weight]
        live = live.t() if transposed else live
        return live.reshape([*live.shape] + [1] * (len(shape) - 2)).contiguous()

    def _set_buffer(self, name: str, value: Tensor) -> None:
        if name in self._buffers:
            self._buffers[name] = value
        else:
            self.register_buffer(name, value, persistent=False)

    def run(self, x: Tensor, training: bool | None = None) -> Any:
        """Call the graph of a mode (None: the current one) and update the buffers that it changes (batch counters).

        Returns:
            The outputs in the structure that the model has in that mode.
        """
        own_mode = training is None
        training = self.training if training is None else training
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            got = f"layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            raise SteppingError(explain("images expected", got=got, expected="a dense tensor (B, C, H, W)"))
        if x.dim() != 4 or tuple(x.shape[1:]) != self.analysis.image_size:
            raise image_shape_error(x.shape, self.analysis.image_size)
        if not torch.compiler.is_compiling():  # the tracer needs no guard for every module
            self.check_structure(training if own_mode else None)
        if training not in self._graphs:
            raise SteppingError("This net holds no graph for train mode: it was made for inference. Call eval() first.")
        graph = self._graphs[training]
        try:
            results = graph.module(x, *self._tensors(graph, training))
        except RuntimeError as error:
            self._check_type(x, error)
            raise
        count = graph.structure.count
        with torch.no_grad():
            for name, value in zip(graph.mutations, results[count:]):
                self.model.get_buffer(name).copy_(value)
        return graph.structure.build(results[:count])

    def _check_type(self, x: Tensor, error: RuntimeError) -> None:
        """Whether images of another type or device than the weights are the reason of an error."""
        kinds = {(p.dtype, p.device) for p in self.model.parameters() if p.is_floating_point()}
        if not kinds or (x.dtype, x.device) in kinds or (not x.is_meta and torch.is_autocast_enabled(x.device.type)):
            return
        got, expected = (f"{dtype} on {device}" for dtype, device in ((x.dtype, x.device), min(kinds, key=str)))
        action = "Convert the images, or the net with to()."
        raise SteppingError(explain("wrong type of images", got=got, expected=expected, action=action)) from error

    def structural_change(self, training: bool | None = None) -> Change | None:
        """The first part of `model` that is not as it was captured; `training`: the mode that parts must be in."""
        return self._structure.change(self, self.model, training)

    def check_structure(self, training: bool | None = None) -> None:
        """Refuse to go on after `model` was changed in what the captured graph does not follow.

        The net computes that graph; parameters, engines and files would be those of another model.

        Args:
            training: the mode in which parts of the model must be; None: any.

        Raises:
            SteppingError: names the module, and the attribute.
        """
        found = self.structural_change(training)
        if found is not None:
            raise SteppingError(
                explain(
                    f"this {found.what} after the conversion, and the net still computes what it was made from",
                    where=f"net.model.{found.path}".rstrip("."),
                    action=found.action
                    or "Change the model first and call apply_steppingnet again, or copy new "
                    "weights into the old module with load_state_dict.",
                )
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.check_structure()
        return super().state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self.check_structure()
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__dict__, memo))
        return made

    def __copy__(self) -> Self:
        made = type(self).__new__(type(self))
        made.__setstate__(dict(self.__dict__))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self).__name__
        raise SteppingError(
            explain(
                f"a {kind} cannot be pickled, and so not be saved by torch.save or sent to another process",
                action="Write a net with net.save(path) and read it with stepping_plugin.load(path) there; engines "
                "(net.deploy()) can be pickled.",
            )
        )

    def _tensors(self, graph: NestedGraph, training: bool) -> list[Tensor]:
        if training not in self._slots:
            self._slots[training] = [self._slot(kind, name, training) for kind, name in graph.inputs]
        return [getattr(module, name) for module, name in self._slots[training]]

    def _slot(self, kind: str, name: str, training: bool) -> tuple[nn.Module, str]:
        """Module and attribute that hold an input of the nested graph."""
        if kind == "tensor":
            path, _, attribute = name.rpartition(".")
            return self.model.get_submodule(path), attribute
        if kind == "constant":
            return self, self._constants[training, name]
        if kind == "mask":
            return self, self._masks[name]
        return self, f"_levels_{int(training)}_{name}"

    def __getattr__(self, name: str) -> Any:
        if name in _DELEGATED:
            return getattr(super().__getattr__("model"), name)
        return super().__getattr__(name)


def weight_layouts(analysis: Analysis) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape of every masked weight where it is used, and whether its input channels come first."""
    layouts = {}
    for program in analysis.programs.values():
        for node in program.operators():
            if node.meta.get("role") == Role.CHANNELS:
                weight: fx.Node = node.args[1]
                layouts[weight_key(weight)] = (weight.meta["shape"], "transpose" in op_name(node))
    return layouts


def direct_weights(analysis: Analysis) -> set[str]:
    """Weights that are parameters as they are (not standardised, transposed, sliced): a mask can be folded in."""
    found: dict[str, bool] = {}
    for program in analysis.programs.values():
        for node in program.operators():
            if node.meta.get("role") == Role.CHANNELS:
                weight: fx.Node = node.args[1]
                key = weight_key(weight)
                found[key] = found.get(key, True) and is_direct(weight)
    return {name for name, direct in found.items() if direct}


def sliced_copy(model: nn.Module, slices: dict[str, ParameterSlice]) -> nn.Module:
    """Copy of a model in which some parameters and buffers are sliced. Tensors shared by several names stay shared."""
    tensors = named_tensors(model)
    return copy_with(model, {name: piece.apply(tensors[name].detach()).clone() for name, piece in slices.items()})


def copy_with(model: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Copy of a model with other values for some parameters and buffers, of any shape; what is shared stays shared."""
    made: dict[int, Any] = {}
    tensors = named_tensors(model)
    for name, value in values.items():
        tensor = tensors[name]
        made[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(model, made)  # the memo makes the copy take these tensors instead of copying the originals
