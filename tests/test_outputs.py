"""Models whose result is not one vector of class scores: maps, several outputs, feature maps (float64)."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from nets import images, nested, randomise, relative
from output_nets import NETS, SIZE
from torch import Tensor, nn

from stepping_plugin import ConstructionConfig, SteppingError, TrainConfig, apply_steppingnet, load, verify
from stepping_plugin.engine import load_engine
from stepping_plugin.graph.labels import Role
from stepping_plugin.graph.structure import map_tensors, tensors_of
from stepping_plugin.studies.coverage.executed import executed_macs

N = 3
EXACT = 1e-12


@cache
def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(NETS[name][0]()).double().eval()


def net_of(name: str, seed: int | None = 0):
    return nested(made(name), N, seed, SIZE)


def shape_of(result: object) -> object:
    """A result with sizes in place of its tensors."""
    return map_tensors(lambda t: tuple(t.shape), result)


def apart(a: object, b: object) -> float:
    pairs = list(zip(tensors_of(a), tensors_of(b), strict=True))
    return max((relative(x.double(), y.double()) for x, y in pairs), default=0.0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETS)
def test_all_at_level_one_is_the_original(name, training):
    model, net = copy.deepcopy(made(name)).train(training), net_of(name, None).train(training)
    x = images(SIZE, 3)
    expected, got = model(x), net.forward_all(x)
    assert type(got) is type(expected)
    assert shape_of(got) == map_tensors(lambda t: (N, *t.shape), expected)
    for i in range(N):
        assert apart(map_tensors(lambda t, i=i: t[i], got), expected) < EXACT
    sum(t.double().square().mean() for t in tensors_of(expected) if t.requires_grad).backward()
    sum(t[-1].double().square().mean() for t in tensors_of(got) if t.requires_grad).backward()
    for (path, p), q in zip(model.named_parameters(), net.model.parameters(), strict=True):
        if p.grad is not None:
            assert relative(q.grad, p.grad) < 1e-9, path
    assert all(relative(b, net.model.get_buffer(n)) < EXACT for n, b in model.named_buffers() if "running" in n)


@pytest.mark.parametrize("name", NETS)
def test_subnets_are_nested_and_every_form_of_them_agrees(name):
    net = net_of(name)
    x = images(SIZE, 2)
    report = verify(net, x)  # also standalone subnets and the engine
    assert min(report.response) > 1e-6 and len(report.engine_error) == N
    engine = net.deploy()
    assert executed_macs(engine, x[:1]) == engine.macs == net.macs
    with torch.no_grad():
        every = net.forward_all(x)
        for i in range(1, N + 1):
            net.active_subnet = i
            assert apart(net(x), map_tensors(lambda t, i=i: t[i - 1], every)) == 0


@pytest.mark.parametrize("name", NETS)
def test_heads_are_whole_and_units_leave_up_to_their_level(name):
    net = net_of(name)
    program, heads = net.analysis.eval_program, NETS[name][1]
    assert {n.meta["module"] for n in program.operators() if n.meta["role"] == Role.HEAD} == heads
    every = tensors_of(net.forward_all(images(SIZE, 2)))
    found = [net._levels_of_output(node.meta) for node in program.outputs]
    assert shape_of(net.output_levels) == program.structure.build([None if f is None else (len(f),) for f in found])
    for node, output, levels in zip(program.outputs, every, found):
        if levels is None:
            continue
        assert len(levels.unique()) > 1
        for i in range(1, N + 1):
            inside = (levels <= i).reshape([-1 if d == node.meta["axis"] else 1 for d in range(output.dim() - 1)])
            assert torch.equal(output[i - 1], torch.where(inside, output[-1], 0))


@pytest.mark.parametrize("name", ["unet", "backbone", "autoencoder"])
def test_without_spare_units_outputs_keep_their_size(name):
    net = net_of(name)
    levels, x = net.levels, images(SIZE, 2)
    net.set_levels(torch.where((levels == N) & (torch.arange(len(levels)) % 2 == 0), N + 1, levels))
    compacted = net.compact()
    assert compacted.analysis.num_units < net.analysis.num_units
    assert apart(compacted.forward_all(x), net.forward_all(x)) < EXACT
    assert apart(compacted.output_levels, net.output_levels) == 0
    verify(compacted, x)
    again = compacted.compact()
    assert apart(again.forward_all(x), net.forward_all(x)) < EXACT


@pytest.mark.parametrize("name", ["detector", "backbone", "tokens"])
def test_sessions_step_keep_and_predict_with_the_models_structure(name):
    net = net_of(name)
    engine, x = net.deploy(), images(SIZE, 5)
    every = net.forward_all(x)
    session = engine.start(x)
    kept = torch.tensor([True, False, True, True, False])
    session.keep(kept)
    assert session.batch_size == 3
    session.step()
    batched = [node.meta["batch_axis"] is not None for node in net.analysis.eval_program.outputs]
    for i in (1, 2):
        for own, output, rows in zip(tensors_of(session.logits_of(i)), tensors_of(every), batched):
            assert relative(own, output[i - 1][kept] if rows else output[i - 1]) < EXACT
    turn = []

    def until(outputs: object) -> Tensor:
        assert type(outputs) is type(net(x))
        turn.append(len(tensors_of(outputs)[0]))
        return torch.arange(turn[-1]) == 0  # the first sample stops

    found = engine.predict(x, until)
    assert turn == [5, 4] and found.subnet.tolist() == [1, 2, 3, 3, 3]
    for own, output, rows in zip(tensors_of(found.logits), tensors_of(every), batched):
        for k, subnet in enumerate([1, 2, 3, 3, 3]):
            assert not rows or relative(own[k], output[subnet - 1][k]) < EXACT


def test_rules_by_name_ask_for_class_scores():
    with pytest.raises(SteppingError, match=r"one tensor \(B, classes\).*function of the outputs"):
        net_of("unet").deploy().predict(images(SIZE), {"max_prob": 0.5})
    with pytest.raises(SteppingError, match="classes are those of class scores"):
        net_of("unet").deploy().predict(images(SIZE)).classes  # noqa: B018


@pytest.mark.parametrize("name", ["detector", "auxiliary", "tokens"])
def test_files_keep_structure_and_values(name, tmp_path):
    net = net_of(name)
    x = images(SIZE, 2)
    net.save(tmp_path / "net")
    loaded = load(tmp_path / "net", made(name))
    assert apart(loaded.forward_all(x), net.forward_all(x)) < EXACT
    net.deploy().save(tmp_path / "engine")
    stepped = list(load_engine(tmp_path / "engine").steps(x))
    assert apart(stepped[-1], net(x)) < EXACT
    expected = shape_of(net(x))
    assert shape_of(stepped[-1]) == (expected._asdict() if hasattr(expected, "_asdict") else expected)


def shapes_loss(outputs: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """A criterion of somebody's own: cross entropy of the map, and of the auxiliary one with a smaller weight."""
    both = (nn.functional.cross_entropy(outputs[name], target["mask"]) for name in ("out", "aux"))
    return next(both) + 0.4 * next(both)


