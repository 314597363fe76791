"""Doubts about a net: planted ones are found with their numbers, sound nets raise none."""

from __future__ import annotations

import pytest
import torch
from small_nets import small_net
from torch import nn

from stepping_plugin.runs.judgement import answers_to, doubts, like_a_constant

SHARES = [0.1, 0.5, 0.85]


def case(*accuracies, classes=4, pictures=400, seed=0, majority=None):
    """Labels, and answers of subnets that are right so often, wrong ones at random."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (pictures,), generator=generator)
    if majority is not None:
        labels[: round(majority * pictures)] = 1
    answers = []
    for accuracy in accuracies:
        wrong = (labels + torch.randint(1, classes, (pictures,), generator=generator)) % classes
        right = torch.randperm(pictures, generator=generator) < round(accuracy * pictures)
        answers.append(torch.where(right, labels, wrong))
    return torch.stack(answers), labels


def test_sound_nets_raise_no_doubt():
    answers, labels = case(0.75, 0.88, 0.9)
    assert doubts(answers, labels, SHARES, 0.92) == [] == doubts(answers, labels, SHARES, None)


def test_constants_are_told_with_their_rate():
    answers, labels = case(0.9, 0.95, 0.95, classes=2, majority=0.4)
    answers[0], answers[1] = 1, 1
    rate = float((labels == 1).double().mean())
    (text, alike) = doubts(answers, labels, SHARES, None)
    assert text.startswith("subnets 1, 2 are at the majority-class rate") and "always answering class 1" in text
    assert f"({rate:.1%} of 400 pictures)" in text and "100%, 100% of the answers are one" in text
    assert "retrain.epochs" in text
    assert alike.startswith("subnet 2 hardly differs from subnet 1: 0 of 400 answers are others, 0 more are right")
    (early,) = doubts(answers, labels, SHARES, 0.9, retrained=False)
    assert early.startswith("after construction, subnets 1, 2 are") and "construction.iterations" in early


@pytest.mark.parametrize("majority", [0.3, 0.6, 0.9])
def test_chance_is_no_knowledge(majority):
    """Answers drawn at random, in proportion or not, are never better than a constant; twice the rate of it is."""
    _, labels = case(0.5, classes=4, pictures=2000, majority=majority)
    guesses = labels[torch.randperm(len(labels))]
    assert like_a_constant(guesses[None], labels) == [1]
    rate = float(torch.bincount(labels).max()) / len(labels)
    better, _ = case(rate + 0.5 * (1 - rate), pictures=2000, majority=majority)
    assert like_a_constant(better, labels) == []


def test_subnets_that_answer_alike_are_counted():
    answers, labels = case(0.75, 0.85, 0.9)
    answers[2] = answers[1]
    wrong = (answers[1] != labels).nonzero().flatten()
    answers[2, wrong[:2]] = labels[wrong[:2]]
    (text,) = doubts(answers, labels, SHARES, 0.88)
    assert text.startswith("subnet 3 hardly differs from subnet 2: 2 of 400 answers are others, 2 more are right")
    assert "further apart" in text
    (text,) = doubts(answers, labels, SHARES, 0.85)
    assert "Subnet 2 is as good as the original" in text


def test_far_below_the_original_depends_on_what_a_subnet_costs():
    answers, labels = case(0.75, 0.84, 0.88)
    (text,) = doubts(answers, labels, SHARES, 0.9)
    assert text.startswith("subnet 2 is far below the original, by 6.0 points of accuracy on 400 pictures")
    (text,) = doubts(answers, labels, SHARES, 0.96)
    assert text.startswith("subnets 1, 2, 3 are far below the original, by 21.0, 12.0, 8.0 points")


@pytest.mark.parametrize("training", [True, False])
def test_answers_are_those_of_all_subnets_in_order(training):
    torch.manual_seed(0)
    net = small_net()
    images, labels = torch.randn(10, *net.analysis.image_size, dtype=torch.float64), torch.arange(10) % 4
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    net.train(training)
    answers, target = answers_to(net, batches)
    assert net.training == training and torch.equal(target, labels)
    with torch.no_grad():
        assert torch.equal(answers, net.eval().forward_all(images).argmax(-1))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 4)).double().eval()
    assert torch.equal(answers_to(plain, batches)[0][0], plain(images).argmax(-1))
