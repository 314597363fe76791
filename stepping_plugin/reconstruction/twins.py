"""The original network and a nested net that descends from it, run side by side on the same images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import SteppingError, explain
from ..graph.labels import Role
from ..graph.program import call_arg, copy_model, named_tensors
from ..nested.net import NestedNet
from ..units.analysis import Analysis, full_units
from ..units.levels import channel_levels
from ..units.witness import find_units
from .fits import LayerFit, NormFit
from .lockstep import Run, Walk, ancestors, inherited_positions, operands_first

__all__ = ["Pair", "Twins"]

Pair = tuple[Run, Run]  # one batch in the nested net, and in the original


class Twins:
    """What the fits need of the two networks.

    Args:
        net: the nested net.
        original: the model it was made from.
        fits: what is going to be fitted; brought into the order of execution.

    Attributes:
        tensors: parameters and buffers of the net by name.
        walk, source: the nested net and the original, operator by operator.

    Raises:
        SteppingError: the net was not made from the original.
    """

    def __init__(self, net: NestedNet, original: nn.Module, fits: list[LayerFit | NormFit]) -> None:
        self.net, self.tensors = net, named_tensors(net.model)
        self.levels, self.n = net.levels, net.num_subnets
        self.like = next(net.model.parameters())
        self.nested = _nested_nodes(net)
        analysis = self._analysis(original)
        self.walk = self._nested_walk(fits)
        self.source = self._original_walk(original, analysis)
        self.fits = sorted(fits, key=lambda fit: max(self.walk.place[c] for c in fit.calls))
        self.source.kept = {self.origin[fit.end] for fit in self.fits}
        self._positions: dict[fx.Node, Tensor] = {}

    def _analysis(self, original: nn.Module) -> Analysis:
        """Analysis of the original; remembers its node behind every node of the net's program."""
        program = self.net.analysis.eval_program
        if self.net.lineage:
            analysis = find_units(copy_model(original), self.net.analysis.image_size)
            self.origin = ancestors(analysis, self.net.lineage, program)
            return analysis
        self.origin = {node: node for node in program.graph.nodes}
        return self.net.analysis

    def _original_walk(self, original: nn.Module, analysis: Analysis) -> Walk:
        program, tensors = analysis.eval_program, named_tensors(original)

        def read(node: fx.Node) -> Tensor:
            name = node.meta["tensor"]
            tensor = program.constants[name] if name in program.constants else tensors.get(name)
            if tensor is None or tuple(tensor.shape) != tuple(node.meta["shape"]):
                raise SteppingError(
                    explain(
                        "not the network that the net was made from",
                        where=f"original.{name}",
                        got="nothing" if tensor is None else str(tuple(tensor.shape)),
                        expected=str(tuple(node.meta["shape"])),
                    )
                )
            tensor = tensor.detach().to(self.like.device)
            return tensor.to(self.like.dtype) if tensor.is_floating_point() else tensor

        walk = Walk(list(program.graph.nodes), program.image, read)
        for node in program.tensor_nodes():
            walk.static(node)
        return walk

    def _nested_walk(self, fits: list[LayerFit | NormFit]) -> Walk:
        graph = self.net._graphs[False]
        nodes = list(graph.module.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        names = dict(zip(inputs[1:], graph.inputs))
        last = {self.nested[f.end]: self.nested[f.branch] for f in fits if f.other is not None}
        output: Any = nodes[-1].args[0]

        def read(node: fx.Node) -> Tensor:
            kind, name = names[node]
            module, attribute = self.net._slot(kind, name, False)
            return getattr(module, attribute).detach()

        return Walk(operands_first(output, last), inputs[0], read)

    # -- running

    def start(self, images: Tensor) -> Pair:
        return self.walk.start(images), self.source.start(images)

    def advance(self, fit: LayerFit | NormFit, pair: Pair) -> None:
        """Up to where everything is there that a fit reads."""
        nested, original = pair
        if len(fit.calls) > 1:  # a classifier that runs once per subnet
            self.walk.kept.update(c.args[0] for c in fit.calls)  # type: ignore[misc]
        self.walk.advance(nested, max(self.walk.place[c] for c in fit.calls))
        self.source.advance(original, self.source.place[self.origin[fit.end]] + 1)

    def done(self, number: int, pairs: Iterable[Pair]) -> None:
        """Let go of the original's values that only the first `number` fits read."""
        end = self.origin[self.fits[number - 1].end]
        if not any(self.origin[fit.end] is end for fit in self.fits[number:]):
            self.source.release((original for _, original in pairs), end)

    def inputs(self, fit: LayerFit | NormFit, pair: Pair) -> list[Tensor]:
        """What a fitted operator of the nested net reads, per call."""
        return [self.walk.value(pair[0], call.args[0]) for call in fit.calls]  # type: ignore[arg-type]

    def aim(self, fit: LayerFit | NormFit, pair: Pair) -> Tensor:
        """The original's values where a fit ends, at the positions that the net's descend from."""
        value = pair[1].values[self.origin[fit.end]]
        positions = self.inherited(fit.end)
        return value if positions is None else value.index_select(fit.end.meta["axis"], positions)

    def inherited(self, node: fx.Node) -> Tensor | None:
        """Position in the original behind every position along a node's unit axis; None without units."""
        if node.meta["units"] is None:
            return None
        if node not in self._positions:
            positions = inherited_positions(self.origin[node].meta["units"], self.net.lineage)
            self._positions[node] = positions.to(self.like.device)
        return self._positions[node]

    # -- parameters and levels

    def parameters(self, node: fx.Node, *names: str) -> list[Tensor]:
        """Parameters or buffers that are arguments of an operator, those that it has."""
        found = [call_arg(node, name) for name in names]
        return [self.tensors[f.meta["tensor"]] for f in found if f is not None]

    def constant(self, node: fx.Node) -> Tensor:
        """Value of a static node of the net's program, float64."""
        return self.walk.static(self.nested[node]).double()

    def out_levels(self, fit: LayerFit | NormFit) -> Tensor:
        """Level per output channel, LongTensor on the CPU."""
        if fit.node.meta.get("role") == Role.HEAD:
            return torch.ones(fit.node.meta["shape"][fit.axis], dtype=torch.long)
        return channel_levels(self.levels, full_units(fit.node, fit.axis))


def _nested_nodes(net: NestedNet) -> dict[fx.Node, fx.Node]:
    """Node of the nested eval graph for every node of the program that has one value for all subnets."""
    nodes = list(net._graphs[False].module.graph.nodes)
    return {net.analysis.eval_program.image: nodes[0], **{n.meta["source"]: n for n in nodes if "source" in n.meta}}
