"""The engine: sessions give what the nested net gives, and execute the MACs that they report, no more."""

import copy
import threading

import pytest
import torch
from engine_nets import TOLERANCE, scores_of
from engine_nets import small as small  # a fixture
from nets import ARCHITECTURES, FAMILIES, Plain, images, make, nested, random_levels, randomise, relative
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepping_plugin.engine import compile_engine, kernels, load_engine
from stepping_plugin.errors import SteppingError
from stepping_plugin.integrations.fvcore.counting import count_macs
from stepping_plugin.views.named import equal_levels


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    return make(request.param)


def check_engine(net, batches=(1, 3, 8), **options):
    """Every subnet of one engine at several batch sizes, and after samples were dropped."""
    engine = compile_engine(net, **options)
    for batch in batches:
        x = images(net.analysis.image_size, batch, seed=batch)
        expected = scores_of(net, x)
        session = engine.start(x)
        for i in range(1, engine.num_subnets + 1):
            if i > 1:
                session.step()
            assert session.subnet == i and session.macs == engine.macs[i - 1]
            assert relative(session.logits, expected[i - 1]) < TOLERANCE
            if batch == 8 and i < 4:
                mask = torch.arange(len(session.logits)) % 3 != i % 3
                session.keep(mask)
                expected = expected[:, mask]
                for j in range(1, i + 1):
                    assert relative(session.logits_of(j), expected[j - 1]) < TOLERANCE
    return engine


@pytest.mark.parametrize(("seed", "batches"), [(1, (1, 3, 8)), (2, (2,))])
def test_sessions_equal_the_nested_net(model, seed, batches):
    check_engine(nested(model, seed=seed).eval(), batches)


def test_programs_equal_the_nested_net_without_side_effects(model):
    """The programs themselves, which are saved and exported; sessions run what `fuse` makes of them."""
    net = nested(model, seed=1).eval()
    x = images(net.analysis.image_size, 2)
    caches = {"image": x}
    with torch.no_grad():
        for program, expected in zip(compile_engine(net).programs, scores_of(net, x), strict=True):
            given = [caches[name] for name in program.inputs]
            before = [c.clone() for c in given]
            caches.update(zip(program.outputs, program.module(*given), strict=True))
            assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
            assert relative(caches["scores"], expected) < TOLERANCE


def test_spare_units_are_never_computed(model):
    net = nested(model, seed=None).eval()
    net.set_levels(random_levels(net.analysis, 4, seed=5, spare=True))
    engine = check_engine(net, batches=(2,))
    spare = net.levels == 5
    for tensor in net.model.parameters():
        assert torch.isfinite(tensor).all()
    assert bool(spare.any())
    for name, (out_units, _) in net.analysis.weight_units.items():
        own = torch.where(out_units >= 0, net.levels[out_units.clamp(min=0)], 1) == 5
        weight = dict(net.model.named_parameters(remove_duplicate=False)).get(name)
        if weight is not None and len(weight) == len(own):
            weight.data[own] = float("nan")
    x = images(net.analysis.image_size, 2)
    for before, after in zip(engine.steps(x), compile_engine(net).steps(x)):
        assert torch.equal(before, after)


def test_all_units_at_level_one_leave_nothing_to_step(model):
    net = nested(model, seed=None).eval()
    engine = check_engine(net, batches=(2,))
    assert engine.macs == [net.macs_model.total] * 4


@pytest.mark.parametrize(("seed", "dtype"), [(1, torch.float64), (2, torch.float32), (None, torch.float32)])
def test_executed_macs_are_the_reported_ones(model, seed, dtype):
    """Counted on what runs, by two counters; with equal shares of all widths every unit matters."""
    net = nested(model, seed=seed).eval().to(dtype)
    if seed is None:
        net.set_levels(equal_levels(net.analysis, 4))
    engine = compile_engine(net)
    assert engine.macs == net.macs
    caches = {"image": images(net.analysis.image_size, 1).to(dtype)}
    for program, before, after in zip(engine.programs, [0, *engine.macs], engine.macs):
        inputs = tuple(caches[name].clone() for name in program.inputs)
        assert count_macs(program.module, inputs).total == after - before
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            engine.run_step(program.level, caches, 1)
        assert counter.get_total_flops() == 2 * (after - before)


def test_units_that_no_score_depends_on_are_not_computed():
    """The second layer is at level 1, so nobody reads what the first one adds at level 2."""
    torch.manual_seed(1)
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 6, 3), torch.nn.Flatten()
    model = torch.nn.Sequential(*layers, torch.nn.Linear(6 * 12 * 12, 5)).double().eval()
    net = nested(model, n=2, seed=None, size=(3, 16, 16)).eval()
    levels = net.levels
    first = next(g.units for g in net.analysis.groups if g.name == "0")
    levels[first[5:]] = 2
    net.set_levels(levels)
    engine = check_engine(net, batches=(2,))
    assert engine.macs == net.macs == [net.macs[0]] * 2
    idle = net.macs_model.subnet_macs(levels, 2).tolist()
    assert idle[1] - idle[0] == 3 * (14 * 14) * (3 * 9)


