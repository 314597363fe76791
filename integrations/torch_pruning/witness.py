"""Which channels move together, told by torch-pruning's dependency graph.

The toolkit knows couplings as dependencies between graph nodes: pruning index i of one layer forces pruning
of index ``mapping(i)`` of another. It offers them as groups, which are no reliable data: a group that covers
a whole layer keeps only the first of several root indices of a channel, and building one does not end on
some models. So the dependencies are followed here, from every layer through the operators between layers
(add, cat, view, ...) to the next layers, for all channels at once.

What contradicts itself is set aside: two layers of which one is sent to indices that the other does not
have, and channel pairs that hold in one direction only. The toolkit guesses shapes where it cannot see them,
and so its mistakes show (broadcast gates, attention biases, token mixing, cascaded split and cat). All other
couplings are reported as the toolkit has them, right or wrong. It knows none between the inputs and outputs
of a grouped convolution, and none between the channels of an attention head: those are rules of its pruner,
not of its graph.
DepGraph: Fang et al., https://arxiv.org/abs/2301.12900
"""

from __future__ import annotations

import copy
import ctypes
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch_pruning as tp
from torch import Tensor, nn

from stepping_plugin.graph.program import cached_results
from stepping_plugin.integrations.torch_pruning.walk import Walk

__all__ = ["ToolkitCouplings", "toolkit_couplings"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class ToolkitCouplings:
    """Channels of convolutions and linear layers, and the classes in which the toolkit moves them.

    Attributes:
        modules: names of the convolutions and linear layers in the graph, as in ``model.named_modules()``.
        entries: (K, 3) int64, one row per channel: index into ``modules``, side (0 output, 1 input), channel.
        classes: (K,) int64 class of every entry, 0, 1, ...; channels of one class are coupled.
        set_aside: couplings left out of ``classes`` and why, one sentence per layer.
        finished: False when the time ran out; ``classes`` then holds what was confirmed until then.
        seconds: time spent.
        error: why there is no (complete) account, None if there is.
    """

    modules: list[str]
    entries: Tensor
    classes: Tensor
    set_aside: list[str]
    finished: bool
    seconds: float
    error: str | None


def toolkit_couplings(
    model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], time_limit: float = 20.0
) -> ToolkitCouplings:
    """Asks torch-pruning which channels of ``model`` are coupled; never raises on what the toolkit does.

    The dependency graph is built on a copy (parameters shared, all requiring gradients, eval mode), in a
    thread of its own: the caller's grad mode, the model's training flags and frozen parameters do not
    matter, and code of the toolkit that does not end is stopped after ``time_limit`` seconds.

    Args:
        model: on any device, called as ``model(*example_inputs)``.
        example_inputs: what the model takes; a single tensor stands for one argument.
        time_limit: seconds for everything.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    start = time.monotonic()

    def work() -> Walk:
        walk = Walk(deadline=start + 0.95 * time_limit)  # ends by itself, with what it has
        twin = _traceable_copy(model)
        graph = tp.DependencyGraph()
        # forward_fn: left alone, the toolkit retries after any error, with the tuple as the one argument.
        graph.build_dependency(twin, example_inputs=inputs, forward_fn=lambda m, x: m(*x), verbose=False)
        walk.prepare(graph)
        walk.run()
        return walk

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        walk, error = _run_limited(work, time_limit)
    walk = walk or Walk(deadline=start)  # nothing came back: no layers, no couplings
    modules, table, classes = walk.couplings()
    if error is None and not walk.finished:
        error = f"not finished within {time_limit:g} s"
    return ToolkitCouplings(
        modules=modules,
        entries=torch.from_numpy(table),
        classes=torch.from_numpy(classes),
        set_aside=walk.reasons,
        finished=error is None,
        seconds=time.monotonic() - start,
        error=error,
    )


# --------------------------------------------------------------------------------------------------------
# The copy and the clock
# --------------------------------------------------------------------------------------------------------


def _traceable_copy(model: nn.Module) -> nn.Module:
    """A copy on which autograd sees every parameter; parameters share their storage with the model's."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        data = parameter.detach()
        data = data.clone() if data.is_inference() else data
        memo[id(parameter)] = nn.Parameter(data, requires_grad=data.is_floating_point() or data.is_complex())
    memo = {**cached_results(model), **memo}
    # train() first: modules that cache for inference (LeViT's biases) drop it then; a cache hides its
    # parameters.
    return copy.deepcopy(model, memo).train().eval()


class _TimeUp(SystemExit):
    """Raised inside the working thread: no Exception, so that few handlers stop it, and silent at its end."""


def _run_limited(work: Callable[[], Result], limit: float, grace: float = 2.0) -> tuple[Result | None, str | None]:
    """Result of ``work`` and what went wrong, after at most ``limit`` seconds (plus ``grace`` to stop)."""
    outcome: list[tuple[Result | None, str | None]] = []

    def target() -> None:
        try:
            try:
                with torch.enable_grad():
                    outcome.append((work(), None))
            except Exception as err:
                outcome.append((None, f"torch-pruning failed with {type(err).__name__}: {err}"))
        except _TimeUp:
            pass

    thread = threading.Thread(target=target, name="torch-pruning", daemon=True)
    thread.start()
    thread.join(limit)
    late = time.monotonic() + grace
    while thread.is_alive() and time.monotonic() < late:
        ident = ctypes.c_ulong(thread.ident or 0)  # again and again: bare except clauses swallow it
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_TimeUp))
        thread.join(0.1)
    return outcome[0] if outcome else (None, f"stopped after {limit:g} s")
