"""Budgets as users write them, and the smallest subnet that exists."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import Plain, random_levels

from stepping_plugin import BudgetError, SteppingError
from stepping_plugin.units.analysis import analyse
from stepping_plugin.units.levels import check_budgets, check_scores, floor_macs, locked_units, parse_budgets
from stepping_plugin.units.macs import MacModel

M_T = 1_234_567


@functools.cache
def plain():
    torch.manual_seed(0)
    analysis = analyse(Plain().eval(), (3, 12, 12), (False,))
    return analysis, MacModel(analysis)


@pytest.mark.parametrize(
    ("budget", "macs"),
    [
        (0.4, 493_826),
        ("40%", 493_826),
        (" 40 % ", 493_826),
        ("0.4", 493_826),
        ("12.5%", 154_320),
        (1.0, M_T),
        ("100%", M_T),
        (300_000, 300_000),
        ("300k", 300_000),
        ("300K", 300_000),
        ("0.3M", 300_000),
        ("1.2m MACs", 1_200_000),
        ("0.001G", 1_000_000),
        ("700000", 700_000),
    ],
)
def test_every_way_to_write_a_budget(budget, macs):
    assert parse_budgets([budget], M_T) == [macs]


def test_kinds_may_be_mixed():
    assert parse_budgets((0.1, "300k", "50%", 1_000_000), M_T) == [123_456, 300_000, 617_283, 1_000_000]


@given(st.floats(min_value=1e-5, max_value=1.0), st.integers(min_value=10**6, max_value=10**12))
def test_a_fraction_is_never_exceeded(fraction, reference):
    (macs,) = parse_budgets([fraction], reference)
    assert macs <= fraction * reference + 1e-6 * reference and macs + 1 > fraction * reference * (1 - 1e-12)


def test_a_decimal_fraction_is_exact():
    assert parse_budgets([0.1, 0.3, 0.7], 10) == [1, 3, 7]  # 0.3 * 10 is below 3 in floating point


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ([], "empty"),
        (0.5, "list"),
        ("50%", "list"),
        (None, "list"),
        ([0.5, 0.3], "below budget 1"),
        ([0.3, 0.3], "equal to budget 1"),
        ([0.3, "30%"], "equal to budget 1"),
        ([0.3, 300_000], "below budget 1"),
        ([1.5], "at most 1"),
        (["150%"], "at most 1"),
        ([0.0], "above 0"),
        ([0], "above 0"),
        ([-0.1], "above 0"),
        ([-5], "above 0"),
        (["0%"], "above 0"),
        ([1], "one MAC"),
        ([True], "bool"),
        ([None], "NoneType"),
        ([float("nan")], "nan"),
        ([float("inf")], "inf"),
        (["half"], "cannot read 'half'"),
        (["-3M"], "cannot read '-3M'"),
        (["1,5M"], "cannot read '1,5M'"),
        ([""], "cannot read ''"),
        ([2_000_000], "the whole network costs 1,234,567"),
        (["2M"], "the whole network costs 1,234,567"),
        ([1e-9], "less than one"),
    ],
)
def test_bad_budgets(budgets, said):
    with pytest.raises(BudgetError, match=said.replace("(", r"\(")):
        parse_budgets(budgets, M_T)


def test_one_error_lists_everything():
    with pytest.raises(BudgetError) as caught:
        parse_budgets([0.5, "half", True, 0.4, 2.0], M_T)
    message = str(caught.value)
    for said in ("budget 2: cannot read 'half'", "budget 3: got True", "budget 4 (0.4", "budget 5: got 2.0"):
        assert said in message


def test_a_wider_network_takes_larger_budgets():
    assert parse_budgets([0.5, "2M"], M_T, limit=3_000_000) == [617_283, 2_000_000]
    with pytest.raises(BudgetError, match="3,000,000"):
        parse_budgets(["4M"], M_T, limit=3_000_000)
    with pytest.raises(BudgetError, match="at most 1"):  # fractions are fractions of the original
        parse_budgets([1.2], M_T, limit=3_000_000)


# ---------------------------------------------------------------------------------------- smallest subnet


def test_locked_units_satisfy_every_anchor_with_the_best_units():
    analysis, _ = plain()
    scores = torch.rand(analysis.num_units)
    locked = locked_units(analysis, scores)
    assert all(bool(locked[anchor].any()) for anchor in analysis.anchors)
    for unit in locked.nonzero().flatten().tolist():
        assert any(unit == int(a[scores[a].argmax()]) for a in analysis.anchors)
        without = locked.clone()
        without[unit] = False
        assert any(not bool(without[a].any()) for a in analysis.anchors), "locked for nothing"


def test_no_subnet_is_below_the_floor():
    analysis, macs = plain()
    floor = floor_macs(analysis, macs)
    for seed in range(30):
        assert int(macs.subnet_macs(random_levels(analysis, 3, seed), 3)[0]) >= floor
    locked = locked_units(analysis, torch.rand(analysis.num_units))
    assert int(macs.subnet_macs(torch.where(locked, 1, 2), 1)[0]) == floor_macs(analysis, macs, locked)


def test_budget_below_the_floor_states_the_floor():
    analysis, macs = plain()
    floor = floor_macs(analysis, macs)
    check_budgets(analysis, macs, [floor, macs.total], macs.total)
    with pytest.raises(BudgetError, match=f"{floor:,} MACs"):
        check_budgets(analysis, macs, [floor - 1, macs.total], macs.total)


def test_the_advised_budget_is_enough():
    analysis, macs = plain()
    with pytest.raises(BudgetError) as caught:
        check_budgets(analysis, macs, [2], macs.total)
    advised = str(caught.value).rsplit("Raise budget 1 to ", 1)[1].split(" ")[0]
    check_budgets(analysis, macs, parse_budgets([advised], macs.total), macs.total)


def test_more_subnets_than_units():
    analysis, macs = plain()
    budgets = list(range(macs.total - analysis.num_units - 1, macs.total))
    with pytest.raises(BudgetError, match="units that can move"):
        check_budgets(analysis, macs, budgets, macs.total)


def test_scores_that_rank_nothing():
    with pytest.raises(SteppingError, match="2 of 5 are not finite"):
        check_scores(torch.tensor([1.0, float("nan"), 2.0, float("inf"), 0.0]), 5)
    with pytest.raises(SteppingError, match="expected \\(5,\\)"):
        check_scores(torch.zeros(4), 5)
