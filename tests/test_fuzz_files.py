"""Random damage in nets, engines and checkpoints: an error of ours, or the same function; never anything else.

A mutation is made from a seed, so a failure names what repeats it. Half of them have their checksums computed anew, as
somebody does who knows the format: those must not crash, hang, or pass with other scores than a probe tells apart.
"""

from __future__ import annotations

import copy
import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from nets import relative
from rewriting import rewrite
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stepping_plugin import SteppingError, TrainConfig, apply_steppingnet, load
from stepping_plugin.engine import load_engine
from stepping_plugin.training.loop import CHECKPOINT, fit

LIMIT = 10  # seconds of work per file: of the processor, which a busy machine does not stretch
TOLERANCE = 0.02  # of signed files: what a probe tells apart


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 4)).eval()


def small_net() -> Any:
    return apply_steppingnet(model(), [0.4, 0.8], example_inputs=torch.zeros(1, 1, 8, 8))


X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)


class Kind:
    """A kind of file: one that is whole, and what is got from reading one."""

    key = "stepping"

    def __init__(self, whole: Path) -> None:
        self.whole = whole
        self.expected = self.read(whole)

    def read(self, path: Path) -> Tensor:
        raise NotImplementedError


class Nets(Kind):
    def read(self, path: Path) -> Tensor:
        with torch.no_grad():
            return load(path, model()).forward_all(X)


class TimmNets(Kind):
    def read(self, path: Path) -> Tensor:
        net = load(path)
        with torch.no_grad():
            return net.forward_all(X[:, :, :8, :8])


class Engines(Kind):
    def read(self, path: Path) -> Tensor:
        return torch.stack(list(load_engine(path).steps(X)))


class Checkpoints(Kind):
    key = "state"

    def __init__(self, whole: Path) -> None:
        self.start = small_net()
        super().__init__(whole)

    def read(self, path: Path) -> Tensor:
        """Scores after the rest of the run."""
        folder = path.parent / "resumed"
        folder.mkdir(exist_ok=True)
        (folder / CHECKPOINT).write_bytes(path.read_bytes())
        net = run(self.start, folder, epochs=2)
        with torch.no_grad():
            return net.forward_all(X)


def run(start: Any, folder: Path, epochs: int) -> Any:
    net = copy.deepcopy(start)
    batches = DataLoader(TensorDataset(X, LABELS), 2, shuffle=True)
    config = TrainConfig(epochs=2, opt="adamw", lr=0.01, device="cpu")
    stop = {"log": stop_after(epochs)} if epochs < 2 else {}
    with suppress(KeyboardInterrupt):
        fit(net, batches, None, config, checkpoint_dir=folder, **stop)
    return net


def stop_after(epochs: int) -> Callable[[dict[str, Any]], None]:
    def log(record: dict[str, Any]) -> None:
        if record["epoch"] == epochs:
            raise KeyboardInterrupt

    return log


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("whole")
    net = small_net()
    net.save(folder / "net")
    net.deploy().save(folder / "engine")
    digits = timm.create_model("digits_net", num_classes=4, in_chans=1, img_size=8).eval()
    apply_steppingnet(digits, [0.3, 0.6], example_inputs=X).compact().save(folder / "timm")
    run(net, folder, epochs=1)
    return {
        "net": Nets(folder / "net"),
        "engine": Engines(folder / "engine"),
        "checkpoint": Checkpoints(folder / CHECKPOINT),
        "timm": TimmNets(folder / "timm"),
    }


# ------------------------------------------------------------------------------------------------- mutations


def bytes_of(chance: random.Random, whole: Path, target: Path) -> str:
    """Damage of the file itself."""
    content = bytearray(whole.read_bytes())
    what = chance.choice(["flip", "flip", "flip", "cut", "grow", "zero", "move"])
    place = chance.randrange(len(content)) if chance.random() < 0.5 else chance.randrange(min(3000, len(content)))
    if what == "flip":
        content[place] ^= 1 << chance.randrange(8)
    elif what == "cut":
        del content[place:]
    elif what == "grow":
        content += bytes(chance.randrange(1, 2000))
    else:
        length = chance.randrange(1, 200)
        source = chance.randrange(len(content))
        new = bytes(length) if what == "zero" else content[source : source + length]
        content[place : place + len(new)] = new
    target.write_bytes(content)
    return f"{what} at {place}"


