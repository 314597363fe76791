"""Models as users bring them, after public reports (named), rebuilt with own code: what `test_situations` converts."""

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F


class Body(nn.Module):
    """Two convolutions with an operator between them, a mean, a classifier."""

    def __init__(self, op, **parts) -> None:
        super().__init__()
        self.op = op
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 4)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        x = self.op(torch.relu(self.first(x)) + 0.1)
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class Siamese(nn.Module):
    """One backbone with batch norm on both pictures (VainF/Torch-Pruning #172, keras-team/keras #8794)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8, 2)

    def one(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.one(x[:, :3]) - self.one(x[:, 3:])).abs())


class TwoViews(Siamese):
    """Both views as one batch, split again behind the backbone (PatrickHua/SimSiam #1)."""

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.one(torch.cat([x[:, :3], x[:, 3:]])).chunk(2)
        return self.head(one * other)


class Spectral(nn.Module):
    """State that train mode updates in every one of three calls: batch norm and a spectral norm's vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8, momentum=0.3), nn.Linear(8, 4)
        self.again = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        for _ in range(3):
            x = torch.relu(self.norm(self.again(x)))
        return self.head(x.mean((2, 3)))


class Cells(nn.Module):
    """A recurrent cell in a loop, its first state left out or given (pytorch/pytorch #21909, #37318, #42785)."""

    def __init__(self, cell: nn.Module, given: bool = False) -> None:
        super().__init__()
        self.conv, self.cell, self.head, self.given = nn.Conv2d(3, 8, 4, 4), cell, nn.Linear(6, 4), given

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(x.shape[0], 6, dtype=x.dtype)
        state = (zeros, zeros) if isinstance(self.cell, nn.LSTMCell) else zeros
        state = state if self.given else None
        for step in self.conv(x).flatten(2).permute(2, 0, 1)[:5]:
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class OwnCell(nn.Module):
    """A recurrent layer by hand; its first state is zero, or learned (microsoft/onnxruntime #11085)."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.conv, self.enter, self.again = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 6), nn.Linear(6, 6)
        self.start, self.head = nn.Parameter(torch.randn(1, 6)) if learned else None, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 6) if self.start is None else self.start.expand(x.shape[0], -1)
        for step in self.conv(x).flatten(2).permute(2, 0, 1)[:4]:
            state = torch.tanh(self.enter(step) + self.again(state))
        return self.head(state)


class ConvLstm(nn.Module):
    """The same convolution on the features beside a state that starts at zero (Convolutional-LSTM-in-Tensorflow #3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gates, self.head = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(12, 24, 3, 1, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        state = torch.zeros(x.shape[0], 6, *x.shape[2:], dtype=x.dtype, device=x.device)
        cell = torch.zeros_like(state)
        for _ in range(3):
            enter, forget, out, new = self.gates(torch.cat([x, state], 1)).chunk(4, 1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            state = out.sigmoid() * cell.tanh()
        return self.head(state.mean((2, 3)))


class Coarse(nn.Module):
    """Coarse scores feed the fine head, both are returned side by side (VainF/Torch-Pruning #481)."""

    def __init__(self, hidden: bool = False, both: bool = True) -> None:
        super().__init__()
        self.conv, self.coarse, self.both = nn.Conv2d(3, 12, 3, 2, 1), nn.Linear(12, 3), both
        self.hidden = nn.Sequential(nn.Linear(15, 9), nn.ReLU()) if hidden else nn.Identity()
        self.fine = nn.Linear(9 if hidden else 15, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.conv(x)).mean((2, 3))
        coarse = self.coarse(features)
        fine = self.fine(self.hidden(torch.cat([features, coarse.softmax(1)], 1)))
        return torch.cat([coarse, fine], 1) if self.both else fine


class Refined(nn.Module):
    """Scores corrected in a loop from themselves and the features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.guess, self.again = nn.Conv2d(3, 12, 3, 2, 1), nn.Linear(12, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.conv(x)).mean((2, 3))
        scores = self.guess(features)
        for _ in range(2):
            scores = scores + self.again(torch.cat([scores.tanh(), features], 1))
        return scores


class GlobalFilter(nn.Module):
    """Complex weights in the frequency domain, channels last (raoyongming/GFNet #7)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 4)
        self.filter = nn.Parameter(torch.randn(8, 5, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        y = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.filter)
        return self.head((x + torch.fft.irfft2(y, s=(8, 8), dim=(1, 2), norm="ortho")).mean((1, 2)))


class FourierUnit(nn.Module):
    """Real and imaginary parts as channels of a convolution (pytorch/executorch #1362, Tencent/ncnn #5065)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(12, 12, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        b, c, h, w = x.shape
        y = torch.view_as_real(torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")).permute(0, 1, 4, 2, 3).contiguous()
        y = torch.relu(self.mix(y.view(b, 2 * c, h, -1))).view(b, c, 2, h, -1).permute(0, 1, 3, 4, 2).contiguous()
        y = torch.fft.irfftn(torch.complex(y[..., 0], y[..., 1]), s=(h, w), dim=(-2, -1), norm="ortho")
        return self.head((x + y).mean((2, 3)))


def amplitude_and_phase(x: Tensor) -> Tensor:
    """c-yn/OKNet #5."""
    y = torch.fft.fft2(x)
    return torch.fft.ifft2(torch.polar(y.abs().log1p(), y.angle())).real


def long_convolution(x: Tensor) -> Tensor:
    """pytorch/pytorch #113444."""
    size = x.shape[-1]
    y = torch.fft.rfft(x, n=2 * size)
    return torch.fft.irfft(y * y.conj(), n=2 * size, norm="forward")[..., :size]


def coordinates(x: Tensor) -> Tensor:
    """Coordinates as channels: arange, meshgrid, stack (microsoft/nni #4885)."""
    b, _, h, w = x.shape
    grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).to(x.dtype)
    return x * torch.cat([x, grid.expand(b, -1, -1, -1)], 1)[:, 2:].mean(1, keepdim=True)


class Masked(Body):
    """A one-channel mask times all channels (VainF/Torch-Pruning #510)."""

    def __init__(self) -> None:
        super().__init__(lambda x: x, mask=nn.Conv2d(3, 1, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((torch.relu(self.first(x)) * self.mask(x).sigmoid()).mean((2, 3)))


class Upwards(Body):
    """A linear layer viewed as a picture, and transposed convolutions (VainF/Torch-Pruning #125)."""

    def __init__(self) -> None:
        super().__init__(lambda x: x, wide=nn.Linear(8, 6 * 4), up=nn.ConvTranspose2d(6, 8, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).mean((2, 3))
        return self.head(torch.relu(self.up(torch.relu(self.wide(x)).view(-1, 6, 2, 2))).mean((2, 3)))


class Cross(nn.Module):
    """Chunks of which every later one is processed further, all concatenated (VainF/Torch-Pruning #147)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 8, 3, 2, 1), nn.ModuleList(nn.Conv2d(4, 4, 3, 1, 1) for _ in range(2))
        self.last, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(torch.relu(self.first(x)).chunk(2, 1))
        parts.extend(torch.relu(layer(parts[-1])) for layer in self.inner)
        return self.head(torch.relu(self.last(torch.cat(parts, 1))).mean((2, 3)))


class Transformer(nn.Module):
    """A spatial transformer (microsoft/onnxruntime #7969): what finds the place is read by six pinned numbers only."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.theta = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 6)
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.theta(torch.relu(self.place(x)).mean((2, 3))).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


class DeepTransformer(Transformer):
    """Two layers and a branch find the place: all units in front of the pinned ones are useless above level 1."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.place = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 8, 3, 1)
        self.side = nn.Conv2d(3, 8, 7, 2)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.relu(self.place(torch.relu(self.before(x)))) + self.side(x)
        theta = self.theta(place.mean((2, 3))).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


class Selected(nn.Module):
    """The best places only (sort has no rule): the layer in front of it is pinned, what that reads is a dead end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.score, self.wide = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, 2, 1), nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(torch.relu(self.first(x))).flatten(2).sort(2)[0][..., -1]
        return self.head(torch.cat([best, torch.relu(self.wide(x)).mean((2, 3))], 1))


class Deformable(Body):
    """VainF/Torch-Pruning #413."""

    def __init__(self) -> None:
        super().__init__(lambda x: x, offset=nn.Conv2d(8, 18, 3, 1, 1))
        self.bend = torchvision.ops.DeformConv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.second(torch.relu(self.bend(x, self.offset(x))))).mean((2, 3)))


class PerSample(Body):
    """A kernel per picture, the batch folded into groups (onnx/onnx #3843)."""

    def __init__(self) -> None:
        super().__init__(lambda x: x, kernel=nn.Linear(8, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        b, c, h, w = x.shape
        kernels = self.kernel(x.mean((2, 3))).view(b * c, c, 1, 1)
        x = F.conv2d(x.reshape(1, b * c, h, w), kernels, groups=b).view(b, c, h, w)
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class Bilinear(Body):
    """Outer products of channels (abhaydoke09/Bilinear-CNN-TensorFlow #18)."""

    def __init__(self) -> None:
        super().__init__(lambda x: x)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x))).flatten(2)
        return self.head(torch.bmm(x, x.transpose(1, 2)).flatten(1))


class SpatialGate(Body):
    """Mean and maximum over the channels, a convolution and its batch norm: values per level (CBAM, resnest14d)."""

    def __init__(self) -> None:
        super().__init__(lambda x: x, norm=nn.BatchNorm2d(1))
        self.gate = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        x = x * torch.sigmoid(self.norm(self.gate(pooled)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class Ghost(Body):
    """Batch norm of parts of the batch (dreamquark-ai/tabnet #384)."""

    def __init__(self) -> None:
        super().__init__(lambda x: x, norm=nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.cat([self.norm(part) for part in x.chunk(2, 0)])  # here
        return self.head(x.mean((2, 3)))


class Sequence(Cells):
    """Scores per time step (VainF/Torch-Pruning #44)."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.conv(x).flatten(2).permute(2, 0, 1))[0])
