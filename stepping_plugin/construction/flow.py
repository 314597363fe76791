"""Construction of the subnets (paper III-A, Fig. 3).

    start     all units of the (widened) network are in subnet 1
    repeat    train all subnets for m batches; evaluate the importance of the units (Eq. 2, 3)
              for i = 1..N: if subnet i costs too much, move units from subnet i to subnet i + 1
              prune weights of negligible magnitude, revive the synapses of moved units
    until     every subnet meets its budget P_i, or N_t iterations are over
    finish    land every subnet just below its budget (not in the paper, which ends up to 7.5 points below)

What "costs too much" and "units" mean is the flow:

`paper`: MACs_i > P_i, and for i >= 2 also MACs_i - MACs_{i-1} > P_i - P_{i-1}. The units of least importance move, until
their MACs just exceed (P_t - P_1) / N_t, with P_t the MACs of the start network (those of the original one would be too
few for a widened start). Two guards that the paper does not state: moving stops as soon as P_i is met, and of every
tensor one unit stays in subnet 1.

`trajectory` (default): MACs_i exceeds its target of this iteration t,

    target_i(t) = P_t * (P_i / P_t)^(t / N_t).

The units of least value move, that is of least importance, as a share of what their layer has in subnet i, per MAC that
the move saves. Layers stay in a band around the regular pattern, which narrows with t.

MACs are recomputed exactly after every move: a moved unit loses synapses from units of its old subnet *and* to them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from ..errors import BudgetError, CheckpointError, SteppingError
from ..levels import check_budgets, locked_units
from ..macs import MacModel
from ..net import SteppingNet
from ..training.checkpoint import differences
from ..training.loader import EpochLoader
from ..training.trainer import Batch, TrainConfig, Trainer, assert_same_levels
from ..units import Analysis
from .config import ConstructionConfig
from .counts import UnitClasses
from .gradient_importance import GradientImportance
from .importance import magnitude_scores
from .landing import LandingResult, Planner, cut_off_groups, find_plugs, result_of, settle
from .uniform import Band, uniform_band
from .unstructured import UnstructuredPruning
from .widening import reinitialise, widen

__all__ = ["Construction", "construct", "start_network"]


def construct(
    model: nn.Module,
    analysis: Analysis,
    train_loader: Iterable[Batch],
    budgets: Sequence[int],
    config: ConstructionConfig | None = None,
    *,
    reference_macs: int,
    origin: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    log: Callable[[dict[str, Any]], None] | None = None,
) -> SteppingNet:
    """From a trained network to N nested subnets: the whole of Fig. 3 but for the retraining.

    Args:
        model: owner of the parameters; not modified.
        analysis: its units.
        train_loader: batches of (images, labels), taken in turn and over again.
        budgets: P_1..P_N in MACs.
        config: hyperparameters.
        reference_macs: M_t, MACs of the original network.
        origin: see `SteppingNet`.
        seed: of widening, of random weights and of random importance.
        device: where to train, see `TrainConfig`.
        log: called with the record of every iteration.

    Returns:
        The net without its spare units, in eval mode on the training device.

    Raises:
        BudgetError: budgets that cannot be met, or at which two subnets could not differ.
        SteppingError: the loader is empty, or training diverged.
    """
    config = config or ConstructionConfig()
    net = start_network(model, analysis, budgets, config, reference_macs, origin, seed)
    construction = Construction(net, train_loader, config, seed=seed, device=device)
    for record in construction:
        if log is not None:
            log(record)
    construction.finish()
    return net.eval().compact()


def start_network(
    model: nn.Module,
    analysis: Analysis,
    budgets: Sequence[int],
    config: ConstructionConfig,
    reference_macs: int,
    origin: dict[str, Any] | None = None,
    seed: int = 0,
) -> SteppingNet:
    """The (widened) network with all units in subnet 1. Arguments as for `construct`."""
    widened = widen(model, analysis, config.expansion, seed, config.noise)
    if config.init == "random":
        reinitialise(widened.model, seed)
    analysis = widened.analysis
    check_budgets(analysis, MacModel(analysis), budgets, reference_macs)
    lineage = [widened.copies] if config.expansion > 1 else []
    ones = torch.ones(analysis.num_units, dtype=torch.long)
    net = SteppingNet(widened.model, analysis, ones, budgets, reference_macs, origin, lineage)
    net.notes = list(widened.notes)
    return net


class Construction:
    """The iterations of Fig. 3, one at a time.

        construction = Construction(start_network(...), loader, config)
        for record in construction:               # trains and moves units
            save(construction.state_dict())       # load_state_dict continues from here
        construction.finish()                     # exact budgets; then net.compact() and retraining

    Together with the random generators, `state_dict` is all that the iterations to come depend on. In a distributed run
    every process has its own share of the batches, and all of them move the same units.

    Args:
        net: all units at level 1; trained in place.
        train_loader: see `construct`; resumed exactly if its batches are repeatable (`training.loader.EpochLoader`).
        config: hyperparameters.
        seed: of random importance.
        device: where to train.
    """

    def __init__(
        self,
        net: SteppingNet,
        train_loader: Iterable[Batch],
        config: ConstructionConfig | None = None,
        *,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        self.net, self.config, self.seed = net, config or ConstructionConfig(), seed
        settings = TrainConfig.of(self.config, epochs=1, sched="none", device=device)
        sequential = self.config.updates == "sequential"
        self.trainer = Trainer(net, settings, 1, beta=self.config.beta, sequential=sequential)
        self.loader = train_loader
        self.iteration = self.batches = 0
        self.stream = _stream(train_loader, 0)
        self.start_macs = net.macs[0]  # P_t
        self.classes = UnitClasses(net.analysis, net.macs_model, small=net.num_subnets)
        self.band: Band | None = None
        if self.config.band is not None:
            self.band = uniform_band(net.analysis, net.macs_model, net.budgets, self.config.band)
        self.pruning = UnstructuredPruning(net, self.config.threshold)
        self.gradient: GradientImportance | None = None
        if self.config.importance in ("per-sample", "per-batch"):
            self.gradient = GradientImportance(net, self.config.importance, partial(reduce, reduction="mean"))
        self.gradients = torch.zeros(net.num_subnets, net.analysis.num_units, dtype=torch.float64)
        self.records: list[dict[str, Any]] = []

    @property
    def done(self) -> bool:
        """Whether N_t iterations are over, or (flow "paper") every subnet meets its budget."""
        met = self.config.flow == "paper" and all(m <= p for m, p in zip(self.net.macs, self.net.budgets))
        return met or self.iteration >= self.config.iterations

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while not self.done:
            yield self.step()

    # --- One iteration

    def step(self) -> dict[str, Any]:
        """One iteration of Fig. 3.

        Returns:
            iteration (from 1), losses of subnets 1..N (means over the batches), macs, moved (units), pruned (share).
        """
        losses = self._train_and_evaluate()
        self.iteration += 1
        before = self.net.levels
        levels = before
        for i in range(1, self.net.num_subnets + 1):
            levels = self._from_paper(i, levels) if self.config.flow == "paper" else self._from_trajectory(i, levels)
        self._assign(levels)
        record = {
            "iteration": self.iteration,
            "losses": losses,
            "macs": self.net.macs,
            "moved": int((levels != before).sum()),
            "pruned": self.pruning.fraction,
        }
        self.records.append(record)
        return record

    def _train_and_evaluate(self) -> list[float]:
        """Train for m batches and evaluate Eq. 2 on the last ones of them; returns the mean losses."""
        config, net = self.config, self.net
        evaluated = config.importance_batches if self.gradient else 0
        last = max(config.batches, evaluated)
        total = torch.zeros(net.num_subnets, device=self.trainer.device)
        group: list[Batch] = []
        net.train()
        for number in range(1, last + 1):
            batch = next(self.stream)
            self.batches += 1
            if number <= config.batches:
                group.append(batch)
                if len(group) == config.grad_accum_steps or number == config.batches:
                    total += self.trainer.update(group) * len(group)
                    group = []
            if self.gradient and number > last - evaluated:
                self._evaluate(self.gradient, batch)
        self.trainer.share_buffers()
        total = reduce(total, "mean") / max(1, config.batches)
        if not bool(total.isfinite().all()):
            raise self.trainer.diverged(f"losses {total.tolist()}")
        if self.gradient:  # a spare unit keeps what it had when it was last in a subnet
            self.gradients = torch.where(net.levels <= net.num_subnets, self.gradient.gradients, self.gradients)
            self.gradient.reset()
        return total.tolist()

    def _evaluate(self, importance: GradientImportance, batch: Batch) -> None:
        kind = next(self.net.parameters()).dtype
        images, target = batch[0].to(self.trainer.device, kind), batch[1].to(self.trainer.device)
        with torch.autocast(self.trainer.device.type, getattr(torch, self.config.amp_dtype), enabled=self.config.amp):
            importance.add(images, lambda scores: self.trainer.criterion(scores, target, None))

    def importance(self, i: int) -> Tensor:
        """M_j of all units with respect to subnet i (Eq. 3), float64 (num_units,)."""
        if self.config.importance == "magnitude":
            return magnitude_scores(self.net.model, self.net.analysis)
        if self.config.importance == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return torch.rand(self.net.analysis.num_units, generator=generator, dtype=torch.float64)
        alpha = self.config.alpha ** torch.arange(self.net.num_subnets, dtype=torch.float64)
        return (alpha[i - 1 :, None] * self.gradients[i - 1 :]).sum(0)

    def _locked(self, levels: Tensor) -> Tensor:
        """The most important unit of every tensor that is still at level 1 stays there, BoolTensor (num_units,)."""
        return locked_units(self.net.analysis, torch.where(levels == 1, self.importance(1), -1.0))

    # --- The two flows

    def _from_paper(self, i: int, levels: Tensor) -> Tensor:
        """Move units from subnet i to subnet i + 1 by the paper's rules; returns the new levels."""
        net = self.net
        macs, budgets = net.macs_model.subnet_macs(levels, net.num_subnets).tolist(), net.budgets
        if macs[i - 1] <= budgets[i - 1]:
            return levels
        if i >= 2 and not macs[i - 1] - macs[i - 2] > budgets[i - 1] - budgets[i - 2]:
            return levels
        quota = (self.start_macs - budgets[0]) / self.config.iterations
        target = max(macs[i - 1] - quota, budgets[i - 1])
        units = ((levels == i) & ~self._locked(levels)).nonzero().flatten()
        units = units[self.importance(i)[units].argsort(stable=True)]

        def moved(count: int) -> Tensor:
            return levels.index_fill(0, units[:count], i + 1)

        low, high = 0, len(units)  # the MACs fall with every unit that leaves: bisect for how many must
        while low < high:
            middle = (low + high) // 2
            enough = int(net.macs_model.subnet_macs(moved(middle), net.num_subnets)[i - 1]) <= target
            low, high = (low, middle) if enough else (middle + 1, high)
        return moved(low)

    def _from_trajectory(self, i: int, levels: Tensor) -> Tensor:
        """Move units of least value from subnet i to subnet i + 1 until it meets its target; returns the new levels."""
        net, progress = self.net, self.iteration / self.config.iterations
        scores, locked, band = self.importance(i), self._locked(levels), None
        if self.band is not None:
            size = self.classes.width_size[:, None]
            upper = np.ceil(size * (np.minimum(self.band.upper, size) / size) ** progress).astype(np.int64)
            levels = _narrowed(levels, i, upper[:, i - 1], scores, locked, self.classes)
            band = Band(self.band.lower, upper, np.zeros_like(self.band.new))
        planner = Planner(net.analysis, net.macs_model, levels, net.num_subnets, scores, locked, band)
        budget = net.budgets[i - 1]
        target = self.start_macs * (budget / self.start_macs) ** progress
        planner.thin(i, max(budget, int(target)))
        return planner.levels

    # --- Landing

    def finish(self) -> LandingResult:
        """Bring every subnet to 0.99 P_i .. P_i wherever units allow, and give it units that the smaller ones lack.

        Raises:
            BudgetError: a budget cannot be met, or two subnets would give the same scores.
        """
        net = self.net
        locked = self._locked(net.levels)
        planner = Planner(
            net.analysis, net.macs_model, net.levels, net.num_subnets, self.importance(1), locked, self.band
        )
        notes: list[str] = []
        for i, budget in enumerate(net.budgets, start=1):
            planner.narrow(i)
            notes += settle(planner, i, budget)
        result = result_of(planner, net.analysis, net.macs_model, notes)
        plugs = len(find_plugs(net.analysis, result.levels, net.num_subnets))
        if plugs:
            raise BudgetError(f"{result.notes[-plugs]}. Put these budgets further apart, or use fewer of them.")
        for i, groups in cut_off_groups(net.analysis, result.levels, net.num_subnets).items():
            result.notes.append(f"subnet {i} does not use its own units in {', '.join(groups)}: no later layer reads them there")
        self._assign(result.levels)
        net.notes += result.notes
        return result

    def _assign(self, levels: Tensor) -> None:
        """Move units and prune; every process must have come to the same levels."""
        moved = levels != self.net.levels
        self.net.set_levels(levels)
        assert_same_levels(self.net)
        self.pruning.round(moved)

    # --- State

    def state_dict(self) -> dict[str, Any]:
        """Everything but the random generators, as tensors, numbers and strings in dicts and lists."""
        return {
            "config": dataclasses.asdict(self.config),
            "seed": self.seed,
            "iteration": self.iteration,
            "batches": self.batches,
            "start_macs": self.start_macs,
            "levels": self.net.levels,
            "gradients": self.gradients,
            "pruned": {name: list(pair) for name, pair in self.pruning.pruned.items()},
            "pruned_share": self.pruning.fraction,
            "records": self.records,
            "trainer": self.trainer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, with the same network, settings and batches.

        Raises:
            CheckpointError: the state belongs to another construction.
        """
        own = {"config": dataclasses.asdict(self.config), "seed": self.seed, "units": len(self.net.levels)}
        theirs = {"config": state["config"], "seed": state["seed"], "units": len(state["levels"])}
        changed = differences(_plain(theirs), _plain(own))
        if changed:
            raise CheckpointError(f"the checkpoint belongs to another construction: {'; '.join(changed)}.")
        self.net.set_levels(state["levels"])
        self.trainer.load_state_dict(state["trainer"])
        self.iteration, self.batches, self.start_macs = state["iteration"], state["batches"], state["start_macs"]
        self.gradients, self.records = state["gradients"].clone(), list(state["records"])
        self.pruning.pruned = {name: (pair[0], pair[1]) for name, pair in state["pruned"].items()}
        self.pruning.fraction = state["pruned_share"]
        self.stream = _stream(self.loader, self.batches)


def _narrowed(
    levels: Tensor, i: int, upper: np.ndarray, scores: Tensor, locked: Tensor, classes: UnitClasses
) -> Tensor:
    """Move the least important units of every width that has more than `upper` units in subnet i."""
    width = classes.width[classes.of_unit]
    excess = np.bincount(width[(levels <= i).numpy()], minlength=len(upper)) - upper
    units = ((levels == i) & ~locked).nonzero().flatten().numpy()
    units = units[np.lexsort((scores.numpy()[units], width[units]))]
    rank = np.arange(len(units)) - np.searchsorted(width[units], width[units])
    return levels.index_fill(0, torch.from_numpy(units[rank < excess[width[units]]]), i + 1)


def _stream(loader: Iterable[Batch], start: int) -> Iterator[Batch]:
    """Batches without end, the first `start` left out."""
    if isinstance(loader, EpochLoader):
        yield from loader.stream(start)
    done = 0
    while True:
        before = done
        for batch in loader:
            if done >= start:
                yield batch
            done += 1
        if done == before:
            raise SteppingError(
                "the training loader is empty, or can be iterated once only. Check the data set, and pass a loader that "
                "starts anew with every `for`."
            )


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value))  # tuples become lists, as in a checkpoint
