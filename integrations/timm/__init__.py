"""timm face of the plugin. Importing it registers the paper's networks with timm's model registry.

After `import stepping_plugin.integrations.timm`, `timm.create_model("lenet3c1l", width_mult=1.8)` works like
any other timm model.
"""

from stepping_plugin.integrations.timm.models import (
    DigitsNet,
    LeNet3C1L,
    LeNet5,
    ResNetTiny,
    VGGCifar,
)

__all__ = ["DigitsNet", "LeNet3C1L", "LeNet5", "ResNetTiny", "VGGCifar"]
