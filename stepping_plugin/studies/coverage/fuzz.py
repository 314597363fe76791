"""Random small networks of supported operators, and the check that each of them is converted exactly."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import CaptureError
from ...integrations.fvcore import count_macs
from ...net import SteppingNet
from ...units.analysis import analyse
from ...units.macs import MacModel
from ...verify import verify
from .blocks import image_blocks, token_blocks
from .check import perturb, random_levels

__all__ = ["SIZE", "FuzzNet", "check_network", "random_network", "run_fuzz"]

SIZE = (3, 8, 8)
TOLERANCE = 1e-10

# ------------------------------------------------------------------------------------------------- images


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Dense(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(x), x], 1)


class Partial(nn.Module):
    """A body on the first channels only."""

    def __init__(self, width: int, body: nn.Module) -> None:
        super().__init__()
        self.width, self.body = width, body

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x[:, : self.width], x[:, self.width :]
        return torch.cat([self.body(first), rest], 1)


class Gate(nn.Module):
    """Squeeze and excitation, by mean or maximum over the positions."""

    def __init__(self, channels: int, hidden: int, largest: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.largest = largest

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.amax((2, 3), keepdim=True) if self.largest else x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(F.relu(self.down(pooled))))


class ChannelTaps(nn.Module):
    """ECA: a convolution along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1))).transpose(1, 2).unsqueeze(-1)


class SpatialGate(nn.Module):
    """A gate per position, from the mean and the maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(torch.cat([x.mean(1, True), x.amax(1, True)], 1)))


class ResponseNorm(nn.Module):
    """GRN: every channel's energy over the mean energy."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        energy = x.norm(p=2, dim=(2, 3), keepdim=True)
        return x + self.weight * x * (energy / (energy.mean(1, keepdim=True) + 1e-6))


class Branches(nn.Module):
    """Selective kernels: a softmax over two branches, channel by channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)
        self.choose = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.one(x), self.two(x)], 1)
        weight = self.choose(both.sum(1).mean((2, 3), keepdim=True)).view(len(x), 2, -1, 1, 1).softmax(1)
        return (both * weight).sum(1)


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class ImageNorm(nn.LayerNorm):
    """LayerNorm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _norm(pick: random.Random, channels: int) -> nn.Module:
    groups = [g for g in (1, 2, 4) if channels % g == 0]
    makers: list[Callable[[], nn.Module]] = [
        lambda: nn.BatchNorm2d(channels),
        lambda: nn.GroupNorm(pick.choice(groups), channels),
        lambda: ImageNorm(channels),
        nn.Identity,
    ]
    return pick.choice(makers)()


def _activation(pick: random.Random, channels: int) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [nn.ReLU, nn.GELU, nn.Hardswish, nn.Sigmoid, lambda: nn.PReLU(channels)]
    return pick.choice(kinds)()


def _convolution(pick: random.Random, channels: int, out: int) -> nn.Module:
    kernel = pick.choice([1, 3])
    groups = pick.choice([g for g in (1, 1, 2, channels) if channels % g == 0 and out % g == 0])
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=pick.random() < 0.5)
    return nn.Sequential(conv, _norm(pick, out), _activation(pick, out))


def _image_block(pick: random.Random, channels: int) -> tuple[nn.Module, int]:
    """A block on images, and its number of output channels."""
    out = pick.choice([4, 6, 8])
    half = channels // 2
    same: list[Callable[[], nn.Module]] = [
        lambda: Residual(nn.Sequential(_convolution(pick, channels, out), _convolution(pick, out, channels))),
        lambda: Residual(_norm(pick, channels)),
        lambda: Partial(half, _convolution(pick, half, half)),
        lambda: Gate(channels, pick.choice([2, 3]), pick.random() < 0.5),
        ChannelTaps,
        SpatialGate,
        lambda: ResponseNorm(channels),
        lambda: Branches(channels),
        lambda: Shuffle(2),
        lambda: nn.AvgPool2d(3, 1, 1),
        lambda: nn.MaxPool2d(3, 1, 1),
        lambda: _norm(pick, channels),
    ]
    chance = pick.random()
    if chance < 0.3:
        return _convolution(pick, channels, out), out
    if chance < 0.4:
        return Dense(_convolution(pick, channels, out)), channels + out
    if chance < 0.45:
        return nn.Sequential(nn.PixelUnshuffle(2), nn.Upsample(scale_factor=2)), 4 * channels
    return pick.choice(same)(), channels


