"""What comes back from a file is the same function, or an error that says why not. Damage of any kind is one error."""

import copy
import io
import json
import multiprocessing
import os
import pickle
import stat
import threading
from pathlib import Path

import pytest
import timm
import torch
from nets import Plain, images, make, nested, relative
from rewriting import rewrite
from safetensors import safe_open
from torch import nn

from stepping_plugin import CheckpointError, SteppingError, apply_steppingnet, load
from stepping_plugin.engine import load_engine
from stepping_plugin.graph.describe import describe, first_difference
from stepping_plugin.tensorfile import read_tensors, write_tensors
from stepping_plugin.training.checkpoint import load_checkpoint
from stepping_plugin.units.witness import find_units

DATA = Path(__file__).parent / "data"


class Small(nn.Module):
    """Whatever is changed here changes no shape."""

    def __init__(self, pool="avg", act=nn.ReLU, eps=1e-5, p=0.1, scale=2.0, order=True):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12, eps=eps), act()
        self.mix, self.drop, self.head = nn.Conv2d(12, 8, 1), nn.Dropout(p), nn.Linear(8, 4)
        self.pool, self.scale, self.order = pool, scale, order

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = self.mix(self.act(x) * torch.linspace(1, self.scale, x.shape[-1]))
        x = x.amax((2, 3)) if self.pool == "max" else x.mean((2, 3))
        x = self.drop(x) if self.order else x
        x = self.head(torch.tanh(x))
        return x if self.order else self.drop(x)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return apply_steppingnet(Small().eval(), [0.4, 0.8], example_inputs=torch.zeros(1, 3, 10, 10))


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "small.safetensors"
    small.save(path)
    return path


# ------------------------------------------------------------------------------------------------- same function


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pool": "max"}, ["eval mode", "got amax", "expected mean"]),
        ({"act": nn.SiLU}, ["got silu", "expected relu", "in act"]),
        ({"eps": 1e-3}, ["eps=0.001", "eps=1e-05", "in norm"]),
        ({"p": 0.2}, ["train mode", "p=0.2", "p=0.1", "in drop"]),
        ({"order": False}, ["train mode", "got tanh", "expected dropout", "in drop"]),
        ({"scale": 3.0}, ["constant 1", "other numbers"]),
    ],
)
def test_another_function_of_the_same_shapes_is_refused(saved, change, words):
    assert load(saved, Small()).num_subnets == 2
    with pytest.raises(CheckpointError) as caught:
        load(saved, Small(**change))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "options", [{"global_pool": "max", "drop_rate": 0.3, "drop_path_rate": 0.1}, {"act_layer": "silu"}]
)
def test_arguments_of_timm_models_are_kept_or_missed(options, tmp_path):
    model = timm.create_model("test_resnet", num_classes=5, **options).eval()
    net = apply_steppingnet(model, [0.3, 0.6]).eval()
    net.save(tmp_path / "net")
    if "act_layer" in options:
        with pytest.raises(CheckpointError, match=r"got relu.*expected silu"):
            load(tmp_path / "net")
    loaded = load(tmp_path / "net", model if "act_layer" in options else None)
    x = torch.randn(2, *net.analysis.image_size)
    with torch.no_grad():
        assert torch.equal(loaded.forward_all(x), net.forward_all(x))
        torch.manual_seed(1)
        trained = net.train().forward_all(x)
        torch.manual_seed(1)
        assert torch.equal(loaded.train().forward_all(x), trained), "dropout and statistics, too"


def test_descriptions_do_not_depend_on_the_capture():
    model = make("test_vit")
    first, again = (find_units(copy.deepcopy(model), model.default_cfg["input_size"]) for _ in range(2))
    for training, program in first.programs.items():
        other = again.programs[training]
        for k, node in enumerate(other.graph.nodes):
            node.name = f"other_{k}"
        assert first_difference(describe(program), describe(other)) is None
        assert len(json.dumps(describe(program))) < 40_000


