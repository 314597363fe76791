"""Construction of the subnets (paper III-A, Fig. 3).

    start     all units of the (widened) network are in subnet 1
    repeat    train all subnets for m batches and evaluate the importance of the units (Eq. 2, 3);
              for i = 1..N: if subnet i costs too much, move units from subnet i to subnet i + 1;
              prune weights of negligible magnitude, revive the synapses of moved units
    until     every subnet meets its budget P_i, or N_t iterations are over
    finish    land every subnet just below its budget (the paper's own end up to 7.5 points below),
              train for some more batches without moves (cool down)

What "costs too much" is, and which units move, is up to the flow.

`paper`: MACs_i > P_i, and for i >= 2 also MACs_i - MACs_{i-1} > P_i - P_{i-1}. Units of least importance
move until their MACs just exceed (P_t - P_1) / N_t. P_t is what the *start* network costs: with the MACs of
the original one, N_t iterations would not bring a widened start down to its budgets. Two guards that the
paper does not state: moving stops as soon as P_i is met, and of every tensor one unit stays in subnet 1.

`trajectory` (default): MACs_i exceeds the target of iteration t,

    target_i(t) = P_t * (P_i / P_t)^(t / N_t).

Units of least value move: of least importance, as a share of what their layer has in subnet i, per MAC that
the move saves; second copies of a widened unit count for less than the first. Every layer's width stays in a
band around the regular pattern, which narrows with t.

MACs are exact after every move: a moved unit loses synapses from units of its old subnet *and* to them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor

from ..console.progress import Stage, stage, track
from ..errors import BudgetError, CheckpointError, explain
from ..graph.structure import map_tensors
from ..net import SteppingNet
from ..training.batches import check_batch_size
from ..training.checkpoint import ADVICE, differences
from ..training.losses import SubnetLoss
from ..training.trainer import Batch, TrainConfig, Trainer, assert_same_levels
from ..units.levels import locked_units
from .calibration import fixed_round_to
from .config import ConstructionConfig
from .counts import Array, UnitClasses
from .distinct import land_apart
from .gradient_importance import GradientImportance
from .importance import discount_copies, magnitude_scores
from .landing import LandingResult, in_blocks, result_of, settle
from .planner import Planner
from .plugs import cut_off_groups, find_plugs
from .rebirth import revive
from .rounding import multiples
from .start import endless
from .trajectory import narrow, narrowing_band
from .uniform import Band, uniform_band
from .unstructured import UnstructuredPruning

__all__ = ["Construction"]

PICTURES = 512  # on which dead units are looked for


class Construction:
    """The iterations of Fig. 3, one at a time.

        construction = Construction(convert(...), train_loader, config)
        for record in construction:               # trains and moves units
            save(construction.state_dict())       # load_state_dict continues from here
        construction.finish()                     # exact budgets, cool-down; then net.compact() and retraining

    Together with the random generators, `state_dict` is all that the following iterations depend on. In a
    distributed run every process has its own share of the batches, and all move the same units.

    Args:
        net: all units at level 1; trained in place.
        train_loader: batches of (images, labels), taken in turn and over again. A resumed construction sees
            those that it would have seen if they are repeatable (`training.loader.EpochLoader`).
        config: hyperparameters.
        seed: of random importance.
        device: where to train, see `TrainConfig`.
        criterion: of training and of Eq. 2, by default the cross entropy.
    """

    def __init__(
        self,
        net: SteppingNet,
        train_loader: Iterable[Batch],
        config: ConstructionConfig | None = None,
        *,
        seed: int = 0,
        device: str = "auto",
        criterion: SubnetLoss | None = None,
    ) -> None:
        self.net, self.config, self.seed = net, config or ConstructionConfig(), seed
        check_batch_size(net, train_loader)
        settings = TrainConfig.of(self.config, epochs=1, sched="none", device=device)
        sequential = self.config.updates == "sequential"
        self.trainer = Trainer(net, settings, 1, criterion=criterion, beta=self.config.beta, sequential=sequential)
        self.loader, self.stream = train_loader, endless(train_loader)
        self.iteration = self.batches = 0
        self.start_macs = net.macs[0]  # P_t
        self.classes = UnitClasses(net.analysis, net.macs_model, small=net.num_subnets)
        self.multiples = multiples(net.analysis, net.macs_model, net.budgets, fixed_round_to(self.config, net.model))
        self.band: Band | None = None
        if self.config.band is not None:
            self.band = uniform_band(
                net.analysis, net.macs_model, net.budgets, self.config.band, self.config.increments
            )
        self.evaluator: GradientImportance | None = None
        if self.config.importance in ("per-sample", "per-batch"):
            self.evaluator = GradientImportance(net, self.config.importance, partial(reduce, reduction="mean"))
        self.gradients = torch.zeros(net.num_subnets, net.analysis.num_units, dtype=torch.float64)
        self.pruning = UnstructuredPruning(net, self.config.threshold)
        self.records: list[dict[str, Any]] = []
        self.shown = Stage("construction", None, 0)  # by whom it is iterated

    @property
    def done(self) -> bool:
        """Whether N_t iterations are over or (flow "paper") every subnet meets its budget."""
        met = all(macs <= budget for macs, budget in zip(self.net.macs, self.net.budgets))
        return self.iteration >= self.config.iterations or (met and self.config.flow == "paper")

    def run(self, log: Callable[[dict[str, Any]], None] | None = None) -> SteppingNet:
        """All iterations, of which `log` gets the records, and the end; returns the net without spare units."""
        for record in self:
            if log is not None:
                log(record)
        self.finish()
        return self.net.eval().compact()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rounds, each = self.config.iterations, max(self.config.batches, self._evaluated)
        with stage("construction", rounds * each, done=self.batches) as self.shown:
            while not self.done:
                self.shown.text = f"iteration {self.iteration + 1}/{rounds}"
                yield self.step()

    # --- One iteration

    def step(self) -> dict[str, Any]:
        """One iteration of Fig. 3.

        Returns:
            iteration (from 1), losses (means over the batches) and macs of subnets 1..N, moved (number of
            units), pruned (share of the weights).
        """
        losses = self._train(self._evaluated)
        self._read_importance()
        self.iteration += 1
        before = levels = self.net.levels
        move = self._by_paper if self.config.flow == "paper" else self._by_trajectory
        for i in range(1, self.net.num_subnets + 1):
            levels = move(i, levels)
        self._assign(levels)
        record = {"iteration": self.iteration, "losses": losses, "macs": self.net.macs}
        record.update(moved=int((levels != before).sum()), pruned=self.pruning.fraction)
        self.records.append(record)
        return record

    @property
    def _evaluated(self) -> int:
        """Batches per iteration on which Eq. 2 is evaluated."""
        return self.config.importance_batches if self.evaluator else 0

    def _train(self, evaluated: int) -> list[float]:
        """Train for m batches and evaluate Eq. 2 on the last so many of them; returns the mean losses."""
        config, net = self.config, self.net
        count = max(config.batches, evaluated)
        losses = torch.zeros(net.num_subnets, device=self.trainer.device)
        group: list[Batch] = []
        net.train()
        for number in range(1, count + 1):
            batch = next(self.stream)
            self.batches += 1
            if number <= config.batches:
                group.append(batch)
                if len(group) == config.grad_accum_steps or number == config.batches:
                    losses += self.trainer.update(group) * len(group)
                    group = []
            if self.evaluator and number > count - evaluated:
                self._evaluate(self.evaluator, *batch)
            self.shown.advance()
        self.trainer.share_buffers()
        losses = reduce(losses, "mean") / max(1, config.batches)
        if not bool(losses.isfinite().all()):
            raise self.trainer.diverged(f"losses {losses.tolist()}")
        return losses.tolist()

    def _read_importance(self) -> None:
        if self.evaluator:
            inside = self.net.levels <= self.net.num_subnets  # spare units keep what they had when they left subnet N
            self.gradients = torch.where(inside, self.evaluator.gradients, self.gradients)
            self.evaluator.reset()

    def _evaluate(self, evaluator: GradientImportance, images: Tensor, target: Any) -> None:
        device, kind = self.trainer.device, getattr(torch, self.config.amp_dtype)
        images = images.to(device, next(self.net.parameters()).dtype)
        target = map_tensors(lambda t: t.to(device), target)
        with torch.autocast(device.type, kind, enabled=self.config.amp):
            evaluator.add(images, lambda scores: self.trainer.criterion(scores, target, None))

    def importance(self, i: int) -> Tensor:
        """M_j of all units with respect to subnet i (Eq. 3), float64 (num_units,)."""
        if self.config.importance == "magnitude":
            return magnitude_scores(self.net.model, self.net.analysis)
        if self.config.importance == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return torch.rand(self.net.analysis.num_units, generator=generator, dtype=torch.float64)
        alpha = self.config.alpha ** torch.arange(self.net.num_subnets, dtype=torch.float64)
        return (alpha[:, None] * self.gradients)[i - 1 :].sum(0)

    def ranking(self, i: int) -> Tensor:
        """`importance`, as moves between subnets go by; the paper's flow and random weights know no copies."""
        scores, config = self.importance(i), self.config
        if config.flow == "paper" or config.init == "random" or not self.net.lineage:
            return scores
        return discount_copies(scores, self.net.lineage[-1], config.copy_importance)

    def _locked(self, levels: Tensor) -> Tensor:
        """The most important unit that each tensor has at level 1 stays there. BoolTensor (num_units,)."""
        return locked_units(self.net.analysis, torch.where(levels == 1, self.ranking(1), -1.0))

    # --- The two flows: from subnet i to subnet i + 1

    def _by_paper(self, i: int, levels: Tensor) -> Tensor:
        """Levels after the moves out of subnet i by the paper's rules."""
        net, budgets, n = self.net, self.net.budgets, self.net.num_subnets
        macs = [0, *net.macs_model.subnet_macs(levels, n).tolist()]
        if macs[i] <= budgets[i - 1]:
            return levels
        if i >= 2 and not macs[i] - macs[i - 1] > budgets[i - 1] - budgets[i - 2]:
            return levels
        quota = (self.start_macs - budgets[0]) / self.config.iterations
        target = max(macs[i] - quota, budgets[i - 1])
        units = ((levels == i) & ~self._locked(levels)).nonzero().flatten()
        units = units[self.importance(i)[units].argsort(stable=True)]

        def moved(count: int) -> Tensor:
            return levels.index_fill(0, units[:count], i + 1)

        low, high = 0, len(units)  # every unit that leaves saves MACs: bisect for how many must
        while low < high:
            middle = (low + high) // 2
            enough = int(net.macs_model.subnet_macs(moved(middle), n)[i - 1]) <= target
            low, high = (low, middle) if enough else (middle + 1, high)
        return moved(low)

    def _by_trajectory(self, i: int, levels: Tensor) -> Tensor:
        """Levels after the moves out of subnet i that bring it to its target of this iteration."""
        net, progress = self.net, self.iteration / self.config.iterations
        scores, locked, band = self.ranking(i), self._locked(levels), None
        if self.band is not None:
            band = narrowing_band(self.band, self.classes, progress)
            levels = narrow(levels, i, band, self.classes, scores, locked, self.multiples)
        planner = Planner(net.analysis, net.macs_model, levels, net.num_subnets, scores, locked, band, self.multiples)
        target = self.start_macs * (net.budgets[i - 1] / self.start_macs) ** progress
        planner.thin(i, max(int(target), net.budgets[i - 1]))
        return planner.levels

    # --- The end

    def finish(self) -> LandingResult:
        """Bring every subnet to 0.99 P_i .. P_i where units allow, with new units in every larger layer; cool down.

        Raises:
            BudgetError: a budget cannot be met, or two subnets would give the same scores.
        """
        analysis, n, net = self.net.analysis, self.net.num_subnets, self.net
        result = in_blocks(self.multiples, net.budgets, self._landed)
        for i, names in cut_off_groups(analysis, result.levels, n).items():
            reason = "no later layer has new units to read them"
            result.notes.append(f"subnet {i} has new units in {', '.join(names)} that it does not use: {reason}")
        self._assign(result.levels)
        net.notes += result.notes
        if self.config.rebirth and self.config.flow != "paper":
            with stage("rebirth of dead units"):
                self._revive()
        self._cool_down()
        return result

    def _landed(self, blocks: Array) -> LandingResult:
        """Levels on the budgets, from those of the last iteration."""
        analysis, n, net = self.net.analysis, self.net.num_subnets, self.net
        scores, locked = self.ranking(1), self._locked(net.levels)

        def solve(targets: list[int]) -> LandingResult:
            planner = Planner(analysis, net.macs_model, net.levels, n, scores, locked, self.band, blocks)
            notes: list[str] = []
            for i, target in enumerate(track(targets, "landing on the budgets"), start=1):
                planner.narrow(i)
                planner.widen(i)
                notes += settle(planner, i, target)
            return result_of(planner, analysis, net.macs_model, notes)

        return land_apart(solve, analysis, net.macs_model, net.budgets, net.reference_macs)

    def _revive(self) -> None:
        """Give dead units new weights; levels that have nothing but dead units must not stay."""
        first = next(self.net.parameters())
        pictures: list[Tensor] = []
        while sum(map(len, pictures)) < PICTURES / self.trainer.processes.num_processes:
            pictures.append(next(self.stream)[0].to(self.trainer.device, first.dtype))
        life, notes = revive(self.net, pictures, self.seed, partial(reduce, reduction="mean"))
        self.net.notes += notes
        if plugs := find_plugs(self.net.analysis, self.net.levels, self.net.num_subnets, life.alive()):
            raise BudgetError(
                f"subnet {plugs[0].subnet} would give the scores of subnet {plugs[0].subnet - 1}: all units of its own "
                f"that the classifier reads ({', '.join(plugs[0].groups)}) are dead, on {PICTURES} training pictures. "
                "Check the pictures and the learning rate of the construction."
            )

    def _cool_down(self) -> None:
        """Train without moves at a falling learning rate: synapses of the units moved last are new."""
        rounds = self.config.cooldown_iterations
        with stage("cool-down of the construction", rounds * self.config.batches) as self.shown:
            for left in range(rounds, 0, -1):
                for group in self.trainer.optimizer.param_groups:
                    group["lr"] = self.config.lr * left / (rounds + 1)
                self._train(evaluated=0)

    def _assign(self, levels: Tensor) -> None:
        """Move units, check that all processes move the same ones, revive and prune."""
        moved = levels != self.net.levels
        self.net.set_levels(levels)
        assert_same_levels(self.net)
        self.pruning.round(moved)

    # --- State

    def _settings(self) -> dict[str, Any]:
        values = {"config": dataclasses.asdict(self.config), "seed": self.seed, "budgets": self.net.budgets}
        return json.loads(json.dumps(values))  # as a checkpoint gives it back: tuples become lists

    def state_dict(self) -> dict[str, Any]:
        """Everything but the random generators: tensors, numbers and strings in dicts and lists."""
        return {
            "settings": self._settings(),
            "iteration": self.iteration,
            "batches": self.batches,
            "start_macs": self.start_macs,
            "levels": self.net.levels,
            "gradients": self.gradients,
            "pruned": {name: list(pair) for name, pair in self.pruning.pruned.items()},
            "pruned_share": self.pruning.fraction,
            "records": list(self.records),
            "trainer": self.trainer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, with the same network, settings and batches.

        Raises:
            CheckpointError: the state is damaged, or belongs to another construction.
        """
        try:
            self._check_state(state)
            self._take_state(state)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            text = f"damaged state of a construction ({type(error).__name__}: {error})"
            raise CheckpointError(explain(text, action=ADVICE)) from None

    def _check_state(self, state: dict[str, Any]) -> None:
        if changed := differences(state["settings"], self._settings()):
            raise CheckpointError(f"the state belongs to another construction: {'; '.join(changed)}.")
        if len(state["levels"]) != len(self.net.levels):
            raise CheckpointError("the state belongs to another network: it has other units.")
        done, config = state["iteration"], self.config
        batches = max(config.batches, self._evaluated)
        if not isinstance(done, int) or not 0 <= done <= config.iterations or len(state["records"]) != done:
            raise ValueError(f"iteration {done!r} with {len(state['records'])} records")
        if state["batches"] != done * batches:
            raise ValueError(f"{state['batches']!r} batches in {done} iterations")

    def _take_state(self, state: dict[str, Any]) -> None:
        self.net.set_levels(state["levels"])
        self.trainer.load_state_dict(state["trainer"])
        self.iteration, self.batches = state["iteration"], state["batches"]
        self.start_macs, self.gradients = state["start_macs"], state["gradients"].clone()
        self.pruning.pruned = {name: (pair[0], pair[1]) for name, pair in state["pruned"].items()}
        self.pruning.fraction, self.records = state["pruned_share"], list(state["records"])
        self.stream = endless(self.loader, self.batches)