@pytest.mark.parametrize("batch", [1, 8])
def test_float32_sessions_equal_the_nested_net(model, batch):
    """In float32 other kernels run than in float64, and other ones for large batches than for small ones."""
    net = nested(model, seed=1).eval().float()
    x = images(net.analysis.image_size, batch).float()
    for scores, expected in zip(compile_engine(net).steps(x), scores_of(net, x), strict=True):
        assert relative(scores, expected) < 1e-4


def test_autocast_around_a_session_changes_nothing(small):
    net, _, x, _ = small
    engine = compile_engine(copy.deepcopy(net).float())
    plain = list(engine.steps(x.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(engine.steps(x.float()), plain, strict=True))


def test_a_users_network_steps_too():
    torch.manual_seed(1)
    model = Plain().double().eval()
    check_engine(nested(model, seed=1, size=(3, 16, 16)).eval())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_precision(dtype, tolerance):
    net = nested(make("test_convnext"), seed=1).eval()
    x = images(net.analysis.image_size, 2)
    expected = scores_of(net, x)
    engine = compile_engine(copy.deepcopy(net).to(dtype))
    for scores, exact in zip(engine.steps(x.to(dtype)), expected):
        assert relative(scores.double(), exact) < tolerance


def test_sessions_share_an_engine_without_meeting(small):
    _, engine, x, expected = small
    a, b = engine.start(x[:2]), engine.start(x[2:7])
    a.step(), b.step(), b.step(), a.step()
    assert relative(a.logits, expected[2, :2]) < TOLERANCE and relative(b.logits, expected[2, 2:7]) < TOLERANCE


def test_threads_share_an_engine(small):
    _, engine, x, expected = small
    found = {}

    def work(k):
        found[k] = list(engine.steps(x[k : k + 1]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for k in range(8):
        assert all(relative(s, e[k : k + 1]) < TOLERANCE for s, e in zip(found[k], expected))


def test_earlier_scores_stay_and_caches_go(small):
    _, engine, x, _ = small
    session = engine.start(x)
    first = session.logits.clone()
    held = session.cache_bytes
    while session.subnet < 4:
        session.step()
    assert torch.equal(session.logits_of(1), first) and len(session.history) == 4
    assert held > 0 and session.cache_bytes == 0


@pytest.mark.parametrize(
    "act",
    [
        lambda s: [s.step() for _ in range(4)],
        lambda s: s.logits_of(2),
        lambda s: s.logits_of(True),
        lambda s: s.keep([True] * 8),
        lambda s: s.keep(torch.ones(7, dtype=torch.bool)),
        lambda s: s.keep(torch.ones(8)),
        lambda s: s.keep(torch.zeros(8, dtype=torch.bool)),
    ],
)
def test_misused_session(small, act):
    _, engine, x, expected = small
    session = engine.start(x)
    with pytest.raises(SteppingError):
        act(session)
    assert relative(session.logits, expected[session.subnet - 1]) < TOLERANCE


class TokensFirst(torch.nn.Module):
    """Works on (tokens, batch, channels), and on (tokens * batch, channels): samples are interleaved."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 4, 4)
        self.norm = torch.nn.LayerNorm(16)
        self.attention = torch.nn.MultiheadAttention(16, 4)
        self.hidden, self.head = torch.nn.Linear(16, 12), torch.nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).permute(2, 0, 1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        tokens, batch, channels = x.shape
        x = torch.relu(self.hidden(x.reshape(tokens * batch, channels))).view(tokens, batch, -1)
        return self.head(x.mean(0))


class Windows(torch.nn.Module):
    """Works on windows folded into the batch: the samples' rows lie behind one another."""

    def __init__(self):
        super().__init__()
        self.stem, self.hidden = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(8, 12)
        self.mix, self.head = torch.nn.Linear(12, 8), torch.nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x.reshape(-1, 4, 4, 4, 4, 8).transpose(2, 3).reshape(-1, 16, 8)
        x = self.mix(torch.relu(self.hidden(x)))
        return self.head(x.reshape(-1, 16, 16, 8).mean((1, 2)))


@pytest.mark.parametrize("network", [TokensFirst, Windows])
def test_keep_finds_samples_that_are_folded_into_another_axis(network):
    torch.manual_seed(0)
    net = nested(randomise(network()).double().eval(), seed=1, size=(3, 16, 16)).eval()
    engine = check_engine(net)
    assert any(place and (place.outer > 1) == (network is TokensFirst) for place in engine.cache_axes.values())


@pytest.mark.parametrize("shape", [(2, 1, 160, 160), (2, 3, 161, 160), (3, 160, 160), (0, 3, 160, 160)])
def test_wrong_images(small, shape):
    with pytest.raises(SteppingError, match="expected"):
        small[1].start(torch.zeros(shape, dtype=torch.float64))


def test_wrong_type_of_images(small):
    with pytest.raises(SteppingError, match="float32"):
        small[1].start(small[2].float())
    with pytest.raises(SteppingError, match="tensor"):
        small[1].start([1, 2])


def test_a_sample_of_nans_stays_alone(small):
    _, engine, x, expected = small
    x = x.clone()
    x[2] = float("nan")
    others = torch.arange(8) != 2
    for scores, exact in zip(engine.steps(x), expected):
        assert relative(scores[others], exact[others]) < TOLERANCE and scores[2].isnan().all()
    result = engine.predict(x, until={"max_prob": 0.0})
    assert result.subnet.tolist() == [1, 1, 4, 1, 1, 1, 1, 1]


def test_a_sample_of_nans_has_no_scores_in_float32(small):
    """Kernels that turn NaN into a number would make up an answer."""
    for model in (small[0].model, make("test_efficientnet"), make("test_vit")):
        net = nested(model, seed=3).eval().float() if model is not small[0].model else copy.deepcopy(small[0]).float()
        x = images(net.analysis.image_size, 8).float()
        x[2] = float("nan")
        for scores in compile_engine(net).steps(x):
            assert scores[2].isnan().all() and not scores[torch.arange(8) != 2].isnan().any()


def test_engine_of_a_changed_net():
    net = nested(make("lenet5"), seed=1).eval()
    x = images(net.analysis.image_size)
    engine = compile_engine(net)
    session = engine.start(x)
    net.set_levels(random_levels(net.analysis, 4, seed=9))
    session.step()  # what has begun goes on: the engine has its own weights
    with pytest.raises(SteppingError, match="levels differ"):
        engine.start(x)
    engine = compile_engine(net)
    with torch.no_grad():
        next(net.model.parameters()).mul_(2)
    with pytest.raises(SteppingError, match="weights differ"):
        engine.start(x)
    engine = compile_engine(net)
    del net
    engine.start(x)


@pytest.mark.parametrize(
    "options", [{"backend": "aot_eager"}, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "inductor"]
)
def test_compiled_engines(options, tmp_path):
    net = nested(make("lenet5").float(), n=2, seed=1).eval()
    engine = net.deploy(compile=options)
    engine.save(tmp_path / "engine")
    for compiled in (engine, load_engine(tmp_path / "engine", compile=options)):
        for batch in (1, 3, 2):
            x = images(net.analysis.image_size, batch).float()
            for scores, expected in zip(compiled.steps(x), scores_of(net, x), strict=True):
                assert relative(scores, expected) < 1e-4
    with pytest.raises(SteppingError, match="keyword arguments"):
        net.deploy(compile="fast")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    model = make(name)
    for seed in (1, 2):
        net = nested(model, seed=seed).eval()
        check_engine(net)
        test_executed_macs_are_the_reported_ones(model, seed, torch.float32)


class Patches(torch.nn.Module):
    """Convolutions that cut images into squares and leave an edge over, a norm in front of products of either kind."""

    def __init__(self, size=8, further=False):
        super().__init__()
        self.cut, self.overlap = torch.nn.Conv2d(3, 12, size, size), torch.nn.Conv2d(3, 12, 3, size, 1)
        self.norm, self.mix = torch.nn.LayerNorm(12), torch.nn.Linear(12, 16)
        self.further, self.down = further, torch.nn.Conv2d(12, 16, 2, 2)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x):
        y = self.cut(x)
        y = y + self.overlap(x)[:, :, : y.shape[2], : y.shape[3]] if self.further else y
        y = self.norm(y.permute(0, 2, 3, 1))
        z = self.down(y.permute(0, 3, 1, 2)).mean((2, 3))
        return self.head(torch.relu(self.mix(y)).mean((1, 2)) + z)


@pytest.mark.parametrize("further", [False, True], ids=["only reader", "one of two"])
@pytest.mark.parametrize(("size", "side"), [(4, 35), (8, 35), (8, 32)])
def test_convolutions_without_overlap(size, side, further):
    net = nested(randomise(Patches(size, further)).double().eval(), seed=2, size=(3, side, side)).eval()
    engine = check_engine(net)
    x = images(net.analysis.image_size, 2)
    with FlopCounterMode(display=False) as counter:
        list(engine.steps(x))
    assert counter.get_total_flops() == 2 * 2 * engine.macs[-1]
    single = nested(randomise(Patches(size, further)).eval(), seed=2, size=(3, side, side)).eval()
    for scores, expected in zip(compile_engine(single).steps(x.float()), scores_of(single, x.float()), strict=True):
        assert relative(scores, expected) < 1e-4


def test_norms_leave_their_weights_to_the_products_behind_them():
    net = nested(make("test_vit"), seed=1).eval()
    norms = [n for p in compile_engine(net).programs[1:] for n in p.module.graph.nodes if n.target is kernels.next_norm]
    bare = [n for n in norms if n.args[5:7] == (None, None)]
    assert bare and len(bare) >= len(norms) - 2 * (net.num_subnets - 1)  # the last norm stands in front of the head
