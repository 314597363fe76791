"""The training loop against loops written by hand, and what it does when things go wrong."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stepping_plugin.errors import CheckpointError, SteppingError
from stepping_plugin.net import SteppingNet
from stepping_plugin.training.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from stepping_plugin.training.loop import CHECKPOINT, LOG, TrainConfig, Trainer, evaluate, fit
from stepping_plugin.training.losses import SubnetLoss, cross_entropy
from stepping_plugin.training.suppression import Suppression
from stepping_plugin.units.analysis import Analysis, analyse

CLASSES, SIZE = 4, (1, 6, 6)
PLAIN_SGD = TrainConfig(epochs=2, opt="momentum", lr=0.05, sched="none", weight_decay=0.0)


def small_model(norm: bool = True, classes: int = CLASSES) -> nn.Module:
    normalise: Callable[[int], nn.Module] = nn.BatchNorm2d if norm else lambda width: nn.Identity()
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), normalise(8), nn.ReLU(), nn.Conv2d(8, 12, 3), normalise(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, classes),
    )  # fmt: skip


_analyses: dict[bool, Analysis] = {}


def small_net(norm: bool = True, subnets: int = 3) -> SteppingNet:
    model = small_model(norm).double()
    if norm not in _analyses:
        _analyses[norm] = analyse(model, SIZE)
    levels = torch.arange(_analyses[norm].num_units) % (subnets + 1) + 1
    return SteppingNet(model, _analyses[norm], levels, [1] * subnets, 1)


def data(samples: int = 32, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Pictures of four patterns."""
    labels = torch.arange(samples) % CLASSES
    patterns = torch.randn(CLASSES, *SIZE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return patterns[labels] + noise * torch.randn(samples, *SIZE, dtype=torch.float64), labels


def loader(batch_size: int = 8, samples: int = 32, **kwargs: Any) -> DataLoader:
    return DataLoader(TensorDataset(*data(samples)), batch_size, **kwargs)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_close(net: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(tensors(net), tensors(other), rtol=0, atol=tolerance)


# --- What it computes


def by_hand(net: SteppingNet, batches: list, optimizer: torch.optim.Optimizer, teacher: nn.Module | None) -> None:
    """`fit` with its defaults gamma 0.4 and beta 0.9, spelled out."""
    suppression = Suppression(net, 0.9, optimizer=optimizer)
    net.train()
    for images, labels in batches:
        guide = None if teacher is None else teacher(images).detach()
        suppression.combine(SubnetLoss()(net.forward_all(images), labels, guide)).backward()
        suppression.scale_gradients()
        with suppression.step():
            optimizer.step()
        optimizer.zero_grad()
    net.eval()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("opt", ["momentum", "adamw"])
def test_fit_equals_a_loop_written_by_hand(opt, guided):
    net, batches = small_net(), loader()
    teacher = small_model().double().eval() if guided else None
    other = copy.deepcopy(net)
    if opt == "momentum":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(other.parameters(), lr=0.05, weight_decay=0)
    fit(net, batches, config=replace(PLAIN_SGD, opt=opt), teacher=teacher)
    by_hand(other, list(batches) * 2, optimizer, teacher)
    assert_close(net, other)
    assert not net.training


def test_an_ordinary_model_is_trained_as_usual():
    model = small_model().double()
    other, batches = copy.deepcopy(model), loader()
    history = fit(model, batches, batches, PLAIN_SGD)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    for images, labels in list(batches) * 2:
        optimizer.zero_grad()
        F.cross_entropy(other(images), labels).backward()
        optimizer.step()
    assert_close(model, other)
    correct = [int((other.eval()(x).argmax(1) == y).sum()) for x, y in batches]
    assert history.accuracy == [sum(correct) / 32]


def test_sequential_updates_go_through_the_subnets_in_ascending_order():
    net, batches = small_net(), loader()
    other = copy.deepcopy(net)
    config = TrainConfig(epochs=1, opt="momentum", lr=0.05, sched="none", weight_decay=0.0)
    fit(net, batches, config=config, sequential=True, beta=0.5)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    suppression = Suppression(other, 0.5, mode="gradient")
    other.train()
    for images, labels in batches:
        for subnet in (1, 2, 3):
            optimizer.zero_grad()
            F.cross_entropy(other.forward_all(images)[subnet - 1], labels).backward()
            suppression.scale_gradients(subnet)
            optimizer.step()
    assert_close(net, other)


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    net = small_net(norm=False)
    other, samples = copy.deepcopy(net), data(24)
    fit(net, DataLoader(TensorDataset(*samples), 4), config=TrainConfig(epochs=2, grad_accum_steps=3))
    fit(other, DataLoader(TensorDataset(*samples), 12), config=TrainConfig(epochs=2))
    assert_close(net, other)


def test_an_incomplete_group_of_batches_counts_in_full():
    net = small_net(norm=False)
    trainer = Trainer(net, PLAIN_SGD, 1)
    other = copy.deepcopy(net)
    batches = list(loader(8, 16))
    fit(other, batches, config=replace(PLAIN_SGD, epochs=1, grad_accum_steps=3))
    net.train()
    trainer.update([(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))])
    assert_close(net, other)


def test_clipping_bounds_the_update_of_suppressed_gradients():
    net = small_net(norm=False)
    before = copy.deepcopy(net)
    config = TrainConfig(opt="momentum", lr=1.0, momentum=0.0, sched="none", weight_decay=0.0, clip_grad=1e-3)
    Trainer(net.train(), config, 1).update([data()])
    moved = [(a - b).detach() for a, b in zip(net.parameters(), before.parameters())]
    assert math.sqrt(sum(float((m**2).sum()) for m in moved)) == pytest.approx(1e-3, rel=1e-5)


def test_warm_up_and_cosine_follow_the_updates():
    rates: list[float] = []
    net = small_net(norm=False)
    config = TrainConfig(epochs=4, lr=0.1, warmup_epochs=1, warmup_lr=0.01, min_lr=0.001)
    trainer = Trainer(net.train(), config, 4)
    for _ in range(16):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.update([data(4)])
    assert rates[:4] == pytest.approx([0.01 + 0.0225 * k for k in range(4)])
    cosine = [0.001 + 0.099 * 0.5 * (1 + math.cos(math.pi * k / 16)) for k in range(4, 16)]
    assert rates[4:] == pytest.approx(cosine)
    history = fit(
        small_net(norm=False),
        loader(),
        config=TrainConfig(epochs=3, sched="step", decay_epochs=1, sched_on_updates=False),
    )
    assert [r["lr"] for r in history.epochs] == pytest.approx([0.05, 0.005, 0.0005])


def test_the_moving_average_is_what_gets_evaluated_and_left_in_the_net():
    net, batches = small_net(norm=False), loader()
    other = copy.deepcopy(net)
    config = replace(PLAIN_SGD, model_ema=True, model_ema_decay=0.7)
    history = fit(net, batches, batches, config)
    trainer, average = Trainer(other.train(), PLAIN_SGD, 4), tensors(other)
    for step, batch in enumerate(list(batches) * 2):
        trainer.update([batch])
        decay = 0.0 if step == 0 else 0.7  # timm starts from the weights after the first update
        average = {
            k: v if k == "unit_levels" else decay * average[k] + (1 - decay) * v for k, v in tensors(other).items()
        }
    torch.testing.assert_close(tensors(net), average, rtol=0, atol=1e-12)
    assert history.accuracy == evaluate(net, batches)["accuracy"]


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mixed_precision_and_channels_last_train(kind):
    net = small_net().float()
    config = TrainConfig(epochs=8, lr=0.1, amp=True, amp_dtype=kind, channels_last=True, clip_grad=5.0)
    history = fit(net, loader(shuffle=True), loader(), config)
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in net.parameters())
    assert history.accuracy is not None and history.accuracy[-1] > 0.9
    assert history.epochs[-1]["train_loss"][0] < history.epochs[0]["train_loss"][0]


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_all_subnets_learn(opt):
    net = small_net()
    config = TrainConfig(epochs=30, opt=opt, lr=0.1 if opt == "sgd" else 0.03)
    before = evaluate(net, loader())["accuracy"]
    history = fit(net, loader(shuffle=True), loader(), config, from_largest=True)
    assert history.accuracy is not None
    assert max(before) < 0.6 < 0.7 < min(history.accuracy) and max(history.accuracy) > 0.9


