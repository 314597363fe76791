"""Nets as files: one safetensors file with tensors and a JSON header. Nothing in it is executed.

The header names how the model is made (`origin`) and what it computes: the operators of both captured graphs
(`graph.describe`), a fingerprint of the units, and the scores of a small experiment (`probe`). Loading builds the model
again (timm models by their registered name, anything else from the instance that the caller gives), captures it and
compares all three: a net comes back as the same function or not at all. For timm models the eval graph with its units
is in the file as well (`units.stored`): then nothing is captured until the train graph is asked for.

What must be equal: image size, operators with their arguments, constants, layers, tensors and their types, units,
levels, MACs. What need not: the names of nodes, the order of independent operators, devices, the last bits of real
constants, the version of timm. Another torch version may write the same function in other operators; then the
experiment decides, and the net says so in its notes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import timm
import torch
from torch import Tensor, nn

from .errors import CaptureError, CheckpointError, SteppingError, explain
from .files.graphs import DAMAGE
from .files.headers import NetHeader, Probe, mode_name, validated
from .files.origin import candidates, same_names
from .files.probe import compare_outputs, probe_images, probe_names, quiet, stored_probe
from .files.zoo import find_net
from .graph.describe import describe, draws, first_difference
from .graph.device import usable_device
from .graph.modes import ordinary_mode
from .graph.program import copy_model, named_tensors, unwrap
from .graph.structure import tensors_of
from .nested.module import copy_with, sliced_copy
from .nested.net import NestedNet, check_levels
from .tensorfile import NET, checked_path, not_finite, pack_header, read_file, write_tensors
from .units.analysis import Analysis, fingerprint, restrict
from .units.macs import MacModel
from .units.stored import code_of, pack_analysis, unpack_analysis
from .units.witness import find_units

__all__ = ["read_net", "write_net"]

VERSION = 3  # 1: no checksums, no programs, no probe; 2: no analysis
NetT = TypeVar("NetT", bound=NestedNet)
_PROBE = Probe(seed=1, batch=1)
_WITHOUT = "The file is of format 1, which does not say what the net computes; save the net again to have that checked."


# ------------------------------------------------------------------------------------------------- writing


def write_net(net: NestedNet, path: str | os.PathLike[str]) -> None:
    """Write a net atomically: the file at `path` is the old one or the complete new one.

    Raises:
        SteppingError: its weights are not finite, or it is beyond what files may hold.
        OSError: the file cannot be written.
    """
    path = checked_path(path)
    net.check_structure()
    own = dict(_unique(net.model))
    broken = not_finite(own) or next((n for n, p in own.items() if _is_broken(p)), None)
    if broken:
        what = "the net is not saved: its weights are not finite numbers"
        action = "Training has diverged; go back to an earlier net or checkpoint."
        raise SteppingError(explain(what, where=broken, action=action))
    tensors = {f"model.{name}": tensor for name, tensor in own.items()}
    tensors["levels"] = net.levels
    for k, copies in enumerate(net.lineage):
        tensors[f"lineage.{k}"] = copies
    scores = _probe_scores(net, _PROBE)
    tensors.update(zip(probe_names(len(scores or ())), scores or ()))
    programs = {mode_name(t): dict(zip(("lines", "sketches"), describe(p))) for t, p in net.analysis.programs.items()}
    if isinstance(net.completion, _Completion):  # what is not captured is what the file said
        known = net.completion.file.header.model_dump()["programs"]
        programs = {**known, **programs}
    stored = pack_analysis(net.analysis, net.model) if "timm" in net.origin else None
    tensors.update(stored[1] if stored else {})
    header = {
        "format": NET,
        "version": VERSION,
        "origin": net.origin,
        "image_size": list(net.analysis.image_size),
        "modes": [name == mode_name(True) for name in programs],
        "budgets": net.budgets,
        "macs": net.macs,
        "reference_macs": net.reference_macs,
        "fingerprint": fingerprint(net.analysis),
        "lineage": len(net.lineage),
        "notes": net.notes,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "dtype": _plain(_captured_type(net.analysis)),
        "programs": programs,
        "probe": _PROBE.model_dump() if scores is not None else None,
        "contribution": net.contribution and net.contribution.model_dump(),
        "analysis": stored and stored[0].model_dump(),
        "metadata": net.metadata.model_dump(),
    }
    try:
        validated(NetHeader, header, path)
    except CheckpointError as error:
        raise SteppingError(f"the net cannot be saved: {error}") from None
    write_tensors(path, tensors, pack_header(header))


def _is_broken(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not bool(tensor.isfinite().all())


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _captured_type(analysis: Analysis) -> torch.dtype:
    return next(iter(analysis.programs.values())).image.meta["dtype"]


def _probe_scores(net: NestedNet, probe: Probe) -> list[Tensor] | None:
    """Outputs of all subnets, (N, ...) each, in eval mode; None where they would say nothing: random, or no numbers."""
    program = net.analysis.programs.get(False)
    weight = next((p for p in net.model.parameters() if p.is_floating_point()), None)
    if program is None or weight is None or draws(program.graph):
        return None
    images = probe_images(probe, net.analysis.image_size, weight.dtype).to(weight.device)
    precise = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    with precise, torch.autocast(weight.device.type, enabled=False):
        return quiet(lambda: tensors_of(net.run(images, training=False)))


def _unique(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, shared ones once under their first name."""
    seen: set[int] = set()
    for name, tensor in named_tensors(model).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