def test_double_precision_and_casts_come_back(tmp_path):
    model = Plain().double()
    net = apply_steppingnet(model, [0.4, 0.9], example_inputs=torch.zeros(1, 3, 8, 8))
    for cast in (net, copy.deepcopy(net).float(), copy.deepcopy(net).half()):
        cast.save(tmp_path / "net")
        loaded = load(tmp_path / "net", Plain())
        assert {p.dtype for p in loaded.parameters()} == {p.dtype for p in cast.parameters()}
        x = torch.randn(2, 3, 8, 8, dtype=next(cast.parameters()).dtype)
        with torch.no_grad():
            assert torch.equal(loaded.forward_all(x), cast.eval().forward_all(x))


def test_the_probe_sees_what_the_description_does_not(saved, tmp_path):
    def edit(header, tensors):
        tensors["model.conv.weight"].mul_(1.5)

    rewrite(saved, tmp_path / "net", edit)
    with pytest.raises(CheckpointError, match=r"computes something else.*scores of subnet 1"):
        load(tmp_path / "net", Small())


def test_another_torch_may_capture_in_other_operators(saved, tmp_path):
    def edit(header, tensors):
        header["programs"]["eval"]["lines"][0] += " "
        header["versions"]["torch"] = "2.6.0"

    rewrite(saved, tmp_path / "net", edit)
    assert "scores of all subnets for a stored image are the same" in load(tmp_path / "net", Small()).notes[-1]
    with pytest.raises(CheckpointError, match="computes something else"):
        load(tmp_path / "net", Small(pool="max"))


def test_compiled_and_wrapped_models_are_the_models_inside(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3).eval()

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.late = nn.Linear(3, 3)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, x):
            return self.late(self.inner(x))

    net = apply_steppingnet(torch.compile(model), [0.3, 0.6])
    net.save(tmp_path / "net")
    x = torch.randn(1, *net.analysis.image_size)
    for given in (None, model, torch.compile(model)):
        with torch.no_grad():
            assert torch.equal(load(tmp_path / "net", given).forward_all(x), net.eval().forward_all(x))
    wrapped = apply_steppingnet(Wrapper().eval(), [0.3, 0.6])
    assert "timm" not in wrapped.origin
    wrapped.save(tmp_path / "wrapped")
    with pytest.raises(CheckpointError, match="Pass load"):
        load(tmp_path / "wrapped")


def test_loading_in_inference_mode_gives_a_net_that_learns(tmp_path):
    nested(make("lenet5").float(), n=2, seed=1).save(tmp_path / "net")
    with torch.inference_mode():
        net = load(tmp_path / "net", timm.create_model("lenet5"))
    net.train().forward_all(torch.randn(2, *net.analysis.image_size)).sum().backward()


# ------------------------------------------------------------------------------------------------- older files


def probe():
    return (torch.arange(192) % 7 - 3.0).view(1, 3, 8, 8)


OLD_SCORES = [  # of net_version_1.safetensors, as the version that wrote it computed them
    [0.37137365341186523, 0.3982563614845276, -0.23901180922985077, -0.4189786911010742, 0.046215981245040894],
    [0.4044177234172821, 0.33965978026390076, -0.19565141201019287, -0.4677870273590088, -0.05329117178916931],
]


def test_files_of_older_versions_still_load():
    net = load(DATA / "net_version_1.safetensors", Plain())
    assert (net.macs, net.budgets) == ([14116, 29272], [14172, 31888]) and "format 1" in net.notes[-1]
    with torch.no_grad():
        assert relative(net.forward_all(probe())[:, 0], torch.tensor(OLD_SCORES)) < 1e-5
    engine = load_engine(DATA / "engine_version_2.safetensors")
    assert relative(torch.cat(list(engine.steps(probe()))), torch.tensor(OLD_SCORES)) < 1e-5
    state = load_checkpoint(DATA / "checkpoint_version_1.safetensors")
    assert state["epoch"] == 3 and state["by number"] == {0: None, 7: "x"}
    assert torch.equal(state["pair"][1], torch.arange(3.0))