def test_timm_mixup_gives_soft_targets():
    net = small_net()
    mixup = Mixup(mixup_alpha=0.4, num_classes=CLASSES)
    history = fit(net, loader(shuffle=True), loader(), TrainConfig(epochs=8, lr=0.1), mixup=mixup)
    assert history.accuracy is not None and history.accuracy[-1] > 0.85


def test_evaluation_counts_every_subnet_and_restores_the_mode():
    net = small_net().train()
    batches = loader(5, 32)
    result = evaluate(net, batches)
    assert net.training
    net.eval()
    images, labels = data_of(batches)
    for subnet in (1, 2, 3):
        net.active_subnet = subnet
        assert result["accuracy"][subnet - 1] == float((net(images).argmax(1) == labels).double().mean())
        assert result["loss"][subnet - 1] == pytest.approx(F.cross_entropy(net(images), labels).item(), rel=1e-12)


def data_of(batches: DataLoader) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


def test_hyperparameters_are_read_from_a_section_of_a_recipe():
    from stepping_plugin.runs.recipe_schema import Retrain

    config = TrainConfig.of(Retrain(epochs=3, opt="adamw", amp=True), device="cpu")
    assert (config.epochs, config.opt, config.amp, config.device) == (3, "adamw", True, "cpu")


# --- Log and checkpoints


