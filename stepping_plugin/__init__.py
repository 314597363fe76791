"""SteppingNet for image classifiers in PyTorch: nested subnets that reuse each other's results.

The public names below load on first use, so that ``import stepping_plugin`` costs nothing.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from stepping_plugin.api import apply_steppingnet as apply_steppingnet
    from stepping_plugin.construction.config import ConstructionConfig as ConstructionConfig
    from stepping_plugin.errors import BudgetError as BudgetError
    from stepping_plugin.errors import CaptureError as CaptureError
    from stepping_plugin.errors import CheckpointError as CheckpointError
    from stepping_plugin.errors import NestingError as NestingError
    from stepping_plugin.errors import RecipeError as RecipeError
    from stepping_plugin.errors import SteppingError as SteppingError
    from stepping_plugin.net import SteppingNet as SteppingNet
    from stepping_plugin.net import load as load
    from stepping_plugin.training.trainer import TrainConfig as TrainConfig
    from stepping_plugin.verify import verify as verify
    from stepping_plugin.views.inspection import inspect_model as inspect_model

_HOME = {  # public name -> the module that defines it
    "BudgetError": "errors",
    "CaptureError": "errors",
    "CheckpointError": "errors",
    "ConstructionConfig": "construction.config",
    "NestingError": "errors",
    "RecipeError": "errors",
    "SteppingError": "errors",
    "SteppingNet": "net",
    "TrainConfig": "training.trainer",
    "apply_steppingnet": "api",
    "inspect_model": "views.inspection",
    "load": "net",
    "verify": "verify",
}

__all__ = ["__version__", *_HOME]

# integrations/ and recipes/ lie beside this folder in a source tree and inside it once installed.
_FOLDER = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_FOLDER, "integrations")):
    __path__.append(os.path.dirname(_FOLDER))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``stepping_plugin.verify`` the function: importing the module of that name would shadow it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