def pictures_with_masks() -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Bright squares on noise; their pixels are class 1."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(6):
        x, mask = 0.3 * torch.randn(8, *SIZE, generator=generator), torch.zeros(8, *SIZE[1:], dtype=torch.long)
        for k, (top, left) in enumerate(torch.randint(0, 10, (8, 2), generator=generator).tolist()):
            x[k, :, top : top + 6, left : left + 6] += 1
            mask[k, top : top + 6, left : left + 6] = 1
        batches.append((x, {"mask": mask}))
    return batches


def test_fit_and_construction_take_a_criterion_of_ones_own():
    torch.manual_seed(0)
    data = pictures_with_masks()
    config = ConstructionConfig(iterations=2, batches=2, lr=0.01)
    net = apply_steppingnet(NETS["unet"][0](), [0.3, 0.9], train_loader=data, criterion=shapes_loss, config=config)
    history = net.fit(data, data, TrainConfig(epochs=4, lr=0.01, opt="adamw"), criterion=shapes_loss)
    first, last = history.epochs[0]["val_loss"], history.epochs[-1]["val_loss"]
    assert all(b < a for a, b in zip(first, last)) and "accuracy" not in history.epochs[-1]
    masks = net.forward_all(data[0][0])["out"].argmax(2)
    assert bool(((masks == data[0][1]["mask"]).double().mean((1, 2, 3)) > 0.9).all())


def test_named_criteria_metrics_and_teachers_are_for_class_scores():
    net, data = net_of("unet").float(), pictures_with_masks()
    classes = [(x, torch.zeros(len(x), dtype=torch.long)) for x, _ in data]
    config = TrainConfig(epochs=1)
    with pytest.raises(SteppingError, match="cross_entropy is for class scores"):
        net.fit(classes, config=config)
    with pytest.raises(SteppingError, match="distillation"):
        net.fit(data, config=config, criterion=shapes_loss, teacher=copy.deepcopy(made("unet")).float())
    with pytest.raises(SteppingError, match="metrics are for class scores"):
        net.evaluate(classes)


def test_measures_of_class_scores_say_so():
    with pytest.raises(SteppingError, match=r"measured on class scores.*got outputs of dict"):
        net_of("unet").measure(images(SIZE))


def test_conversion_meets_budgets():
    net = apply_steppingnet(copy.deepcopy(made("unet")), [0.3, 0.6, 1.0], example_inputs=images(SIZE))
    assert all(m <= b for m, b in zip(net.macs, net.budgets)) and net.macs[0] < net.macs[1] < net.macs[2]


def test_a_vector_of_units_is_noted():
    with_norm = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 6), nn.BatchNorm1d(6))
    for model, noted in ((with_norm, True), (with_norm[:-1], False)):
        net = apply_steppingnet(model.eval(), [0.5], example_inputs=images(SIZE).float())
        assert any("for class scores end the model" in note for note in net.notes) == noted


class Unregistered:
    def __init__(self, value: Tensor) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Unregistered, "torch.export.register_dataclass"),
        (lambda y: (None, 3), "tuple, list, dict or dataclass of tensors"),
        (lambda y: (y, len(y)), "depend on the batch size"),
    ],
)
def test_what_is_no_structure_of_tensors_is_refused(result, message):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> object:
            return result(self.conv(x).mean((2, 3)))

    with pytest.raises(SteppingError, match=message):
        nested(Model().double().eval(), 2, None, SIZE)