# ------------------------------------------------------------------------------------------------- reading


@ordinary_mode  # the net's tensors must be ordinary ones, wherever it is loaded
def read_net(
    path: str | os.PathLike[str],
    kind: type[NetT],
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
) -> NetT:
    """Read a net that `write_net` wrote, as one of class `kind`. Other arguments and errors: `stepping_plugin.load`."""
    device = None if device is None else usable_device(device)
    path = find_net(checked_path(path))
    content, tensors = read_file(path, NET, VERSION, oldest=1)
    header: NetHeader = validated(NetHeader, content, path)
    _check_tensors(header, tensors, path)
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    _legacy_names(header, weights)
    file, errors = _File(path, header, tensors, weights), []
    for candidate, make in candidates(header, weights, path) if model is None else [(copy_model(unwrap(model)), None)]:
        try:
            net = None if make is None else _without_capture(kind, candidate, make, file)
            net = net or _rebuild(kind, candidate, file)
            return net.to(device) if device is not None else net
        except CaptureError:  # a model that cannot even run on the net's images
            errors.append(str(_other_model(candidate, path)))
        except CheckpointError as error:
            errors.append(str(error))
    raise CheckpointError(errors[0])


@dataclass
class _File:
    """What a file holds."""

    path: object
    header: NetHeader
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self.types = {t.dtype for t in self.weights.values() if t.is_floating_point()}
        self.lineage = [self.tensors[f"lineage.{k}"] for k in range(self.header.lineage)]


def _check_tensors(header: NetHeader, tensors: Mapping[str, Tensor], path: object) -> None:
    """What can be said about the tensors before there is a model."""
    probes = stored_probe(tensors) if header.probe else []
    listed = ["levels", *(f"lineage.{k}" for k in range(header.lineage)), *probes]
    own = ("model.", "analysis.") if header.analysis else "model."
    others = [n for n in tensors if not n.startswith(own) and n not in listed]
    wrong = next((f"{n} is missing" for n in listed if n not in tensors), None) or next(iter(others), None)
    if wrong:
        raise CheckpointError(f"{path}: damaged: its tensors are not those of a net ({wrong}).")
    chain = [*(tensors[f"lineage.{k}"] for k in range(header.lineage)), tensors["levels"]]
    for copies, following in zip(chain, [*chain[1:], None]):
        if copies.dtype != torch.int64 or copies.dim() != 1 or (len(copies) and int(copies.min()) < 0):
            raise CheckpointError(f"{path}: damaged: levels or lineage are no lists of whole numbers.")
        if following is not None and (bool((copies > len(following)).any()) or int(copies.sum()) != len(following)):
            raise CheckpointError(f"{path}: damaged: its lineage and levels do not fit together.")
    if len(header.budgets) > len(tensors["levels"]):
        raise CheckpointError(f"{path}: damaged: {len(header.budgets)} subnets of {len(tensors['levels'])} units.")
    weights = {n: t for n, t in tensors.items() if n.startswith("model.")}
    kinds = {t.dtype for t in weights.values() if t.is_floating_point()}
    allowed = {torch.float32, torch.float64}
    if header.version > 1:
        allowed |= {torch.float16, torch.bfloat16}
    elif len(kinds) > 1:
        allowed = set()
    if not kinds <= allowed:
        raise CheckpointError(
            explain("weights of a wrong type", where=str(path), got=", ".join(sorted(map(_plain, kinds))),
                    expected="float32 or float64")
        )  # fmt: skip
    broken = not_finite(weights) or not_finite({n: tensors[n] for n in probes})
    if broken:
        raise CheckpointError(explain("weights that are not finite numbers", where=f"{path}: {broken}"))