# ------------------------------------------------------------------------------------------------- tokens


class Attention(nn.Module):
    """Attention with separate or packed projections, fused or written out, with or without normalised queries."""

    def __init__(self, pick: random.Random, channels: int) -> None:
        super().__init__()
        self.heads, self.size = pick.choice([1, 2, 3]), pick.choice([2, 4])
        self.fused, self.packed = pick.random() < 0.5, pick.random() < 0.5
        inner = self.heads * self.size
        self.qkv = nn.Linear(channels, 3 * inner, bias=pick.random() < 0.5)
        self.norm = nn.LayerNorm(self.size) if pick.random() < 0.3 else nn.Identity()
        self.mix = nn.Linear(self.heads, self.heads) if pick.random() < 0.2 else None
        self.out = nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.packed:
            q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (t.view(b, n, self.heads, self.size).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q, k = self.norm(q), self.norm(k)
        if self.fused and self.mix is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q @ k.transpose(-2, -1)) * self.size**-0.5
            if self.mix is not None:
                weights = self.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y = weights.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


class ChannelAttention(nn.Module):
    """XCA: attention between the channels of a head."""

    def __init__(self, pick: random.Random, channels: int) -> None:
        super().__init__()
        self.heads = pick.choice([h for h in (1, 2) if channels % h == 0])
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.permute(0, 3, 1, 2).reshape(b, n, c))


class Gated(nn.Module):
    """Gated linear unit."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(channels, 2 * hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class TokenMix(nn.Module):
    """A layer along the tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.mix = nn.Linear(tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self, channels: int, both: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, 3, batch_first=True, bidirectional=both)
        self.out = nn.Linear(6 if both else 3, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0])


