"""The toolkit's face: `SteppingPruner` with the toolkit's importances."""

import pytest
import torch
import torch_pruning as tp
from nets import image_size, images, make

from stepping_plugin import SteppingError, verify
from stepping_plugin.integrations.torch_pruning import SteppingImportance, SteppingPruner

BUDGETS = [0.2, 0.5]


@pytest.fixture(scope="module")
def model():
    return make("test_resnet", num_classes=5).float()


def example(model):
    return torch.zeros(1, *image_size(model))


def test_one_step_makes_nested_subnets(model):
    pruner = SteppingPruner(model, example(model), importance=tp.importance.GroupMagnitudeImportance(), budgets=BUDGETS)
    assert set(pruner.net.levels.tolist()) == {1}
    assert pruner.step() is None
    assert all(0.99 * b <= m <= b for m, b in zip(pruner.net.macs, pruner.net.budgets))
    verify(pruner.net, engine=False)


def test_interactive_moves_add_up_to_the_step(model):
    arguments = dict(importance=tp.importance.GroupMagnitudeImportance(), budgets=BUDGETS)
    whole = SteppingPruner(model, example(model), **arguments)
    whole.step()
    one_by_one = SteppingPruner(model, example(model), **arguments)
    for move in one_by_one.step(interactive=True):
        assert move.level > 1 and len(move.units) and move.layers
        move.prune()
    assert torch.equal(one_by_one.net.levels, whole.net.levels)


def test_moves_that_are_not_carried_out_change_nothing(model):
    pruner = SteppingPruner(model, example(model), budgets=BUDGETS)
    moves = list(pruner.step(interactive=True))
    moves[0].prune()
    moved = pruner.net.levels > 1
    assert torch.equal(moved.nonzero().flatten(), moves[0].units.sort().values)


def test_the_toolkits_importance_decides(model):
    """A channel that the importance calls worst in its layer is not in subnet 1, the best one is."""

    class Ranked(tp.importance.Importance):
        def __call__(self, group):
            return torch.arange(len(group[0].idxs)).float() + 1

    pruner = SteppingPruner(model, example(model), importance=Ranked(), budgets=BUDGETS)
    pruner.step()
    outputs, _ = pruner.net.analysis.weight_units["layer1.0.conv1.weight"]
    levels = pruner.net.levels[outputs]
    assert levels[-1] == 1 and levels[0] > 1
    assert torch.equal(levels, levels.sort(descending=True).values)


def test_importance_from_gradients(model):
    importance = SteppingImportance()
    importance.zero()
    x, y = images(image_size(model), batch=4).float(), torch.tensor([0, 1, 2, 3])
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    importance.accumulate(model)
    model.zero_grad()
    pruner = SteppingPruner(model, example(model), importance=importance, budgets=BUDGETS)
    pruner.step()
    by_magnitude = SteppingPruner(model, example(model), budgets=BUDGETS)
    by_magnitude.step()
    assert pruner.net.macs[-1] <= pruner.net.budgets[-1]
    assert not torch.equal(pruner.net.levels, by_magnitude.net.levels)


def test_ignored_layers_stay_in_every_subnet(model):
    pruner = SteppingPruner(model, example(model), budgets=BUDGETS, ignored_layers=[model.layer1[0].conv1])
    pruner.step()
    assert "layer1.0.conv1" not in {g.name for g in pruner.net.analysis.groups}
    verify(pruner.net, engine=False)


def test_round_to_gives_multiples(model):
    pruner = SteppingPruner(model, example(model), budgets=[0.3, 0.6], round_to=4)
    pruner.step()
    checked = 0
    for outputs, _ in pruner.net.analysis.weight_units.values():
        known = outputs[outputs >= 0]
        for level in (1, 2):
            count = int((pruner.net.levels[known] == level).sum())
            assert count % 4 == 0
            checked += count > 0
    assert checked > 4
    verify(pruner.net, engine=False)


def test_heads_are_found_and_contradictions_refused():
    model = make("test_vit").float()
    qkv = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "num_heads")}
    SteppingPruner(model, example(model), budgets=[0.3, 0.6], num_heads=qkv).step()
    wrong = {layer: heads + 1 for layer, heads in qkv.items()}
    with pytest.raises(SteppingError, match="heads do not fit"):
        SteppingPruner(model, example(model), budgets=[0.3, 0.6], num_heads=wrong)


def test_the_users_model_is_left_alone(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    SteppingPruner(model, example(model), importance=tp.importance.GroupMagnitudeImportance(), budgets=BUDGETS).step()
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.eval()
