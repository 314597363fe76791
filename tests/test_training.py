"""The training loop against loops written by hand, and what it does when things go wrong."""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import CLASSES, PLAIN_SGD, assert_close, data, loader, small_model, small_net, tensors
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stepping_plugin.errors import CheckpointError
from stepping_plugin.net import SteppingNet
from stepping_plugin.training.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from stepping_plugin.training.loop import CHECKPOINT, LOG, TrainConfig, Trainer, evaluate, fit
from stepping_plugin.training.losses import SubnetLoss, cross_entropy
from stepping_plugin.training.suppression import Suppression


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
