"""What subnets learn from labels, against torch's, torchvision's and timm's own losses in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_nets import small_net
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import sigmoid_focal_loss

from stepping_plugin import SteppingError, TrainConfig
from stepping_plugin.runs.recipe import parse_recipe
from stepping_plugin.training.criteria import Criterion, named_criterion
from stepping_plugin.training.evaluation import evaluate
from stepping_plugin.training.loop import fit
from stepping_plugin.training.losses import SubnetLoss, binary_distillation

N, B, C = 3, 6, 5
WEIGHTS = [0.5, 1.0, 2.0, 0.0, 3.0]


def some() -> tuple[Tensor, Tensor, Tensor]:
    """Scores, classes, any number of labels per picture."""
    scores = 3 * torch.randn(N, B, C, dtype=torch.float64)
    return scores, torch.randint(0, C, (B,)), (torch.rand(B, C) > 0.6).double()


def of_every_subnet(loss: nn.Module, scores: Tensor, target: Tensor) -> Tensor:
    return torch.stack([loss(s, target) for s in scores])


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_are_those_of_torch(smoothing):
    scores, labels, _ = some()
    theirs = nn.CrossEntropyLoss(torch.tensor(WEIGHTS, dtype=torch.float64), label_smoothing=smoothing)
    ours = Criterion(smoothing=smoothing, class_weights=WEIGHTS)
    same(ours(scores, labels), of_every_subnet(theirs, scores, labels))
    soft = torch.rand(B, C, dtype=torch.float64).softmax(-1)
    same(ours(scores, soft), of_every_subnet(theirs, scores, soft))
    focal = Criterion("focal", smoothing, WEIGHTS, focal_gamma=0)
    same(focal(scores, labels), of_every_subnet(theirs, scores, labels))


def test_focal_loss_of_two_classes_is_the_sigmoid_one():
    """Two softmax classes are one yes or no of the difference of their scores."""
    scores, labels = torch.randn(N, B, 2, dtype=torch.float64), torch.randint(0, 2, (B,))
    for gamma in (0.0, 0.5, 2.0):
        expected = [
            sigmoid_focal_loss(s[:, 1] - s[:, 0], labels.double(), alpha=-1, gamma=gamma).mean() for s in scores
        ]
        same(Criterion("focal", focal_gamma=gamma)(scores, labels), torch.stack(expected))


def test_focal_loss_has_a_gradient_where_the_class_is_certain():
    scores = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    for gamma in (0.5, 2.0):
        (gradient,) = torch.autograd.grad(Criterion("focal", focal_gamma=gamma)(scores, torch.zeros(1).long()), scores)
        assert bool(gradient.isfinite().all())


def test_binary_is_that_of_torch_and_of_timm():
    scores, labels, several = some()
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    ours = Criterion("binary", class_weights=WEIGHTS)
    same(ours(scores, several), of_every_subnet(nn.BCEWithLogitsLoss(weights), scores, several))
    same(Criterion("binary", 0.1)(scores, labels), of_every_subnet(BinaryCrossEntropy(0.1), scores, labels))
    same(Criterion("binary", 0.2)(scores, several), Criterion("binary")(scores, several * 0.8 + 0.1))


def test_a_teacher_is_followed_class_by_class_where_classes_are_yes_or_no():
    scores, _, several = some()
    teacher, t = torch.randn(B, C, dtype=torch.float64), 2.0
    p, q = (teacher / t).sigmoid(), (scores / t).sigmoid()
    expected = t**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean((1, 2))
    same(binary_distillation(scores, teacher, t), expected)
    for criterion in ("binary", nn.BCEWithLogitsLoss()):
        loss = SubnetLoss(gamma=0.3, temperature=t, criterion=criterion)
        same(loss(scores, several, teacher), 0.3 * Criterion("binary")(scores, several) + 0.7 * expected)


def test_a_criterion_of_ones_own_takes_the_place_of_the_cross_entropy():
    scores, labels, _ = some()
    teacher = torch.randn(B, C, dtype=torch.float64)
    own = nn.MultiMarginLoss()
    expected = of_every_subnet(own, scores, labels)
    same(SubnetLoss(criterion=own)(scores, labels), expected)
    guided = SubnetLoss(gamma=0.4, criterion=own, weights=[1, 2, 3])(scores, labels, teacher)
    plain = SubnetLoss(gamma=0.4)(scores, labels, teacher)
    cross = SubnetLoss()(scores, labels)
    same(guided, (plain + 0.4 * (expected - cross)) * torch.tensor([1, 2, 3], dtype=torch.float64))
    assert SubnetLoss(criterion=own).settings()["criterion"] == "torch.nn.modules.loss.MultiMarginLoss"


def several_labels(seed: int = 0) -> DataLoader:
    """Pictures with blocks that are on or off, each a label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (96, 4), generator=generator)
    images = 0.3 * torch.randn(96, 1, 6, 6, generator=generator, dtype=torch.float64)
    for k in range(4):
        images[:, :, 3 * (k // 2) : 3 * (k // 2) + 3, 3 * (k % 2) : 3 * (k % 2) + 3] += labels[:, k, None, None, None]
    return DataLoader(TensorDataset(images, labels), batch_size=16)


def test_pictures_with_several_labels_are_learned_and_judged():
    net, loader = small_net(), several_labels()
    before = evaluate(net, loader)
    history = fit(net, loader, loader, TrainConfig(epochs=12, lr=0.3), criterion="binary", from_largest=True)
    after = evaluate(net, loader)
    assert all(b > a for a, b in zip(after["loss"], before["loss"])) and history.accuracy == after["accuracy"]
    with pytest.raises(SteppingError, match="criterion='binary'"):
        fit(net, loader, None, TrainConfig(epochs=1))


def test_names_and_paths(tmp_path, monkeypatch):
    (tmp_path / "losses_of_mine.py").write_text("import torch\nhalf = lambda s, t: s.sum() / 2\nnumber = 3\n1 / 1\n")
    (tmp_path / "broken_losses.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert named_criterion("focal") == "focal"
    assert named_criterion("losses_of_mine.half")(torch.ones(4), None) == 2
    assert isinstance(named_criterion("torch.nn.MultiMarginLoss"), nn.MultiMarginLoss)
    assert named_criterion("torch.nn.functional.cross_entropy") is F.cross_entropy
    for name, words in {
        "losses_of_mine.number": "no function",
        "losses_of_mine.missing": "AttributeError",
        "no_such_module.f": "ModuleNotFoundError",
        "broken_losses.f": "ZeroDivisionError",
    }.items():
        with pytest.raises(SteppingError, match=words):
            named_criterion(name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s, y, m: Criterion("crossentropy"), "did you mean 'cross_entropy'"),
        (lambda s, y, m: Criterion(3), "no criterion"),
        (lambda s, y, m: Criterion("focal", focal_gamma=-1), "focal_gamma"),
        (lambda s, y, m: Criterion(class_weights=[0, 0]), "class_weights"),
        (lambda s, y, m: Criterion(class_weights=[1, 2])(s, y), "2 numbers.*5, one per class"),
        (lambda s, y, m: Criterion(nn.MultiMarginLoss(), smoothing=0.1), "label smoothing"),
        (lambda s, y, m: Criterion(nn.MultiMarginLoss(reduction="none"))(s, y), r"shape \(6,\).*reduction='mean'"),
        (lambda s, y, m: Criterion(lambda scores, labels: 1.0)(s, y), "float"),
        (lambda s, y, m: Criterion()(s, m + 1), "loss: binary"),
        (lambda s, y, m: Criterion("binary")(s, 2 * m), "0 to 2"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make, words):
    with pytest.raises(SteppingError, match=words):
        make(*some())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"loss": "focla"}, "did you mean 'focal'"),
        ({"loss": "os.system; rm"}, "package.module.name"),
        ({"loss": "my.loss", "smoothing": 0.1}, "remove smoothing"),
        ({"focal_gamma": 3.0}, "no effect with loss: cross_entropy"),
        ({"loss": "focal", "focal_gamma": -1}, "focal_gamma"),
    ],
)
def test_keys_of_recipes(keys, words):
    lines = "".join(f"  {key}: {value}\n" for key, value in keys.items())
    text = "model: {name: digits_net}\ndata: {name: digits}\nbudgets: [0.5]\nretrain:\n"
    with pytest.raises(SteppingError, match=words):
        parse_recipe(text + lines)
    assert parse_recipe(text + "  loss: focal\n  focal_gamma: 1.0\n").retrain.loss == "focal"
