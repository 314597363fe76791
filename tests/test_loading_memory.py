"""Loading takes memory in proportion to the file, whatever the net was made from on the way."""

import torch
from torch import nn

from stepping_plugin import ConstructionConfig, apply_steppingnet, load, serialization
from stepping_plugin.nested.module import sliced_copy


def test_weights_of_ancestors_are_never_made(tmp_path, monkeypatch):
    """A net that was widened, then cut to a tenth: what lies between is known by its shapes only."""
    torch.manual_seed(0)
    middle = nn.Linear(64, 64)
    layers = nn.Conv2d(1, 64, 3), nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), middle, nn.Linear(64, 4)
    model, images = nn.Sequential(*layers).eval(), torch.randn(3, 1, 6, 6)
    config = ConstructionConfig(expansion=3.0)
    net = apply_steppingnet(model, ["5%", "10%"], example_inputs=images, config=config).compact().eval()
    net.save(tmp_path / "net.safetensors")
    made = []

    def watched(owner, slices):
        result = sliced_copy(owner, slices)
        made.extend([*owner.parameters(), *owner.buffers(), *result.parameters(), *result.buffers()])
        return result

    monkeypatch.setattr(serialization, "sliced_copy", watched)
    loaded = load(tmp_path / "net.safetensors", model)
    assert len(loaded.lineage) == 2 and max(t.numel() for t in made) >= 4 * 64 * 64
    assert all(tensor.is_meta for tensor in made)
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    assert torch.equal(loaded.forward_all(images), net.forward_all(images))
