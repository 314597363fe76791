"""What `stepping bench engine` measures for one word: a timm model, or somebody's own net beside its dense original."""

from __future__ import annotations

from torch import nn

from ...errors import SteppingError
from ...integrations.timm.models import named_model
from ...net import SteppingNet
from ...views.named import Named

__all__ = ["contender"]


def contender(source: Named) -> nn.Module | tuple[SteppingNet, nn.Module]:
    """A timm model, or a net and the dense model that it was made from, with random weights: only time matters.

    Raises:
        SteppingError: the net was made from no timm model, so that there is no original to compare it with.
    """
    if source.model is not None:
        return named_model(source.model)
    net = source.stepping_net()
    origin = net.origin or {}
    if not origin.get("timm"):
        raise SteppingError(
            f"{source.word}: its original, {origin.get('class', 'an unknown model')}, is no timm model, so there is no "
            "dense network to measure beside it. In Python: studies.bench.engine.bench_net(net, original, batch_size)."
        )
    _, height, width = net.analysis.image_size
    return net, named_model(origin["timm"], (height, width), **origin.get("kwargs", {})).eval()