def _legacy_names(header: NetHeader, weights: dict[str, Tensor]) -> None:
    """Format 1 kept the prefix of compiled models, which made them unreadable for the models inside."""
    prefix = "_orig_mod."
    if header.version == 1 and all(name.startswith(prefix) for name in weights):
        for name in list(weights):
            weights[name.removeprefix(prefix)] = weights.pop(name)


def _rebuild(kind: type[NetT], model: nn.Module, file: _File) -> NetT:
    problem = same_names(dict(_unique(model)), file.weights, file.header.lineage > 0)
    if problem:
        raise _other_model(model, file.path, problem)
    model, analysis, doubt = _analysed(model, file)
    return _filled(kind, model, analysis, file, doubt)


def _analysed(model: nn.Module, file: _File) -> tuple[nn.Module, Analysis, str | None]:
    """The model captured in all modes, with the units of the file; it and what is found are compared with the file."""
    header = file.header
    if len(file.types) == 1:
        model.to(getattr(torch, header.dtype) if header.dtype else next(iter(file.types)))
    analysis = find_units(model, tuple(header.image_size), tuple(header.modes))
    place = next(model.parameters()).device
    if file.lineage:  # what lies between the original and the net may be larger than both: its weights are never made
        model = copy_with(model, {name: tensor.to("meta") for name, tensor in named_tensors(model).items()})
    for copies in file.lineage:
        if copies.shape != (analysis.num_units,):
            raise _other_model(model, file.path)
        analysis, slices = restrict(analysis, copies)
        model = sliced_copy(model, slices)
    if file.lineage:
        model = copy_with(model, {n: torch.empty_like(t, device=place) for n, t in named_tensors(model).items()})
    doubt = _compare_programs(analysis, header, file.path)
    if fingerprint(analysis) != header.fingerprint:
        raise _other_model(model, file.path, "its units differ")
    return model, analysis, doubt


@dataclass
class _Completion:
    """Captures what `_without_capture` left out."""

    make: Callable[[], nn.Module]
    file: _File

    def __call__(self) -> Analysis:
        return _analysed(self.make(), self.file)[1]


def _without_capture(kind: type[NetT], model: nn.Module, make: Callable[[], nn.Module], file: _File) -> NetT | None:
    """The net with the analysis that the file holds, for inference; None where that does not do.

    The stored program is what the net computes, and the stored scores prove it. The model's code matters when the
    train mode is captured (`NestedNet.complete`), and is compared then; another torch, or modules that print
    themselves differently, are reason enough to do it now.
    """
    stored, header = file.header.analysis, file.header
    own = dict(_unique(model))
    if stored is None or _release(header.versions.get("torch", "")) != _release(torch.__version__):
        return None
    if same_names(own, file.weights, sliced=True) or code_of(model) != stored.code:
        return None
    try:
        analysis = unpack_analysis(stored, file.tensors, tuple(header.image_size))
        for name, tensor in own.items():
            _check_type(name, tensor, file.weights[name], file.path)
        if fingerprint(analysis) != header.fingerprint or _compare_programs(analysis, header, file.path):
            return None
        aligned = {n: t.clone() for n, t in file.weights.items()}
        net = _filled(kind, copy_with(model, aligned), analysis, file)
    except (CheckpointError, *DAMAGE):  # the long way finds out what is wrong, and says so
        return None
    if True in header.modes:
        types = {name: tensor.new_empty(0) for name, tensor in file.weights.items()}
        lineage = {f"lineage.{k}": copies for k, copies in enumerate(file.lineage)}
        net.completion = _Completion(make, replace(file, tensors=lineage, weights=types))
    return net


