"""What a coverage run checks on one model. Every check is a property of the conversion, in float64."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...construction.importance import magnitude_scores
from ...construction.policies import assign
from ...errors import SteppingError
from ...integrations.fvcore import count_macs
from ...integrations.torch_pruning.witness import toolkit_couplings
from ...net import SteppingNet
from ...units.analysis import Analysis
from ...units.levels import floor_macs
from ...units.macs import MacModel, static_macs
from ...units.witness import compare_witnesses, find_units
from ...verify import verify
from .executed import executed_macs, reached_macs
from .specs import CLASSES, Spec
from .variants import fitted

__all__ = ["STAGES", "build", "check", "perturb", "random_levels"]

SUBNETS = 3
TOLERANCE = 1e-9  # relative to the largest class score, in float64
SHARES = (0.25, 0.5, 0.75)  # budgets, as positions between the floor of subnet 1 and the whole network
TOOLKIT_SECONDS = 10.0


class Failed(Exception):
    """A check whose outcome is not what was promised."""


def build(spec: Spec) -> nn.Module:
    """The model with every parameter perturbed, float64, eval mode."""
    torch.manual_seed(0)
    if spec.model.startswith("torchvision:"):
        from torchvision import models

        model = models.get_model(spec.model.removeprefix("torchvision:"), num_classes=CLASSES, **spec.kwargs)
    else:
        import timm

        from ...integrations.timm import models as _  # noqa: F401 - registers the paper's networks

        model = timm.create_model(spec.model, num_classes=CLASSES, **spec.kwargs)
    # Dropout of elements draws its numbers in the order in which a tensor lies in memory.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return InFloat64(perturb(model)).double().eval()


def perturb(model: nn.Module) -> nn.Module:
    """Break the symmetries of a fresh model: with zero scales and heads most checks would say nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1 or float(parameter.abs().max()) == 0 or float(parameter.std()) == 0:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model


def random_levels(analysis: Analysis, subnets: int, generator: torch.Generator, empty: float = 0.0) -> Tensor:
    """Random levels 1..subnets; every anchor keeps a unit at level 1.

    Args:
        empty: share of the groups in which one of the levels from 2 up has no unit.
    """
    levels = torch.randint(1, subnets + 1, (analysis.num_units,), generator=generator)
    for group in analysis.groups:
        if empty and subnets > 1 and float(torch.rand(1, generator=generator)) < empty:
            missing = int(torch.randint(2, subnets + 1, (1,), generator=generator))
            own = levels[group.units]
            levels[group.units] = torch.where(own == missing, missing - 1, own)
    for anchor in analysis.anchors:
        if int(levels[anchor].min()) > 1:
            levels[anchor[0]] = 1
    return levels


class _Casts(TorchFunctionMode):
    """Turns casts to float32 into casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            return args[0].double()
        if func in (Tensor.to, Tensor.type):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


class InFloat64(nn.Module):
    """A model whose own casts to float32 (norms, softmax) keep float64: they would hide errors below 1e-7."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with _Casts():
            return self.model(x)


