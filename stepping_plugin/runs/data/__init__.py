"""Data by name: `build_data(DataConfig(name="digits"))`.

*In memory*: `digits` (comes with scikit-learn), `fashion_mnist` (idx files), torchvision's small sets (`cifar10`,
`cifar100`, `mnist`, `kmnist`, `qmnist`, through timm, or as folders of pictures), and `imagefolder` with
`in_memory: true`. *On disk*: `imagefolder`, one subfolder per class under train/ and under val/, test/ or both, and
anything else that timm opens: `torch/imagenet`, `hfds/NAME`. Loaders: `stepping_plugin.training.loader`.
"""

from .build import build_data
from .bundle import DataBundle

__all__ = ["DataBundle", "build_data"]
