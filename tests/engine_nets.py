"""What test_engine.py and test_predict.py share."""

import pytest
import torch
from nets import images, make, nested

from stepping_plugin.engine import compile_engine

TOLERANCE = 1e-9


def scores_of(net, x):
    with torch.no_grad():
        return net.eval().forward_all(x)


@pytest.fixture(scope="module")
def small():
    """A net, its engine, eight images and their scores; not to be changed."""
    net = nested(make("test_resnet"), seed=3).eval()
    x = images(net.analysis.image_size, 8)
    return net, compile_engine(net), x, scores_of(net, x)