# ------------------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_is_found(saved, tmp_path):
    whole = saved.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(whole), (60,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        (tmp_path / "flipped").write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load(tmp_path / "flipped", Small())


def test_unsigned_changes_are_found(saved, tmp_path):
    edits = {
        "tensors were changed": lambda h, t: t["model.conv.weight"].mul_(2),
        "checksum differs": lambda h, t: h["budgets"].__setitem__(0, 7),
        "model.mix.weight": lambda h, t: t.update({"model.mix.weight": t["model.mix.weight"].half()}),
    }
    for words, edit in edits.items():
        rewrite(saved, tmp_path / "net", edit, signed=False)
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / "net", Small())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(small, saved, tmp_path, value):
    net = copy.deepcopy(small)
    with torch.no_grad():
        net.model.conv.weight[0, 0, 0, 0] = value
    with pytest.raises(SteppingError, match=r"conv\.weight.*not saved"):
        net.save(tmp_path / "net")
    assert not (tmp_path / "net").exists()
    rewrite(saved, tmp_path / "bad", lambda h, t: t["model.conv.weight"][0].fill_(value))
    with pytest.raises(CheckpointError, match="not finite"):
        load(tmp_path / "bad", Small())


def lie(header, key, value):
    header["origin"]["kwargs"][key] = value


# Files that ask for any amount of memory or time, and fields of wrong types: refused before anything is built.
LIES = {
    "classes": lambda h: lie(h, "num_classes", 10**12),
    "classes within bounds": lambda h: lie(h, "num_classes", 50_000),
    "width": lambda h: lie(h, "width_mult", 1e9),
    "unknown argument": lambda h: lie(h, "foo", 1),
    "giant": lambda h: h["origin"].update(timm="vit_giant_patch14_224"),
    "bad tag": lambda h: h["origin"].update(timm="lenet5.foo_tag"),
    "image": lambda h: h.update(image_size=[1, 10**6, 10**6]),
    "larger image": lambda h: h.update(image_size=[1, 5000, 5000]),
    "modes": lambda h: h.update(modes=[True, False] * 500),
    "budgets": lambda h: h.update(budgets=list(range(1, 10**5)), macs=list(range(1, 10**5))),
    "900 budgets": lambda h: h.update(budgets=list(range(1, 901)), macs=list(range(1, 901))),
    "no budgets": lambda h: h.pop("budgets"),
    "texts": lambda h: h.update(budgets=["a", "b"]),
    "no reference": lambda h: h.update(reference_macs=0),
    "lineage": lambda h: h.update(lineage=10**9),
    "lineage of one": lambda h: h.update(lineage=1),
    "unknown field": lambda h: h.update(more=1),
    "origin": lambda h: h.update(origin=[1]),
    "version": lambda h: h.update(version=1),
    "true version": lambda h: h.update(version=True),
    "programs": lambda h: h["programs"].pop("train"),
    "dtype": lambda h: h.update(dtype="load"),
    "probe": lambda h: h["probe"].update(batch=10**9),
}


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("timm") / "net"
    apply_steppingnet(timm.create_model("lenet5", num_classes=10, in_chans=1), [0.3, 0.6]).save(path)
    return path


@pytest.mark.parametrize("what", LIES)
def test_lies_in_a_header_are_refused(what, timm_file, tmp_path):
    rewrite(timm_file, tmp_path / "lie", lambda header, tensors: LIES[what](header))
    with pytest.raises(CheckpointError, match="lie"):
        load(tmp_path / "lie")


@pytest.mark.parametrize("text", ["[1, 2]", "null", "{", "[" * 100_000, '{"format": "stepping-plugin net"}', ""])
def test_headers_that_are_none(text, timm_file, tmp_path):
    rewrite(timm_file, tmp_path / "lie", text=text)
    for read in (load, load_engine):
        with pytest.raises(CheckpointError, match="lie"):
            read(tmp_path / "lie")


