"""`NestedNet`: levels, budgets and subnets of one model. `stepping_plugin.SteppingNet` adds what people do with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import SteppingError, expect, explain
from ..files.headers import Contribution
from ..files.metadata import Metadata
from ..graph.structure import map_tensors
from ..units.analysis import Analysis, restrict
from ..units.levels import channel_levels
from ..units.macs import MacModel
from .module import NestedModule, sliced_copy
from .subnet import Subnet, extract_subnet

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["NestedNet", "check_levels"]


class Assigned(Protocol):
    """Levels (LongTensor, num_units) and a sentence per subnet that is not as asked."""

    levels: Tensor
    notes: list[str]


class NestedNet(NestedModule):
    """N nested subnets of one model.

    Calling the net gives the outputs of `active_subnet`; `forward_all` gives those of all subnets in one pass.
    `model` holds the parameters under their original names.

    Args:
        model: owner of the parameters (a private copy).
        analysis: its units.
        levels: LongTensor (num_units,), 1..N, N + 1 = spare.
        budgets: MACs allowed in subnets 1..N.
        reference_macs: M_t, MACs of the original network.
        origin: how the model can be made again, see `serialization`.
        lineage: copies of every unit, one LongTensor per widening or compaction since the original model.
    """

    unit_levels: Tensor

    def __init__(
        self,
        model: nn.Module,
        analysis: Analysis,
        levels: Tensor,
        budgets: Sequence[int],
        reference_macs: int,
        origin: dict[str, Any] | None = None,
        lineage: Sequence[Tensor] = (),
    ) -> None:
        super().__init__(model, analysis, len(budgets))
        self.macs_model = MacModel(analysis)
        self.budgets = [int(b) for b in budgets]
        self.reference_macs = int(reference_macs)
        self.origin = dict(origin or {})
        self.lineage = [c.clone() for c in lineage]
        self.notes: list[str] = []
        self.completion: Callable[[], Analysis] | None = None  # of a net loaded for inference, see `complete`
        self._metadata = Metadata()
        self.contribution: Contribution | None = None  # measured last; see `SteppingNet.measure`
        self._active = len(self.budgets)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.register_buffer("unit_levels", torch.ones(analysis.num_units, dtype=torch.long, device=device))
        self.set_levels(levels)
        self.register_load_state_dict_pre_hook(_check_before_loading)
        self.register_load_state_dict_post_hook(_refresh_after_loading)

    @property
    def metadata(self) -> Metadata:
        """What files say besides the function: names of classes, preprocessing, early exit, provenance."""
        return self._metadata

    @metadata.setter
    def metadata(self, metadata: Metadata) -> None:
        given: object = metadata
        if not isinstance(given, Metadata):
            got = type(given).__name__
            raise SteppingError(explain("wrong type", where="metadata", got=got, expected="files.metadata.Metadata"))
        classes = next(iter(self.analysis.programs.values())).num_classes
        problem = metadata.problem(self.analysis.image_size, self.num_subnets, classes)
        if problem:
            raise SteppingError(explain(problem, where="metadata"))
        self._metadata = metadata

    # ------------------------------------------------------------------------------------------ structure

    @property
    def num_subnets(self) -> int:
        """N."""
        return len(self.budgets)

    @property
    def levels(self) -> Tensor:
        """Level of every unit, LongTensor (num_units,) on the CPU: 1..N, N + 1 = spare."""
        return self.unit_levels.detach().cpu().clone()

    @property
    def returns_class_scores(self) -> bool:
        """Whether the model returns class scores (B, classes) and nothing else."""
        return next(iter(self.analysis.programs.values())).num_classes is not None

    @property
    def output_levels(self) -> Any:
        """The structure of the eval outputs with a level vector for each: LongTensor (C,), the first subnet that has
        the channel (feature maps), N + 1 for none; None for outputs that are whole in every subnet (class scores).
        """
        program = self.analysis.eval_program
        return program.structure.build([self._levels_of_output(node.meta) for node in program.outputs])

    def _levels_of_output(self, facts: dict[str, Any]) -> Tensor | None:
        if facts.get("units") is None or facts["per_level"]:
            return None
        levels = channel_levels(self.levels, facts["units"])
        return torch.where(facts["gone"], self.num_subnets + 1, levels) if "gone" in facts else levels

    @property
    def macs(self) -> list[int]:
        """MACs that are executed to get the scores of subnets 1..N, each including the smaller ones.

        Units that no class score depends on are not computed by the engine, so they do not count.
        """
        return self.macs_model.executed_macs(self.levels, self.num_subnets).tolist()

    def set_levels(self, levels: Tensor) -> None:
        """Assign units to subnets and refresh the masks.

        Args:
            levels: LongTensor (num_units,) with values 1..N + 1.

        Raises:
            SteppingError: wrong shape or values, or a layer would have no unit left in subnet 1.
        """
        levels = check_levels(levels, self.analysis, self.num_subnets)
        self.unit_levels.copy_(levels)
        self.contribution, self._metadata = None, self._metadata.updated(exit=None)
        self.refresh(levels)

    def take(self, assigned: Assigned) -> None:
        """Assign units as a policy or a landing proposes, and keep its notes."""
        self.set_levels(assigned.levels)
        self.notes += assigned.notes

    def compact(self) -> Self:
        """A net without the spare units: same subnets, smaller tensors, faster training.

        Parameters are new objects; make the optimizer afterwards.
        """
        self.complete()
        self.check_structure()
        kept = self.levels <= self.num_subnets
        analysis, slices = restrict(self.analysis, kept.long())
        model = sliced_copy(self.model, slices)
        lineage = [*self.lineage, kept.long()]
        levels = self.levels[kept]
        net = type(self)(model, analysis, levels, self.budgets, self.reference_macs, self.origin, lineage)
        net.notes, net.metadata = list(self.notes), self.metadata
        return net.train(self.training)

    @property
    def dense_macs(self) -> list[int]:
        """MACs that `extract(1)` to `extract(N)` execute: as `macs`, but with the zeros of dead synapses multiplied."""
        levels = self.levels
        alone = [
            self.macs_model.executed_macs(torch.where(levels <= i, 1, 2), 1) for i in range(1, len(self.budgets) + 1)
        ]
        return [int(macs) for macs in alone]

    def extract(self, subnet: int) -> Subnet:
        """Subnet `subnet` (1..N) as a standalone module, physically without the other units.

        Dead synapses are zeros in its weights: it executes `dense_macs`, not `macs`.
        """
        self.complete()
        self.check_structure()
        return extract_subnet(self.model, self.analysis, self.levels, self._subnet(subnet)).train(self.training)

    def complete(self) -> None:
        """Capture the train mode of a net that was loaded without it, which `load` leaves to whoever needs it.

        `train()`, `fit`, `extract` and `compact` call this; it takes as long as a conversion, and does nothing later.

        Raises:
            CheckpointError: the model's code computes something else than the net that was saved.
        """
        if self.completion is None:
            return
        self.check_structure()
        analysis, self.completion = self.completion(), None
        self._adopt(analysis)
        self.macs_model = MacModel(analysis)
        self.refresh(self.levels)
        reference = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        for name in self._constants.values():
            value = getattr(self, name)
            self._set_buffer(name, value.to(reference if value.is_floating_point() else reference.device))

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.complete()
        return super().train(mode)

    # ------------------------------------------------------------------------------------------ running

    @property
    def active_subnet(self) -> int:
        """The subnet that calling the net evaluates, 1..N."""
        return self._active

    @active_subnet.setter
    def active_subnet(self, subnet: int) -> None:
        self._active = self._subnet(subnet)

    def _subnet(self, subnet: int) -> int:
        if isinstance(subnet, bool) or not isinstance(subnet, int) or not 1 <= subnet <= self.num_subnets:
            raise SteppingError(
                explain("no such subnet", got=subnet, expected=f"an integer from 1 to {self.num_subnets}")
            )
        return subnet

    def forward(self, x: Tensor) -> Any:
        """What the model returns (class scores (B, classes), for example), from the active subnet, for images
        (B, C, H, W).
        """
        return map_tensors(lambda output: output[self._active - 1], self.forward_all(x))

    def forward_all(self, x: Tensor) -> Any:
        """The outputs of all subnets in one pass, in train and in eval mode: class scores (N, B, classes), or whatever
        the model returns in that mode (a tuple, a list, a dict, ... of tensors), with a leading axis N on every tensor.

        Units that leave the model (feature maps) are 0 in subnets that do not contain them, see `output_levels`.

        Args:
            x: images (B, C, H, W) of the size that the net was made for.

        Raises:
            SteppingError: another image size, or train mode of a net that was made for inference only.
        """
        return self.run(x)


def check_levels(levels: Tensor, analysis: Analysis, n: int) -> Tensor:
    """Levels as LongTensor (num_units,) on the CPU.

    Raises:
        SteppingError: wrong shape or values, or a layer would have no unit left in subnet 1.
    """
    try:
        levels = torch.as_tensor(levels).detach().cpu().long()
    except (TypeError, ValueError, RuntimeError):
        expect(levels, Tensor, "levels", f"LongTensor ({analysis.num_units},), one level per unit")
        raise
    if levels.shape != (analysis.num_units,):
        expected = f"({analysis.num_units},), one level per unit"
        raise SteppingError(explain("wrong shape", where="levels", got=str(tuple(levels.shape)), expected=expected))
    if len(levels) and (int(levels.min()) < 1 or int(levels.max()) > n + 1):
        got, expected = f"{int(levels.min())}..{int(levels.max())}", f"1..{n}, or {n + 1} for spare units"
        raise SteppingError(explain("value out of range", where="levels", got=got, expected=expected))
    for anchor in analysis.anchors:
        if int(levels[anchor].min()) > 1:
            first = int(anchor[0])
            name = next((g.name for g in analysis.groups if bool((g.units == first).any())), "a layer")
            raise SteppingError(
                explain(
                    f"subnet 1 would have an empty layer: none of {len(anchor)} units is at level 1",
                    where=name,
                    action="Keep one of them there.",
                )
            )
    return levels


def _check_before_loading(net: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state dict brings its own levels, but no budgets: refuse levels that this net cannot have before copying any.

    Raises:
        SteppingError: impossible levels, or subnets that cost more than the budgets.
    """
    assert isinstance(net, NestedNet)
    levels = state.get(f"{prefix}unit_levels")
    if levels is None or torch.equal(torch.as_tensor(levels).cpu(), net.levels):
        return
    levels = check_levels(levels, net.analysis, net.num_subnets)
    macs = net.macs_model.subnet_macs(levels, net.num_subnets).tolist()
    under_way = any(m > b for m, b in zip(net.macs, net.budgets))  # construction starts above all budgets
    if not under_way and any(m > b for m, b in zip(macs, net.budgets)):
        action = "Convert the model with the same budgets as the other net, or use net.save and stepping_plugin.load."
        raise SteppingError(
            explain(
                "the levels in this state dict do not fit the net's budgets",
                where="load_state_dict",
                got=f"MACs {macs}",
                expected=f"at most {net.budgets}",
                action=action,
            )
        )


def _refresh_after_loading(net: nn.Module, _: Any) -> None:
    """A state dict brings its own levels; the masks must follow."""
    assert isinstance(net, NestedNet)
    net.refresh(check_levels(net.unit_levels, net.analysis, net.num_subnets))
