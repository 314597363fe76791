"""What the word NET of a command means: a run's folder, a file of a net or engine, a net of the zoo, a timm model."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..console.progress import stage
from ..engine.engine import Engine, load_engine
from ..errors import SteppingError, closest
from ..files.zoo import PREFIX, find_net
from ..integrations.timm.models import named_model
from ..net import SteppingNet, load
from ..tensorfile import ENGINE
from ..units.analysis import Analysis, analyse
from ..units.macs import MacModel

__all__ = ["Named", "equal_levels", "equal_net", "named"]


NET, REPORT, MARKER = "net.safetensors", "report.json", ".stepping-run.json"  # of a run


@dataclass(frozen=True)
class Named:
    """What a word names: exactly one of `net`, `engine` and `model`.

    Attributes:
        word: as it was given.
        net, engine: file of a net, or of an engine.
        model: timm name.
        run: folder of the run that the net belongs to, if it does.
    """

    word: str
    net: Path | None = None
    engine: Path | None = None
    model: str | None = None
    run: Path | None = None

    @property
    def place(self) -> Path:
        """Where things that are made of it go, if nobody says otherwise."""
        if self.model is not None or self.word.startswith(PREFIX):
            return Path(self.word.replace(":", "-") + "-untrained" * (self.model is not None))
        return (self.net or self.engine or Path(self.word)).parent

    def stepping_net(self, subnets: int = 4) -> SteppingNet:
        """The net in eval mode; of a timm model, one whose subnets have equal shares of every width, untrained.

        Raises:
            SteppingError: an engine has no net any more; or the model or the file cannot be used.
        """
        if self.engine is not None:
            raise SteppingError(
                f"{self.word} holds an engine; here the net is needed. Give the run, or the net's file."
            )
        if self.net is not None:
            return load(self.net).eval()
        return equal_net(named_model(str(self.model)).eval(), subnets)

    def deployed(self, subnets: int = 4) -> Engine:
        """The engine of the net, or that of the file."""
        if self.engine is not None:
            return load_engine(self.engine)
        net = self.stepping_net(subnets)
        with stage(f"step programs of {self.word}"):
            return net.deploy()


def named(word: str) -> Named:
    """Find out what a word names.

    Raises:
        SteppingError: nothing that is there; the nearest names are given.
    """
    if word.startswith(PREFIX):
        return Named(word, net=find_net(Path(word)))
    path = Path(word)
    if path.is_dir():
        if (path / NET).is_file():
            return Named(word, net=path / NET, run=path)
        if (path / MARKER).is_file():
            raise SteppingError(
                f"{word}: the run in this folder has not come to its end, {NET} is missing. Go on with it: "
                f"`stepping run {path / 'recipe.yaml'} output={word}`."
            )
        raise SteppingError(f"{word}: no run in this folder, {NET} is missing. {_hint(word)}")
    if path.is_file():
        if _holds_engine(path):
            return Named(word, engine=path)
        run = path.parent if path.name == NET and (path.parent / MARKER).is_file() else None
        return Named(word, net=path, run=run)
    if timm.is_model(word.split(".")[0]):
        return Named(word, model=word)
    if path.suffix == ".safetensors" or len(path.parts) > 1:
        raise SteppingError(f"{word}: no such file or folder. {_hint(word)}")
    raise SteppingError(f"{word}: no run, no file of a net and no timm model of this name. {_hint(word)}")


def _holds_engine(path: Path) -> bool:
    with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
        texts = file.metadata() or {}
        return any(ENGINE in text[:200] for text in texts.values())
    return False


def _hint(word: str) -> str:
    """The nearest names; never a list of all."""
    runs = [net.parent for net in (*Path("runs").glob(f"*/{NET}"), *Path(".").glob(f"*/{NET}"))]
    names = {name: name for name in timm.list_models()}
    for run in runs:
        names |= {run.name: str(run), str(run): str(run)}
    return closest(word, names) or "Runs are folders that `stepping run` made."


# ------------------------------------------------------------------------------------------------- timm models


def equal_levels(analysis: Analysis, num_subnets: int) -> Tensor:
    """Levels that give every subnet an equal share of every group of units, LongTensor (num_units,)."""
    levels = torch.ones(analysis.num_units, dtype=torch.long)
    for group in analysis.groups:
        levels[group.units] = 1 + torch.arange(len(group.units)) * num_subnets // len(group.units)
    for anchor in analysis.anchors:
        if int(levels[anchor].min()) > 1:
            levels[anchor[0]] = 1
    return levels


def equal_net(model: nn.Module, num_subnets: int) -> SteppingNet:
    """A net in eval mode whose subnets have equal shares of every width; the model is copied."""
    size = tuple(model.default_cfg["input_size"])  # type: ignore[index]
    analysis = analyse(model, size, modes=(False,))
    levels, macs = equal_levels(analysis, num_subnets), MacModel(analysis)
    budgets = macs.subnet_macs(levels, num_subnets).tolist()
    return SteppingNet(copy.deepcopy(model), analysis, levels, budgets, macs.total).eval()