class Scale(nn.Module):
    """Layer scale and a position embedding."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))
        self.position = nn.Parameter(torch.randn(1, tokens, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.position


def _token_block(pick: random.Random, tokens: int, channels: int) -> nn.Module:
    norms: list[Callable[[int], nn.Module]] = [nn.LayerNorm, nn.RMSNorm, lambda c: nn.Identity()]
    norm = pick.choice(norms)(channels)
    bodies: list[Callable[[], nn.Module]] = [
        lambda: Attention(pick, channels),
        lambda: ChannelAttention(pick, channels),
        lambda: nn.Sequential(nn.Linear(channels, 7), nn.GELU(), nn.Linear(7, channels)),
        lambda: Gated(channels, 5),
        lambda: TokenMix(tokens),
        lambda: Scale(tokens, channels),
        lambda: Recurrent(channels, pick.random() < 0.5),
    ]
    weights = [3, 1, 2, 1, 1, 1, 0.3]
    body = nn.Sequential(norm, pick.choices(bodies, weights)[0]())
    return Residual(body) if pick.random() < 0.8 else body


# ------------------------------------------------------------------------------------------------- networks


class FuzzNet(nn.Module):
    """Image blocks, then (sometimes) token blocks, then a classifier.

    Args:
        pick: source of all choices.
        more: share of blocks taken from `blocks`; 0 makes the networks of earlier versions.
    """

    def __init__(self, pick: random.Random, more: float = 0.0) -> None:
        super().__init__()
        channels = pick.choice([4, 6, 8])
        stride = pick.choice([1, 2])
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, stride, 1), _norm(pick, channels))
        images = []
        for _ in range(pick.randint(0, 4)):
            if more and pick.random() < more:
                images.append(pick.choice(image_blocks(pick, channels))())
                continue
            block, channels = _image_block(pick, channels)
            images.append(block)
        self.images = nn.Sequential(*images)
        tokens = (8 // stride) ** 2
        self.has_tokens = pick.random() < 0.5
        blocks = []
        for _ in range(pick.randint(1, 3) if self.has_tokens else 0):
            if more and pick.random() < more:
                further = pick.choice(token_blocks(pick, channels))()
                blocks.append(Residual(further) if pick.random() < 0.7 else further)
            else:
                blocks.append(_token_block(pick, tokens, channels))
        self.tokens = nn.Sequential(*blocks)
        self.pool = pick.choice(["mean", "max", "flatten"])
        features = channels * tokens if self.pool == "flatten" else channels
        self.hidden = nn.Linear(features, 6) if pick.random() < 0.5 else None
        self.head = nn.Linear(6 if self.hidden else features, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.images(self.stem(x)).flatten(2).transpose(1, 2)
        x = self.tokens(x)
        x = x.mean(1) if self.pool == "mean" else x.amax(1) if self.pool == "max" else x.flatten(1)
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
        return self.head(x)


FIRST_WITH_MORE = 10_000  # seeds from here on take half of their blocks from `blocks`


def random_network(seed: int) -> nn.Module:
    """A network in float64, eval mode, that depends on the seed only."""
    torch.manual_seed(seed)
    return perturb(FuzzNet(random.Random(seed), 0.5 if seed >= FIRST_WITH_MORE else 0.0)).double().eval()


def check_network(model: nn.Module, seed: int, size: tuple[int, ...] = SIZE) -> dict[str, Any]:
    """Convert a network and compare: original, nested net, noise above every subnet, standalone subnets, engine, MACs.

    Returns:
        Units, pinned channels and channels; no units where nothing can move, which has to be said by an error.

    Raises:
        AssertionError, SteppingError: what does not hold.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        analysis = analyse(model, size, (False,))
    except CaptureError as error:
        if not str(error).startswith("No unit of this model can move"):
            raise
        return {"units": 0, "pinned": 0, "channels": 0}
    levels = torch.ones(analysis.num_units, dtype=torch.long)
    net = SteppingNet(copy.deepcopy(model), analysis, levels, [1, 2, 3], 1).eval()
    images = torch.randn(2, *size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        scale = float(expected.abs().max())
        apart = float((net.forward_all(images)[0] - expected).abs().max()) / scale
    assert apart <= TOLERANCE, f"seed {seed}: differs from the original by {apart:.1e}"
    net.set_levels(random_levels(analysis, 3, generator))
    report = verify(net, images, seed=seed)
    worst = max(report.leak + report.extract_error + report.engine_error)
    assert worst <= TOLERANCE, f"seed {seed}: {report}"
    executed, reported = net.deploy().macs, net.macs
    assert executed == reported, f"seed {seed}: MACs {executed} executed, {reported} reported"
    total, counted = MacModel(analysis).total, count_macs(model, (images[:1],)).total
    assert total == counted, f"seed {seed}: {total} MACs in the graph, fvcore counts {counted}"
    return {"units": analysis.num_units, "pinned": analysis.pinned_channels, "channels": analysis.channels}


def run_fuzz(first: int, count: int, say: Callable[[str], None] = print) -> list[int]:
    """Check the networks of seeds first..first + count - 1; returns the seeds of those that fail."""
    failed, pinned, channels = [], 0, 0
    for seed in range(first, first + count):
        try:
            facts = check_network(random_network(seed), seed)
        except Exception as error:
            failed.append(seed)
            say(f"seed {seed}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        pinned, channels = pinned + facts["pinned"], channels + facts["channels"]
        if (seed - first + 1) % 50 == 0:
            share = pinned / max(1, channels)
            say(f"{seed - first + 1} networks, {len(failed)} failed, {share:.1%} of the channels pinned")
    say(f"{count} networks, {len(failed)} failed" + (f": {failed}" if failed else ""))
    return failed
