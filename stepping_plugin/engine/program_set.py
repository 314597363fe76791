"""All step programs of one net, as data: what an engine runs, a file keeps and an export writes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..files.metadata import Metadata
from ..graph.structure import ONE_TENSOR, Structure
from .emit import StepProgram
from .plan import BatchAxis

__all__ = ["ProgramSet"]


@dataclass
class ProgramSet:
    """Step programs and what their caller has to know.

    Attributes:
        programs: step programs 1..N.
        macs: MACs executed per sample up to subnets 1..N. They are the net's MACs (`SteppingNet.macs`, which counts
            every unit and is what budgets bound), less those of units that no class score of any subnet depends on:
            such units are not computed, and what is executed is reported.
        image_size: (C, H, W).
        dtype, device: of images and scores.
        cache_axes: where the samples are, per cache name; None where a cache does not depend on the batch.
        metadata: classes, preprocessing, calibrated exit and provenance, as far as they are known.
        structure: how the outputs are put together.
    """

    programs: list[StepProgram]
    macs: list[int]
    image_size: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    cache_axes: dict[str, BatchAxis | None]
    metadata: Metadata = field(default_factory=Metadata)
    structure: Structure = ONE_TENSOR

    @property
    def num_subnets(self) -> int:
        """N."""
        return len(self.programs)