VALUES = [None, True, False, -1, 0, 1, 2, 7, 255, 10**6, 10**12, 2**63, -(2**63), 0.5, 1e308, -1e-9, float("nan"),
          float("inf"), "", "x", "aten.relu", "float64", "cuda:7", "../../etc/passwd", "\ud800", [], [1], [[]], {},
          {"node": 0}, {"tuple": []}, {"dtype": "load"}, {"$": "tensor", "name": "x"}, {"$": "tuple"}]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def nested_value(chance: random.Random, old: Any) -> Any:
    """A value like the old one, or of another kind."""
    if isinstance(old, (int, float)) and not isinstance(old, bool) and chance.random() < 0.4:
        return chance.choice([old + 1, old - 1, old * 2, -old, old * 10**9])
    if isinstance(old, str) and old and chance.random() < 0.4:
        return chance.choice([old[:-1], old + "_", old.upper(), old * 1000])
    if isinstance(old, list) and old and chance.random() < 0.6:
        return chance.choice([old[:-1], old * 2, old[::-1], old * (10**6 // len(json.dumps(old)) + 1), [*old, None]])
    if chance.random() < 0.05:
        deep: Any = []
        for _ in range(500):
            deep = [deep]
        return deep
    return chance.choice(VALUES)


def edit_header(chance: random.Random, header: dict[str, Any]) -> str:
    every = list(places(header))
    # Fields of the first floors matter more than the many arguments below them.
    short = [p for p in every if len(p) <= 2]
    path = chance.choice(short if chance.random() < 0.5 else every)
    parent: Any = header
    for key in path[:-1]:
        parent = parent[key]
    if chance.random() < 0.15:
        del parent[path[-1]]
        return f"delete {path}"
    if chance.random() < 0.1 and isinstance(parent, dict):
        parent[chance.choice(["more", "foo", "pretrained", "checkpoint_path"])] = chance.choice(VALUES)
        return f"add beside {path}"
    parent[path[-1]] = nested_value(chance, parent[path[-1]])
    return f"{path} = {str(parent[path[-1]])[:60]}"


def edit_tensors(chance: random.Random, tensors: dict[str, Tensor]) -> str:
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    what = chance.choice(["remove", "add", "cast", "shape", "nan", "swap", "zero", "empty", "shift"])
    if what == "remove":
        del tensors[name]
    elif what == "add":
        tensors[chance.choice(["more", "model.more", "lineage.9", "step9.t9"])] = torch.zeros(3)
    elif what == "cast":
        kinds = [torch.float16, torch.float64, torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.bfloat16]
        tensors[name] = tensor.to(chance.choice(kinds))
    elif what == "shape":
        tensors[name] = chance.choice([tensor.flatten(), tensor.unsqueeze(0), torch.cat([tensor.flatten()] * 2)])
    elif what == "nan" and tensor.is_floating_point():
        tensors[name] = tensor * chance.choice([float("nan"), float("inf"), 1e30])
    elif what == "swap":
        same = [n for n in sorted(tensors) if tensors[n].shape == tensor.shape]
        other = chance.choice(same)
        tensors[name], tensors[other] = tensors[other], tensor
    elif what == "empty":
        tensors[name] = tensor.flatten()[:0]
    elif what == "shift" and not tensor.is_floating_point():
        tensors[name] = tensor + chance.choice([-1, 1, 10**12])
    else:
        tensors[name] = torch.zeros_like(tensor)
    return f"{what} {name}"


def mutate(seed: int, kind: Kind, target: Path) -> tuple[str, bool]:
    """What was done, and whether the checksums were computed anew."""
    chance = random.Random(seed)
    how = chance.choice(["bytes", "header", "header", "tensors"])
    if how == "bytes":
        return bytes_of(chance, kind.whole, target), False
    signed = chance.random() < 0.7
    done: list[str] = []

    def edit(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for _ in range(chance.choice([1, 1, 1, 2])):
            done.append(edit_header(chance, header) if how == "header" else edit_tensors(chance, tensors))

    rewrite(kind.whole, target, edit, signed, kind.key)
    return "; ".join(done), signed


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"over {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def verdict(kind: Kind, target: Path, signed: bool) -> str:
    """ "refused", "same", or what is wrong."""
    began = time.process_time()
    try:
        with limit(LIMIT):
            got = kind.read(target)
    except SteppingError as error:
        return "refused" if str(error) else "an error without a text"
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__} after {time.process_time() - began:.1f} s: {str(error)[:200]}"
    if isinstance(kind, Checkpoints) and signed:
        return "same"  # another state that fits the run is another run
    if got.shape == kind.expected.shape and got.dtype == kind.expected.dtype:
        gap = relative(got, kind.expected)
        if gap <= (TOLERANCE if signed else 0):
            return "same"
        return f"other scores: {gap:.3g}"
    return f"scores {tuple(got.shape)} in {got.dtype}"


def sweep(kinds: dict[str, Kind], seeds: range, folder: Path) -> dict[str, int]:
    counts, wrong = {"refused": 0, "same": 0}, []
    names = list(kinds)
    for seed in seeds:
        kind = kinds[names[seed % len(names)]]
        target = folder / "mutated"
        try:
            what, signed = mutate(seed, kind, target)
        except UnicodeEncodeError:
            continue  # a text that no file can hold
        found = verdict(kind, target, signed)
        if found in counts:
            counts[found] += 1
        else:
            wrong.append(
                f"seed {seed}, {names[seed % len(names)]}, {'signed' if signed else 'unsigned'}: {what}: {found}"
            )
    assert wrong == [], f"{len(wrong)} of {len(seeds)}:\n" + "\n".join(wrong[:40])
    return counts


def test_a_sample_of_damaged_files(kinds: dict[str, Kind], tmp_path: Path) -> None:
    counts = sweep(kinds, range(60), tmp_path)
    assert counts["refused"] > 40


@pytest.mark.slow
def test_two_thousand_damaged_files(kinds: dict[str, Kind], tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = sweep(kinds, range(1000, 3000), tmp_path)
    print(json.dumps(counts))
    assert counts["refused"] > 1500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
