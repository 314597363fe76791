"""Further blocks of random networks: weights made from parameters, recurrent cells, gates, several branches."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["image_blocks", "token_blocks"]

# ------------------------------------------------------------------------------------------------- images


class Concatenated(nn.Module):
    """Inception: branches side by side, their channels shuffled and mixed."""

    def __init__(self, pick: random.Random, channels: int) -> None:
        super().__init__()
        widths = [pick.choice([2, 3, 4]) for _ in range(pick.choice([2, 3]))]
        self.branches = nn.ModuleList(nn.Conv2d(channels, w, 2 * k + 1, padding=k) for k, w in enumerate(widths))
        self.pool = nn.AvgPool2d(3, 1, 1) if pick.random() < 0.5 else nn.Identity()
        self.mix = nn.Conv2d(sum(widths) + channels, channels, 1)
        self.activation = pick.choice([nn.ReLU, nn.SiLU, nn.Tanh])()

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.activation(torch.cat([*(b(x) for b in self.branches), self.pool(x)], 1)))


class ChunkGate(nn.Module):
    """Half of the channels gates the other half (GLU, SimpleGate)."""

    def __init__(self, pick: random.Random, channels: int) -> None:
        super().__init__()
        hidden = pick.choice([3, 4])
        self.up, self.down = nn.Conv2d(channels, 2 * hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.kind = pick.choice(["glu", "product", "strided"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.up(x))
        if self.kind == "glu":
            return self.down(F.glu(x, 1))
        a, b = (x[:, ::2], x[:, 1::2]) if self.kind == "strided" else x.chunk(2, 1)
        return self.down(a * b)


class Again(nn.Module):
    """One layer called several times, each time with a norm of its own."""

    def __init__(self, pick: random.Random, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(pick.choice([2, 3])))

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = F.relu(norm(self.conv(x)))
        return x


class Standardised(nn.Conv2d):
    """Weights standardised per output channel."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (self.weight.std((1, 2, 3), keepdim=True) + 1e-3)
        return F.conv2d(x, weight, self.bias, padding=1)


class DownUp(nn.Module):
    """Down by a strided convolution, up by a transposed one, with or without groups."""

    def __init__(self, pick: random.Random, channels: int) -> None:
        super().__init__()
        hidden = pick.choice([4, 6])
        groups = 2 if channels % 2 == 0 and pick.random() < 0.4 else 1
        self.down = nn.Conv2d(channels, hidden, 2, 2)
        self.up = nn.ConvTranspose2d(hidden, channels, 2, 2, groups=groups)
        self.norm = nn.InstanceNorm2d(hidden, affine=True) if pick.random() < 0.5 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.norm(self.down(x))))


class Assigned(nn.Module):
    """Some channels are overwritten with a function of others."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        x = x.clone()
        x[:, :half] += torch.tanh(x[:, -half:])
        return x


def image_blocks(pick: random.Random, channels: int) -> list[Callable[[], nn.Module]]:
    """Makers of blocks that keep the shape (B, channels, H, W); H and W are even."""
    return [
        lambda: Concatenated(pick, channels),
        lambda: ChunkGate(pick, channels),
        lambda: Again(pick, channels),
        lambda: Standardised(channels, channels, 3),
        lambda: DownUp(pick, channels),
        Assigned,
    ]


# ------------------------------------------------------------------------------------------------- tokens


class EinsumAttention(nn.Module):
    """Attention whose projections and products are einsums, with one parameter per projection or one for all."""

    def __init__(self, pick: random.Random, channels: int) -> None:
        super().__init__()
        heads, size = pick.choice([2, 3]), pick.choice([2, 4])
        self.together = pick.random() < 0.5
        shape = (3, channels, heads, size)
        shapes = [shape] if self.together else [shape[1:]] * 3
        self.qkv = nn.ParameterList([nn.Parameter(torch.randn(s) * 0.4) for s in shapes])
        self.out = nn.Parameter(torch.randn(heads, size, channels) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.qkv[0].unbind(0) if self.together else list(self.qkv)
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in weights)
        mixed = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
        return torch.einsum("bhnd,hdc->bnc", torch.einsum("bhnm,bhmd->bhnd", mixed, v), self.out)


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention`, of the tokens with themselves or with some of them."""

    def __init__(self, pick: random.Random, channels: int) -> None:
        super().__init__()
        heads = pick.choice([h for h in (1, 2, 3, 4) if channels % h == 0])
        self.first = pick.random() < 0.5
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=not self.first, bias=pick.random() < 0.7)
        self.cross = pick.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.first else x
        keys = x.flip(0 if self.first else 1) * 0.5 if self.cross else x
        y = self.attention(x, keys, keys, need_weights=False)[0]
        return y.transpose(0, 1) if self.first else y


class Matrices(nn.Module):
    """Linear layers whose weights are turned, cut, joined or shared."""

    def __init__(self, pick: random.Random, channels: int) -> None:
        super().__init__()
        self.kind = pick.choice(["turned", "tied", "cut", "joined", "product", "normed"])
        self.weight = nn.Parameter(torch.randn(channels, channels) * 0.4)
        self.other = nn.Parameter(torch.randn(channels, channels) * 0.4)
        self.bias = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        w, other = self.weight, self.other
        if self.kind == "turned":
            return F.linear(F.relu(F.linear(x, w.t(), self.bias)), other)
        if self.kind == "tied":
            return F.linear(F.gelu(F.linear(x, w)), w.t(), self.bias)
        if self.kind == "cut":
            half = len(w) // 2
            return F.linear(torch.cat([F.linear(x, w[half:]), F.linear(x, w[:half]).tanh()], -1), other, self.bias)
        if self.kind == "joined":
            return F.linear(x, torch.cat([w, other], 1).reshape(len(w), 2, -1).mean(1), self.bias)
        if self.kind == "product":
            return F.relu(x @ w + self.bias) @ other
        return F.linear(x, F.normalize(w, dim=1) * self.bias[:, None])


class Cells(nn.Module):
    """A recurrent layer of any kind."""

    def __init__(self, pick: random.Random, channels: int) -> None:
        super().__init__()
        kind = pick.choice([nn.GRU, nn.RNN, nn.LSTM])
        both = pick.random() < 0.3
        self.cell = kind(channels, 3, batch_first=True, bidirectional=both, bias=pick.random() < 0.7)
        self.out = nn.Linear(6 if both else 3, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x[:, :5])[0]).mean(1, keepdim=True) + x


class Standard(nn.Module):
    """A norm written out, over the channels of each token."""

    def __init__(self, pick: random.Random, channels: int) -> None:
        super().__init__()
        self.rms = pick.random() < 0.5
        self.scale = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.scale


def token_blocks(pick: random.Random, channels: int) -> list[Callable[[], nn.Module]]:
    """Makers of blocks that keep the shape (B, N, channels)."""
    return [
        lambda: EinsumAttention(pick, channels),
        lambda: TorchAttention(pick, channels),
        lambda: Matrices(pick, channels),
        lambda: Matrices(pick, channels),
        lambda: Cells(pick, channels),
        lambda: Standard(pick, channels),
    ]
