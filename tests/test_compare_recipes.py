"""The recipes of the comparison, full-size ones included: two updates of the nets that matter, on random pictures."""

import pytest
import torch

from stepping_plugin.runs.data import DataBundle
from stepping_plugin.runs.pipeline import Run
from stepping_plugin.runs.recipe import load_recipe
from stepping_plugin.runs.recipe_schema import DataConfig
from stepping_plugin.studies.compare.dense import dense_net, dense_units
from stepping_plugin.studies.compare.methods import Job
from stepping_plugin.studies.compare.slimmable import Slimmable
from stepping_plugin.studies.compare.studies import METHODS, REFERENCE
from stepping_plugin.training.loader import TensorSet
from stepping_plugin.training.trainer import TrainConfig, Trainer

SHAPES = {"fashion_mnist": (1, 28, 10), "cifar10": (3, 32, 10), "cifar100": (3, 32, 100), "imagefolder": (3, 224, 1000)}
FAST = ["compare_lenet5"]
SLOW = [
    "compare_resnet",
    "compare_vgg",
    "compare_vgg_long",
    "compare_lenet5_full",
    "compare_vit",
    "compare_cifar10_resnet56",
    "compare_imagenet_resnet50",
    "cifar10_lenet3c1l",
    "cifar10_lenet5",
    "cifar100_vgg16",
]


def random_data(cfg: DataConfig, samples: int) -> DataBundle:
    channels, size, classes = SHAPES[cfg.name]
    size = cfg.img_size or size
    images = torch.randint(0, 256, (samples, channels, size, size), dtype=torch.uint8)
    mean = std = (0.5,) * channels
    pictures = TensorSet(images, torch.randint(0, classes, (samples,)), mean, std)
    return DataBundle(cfg.name, pictures, pictures, pictures, classes, channels, size, mean, std)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_two_updates_of_every_kind_of_net(name, tmp_path):
    small = ["device=cpu", "retrain.batch_size=2", "construction.batch_size=2"]
    recipe = METHODS["any-width"].recipe(name, small)
    run = Run(recipe, tmp_path, lambda text: None)
    run._data = random_data(recipe.data, 4)
    original = run.build_model(recipe.model, pretrained=False).eval()
    job = Job(run, METHODS[REFERENCE], original, 0.5)
    net = run.construct(original)
    assert all(0.85 * b <= m <= b for m, b in zip(net.macs, net.budgets, strict=True)), (net.macs, net.budgets)
    widths = [dense_units(job.analysis, job.macs_model, b) for b in (job.budgets[0], job.budgets[-1])]
    nets = [net, Slimmable(original, job.analysis, widths), dense_net(original, job.analysis, widths[0], seed=0)]
    config = TrainConfig.of(recipe.retrain, device="cpu", amp=False, sched="none", lr=1e-3)
    for made in nets:
        trainer = Trainer(made.train(), config, 2, teacher=original)
        batches = list(run.loader("train", 2, "retrain"))
        losses = torch.stack([trainer.update([batch]).sum() for batch in batches[:2]])
        assert len(batches) == 2 and bool(losses.isfinite().all())


def test_variants_say_what_they_are_whatever_the_recipe_says():
    for name in ("cifar10_lenet3c1l", "compare_lenet5"):
        construction = METHODS[REFERENCE].recipe(name).construction
        assert (construction.flow, construction.init, construction.band) == ("trajectory", "original", (0.8, 1.25))
        construction = METHODS["steppingnet-paper"].recipe(name).construction
        assert (construction.flow, construction.importance, construction.band) == ("paper", "per-batch", None)
        long = METHODS["steppingnet-long"].recipe(name).retrain
        assert long.epochs == round(2.5 * load_recipe(name).retrain.epochs)


def test_what_the_caller_overrides_holds_unless_a_variant_is_made_of_it():
    def construction(variant, *overrides):
        return METHODS[variant].recipe("compare_lenet5", overrides).construction

    ours = construction(REFERENCE, "construction.band=[0.5,1.5]", "construction.importance=random")
    assert (ours.band, ours.importance) == ((0.5, 1.5), "random")
    assert construction(REFERENCE, "construction.flow=paper").flow == "trajectory"
    assert construction("steppingnet-paper", "construction.band=[0.5,1.5]").band is None
