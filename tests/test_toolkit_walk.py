"""The walk over the toolkit's index mappings: relations in both directions, and an end."""

from toolkit_nets import state
from torch_pruning.dependency import index_mapping

from stepping_plugin.integrations.torch_pruning.walk import Edge, State, Walk


class Mapping:
    """An index mapping, from a function of one index to a list of indices."""

    def __init__(self, function):
        self.function = function

    def __call__(self, given):
        return [one._replace(idx=image) for one in given for image in self.function(one.idx)]


def connect(one: State, other: State, there: list, back: list) -> None:
    """A dependency each way; ``there`` and ``back`` are the mappings on it."""
    one.edges.append(Edge(other, there, [back]))
    other.edges.append(Edge(one, back, [there]))


def walked(*layers: State) -> Walk:
    walk = Walk(deadline=float("inf"))
    walk.layers = list(layers)
    walk.run()
    assert walk.finished
    return walk


def ties(walk: Walk, one: State, other: State) -> set[tuple[int, int]]:
    found = set()
    for first, second, pairs in walk._accepted():
        rows = zip(pairs.source.tolist(), pairs.index.tolist())
        found |= {row if first is one else row[::-1] for row in rows if {first, second} == {one, other}}
    return found


def relation(function_there, function_back) -> tuple[set[tuple[int, int]], str]:
    """Ties between layer a (4 channels) and layer b (6 channels) through an operator, and the reasons."""
    a, operator, b = state("a", 4), state("op", None), state("b", 6)
    connect(a, operator, [], [])
    connect(operator, b, [Mapping(function_there)], [Mapping(function_back)])
    walk = walked(a, b)
    return ties(walk, a, b), " ".join(walk.reasons)


def test_relations_need_both_directions():
    shift = {(0, 2), (1, 3), (2, 4), (3, 5)}
    assert relation(lambda i: [i + 2], lambda i: [i - 2] if i >= 2 else []) == (shift, "")
    found, reasons = relation(lambda i: [i + 2], lambda i: [i - 2] if i >= 4 else [])
    assert found == {(2, 4), (3, 5)} and "one direction" in reasons
    found, reasons = relation(lambda i: [i + 3], lambda i: [i - 3] if i >= 3 else [])
    assert found == set() and "outside" in reasons


def test_mapping_that_raises_is_set_aside():
    found, reasons = relation(lambda i: [i + 1 // (3 - i)], lambda i: [i])
    assert found == set() and "ZeroDivisionError" in reasons


def test_no_verdict_before_both_layers_have_been_asked():
    """What is wrong between a one-channel map and four channels shows from the side of the four only."""
    a, operator, b = state("a", 1), state("op", None), state("b", 4)
    connect(a, operator, [], [])
    connect(operator, b, [], [])
    assert ties(walked(a, b), a, b) == set()
    walk = Walk(deadline=float("inf"))
    walk.layers = [a, b]
    assert walk._explore(a) and walk.relations[a, b]
    walk.explored.add(a)
    assert walk._accepted() == []


def test_mappings_that_feed_on_each_other_end():
    a, one, two, b = state("a", 4), state("one", None), state("two", None), state("b", 4)
    connect(a, b, [], [])
    connect(a, one, [], [])
    connect(one, two, [], [])
    stretch = [index_mapping._FlattenIndexMapping(stride=2, reverse=reverse) for reverse in (False, True)]
    connect(two, one, stretch[:1], stretch[1:])
    walk = walked(a, b)
    assert ties(walk, a, b) == set() and "grow without end" in " ".join(walk.reasons)


def test_news_at_one_operator_again_and_again_is_no_coupling():
    a, one, two, b = state("a", 4), state("one", None), state("two", None), state("b", 4)
    connect(a, b, [], [])
    connect(a, one, [], [])
    connect(one, two, [], [])
    back = Mapping(lambda i: [i - 1] if 0 < i < 30 else [])  # an offset at every turn, within all bounds
    connect(two, one, [Mapping(lambda i: [i + 1] if i < 29 else [])], [back])
    walk = walked(a, b)
    assert ties(walk, a, b) == set() and "grow without end" in " ".join(walk.reasons)