class Subject:
    """A model on its way through the checks; what one check makes, the later ones use."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec = fitted(spec)
        assert spec.image is not None
        self.model = build(spec)
        self.size = (3, spec.image, spec.image)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(2, *self.size, generator=generator, dtype=torch.float64)
        self.analysis: Analysis
        self.net: SteppingNet

    def level_vectors(self) -> list[Tensor]:
        """Random levels: units of all levels in every group, and groups without units of some level."""
        generator = torch.Generator().manual_seed(1)
        return [random_levels(self.analysis, SUBNETS, generator, empty) for empty in (0.0, 0.4)]


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


def _bounded(what: str, error: float) -> float:
    if not error <= TOLERANCE:  # NaN is an error too
        raise Failed(f"{what} {error:.1e}")
    return error


def convert(subject: Subject) -> dict[str, Any]:
    """Units, pins, groups, and the nested net with all units at level 1."""
    subject.analysis = analysis = find_units(subject.model, subject.size)
    ones = torch.ones(analysis.num_units, dtype=torch.long)
    start = time.perf_counter()
    owner = copy.deepcopy(subject.model)
    subject.net = SteppingNet(owner, analysis, ones, list(range(1, SUBNETS + 1)), 1).eval()
    built = time.perf_counter() - start
    return {
        "units": analysis.num_units,
        "groups": len(analysis.groups),
        "channels": analysis.channels,
        "pinned_channels": analysis.pinned_channels,
        "pinned_share": analysis.pinned_channels / max(1, analysis.channels),
        "pins": [
            {"reason": r, "module": m.removeprefix("model."), "operator": o, "channels": k}
            for (r, m, o), k in analysis.pins.most_common()
        ],
        "operators_without_rule": dict(analysis.unknown),
        "build_seconds": {**{k: round(v, 2) for k, v in analysis.seconds.items()}, "net": round(built, 2)},
    }


def identity(subject: Subject) -> dict[str, Any]:
    """With all units at level 1 the net is the original."""
    with torch.no_grad():
        expected, scores = subject.model(subject.images), subject.net.forward_all(subject.images)
    return {"identity": _bounded("class scores differ by", max(_relative(s, expected) for s in scores))}


def train_mode(subject: Subject) -> dict[str, Any]:
    """In train mode too: same scores and gradients, same running statistics after one batch, same random numbers drawn.

    Other buffers may differ: some models fill tables on their first call, which are constants of the captured graph.
    """
    original, net = copy.deepcopy(subject.model).train(), copy.deepcopy(subject.net).train()
    images = torch.cat([subject.images, subject.images.flip(0) * 0.5 + 0.1])
    torch.manual_seed(1)
    expected = original(images)
    torch.manual_seed(1)
    scores = net.forward_all(images)[-1]
    buffers = dict(net.model.named_buffers())
    running = [(n, b) for n, b in original.named_buffers() if "running" in n]
    statistics = max((_relative(buffers[n], b) for n, b in running), default=0.0)
    counters = [n for n, b in original.named_buffers() if "num_batches" in n and not torch.equal(buffers[n], b)]
    if counters:
        raise Failed(f"batch counters differ: {counters[0]}")
    return {
        "train_identity": _bounded("class scores differ by", _relative(scores, expected)),
        "train_statistics": _bounded("running statistics differ by", statistics),
        "train_gradient": _bounded("gradients differ by", _gradients_apart(net.model, scores, original, expected)),
    }


def _gradients_apart(model: nn.Module, scores: Tensor, original: nn.Module, expected: Tensor) -> float:
    """Largest difference of the parameters' gradients of a random sum of the scores, relative to the largest one."""
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=expected.dtype)
    both = []
    for module, result in ((model, scores), (original, expected)):
        parameters = list(module.parameters())
        gradients = torch.autograd.grad((result * weights).sum(), parameters, allow_unused=True)
        both.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)])
    largest = max(float(g.abs().max()) for g in both[1])
    return max(float((a - b).abs().max()) for a, b in zip(*both)) / max(largest, 1e-300)


def nested(subject: Subject) -> dict[str, Any]:
    """At random levels no subnet depends on units that it does not contain, and each can be cut out."""
    reports = []
    for levels in subject.level_vectors():
        subject.net.set_levels(levels)
        reports.append(verify(subject.net, subject.images, engine=False))
    if not min(reports[0].response) > 1e-9:
        raise Failed("noise in the units above a subnet changes nothing, so nesting is not shown")
    return {
        "leak": max(max(r.leak) for r in reports),
        "response": min(reports[0].response),
        "extract": max(max(r.extract_error) for r in reports),
        "step_gain": min(reports[0].step_gain),
    }


