"""What stops a training, and what that leaves behind."""

from __future__ import annotations

import copy
import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from small_nets import PLAIN_SGD, assert_close, data, loader, small_model, small_net, tensors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stepping_plugin import ConstructionConfig, apply_steppingnet
from stepping_plugin.errors import CheckpointError, SteppingError
from stepping_plugin.training.batches import images_at_hand
from stepping_plugin.training.checkpoint import load_checkpoint, save_checkpoint
from stepping_plugin.training.loader import EpochLoader, TensorSet
from stepping_plugin.training.loop import CHECKPOINT, LOG, fit

SET = TensorSet(torch.zeros(8, 1, 6, 6, dtype=torch.uint8), torch.zeros(8).long(), (0.5,), (0.5,))


class Faulty:
    """A loader that does something at one batch."""

    def __init__(self, at: int, action: Callable[[Tensor], Tensor]) -> None:
        self.batches, self.at, self.action, self.given = loader(), at, action, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            self.given += 1
            yield self.action(images) if self.given == self.at else images, labels


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    net = small_net()
    faulty = Faulty(7, lambda images: images * math.nan)  # in the second epoch
    with pytest.raises(SteppingError, match=r"diverged.*update 7.*lr 0\.05"):
        fit(net, faulty, config=PLAIN_SGD, checkpoint_dir=tmp_path)
    state = load_checkpoint(tmp_path / CHECKPOINT)
    assert (state["epoch"], state["trainer"]["updates"]) == (1, 4)
    assert all(bool(t.isfinite().all()) for t in state["trainer"]["net"].values())
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """The last step before a checkpoint overflows: every loss so far was finite."""
    images, labels = data(8)
    config = replace(PLAIN_SGD, lr=1e38)
    with pytest.raises(SteppingError, match=r"diverged.*weight is not finite.*lr 1e\+38"):
        fit(small_net(norm=False).float(), [(1e4 * images, labels)], config=config, checkpoint_dir=tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def interrupted(images: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGINT)
    return images


def test_ctrl_c_saves_where_it_is_and_the_rest_ends_the_same(tmp_path):
    net, whole = small_net(), small_net()
    start = tensors(net)
    whole.load_state_dict(start)
    batches = Faulty(6, interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(net, batches, config=PLAIN_SGD, checkpoint_dir=tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    state = load_checkpoint(tmp_path / CHECKPOINT)
    assert (state["epoch"], state["done"], state["trainer"]["updates"]) == (1, 2, 6)
    resumed = small_net()
    resumed.load_state_dict(start)
    quiet = Faulty(0, lambda images: images)
    quiet.batches = batches.batches
    fit(resumed, quiet, config=PLAIN_SGD, checkpoint_dir=tmp_path)
    fit(whole, quiet, config=PLAIN_SGD)
    assert_close(resumed, whole, 0)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice(images: Tensor) -> Tensor:
        interrupted(interrupted(images))
        raise AssertionError("reached")

    with pytest.raises(KeyboardInterrupt):
        fit(small_net(), Faulty(2, twice), config=PLAIN_SGD, checkpoint_dir=tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(record: dict) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # what lies beyond cannot be written

    try:
        with pytest.raises(CheckpointError, match=r"cannot be written.*untouched"):
            fit(small_net(), loader(), config=PLAIN_SGD, checkpoint_dir=tmp_path, log=full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(tmp_path / CHECKPOINT)["epoch"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [CHECKPOINT, LOG]


class Untouched:
    """A loader that must not be asked for a batch."""

    def __init__(self, size: int, drop_last: bool = False) -> None:
        self.batch_size, self.sampler, self.drop_last = size, range(33), drop_last

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise AssertionError("training has begun")


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "batches", [Untouched(8), Untouched(1), loader(8, 33), [data(8), data(1)], EpochLoader(SET, 1, train=True)]
)
def test_batches_of_one_are_refused_before_training_where_batch_norm_learns(norm, batches):
    frozen = small_model().double().eval()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode, own=module: own  # stays in eval mode
    for net in (small_net(norm=norm), small_model().double() if norm else frozen):
        if norm:
            with pytest.raises(SteppingError, match=r"training loader: .*batch of one.*drop_last"):
                fit(net, batches, config=PLAIN_SGD)
        elif not isinstance(batches, Untouched):
            assert len(fit(net, batches, config=PLAIN_SGD).epochs) == 2
    with pytest.raises(AssertionError, match="has begun"):  # the last batch is left out
        fit(small_net(), Untouched(8, drop_last=True), config=PLAIN_SGD)


class Single:
    """One picture, of which no attribute tells."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield data(1)


def test_a_batch_of_one_that_no_loader_told_of_is_refused_when_it_comes():
    with pytest.raises(SteppingError, match="batch of one"):
        fit(small_net(), Single(), config=PLAIN_SGD)


class Unsized:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(loader())


class Lying(Unsized):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())


NO_JSON = np.float32(0)


def labelled(labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(data(8)[0], labels)]


@pytest.mark.parametrize(
    ("train_loader", "options", "words"),
    [
        ([], {}, ["training loader is empty"]),
        (loader(64, drop_last=True), {}, ["training loader is empty", "drop_last"]),
        (Unsized(), {}, ["no length"]),
        (Lying(), {}, ["no batch"]),
        (loader(), {"val_loader": []}, ["validation loader gives no batch"]),
        (loader(), {"teacher": small_model(classes=9)}, ["teacher", "(8, 9)", "(8, 4)", "num_classes=4"]),
        (loader(), {"net": small_model()[:-2].double()}, ["no classifier", "(8, 12, 1, 1)"]),
        (labelled(torch.full((8,), 4)), {}, ["labels do not fit", "labels 4 to 4", "0 to 3"]),
        (labelled(torch.rand(8, 9)), {}, ["labels do not fit", "(8, 9)", "(8, 4)"]),
        (loader(), {"subnet_weights": [1.0]}, ["subnet weights", "3 numbers"]),
        ([data(8), (data(8)[0], torch.full((8,), 4))], {}, ["labels do not fit", "labels 4 to 4", "0 to 3"]),
        ([data(8), (data(8)[0], torch.full((8,), -100))], {}, ["labels -100 to -100"]),
        ([data(8), (data(8)[0], torch.arange(7))], {}, ["labels do not fit the images", "(7,) for 8 images"]),
        ([data(8), (data(8)[0][:0], data(8)[1][:0])], {}, ["empty batch", "(0, 1, 6, 6)"]),
        ([(data(8)[0], data(8)[1] > 1)], {}, ["labels do not fit", "bool"]),
        ([(data(8)[0], data(8)[1].view(8, 1))], {}, ["labels do not fit the net", "(8, 1)"]),
        ([(*data(8), None)], {}, ["not a batch", "3 parts", "(images, labels)"]),
        ([{"images": 1}], {}, ["not a batch", "dict"]),
        ([tuple(t.numpy() for t in data(8))], {}, ["ndarray", "torch.as_tensor"]),
        (loader(), {"val_loader": labelled(torch.full((8,), 4))}, ["labels do not fit", "labels 4 to 4"]),
        (loader(), {"net": small_model().double().requires_grad_(False)}, ["nothing to train", "requires_grad_"]),
        (loader(), {"teacher": "resnet18"}, ["teacher", "str", "torch.nn.Module"]),
        (loader(), {"config": {}}, ["config", "dict", "TrainConfig"]),
        (loader(), {"config": replace(PLAIN_SGD, device="banana")}, ["device", "banana", "expected cpu"]),
        (loader(), {"config": replace(PLAIN_SGD, device="cuda:99")}, ["device", "cuda:99"]),
        (loader(), {"config": replace(PLAIN_SGD, device="meta")}, ["device", "meta"]),
        (loader(), {"config": replace(PLAIN_SGD, opt="sdg")}, ["opt=sdg", "no such optimizer"]),
        (loader(), {"config": replace(PLAIN_SGD, opt_kwargs={"dampening": NO_JSON})}, ["config", "float32"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(train_loader, options, words):
    given = {"net": small_net(), "config": PLAIN_SGD, **options}
    with pytest.raises(SteppingError) as caught:
        fit(train_loader=train_loader, **given)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "change", [{"epochs": -1}, {"epochs": 1.5}, {"lr": math.nan}, {"lr": math.inf}, {"seed": "a"}, {"device": 3},
               {"grad_accum_steps": 0}, {"amp_dtype": "float8"}, {"clip_grad": -1.0}, {"weight_decay": -1.0}]
)  # fmt: skip
def test_hyperparameters_out_of_range(change):
    with pytest.raises(SteppingError, match=f"config.{next(iter(change))}: out of range"):
        replace(PLAIN_SGD, **change)


def test_labels_of_other_whole_numbers_are_converted():
    images, labels = data(8)
    net = small_net()
    histories = [
        fit(copy.deepcopy(net), [(images, labels.to(kind))], config=PLAIN_SGD).epochs[-1]["train_loss"]
        for kind in (torch.int64, torch.int32, torch.uint8)
    ]
    assert histories[0] == histories[1] == histories[2]


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "settings": lambda s: s.pop("settings"),
    "random": lambda s: s.pop("random"),
    "history": lambda s: s.update(history=None),
    "epoch": lambda s: s.update(epoch="x"),
    "epoch 1000000 of 2": lambda s: s.update(epoch=10**6),
    "epoch: ": lambda s: s.update(epoch=-1),
    "5 batches of 4": lambda s: s.update(done=5, losses=torch.zeros(3)),
    "updates": lambda s: s["trainer"].update(updates=3),
    "losses": lambda s: s.update(losses=torch.zeros(1)),
    "generators": lambda s: s["random"][0].update(torch=torch.zeros(3)),
    "0 processes": lambda s: s.update(random=[]),
    "optimizer": lambda s: s["trainer"]["optimizer"].update(param_groups=[]),
    "momentum_buffer": lambda s: s["trainer"]["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(1)),
    "net": lambda s: s["trainer"].update(net=[1]),
    "another net": lambda s: s["trainer"]["net"].pop("unit_levels"),
    "more": lambda s: s.update(more=1),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_state_in_a_whole_checkpoint_is_refused(tmp_path, what):
    fit(small_net(), loader(), config=PLAIN_SGD, checkpoint_dir=tmp_path)
    state = load_checkpoint(tmp_path / CHECKPOINT)
    DAMAGE[what](state)
    save_checkpoint(tmp_path / CHECKPOINT, state)
    net = small_net()
    before = tensors(net)
    with pytest.raises(CheckpointError) as caught:
        fit(net, loader(), config=PLAIN_SGD, checkpoint_dir=tmp_path)
    assert CHECKPOINT in str(caught.value) and what.replace("0 processes", "random") in str(caught.value)
    torch.testing.assert_close(tensors(net), before, rtol=0, atol=0)


def test_checkpoints_nested_without_end_are_refused(tmp_path):
    from stepping_plugin.tensorfile import write_tensors

    for text in ("[" * 100_000, "[]", "null", '{"$": "tensor"}', '{"$": "tuple", "items": 3}', '{"a": {"$": "dict"}}'):
        texts = {"format": "stepping-plugin checkpoint 2", "state": text}
        write_tensors(tmp_path / CHECKPOINT, {"x": torch.zeros(1)}, texts)
        with pytest.raises(CheckpointError, match=CHECKPOINT):
            load_checkpoint(tmp_path / CHECKPOINT)


def test_the_image_size_is_that_of_the_loader_and_no_generator_moves():
    """Half the size of the model's own configuration; the batches that follow are those that would have come."""
    model = timm.create_model("test_resnet", num_classes=3)
    data = TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 3)
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))
    state, own = torch.get_rng_state(), loader.generator.get_state()
    found = images_at_hand(None, loader)
    assert found.shape == (4, 3, 32, 32)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(own, loader.generator.get_state())
    config = ConstructionConfig(iterations=1, batches=1, cooldown_iterations=0)
    assert apply_steppingnet(model, [0.5], train_loader=loader, config=config).analysis.image_size == (3, 32, 32)
    assert apply_steppingnet(model, [0.5], calibration=data.tensors[0]).analysis.image_size == (3, 32, 32)
    assert images_at_hand(iter([])) is None and images_at_hand([]) is None