def test_log_and_history_agree(tmp_path):
    seen: list[dict] = []
    history = fit(small_net(), loader(), loader(), PLAIN_SGD, checkpoint_dir=tmp_path, log=seen.append)
    assert [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()] == history.epochs == seen
    record = history.epochs[-1]
    assert (record["epoch"], record["updates"], len(record["accuracy"]), len(record["train_loss"])) == (
        2,
        8,
        3,
        3,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [CHECKPOINT, LOG]


def test_a_finished_run_is_found_again(tmp_path):
    net = small_net()
    start = copy.deepcopy(net)
    config = TrainConfig(epochs=2, model_ema=True, model_ema_decay=0.9)
    history = fit(net, loader(), loader(), config, checkpoint_dir=tmp_path)
    again = fit(start, loader(), loader(), config, checkpoint_dir=tmp_path)
    assert again.epochs == history.epochs
    assert_close(start, net, 0)
    anew = small_net()
    assert fit(anew, loader(), loader(), config, checkpoint_dir=tmp_path, resume=False).epochs != history.epochs


def test_checkpoints_give_back_what_they_were_given(tmp_path):
    state = {
        "tensors": [torch.randn(3, 2).t(), torch.tensor(2.5), torch.arange(4), torch.tensor([True])],
        "numbers": {0: (1, 2.0, None), 7: {"nan": math.nan, "big": 2**70, "tiny": 5e-324}},
        "text": 'quotes " and $ and ü',
        "shared": (x := torch.zeros(2), x),
    }  # fmt: skip
    save_checkpoint(tmp_path / "deep" / "c", state)
    got = load_checkpoint(tmp_path / "deep" / "c")
    torch.testing.assert_close(got["tensors"], state["tensors"], rtol=0, atol=0)
    assert got["numbers"][0] == (1, 2.0, None)
    assert math.isnan(got["numbers"][7].pop("nan")) and got["numbers"][7] == {"big": 2**70, "tiny": 5e-324}
    assert got["text"] == state["text"] and isinstance(got["shared"], tuple)
    with pytest.raises(CheckpointError, match=r"/a/1.*set"):
        save_checkpoint(tmp_path / "c", {"a": [1, {2}]})


def test_random_generators_continue(tmp_path):
    save_checkpoint(tmp_path / "c", random_state())

    def draw() -> list[float]:
        return [random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))]

    first = [draw(), draw()]
    restore_random_state(load_checkpoint(tmp_path / "c"))
    assert [draw(), draw()] == first


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / CHECKPOINT
    fit(small_net(), loader(), config=PLAIN_SGD, checkpoint_dir=tmp_path)
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(path.read_bytes()[: 5000 if damage == "cut" else 0])
    with pytest.raises(CheckpointError, match=CHECKPOINT):
        fit(small_net(), loader(), config=PLAIN_SGD, checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": replace(PLAIN_SGD, lr=0.1)}, ["config.lr was 0.05, is 0.1"]),
        ({"beta": 0.5, "gamma": 0.1}, ["beta was 0.9", "loss.gamma was 0.4, is 0.1"]),
        ({"train_loader": loader(4)}, ["batches per epoch was 4, is 8"]),
        ({"net": small_net(subnets=2)}, ["another net"]),
        ({"net": small_model().double()}, ["another net"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, words):
    given: dict[str, Any] = {"net": small_net(), "train_loader": loader(), "config": PLAIN_SGD}
    fit(**given, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError) as caught:
        fit(**{**given, "net": small_net(), **change}, checkpoint_dir=tmp_path)
    assert all(word in str(caught.value) for word in words)


# --- Faults


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


def test_batch_norm_refuses_a_batch_of_one_and_others_take_it():
    with pytest.raises(SteppingError, match=r"batch of one.*drop_last"):
        fit(small_net(), loader(8, 33), config=PLAIN_SGD)
    with pytest.raises(SteppingError, match="batch of one"):
        fit(small_model().double(), loader(1), config=PLAIN_SGD)
    assert len(fit(small_net(norm=False), loader(8, 33), config=PLAIN_SGD).epochs) == 2


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


def test_the_teacher_keeps_its_mode_and_learns_nothing():
    teacher = small_model().double().train()
    before = tensors(teacher)
    fit(small_net(), loader(), config=PLAIN_SGD, teacher=teacher)
    assert teacher.training
    torch.testing.assert_close(tensors(teacher), before, rtol=0, atol=0)


def test_no_epochs_means_no_training():
    net = small_net()
    before = tensors(net)
    assert fit(net, loader(), config=TrainConfig(epochs=0)).epochs == []
    torch.testing.assert_close(tensors(net), before, rtol=0, atol=0)


def test_the_losses_of_an_update_are_those_before_it():
    net = small_net().train()
    batch = data()
    expected = cross_entropy(copy.deepcopy(net).forward_all(batch[0]), batch[1])
    torch.testing.assert_close(Trainer(net, PLAIN_SGD, 1).update([batch]), expected.detach())
