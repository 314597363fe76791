"""The engine: step programs of one net, and everything that runs them."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import SteppingError, explain, image_shape_error
from ..graph.program import named_tensors
from ..graph.structure import class_scores, map_tensors, tensors_of
from ..nested.net import NestedNet
from ..runtimes.clock import StepClock
from .emit import emit_steps, output_names
from .exact import ExactSubnet
from .exit import ExitRule, as_decision, wide
from .export import export_engine
from .files import pack_engine, read_engine, save_engine, unpack_engine
from .fuse import fuse
from .pictures import prepared
from .plan import Plan, batch_axes
from .program_set import ProgramSet
from .rows import put_rows
from .session import Session

__all__ = ["Engine", "Prediction", "compile_engine", "exact_subnet", "load_engine"]


@dataclass
class Prediction:
    """Answer of `Engine.predict`.

    Attributes:
        logits: class scores (B, classes), or other outputs, of the largest subnet that ran for each sample; with
            `until="calibrated"` the answer that the net's temperatures make of them, whose softmax is calibrated.
        subnet: LongTensor (B,), that subnet.
        macs: LongTensor (B,), MACs executed for each sample.
        seconds: wall-clock time of the call.
        in_time: whether a deadline, if there was one, was met.
        class_names: of all classes, where the net knows them.
    """

    logits: Any
    subnet: Tensor
    macs: Tensor
    seconds: float
    in_time: bool
    class_names: Sequence[str] | None = None

    @property
    def classes(self) -> Tensor:
        """LongTensor (B,), class of largest score."""
        return self._scores.argmax(-1)

    @property
    def _scores(self) -> Tensor:
        action = "Read what the model returns in `logits`."
        return class_scores(self.logits, "classes are those of class scores", "Prediction", action, rank=2)

    @property
    def labels(self) -> list[str]:
        """Names of `classes`; their numbers where the net has no names."""
        names = self.class_names
        return [str(k) if names is None else names[k] for k in self.classes.tolist()]

    @property
    def confidence(self) -> Tensor:
        """Floats (B,), the largest softmax probability."""
        return wide(self._scores).softmax(-1).amax(-1)


@dataclass
class Engine(ProgramSet):
    """Runs the subnets of a net one after the other, computing only what a larger subnet adds.

    An engine is never changed by running it: any number of sessions, in any threads, share it.

    Attributes:
        changed: says what was changed in the net since; None: nothing.
        clock: step times measured so far.
    """

    changed: Callable[[], str | None] = lambda: None
    clock: StepClock = field(init=False)
    _runners: list[Callable[..., tuple[Tensor, ...]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        increments = [b - a for a, b in zip([0, *self.macs], self.macs)]
        self.clock = StepClock(increments)
        self._runners = [fuse(program, self.dtype, self.device) for program in self.programs]

    def compile(self, **options: Any) -> Engine:
        """Run the step programs through `torch.compile` from now on.

        Every step is compiled when it first runs, which takes seconds to minutes, once more when a second batch
        size arrives, and then holds for all batch sizes.

        Args:
            options: keyword arguments of `torch.compile`.
        """
        self._runners = [torch.compile(program.module, **options) for program in self.programs]
        return self

    # ------------------------------------------------------------------------------------------ running

    def start(self, x: Tensor, *, borrow: bool = False) -> Session:
        """Run subnet 1 on images (B, C, H, W); larger subnets follow with `session.step()`.

        Args:
            x: images. The session keeps a copy, so that the tensor may be filled with the next ones at once.
            borrow: keep the tensor itself; it must stay as it is until the last step, or images mix.

        Raises:
            SteppingError: images of another shape, type or device, or the net was changed after `deploy()`.
        """
        self._check(x)
        return Session(self, x, borrow)

    def steps(self, x: Tensor) -> Iterator[Any]:
        """Class scores (B, classes), or other outputs, of subnets 1..N, each computed when it is asked for."""
        session = self.start(x)
        yield session.outputs
        while session.subnet < self.num_subnets:
            yield session.step()

    def run_step(self, level: int, caches: dict[str, Tensor], samples: int) -> list[Tensor]:
        """Run step program `level` on a session's caches, bring them up to date and return the outputs."""
        program, kind = self.programs[level - 1], self.device.type
        own_type = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        began = time.perf_counter()
        with torch.inference_mode(), own_type:
            results = self._runners[level - 1](*[caches[name] for name in program.inputs])
        caches.update(zip(program.outputs, results, strict=True))
        for name in program.released:
            del caches[name]
        # ordinary tensors: what is made in inference mode cannot be changed outside
        outputs = [caches[name].clone() for name in output_names(self.structure.count)]
        self._wait()
        self.clock.record(level, samples, time.perf_counter() - began)
        return outputs

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def predict(
        self, x: Tensor, until: ExitRule | Mapping[str, float] | str | None = None, deadline: float | None = None
    ) -> Prediction:
        """Step up until a rule on the outputs says stop, for each sample on its own, or until time runs out.

        Args:
            x: images (B, C, H, W).
            until: see `exit.as_decision`: a rule, `{"max_prob": 0.9}`, or "calibrated" for the temperatures and
                thresholds that the net holds (`metadata.exit`); without it all samples step to the last subnet.
            deadline: seconds from now. Subnet 1 always runs; a further step only if the step times measured
                so far say that it ends in time, or, rarely, to measure it again (`runtimes.clock.StepClock` says how
                rarely, and what that guarantees).
        """
        began = time.perf_counter()
        decision, limit = as_decision(until, self.metadata.exit), _checked_deadline(deadline)
        session = self.start(x, borrow=True)
        result = map_tensors(Tensor.clone, decision.answer(session.history))
        subnet, active = torch.ones(len(x), dtype=torch.long), torch.arange(len(x))
        while session.subnet < self.num_subnets:
            if decision.may_stop:
                going = ~decision.stop(session.history, len(active))
                if not bool(going.any()):
                    break
                session.keep(going)
                active = active[going.cpu()]
            left = limit - (time.perf_counter() - began)
            if not self.clock.allows(session.subnet + 1, len(active), left, session.subnet):
                break
            session.step()
            self._put(result, len(x), active, decision.answer(session.history))
            subnet[active] = session.subnet
        seconds = time.perf_counter() - began
        macs = torch.tensor([0, *self.macs])[subnet]
        return Prediction(result, subnet, macs, seconds, seconds <= limit, self.metadata.classes)

    def _put(self, result: Any, size: int, active: Tensor, newer: Any) -> None:
        """Overwrite the outputs of some samples."""
        axes = (self.cache_axes[name] for name in output_names(self.structure.count))
        for tensor, axis, rows in zip(tensors_of(result), axes, tensors_of(newer)):
            put_rows(tensor, axis, size, active.to(tensor.device), rows)

    def preprocess(self, pictures: Any) -> Tensor:
        """Pictures as the net was evaluated with: same mode, resize, crop and normalisation.

        Args:
            pictures: a PIL image, the path of a picture, or a sequence of them.

        Returns:
            Tensor (B, C, H, W) of the engine's type, on its device.

        Raises:
            SteppingError: the net does not say how (`metadata.preprocessing`), or a file is no picture.
        """
        several = isinstance(pictures, Sequence) and not isinstance(pictures, str)
        images = [prepared(p, self.metadata.preprocessing) for p in (pictures if several else [pictures])]
        if not images:
            raise SteppingError(explain("no picture", where="preprocess", expected="one, or several"))
        return torch.stack(images).to(self.device, self.dtype)

    def calibrate(self, batch_size: int = 1, repeats: int = 5) -> list[float]:
        """Measure every step at a batch size; returns the median seconds per step.

        Earlier times at this batch size are forgotten. Worth calling after warming up, and whenever the machine has
        become faster, so that deadlines need not wait for `predict` to find out.

        Raises:
            SteppingError: the numbers are not integers above 0.
        """
        for name, value in (("batch_size", batch_size), ("repeats", repeats)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SteppingError(explain("not a number", where=name, got=value, expected="an integer above 0"))
        self.clock.forget(batch_size)
        x = torch.zeros(batch_size, *self.image_size, dtype=self.dtype, device=self.device)
        times: list[list[float]] = [[] for _ in self.programs]
        for _ in range(repeats):
            session, began = None, time.perf_counter()
            for level in range(self.num_subnets):
                session = self.start(x, borrow=True) if session is None else session
                if level:
                    session.step()
                times[level].append(time.perf_counter() - began)
                began = time.perf_counter()
        return [sorted(t)[len(t) // 2] for t in times]

    # ------------------------------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the engine to one file (tensors and JSON, no pickle); read it with `engine.load_engine`."""
        save_engine(self, path)

    def __reduce__(self) -> tuple[Any, ...]:
        """pickle, `torch.save`, deepcopy and new processes take the engine through its file: a snapshot, uncompiled."""
        return _unpack, pack_engine(self)

    def export(
        self, folder: str | os.PathLike[str], format: str = "torch", batch_size: int | None = None, **options: Any
    ) -> dict[str, Any]:
        """Write the steps for another runtime, and a manifest, see `export.export_engine`."""
        return export_engine(self, folder, format, batch_size, **options)

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            expected = f"a tensor of shape (B, {', '.join(map(str, self.image_size))})"
            raise SteppingError(explain("images expected", got=type(x).__name__, expected=expected))
        if x.layout != torch.strided or x.is_quantized:
            raise SteppingError(explain("images expected", got=f"layout {x.layout}", expected="a dense tensor"))
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_size or not len(x):
            raise image_shape_error(x.shape, self.image_size)
        if x.dtype != self.dtype or x.device.type != self.device.type:
            raise SteppingError(
                explain(
                    "wrong type of images",
                    got=f"{x.dtype} on {x.device}",
                    expected=f"{self.dtype} on {self.device}",
                    action="Convert the images, or the net before deploy().",
                )
            )
        if reason := self.changed():
            raise SteppingError(
                explain(f"the net was changed after deploy(): {reason}", action="Call net.deploy() again.")
            )


def _checked_deadline(deadline: float | None) -> float:
    if deadline is None:
        return math.inf
    if isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or math.isnan(deadline):
        raise SteppingError(explain("not a time", where="deadline", got=deadline, expected="seconds from now, or None"))
    return float(deadline)


# ------------------------------------------------------------------------------------------------- compiling


def compile_engine(net: NestedNet, *, compile: bool | Mapping[str, Any] = False) -> Engine:
    """Compile the step programs of a net.

    Args:
        net: its parameters are copied, sliced by level.
        compile: run the step programs through `torch.compile`; a mapping holds its options.
    """
    engine = Engine(**vars(_step_programs(net, net.levels, net.num_subnets)), changed=_watch(net))
    return engine.compile(**_compile_options(compile)) if compile else engine


def exact_subnet(net: NestedNet, subnet: int) -> ExactSubnet:
    """Subnet `subnet` (1..N) as a module of its own in block form, see `ExactSubnet`. The parameters are copied."""
    levels = net.levels
    levels = torch.where(levels > subnet, subnet + 1, levels)  # spare: nothing of a later step is prepared
    return ExactSubnet(_step_programs(net, levels, subnet))


def _step_programs(net: NestedNet, levels: Tensor, n: int) -> ProgramSet:
    net.check_structure()
    with torch.no_grad():
        plan = Plan(net.analysis.eval_program, levels, n, _lookup(net))
        programs, sources = emit_steps(plan)
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    macs = [sum(p.macs for p in programs[: k + 1]) for k in range(len(programs))]
    found = batch_axes(plan.program)
    axes = {name: found.get(node) for name, node in sources.items()}
    size, structure = tuple(net.analysis.image_size), plan.program.structure
    return ProgramSet(programs, macs, size, dtype, plan.device, axes, net.metadata, structure)


def load_engine(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    compile: bool | Mapping[str, Any] = False,
) -> Engine:
    """Read an engine that `Engine.save` wrote. Needs neither the net nor the library its model came from.

    Args:
        path: the file.
        device: where to put the engine; the CPU if left out.
        compile: run the step programs through `torch.compile`; a mapping holds its options.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, of another version, or calls unknown operators.
    """
    engine = Engine(**vars(read_engine(path, device)))
    return engine.compile(**_compile_options(compile)) if compile else engine


def _unpack(content: bytes, device: str) -> Engine:
    return Engine(**vars(unpack_engine(content, device)))


def _compile_options(compile: Any) -> dict[str, Any]:
    """Keyword arguments of `torch.compile`, from the `compile` argument of `compile_engine` and `load_engine`."""
    if not isinstance(compile, (bool, Mapping)):
        expected = "True, False or keyword arguments of torch.compile"
        raise SteppingError(explain("bad option", where="compile", got=compile, expected=expected))
    return dict(compile) if isinstance(compile, Mapping) else {}


def _lookup(net: NestedNet) -> Callable[[str], Tensor]:
    named = named_tensors(net.model)
    constants = net.analysis.eval_program.constants
    device = next((t.device for t in named.values()), torch.device("cpu"))

    def lookup(name: str) -> Tensor:
        if name in named and name not in constants:
            return named[name]
        held = net._constants.get((False, name))
        return (getattr(net, held) if held else constants[name]).to(device)

    return lookup


def _watch(net: NestedNet) -> Callable[[], str | None]:
    """Says whether levels or weights differ from what they were, without keeping the net alive.

    Asked at the start of every session, so it must be quick: tensors are looked up once.
    """
    reference, levels = weakref.ref(net), net.unit_levels.clone()
    tensors = [*net.model.parameters(), *net.model.buffers()]
    seen = [(weakref.ref(t), t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]

    def changed() -> str | None:
        current = reference()
        if current is None:
            return None
        if current.unit_levels.device != levels.device or not torch.equal(current.unit_levels, levels):
            return "its levels differ"
        if found := current.structural_change():
            return f"net.model.{found.path} {found.what}".replace(". ", " ")
        for held, place, version in seen:
            tensor = held()
            if tensor is None or tensor.data_ptr() != place or (version is not None and tensor._version != version):
                return "its weights differ"
        return None

    return changed
