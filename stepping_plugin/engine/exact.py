"""A subnet as a module of its own that executes the MACs it is named for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import image_shape_error
from .emit import IMAGE, output_names
from .program_set import ProgramSet

__all__ = ["ExactSubnet"]


class ExactSubnet(nn.Module):
    """A subnet in block form, for inference: images (B, C, H, W) to class scores (B, classes), or whatever
    the model returns.

    Every layer is one layer per level, which reads the levels up to its own, so that dead synapses are not multiplied.
    It has more and smaller kernels than `nested.subnet.Subnet`, and fewer MACs: which of the two is faster depends on
    the widths. The weights are buffers with batch norm folded in, and all operators are ATen's: the module moves, saves
    its state and exports like any other.

    Args:
        steps: step programs of the levels that belong to the subnet.

    Attributes:
        macs: MACs executed per sample: those of the net's subnet, less what it only prepares for larger ones.
    """

    def __init__(self, steps: ProgramSet) -> None:
        super().__init__()
        self.macs = steps.macs[-1]
        self.image_size = steps.image_size
        self.steps = nn.ModuleList(program.module for program in steps.programs)
        self._structure = steps.structure
        self._caches = [(p.inputs, p.outputs, p.released) for p in steps.programs]
        self.eval()

    def forward(self, x: Tensor) -> Any:
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_size:
            raise image_shape_error(x.shape, self.image_size)
        caches = {IMAGE: x}
        for step, (inputs, outputs, released) in zip(self.steps, self._caches):
            caches.update(zip(outputs, step(*[caches[name] for name in inputs])))
            for name in released:
                del caches[name]
        return self._structure.build([caches[name] for name in output_names(self._structure.count)])