def _filled(kind: type[NetT], model: nn.Module, analysis: Analysis, file: _File, doubt: str | None = None) -> NetT:
    header, path = file.header, file.path
    levels = _checked_levels(analysis, header, file.tensors["levels"], path)
    net = kind(model, analysis, levels, header.budgets, header.reference_macs, _origin(header), file.lineage)
    if len(file.types) == 1:
        net.to(next(iter(file.types)))
    _take_over(net.model, file.weights, path)
    net.notes = list(header.notes)
    net.contribution = header.contribution
    try:
        net.metadata = header.metadata
    except SteppingError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    _compare_scores(net, header, file.tensors, doubt, path)
    if header.version == 1 and _WITHOUT not in net.notes:
        net.notes.append(_WITHOUT)
    return net.eval()


def _origin(header: NetHeader) -> dict[str, Any]:
    return header.origin.model_dump(by_alias=True, exclude_unset=True)


def _compare_programs(analysis: Analysis, header: NetHeader, path: object) -> str | None:
    """What speaks against the model, if another version of torch may be the reason.

    Raises:
        CheckpointError: the model computes something else than the net that was saved.
    """
    for training, program in analysis.programs.items() if header.programs is not None else ():
        saved = header.programs[mode_name(training)]  # type: ignore[index]
        found = first_difference((saved.lines, saved.sketches), describe(program))
        if found is None:
            continue
        where = f"{mode_name(training)} mode, {found}"
        if header.probe is not None and _release(header.versions.get("torch", "")) != _release(torch.__version__):
            return where
        raise CheckpointError(
            f"{path}: the model computes something else than the net that was saved ({where}). Pass load(path, "
            "model=...) an instance made with the same arguments as the original."
        )
    return None


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def _checked_levels(analysis: Analysis, header: NetHeader, levels: Tensor, path: object) -> Tensor:
    n = len(header.budgets)
    try:
        levels = check_levels(levels, analysis, n)
    except SteppingError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    macs_model = MacModel(analysis)
    executed, counted = (f(levels, n).tolist() for f in (macs_model.executed_macs, macs_model.subnet_macs))
    if header.macs not in ([executed] if header.version > 1 else [executed, counted]):  # format 1 counted idle units
        raise CheckpointError(f"{path}: the net has MACs {executed}, the file says {header.macs}; it is damaged.")
    return levels


def _compare_scores(
    net: NestedNet, header: NetHeader, tensors: Mapping[str, Tensor], doubt: str | None, path: object
) -> None:
    if header.probe is None:
        return
    scores = _probe_scores(net, header.probe)
    stored = [tensors[name] for name in stored_probe(tensors)]
    problem = "scores that are no numbers" if scores is None else compare_outputs(stored, scores)
    if problem:
        raise CheckpointError(
            f"{path}: the net computes something else than when it was saved: {problem}."
            + (f" Its graph differs, too: {doubt}." if doubt else "")
        )
    if doubt:
        net.notes.append(
            f"torch {torch.__version__} captures the net in other operators than {header.versions.get('torch')} did "
            f"({doubt}); the scores of all subnets for a stored image are the same."
        )


def _other_model(model: nn.Module, path: object, why: str = "") -> CheckpointError:
    return CheckpointError(
        f"{path}: the file belongs to another model than {type(model).__name__} as given (its layers or units "
        f"differ{': ' + why if why else ''}). Pass load(path, model=...) an instance made with the same arguments as "
        "the original."
    )


def _take_over(model: nn.Module, tensors: Mapping[str, Tensor], path: object) -> None:
    own = dict(_unique(model))
    problem = same_names(own, tensors, sliced=False)
    if problem:
        raise CheckpointError(f"{path}: tensors do not fit the model: {problem}")
    with torch.no_grad():
        for name, tensor in own.items():
            stored = tensors[name]
            _check_type(name, tensor, stored, path)
            if tensor.dtype == stored.dtype:
                tensor.copy_(stored)
            else:
                tensor.data = stored.clone()
            if _is_broken(tensor):
                raise CheckpointError(explain("weights that are not finite numbers", where=f"{path}: {name}"))


def _check_type(name: str, tensor: Tensor, stored: Tensor, path: object) -> None:
    if tensor.is_floating_point() == stored.is_floating_point() and (
        tensor.is_floating_point() or tensor.dtype == stored.dtype
    ):
        return
    what = "a tensor of a wrong type"
    got, expected = _plain(stored.dtype), _plain(tensor.dtype)
    raise CheckpointError(explain(what, where=f"{path}: {name}", got=got, expected=expected))