def test_a_file_cannot_ask_for_more_than_it_holds(timm_file, tmp_path):
    """Before anything is allocated: no parameter beyond the file's own is made."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what in ("classes", "classes within bounds", "giant", "width", "image", "budgets"):
        rewrite(timm_file, tmp_path / "lie", lambda header, tensors: LIES[what](header))  # noqa: B023
        with pytest.raises(CheckpointError):
            load(tmp_path / "lie")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


# ------------------------------------------------------------------------------------------------- writing


def test_modes_of_files_follow_umask_and_links_are_kept(small, tmp_path):
    before = os.umask(0o027)
    try:
        small.save(tmp_path / "net")
        small.deploy().save(tmp_path / "engine")
        assert all(stat.S_IMODE((tmp_path / n).stat().st_mode) == 0o640 for n in ("net", "engine"))
        (tmp_path / "net").chmod(0o664)
        small.save(tmp_path / "net")
        assert stat.S_IMODE((tmp_path / "net").stat().st_mode) == 0o664
    finally:
        os.umask(before)
    (tmp_path / "link").symlink_to("net")
    small.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    small.save(tmp_path / ("n" * 250))
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_threads_may_save_to_one_path(tmp_path):
    failures = []

    def work(number):
        try:
            for _ in range(20):
                write_tensors(tmp_path / "file", {"x": torch.full((1000,), float(number))}, {"a": "b"})
                read_tensors(tmp_path / "file")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert failures == [] and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    from stepping_plugin import tensorfile

    child = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
    child.start(), child.join()
    name = tensorfile._PARTIAL.format(tag=tensorfile._host(), pid=child.pid, thread=1, n=1)
    (tmp_path / name).write_bytes(b"half")
    mine = tmp_path / tensorfile._PARTIAL.format(tag=tensorfile._host(), pid=os.getpid(), thread=1, n=1)
    mine.write_bytes(b"being written")
    write_tensors(tmp_path / "file", {"x": torch.zeros(2)}, {})
    assert {p.name for p in tmp_path.iterdir()} == {"file", mine.name}


def test_tensors_that_share_memory_are_saved(tmp_path):
    base = torch.arange(6.0)
    write_tensors(tmp_path / "file", {"a": base[:3], "b": base[2:], "c": base.view(2, 3).t(), "d": base}, {"k": "v"})
    texts, tensors = read_tensors(tmp_path / "file")
    assert (
        texts["k"] == "v" and torch.equal(tensors["c"], base.view(2, 3).t()) and tensors["b"].tolist() == [2, 3, 4, 5]
    )


def test_the_description_is_small(tmp_path):
    """A net's header grows with its operators, not with its weights."""
    net = nested(make("test_resnet").float(), n=2)
    net.save(tmp_path / "net")
    with safe_open(tmp_path / "net", "pt") as file:
        operators = sum(len(list(p.operators())) for p in net.analysis.programs.values())
        assert len(file.metadata()["stepping"]) < 1500 + 150 * operators


# ------------------------------------------------------------------------------------------------- pickle


def _scores(net, x):
    torch.set_num_threads(1)
    with torch.no_grad():
        return net.forward_all(x).tolist()


def test_nets_and_engines_can_be_pickled(timm_file):
    net = load(timm_file)
    net.active_subnet = 1
    next(net.model.parameters()).requires_grad_(False)
    x = images(net.analysis.image_size, 2).float()
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    for other in (pickle.loads(pickle.dumps(net)), torch.load(stream, weights_only=False), copy.deepcopy(net)):
        assert type(other) is type(net) and other.active_subnet == 1 and other.training == net.training
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in net.parameters()]
        assert _scores(other, x) == _scores(net, x)
    engine = net.deploy()
    for other in (pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine)):
        assert all(map(torch.equal, engine.steps(x), other.steps(x)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_scores, (net, x)) == _scores(net, x)


def test_what_cannot_be_pickled_says_what_to_do(small):
    with pytest.raises(SteppingError, match=r"net\.save.*load\(path, model=\.\.\.\)"):
        pickle.dumps(small)
    with pytest.raises(SteppingError, match="Send the engine and the images"):
        pickle.dumps(small.deploy().start(torch.zeros(1, 3, 10, 10)))


# ------------------------------------------------------------------------------------------------- state dicts


def test_a_state_dict_of_other_budgets_is_refused_before_anything_is_copied(small):
    other = apply_steppingnet(small.model, [0.2, 0.5], example_inputs=torch.zeros(1, 3, 10, 10))
    with torch.no_grad():
        other.model.conv.weight.add_(1)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(SteppingError, match="do not fit the net's budgets"):
        other.load_state_dict(small.state_dict())
    broken = {**small.state_dict(), "unit_levels": torch.full_like(small.unit_levels, 9)}
    with pytest.raises(SteppingError, match="out of range"):
        other.load_state_dict(broken)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