def engine(subject: Subject) -> dict[str, Any]:
    """Stepping gives the same class scores as the nested net, for as many MACs as engine and net report."""
    errors, idle = [], [0] * SUBNETS
    for levels in subject.level_vectors()[::-1]:
        subject.net.set_levels(levels)
        deployed, reported = subject.net.deploy(), subject.net.macs
        with torch.no_grad():
            expected = subject.net.forward_all(subject.images)
        errors += [_relative(s, e) for s, e in zip(deployed.steps(subject.images), expected, strict=True)]
        counted = executed_macs(deployed, subject.images[:1])
        if not counted == deployed.macs == reported:
            raise Failed(f"MACs executed {counted}, reported by the engine {deployed.macs}, by the net {reported}")
        every = subject.net.macs_model.subnet_macs(levels, SUBNETS).tolist()
        if every != reported:
            needed = reached_macs(subject.net, subject.images)
            if not all(a <= b <= c for a, b, c in zip(needed, reported, every)):
                raise Failed(f"MACs executed {counted}, of all units {every}, that scores depend on {needed}")
            idle = [max(k, b - a) for k, a, b in zip(idle, reported, every)]
    return {
        "engine": _bounded("stepped class scores differ by", max(errors)),
        "engine_macs": deployed.macs,
        "subnet_macs": reported,
        "idle_macs": idle,  # of units that no class score depends on
    }


def macs(subject: Subject) -> dict[str, Any]:
    """The channel graph's MACs are those that fvcore counts on the model itself."""
    model, static = MacModel(subject.analysis), static_macs(subject.analysis.eval_program)
    counted = count_macs(subject.model, (subject.images[:1],)).total
    if counted != model.total + static:
        raise Failed(f"{model.total + static:,} MACs in the graph, fvcore counts {counted:,}")
    return {
        "macs": model.total,
        "macs_without_images": static,
        "macs_fvcore": counted,
        "floor_share": floor_macs(subject.analysis, model) / model.total,
    }


def budgets(subject: Subject) -> dict[str, Any]:
    """One-shot levels for three budgets: how much of each is used."""
    model = MacModel(subject.analysis)
    floor = floor_macs(subject.analysis, model)
    wanted = [int(floor + share * (model.total - floor)) for share in SHARES]
    scores = magnitude_scores(subject.net.model, subject.analysis)
    landed = assign(subject.analysis, model, wanted, scores)
    used = [m / b for m, b in zip(landed.macs, wanted)]
    if max(used) > 1:
        raise Failed(f"over budget: {landed.macs} of {wanted}")
    return {"budgets": wanted, "budget_macs": [int(m) for m in landed.macs], "budget_used": [round(u, 4) for u in used]}


def toolkit(subject: Subject) -> dict[str, Any]:
    """How far torch-pruning's groups agree. For information: the toolkit's failures are not the conversion's."""
    found = toolkit_couplings(copy.deepcopy(subject.model), subject.images[:1], TOOLKIT_SECONDS)
    comparison = compare_witnesses(subject.analysis, found)
    return {
        "toolkit": {
            "finished": found.finished,
            "error": found.error,
            "agreed_units": comparison.agreed,
            "only_channel_graph_units": comparison.only_channel_graph,
            "only_torch_pruning_sets": len(comparison.only_toolkit),
            "unseen_units": comparison.unseen,
        }
    }


STAGES: tuple[Callable[[Subject], dict[str, Any]], ...] = (
    convert,
    identity,
    train_mode,
    nested,
    engine,
    macs,
    budgets,
    toolkit,
)


def check(spec: Spec) -> Iterator[dict[str, Any]]:
    """Results so far, after every stage; the last one is the row of the model.

    A stage that fails does not keep the later ones from running, except for `convert`.
    """
    row: dict[str, Any] = {
        "model": spec.model,
        "module": spec.module,
        "image": spec.image,
        "reduced": spec.reduced,
        "status": "ok",
        "failures": {},
        "seconds": {},
        "stage": "build",
    }
    subject = Subject(spec)
    row["image"] = subject.spec.image
    row["parameters"] = sum(p.numel() for p in subject.model.parameters())
    for stage in STAGES:
        row["stage"] = stage.__name__
        yield row
        start = time.perf_counter()
        try:
            row.update(stage(subject))
        except (Failed, SteppingError) as error:
            row["failures"][stage.__name__] = str(error)
        except Exception as error:  # a defect; it is the point of the run to find those
            row["failures"][stage.__name__] = f"{type(error).__name__}: {error}"
        row["seconds"][stage.__name__] = round(time.perf_counter() - start, 2)
        if row["failures"] and not hasattr(subject, "net"):
            break
    del row["stage"]
    row["status"] = "; ".join(f"{k}: {v.splitlines()[0]}" for k, v in row["failures"].items())[:300] or "ok"
    yield row
