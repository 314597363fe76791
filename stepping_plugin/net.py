"""`SteppingNet`: nested subnets of one model with all that is done with them, and `load`, which brings one back."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .console.progress import stage
from .engine import Engine, compile_engine
from .engine.engine import exact_subnet
from .engine.exact import ExactSubnet
from .errors import SteppingError
from .files.headers import Contribution
from .graph.device import on_cpu_by_default
from .nested.net import NestedNet
from .nested.subnet import Subnet
from .reconstruction.reconstruct import Reconstruction, reconstruct
from .serialization import read_net, write_net
from .training.exits import ExitChoice, choose_exit
from .training.loop import History, fit
from .training.metrics import Metrics, metrics_of
from .training.predictions import predictions_of
from .training.targets import parse_target
from .training.trainer import TrainConfig
from .views.contribution import measure_contribution
from .views.summary import summary

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["SteppingNet", "load"]


class SteppingNet(NestedNet):
    """N nested subnets of one model: train them, step through them, save them.

    Structure and running (`levels`, `macs`, `forward_all`, `active_subnet`, `extract`, ...) and the arguments are those
    of `nested.net.NestedNet`.
    """

    def fit(
        self, train_loader: Any, val_loader: Any = None, config: TrainConfig | None = None, **options: Any
    ) -> History:
        """Train all subnets in one pass per batch, with suppression and optional distillation (Eq. 4).

        Arguments and result: `training.loop.fit`. For a loop of your own, use `forward_all`.
        """
        self._changed()
        return fit(self, train_loader, val_loader, config, **options)

    def _changed(self) -> None:
        """What was measured on other weights holds no longer."""
        self.contribution, self.metadata = None, self.metadata.updated(exit=None)

    def evaluate(self, loader: Iterable[Any], classes: Sequence[str] | None = None) -> list[Metrics]:
        """Metrics of every subnet: accuracy, balanced accuracy, precision, recall, F1, AUC, calibration, per class.

        Args:
            loader: batches of (images, labels); labels (B,) are classes, (B, classes) of zeros and ones any number.
            classes: their names; by default those in `metadata`, or numbers.

        Returns:
            One `training.metrics.Metrics` per subnet; `views.metrics.metrics_table` prints them.
        """
        return metrics_of(predictions_of(self, loader), classes or self.metadata.classes)

    def choose_exit(self, loader: Iterable[Any], target: str, **options: Any) -> ExitChoice:
        """Fit temperatures and thresholds on held-out pictures, and keep them for `predict(until="calibrated")`.

        Args:
            loader: batches of (images, labels) that the net was not trained on, and is not judged by.
            target: such as "accuracy >= 99 % of the largest subnet" or "macs <= 30 %", see `training.targets`.
            options: `per_class`, `combine`, `original` (predictions of the original on the same pictures), `costs`
                (milliseconds until every subnet, for a target in milliseconds; else MACs), see
                `training.exits.choose_exit`.
        """
        costs = options.pop("costs", None)
        if (parse_target(target).kind == "milliseconds") != (costs is not None):
            raise SteppingError(
                "choose_exit: pass costs=[milliseconds until every subnet] with a target in milliseconds."
            )
        costs = costs or self.macs
        given = {"original_macs": self.reference_macs, "classes": self.metadata.classes, **options}
        choice = choose_exit(predictions_of(self, loader), costs, target, **given)
        self.metadata = self.metadata.updated(exit=choice.rule)
        return choice

    def deploy(self, *, compile: bool | Mapping[str, Any] = False) -> Engine:
        """Compile the incremental engine, see `engine.compile_engine`."""
        return compile_engine(self, compile=compile)

    def extract(self, subnet: int, *, exact: bool = False) -> Subnet | ExactSubnet:  # type: ignore[override]
        """Subnet `subnet` (1..N) as a standalone module, physically without the other units.

        Args:
            subnet: its number.
            exact: in block form, one layer per level, for inference only: executes the MACs that `macs` says. Otherwise
                layers stay whole, dead synapses are zeros in their weights, and kernels multiply them: `dense_macs`,
                which `summary` shows beside `macs`, up to twice as many. Such a module can be trained further.
        """
        return exact_subnet(self, self._subnet(subnet)) if exact else super().extract(subnet)

    def measure(self, images: Tensor | Iterable[Tensor]) -> Contribution:
        """Measure what every level adds, keep it in `contribution` for `summary` and files, and return it.

        Args:
            images: (B, C, H, W), or batches of them; a few hundred, such as the net is to be used with.
        """
        self.contribution = measure_contribution(self, [images] if isinstance(images, Tensor) else images)
        return self.contribution

    def reconstruct(self, original: nn.Module, images: Any, **options: Any) -> Reconstruction:
        """Bring the original's values back by least squares on unlabelled images, see `reconstruction.reconstruct`."""
        self._changed()
        return reconstruct(self, original, images, **options)

    def summary(self) -> Group:
        """Printable tables: MACs, budget and gap per subnet; units by level per group of layers; after `measure`, what
        every level adds.
        """
        return summary(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the net to one file (tensors and JSON, no pickle); read it with `stepping_plugin.load`."""
        write_net(self, path)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """pickle, `torch.save` and new processes take the net through its file, and with what a file does not hold."""
        return _unpack, _pack(self)


def load(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, device: str | torch.device | None = None
) -> SteppingNet:
    """Read a net that `SteppingNet.save` wrote, in eval mode. Its weights have the types that they had then.

    For timm models this takes a second at most: the file says what the net computes in eval mode. The model's code is
    compared with the file when train mode is asked for, which takes as long as a conversion (`SteppingNet.complete`).
    An instance that is given, a file of another release of torch or of an older version is captured at once.

    Args:
        path: the file.
        model: an instance of the original model, needed unless it is a registered timm model; not modified.
        device: where to put the net; the CPU if left out.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, of another version, or of another model; or the model
            computes something else than the net that was saved. The first operator that differs is named.
    """
    with on_cpu_by_default(), stage(f"loading {path}"):
        return read_net(path, SteppingNet, model, device)


def _pack(net: SteppingNet) -> tuple[bytes, dict[str, Any]]:
    """A net as the bytes of its file, and what a file does not hold: for pickle.

    Raises:
        SteppingError: a pickle could not be read without the model.
    """
    if not net.origin.get("timm"):
        raise SteppingError(
            f"A net made from {net.origin.get('class', 'a model of your own')} cannot be pickled: that would need the "
            "model's code. Call net.save(path), and stepping_plugin.load(path, model=...) where the net is needed."
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net")
        write_net(net, path)
        content = path.read_bytes()
    frozen = [name for name, p in net.model.named_parameters() if not p.requires_grad]
    device = str(next((p.device for p in net.model.parameters()), "cpu"))
    return content, {"training": net.training, "active": net.active_subnet, "frozen": frozen, "device": device}


def _unpack(content: bytes, state: Mapping[str, Any]) -> SteppingNet:
    """What `_pack` took apart. Pickles of earlier releases name this function, too."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net")
        path.write_bytes(content)
        net = read_net(path, SteppingNet, device=state["device"])
    named = dict(net.model.named_parameters())
    for name in state["frozen"]:
        named[name].requires_grad_(False)
    net.active_subnet = state["active"]
    return net.train(state["training"])
