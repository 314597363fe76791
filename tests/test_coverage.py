"""Coverage runs: which models, what a row says, limits, resuming, the table, the fuzzer."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stepping_plugin import SteppingError, SteppingNet
from stepping_plugin.cli import main
from stepping_plugin.studies.coverage import check as checks
from stepping_plugin.studies.coverage import runner
from stepping_plugin.studies.coverage.families import select
from stepping_plugin.studies.coverage.fuzz import check_network, random_network
from stepping_plugin.studies.coverage.runner import check_in_process, read_results, run_coverage, write_results
from stepping_plugin.studies.coverage.specs import FAMILIES, TORCHVISION, Spec
from stepping_plugin.studies.coverage.structure import structure
from stepping_plugin.studies.coverage.table import markdown_table, summary_lines
from stepping_plugin.studies.coverage.variants import fitted
from stepping_plugin.units.analysis import analyse

SMALL = Spec("test_vit", "vision_transformer", 32, {"img_size": 32, "depth": 2})


def test_one_model_per_module_of_timm():
    import timm

    own = {"models"}  # the paper's networks, if another test has registered them
    assert sorted(spec.module for spec in FAMILIES) == sorted(set(timm.list_modules()) - own)
    assert all(timm.is_model(spec.model) for spec in FAMILIES)


def test_selection():
    assert select(family_smallest=True) == select() == [*FAMILIES, *TORCHVISION]
    assert [s.model for s in select(["resn*"], family_smallest=True)] == ["resnest14d", "test_resnet", "resnetv2_18"]
    assert {"resnet10t", "resnet14t"} <= {s.model for s in select(["resnet1*"])}
    assert select(["torchvision:vgg11"])[0].module == "torchvision.vgg"
    assert select(["torchvision:resnet34"]) == [Spec("torchvision:resnet34", "torchvision.resnet", 224)]
    with pytest.raises(SteppingError, match="resnet18"):
        select(["resnet81"])
    with pytest.raises(SteppingError, match="nothing matches"):
        select(["nope*"], family_smallest=True)


def test_row_of_a_model():
    row = list(checks.check(SMALL))[-1]
    assert row["status"] == "ok" and not row["failures"]
    assert list(row["seconds"]) == [stage.__name__ for stage in checks.STAGES]
    assert row["pinned_channels"] == 0 < row["units"] < row["channels"]
    assert max(row["identity"], row["leak"], row["extract"], row["engine"], row["train_identity"]) < 1e-12
    assert row["macs"] == row["macs_fvcore"] and max(row["budget_used"]) <= 1
    assert row["engine_macs"] == row["subnet_macs"] and row["train_gradient"] < 1e-12
    json.dumps(row)


def test_idle_macs_are_those_without_a_gradient():
    subject = checks.Subject(Spec("lenet5", "models", 32))
    checks.convert(subject)
    levels = subject.net.levels
    levels[subject.analysis.groups[0].units[2:]] = 2  # nobody reads them: the second layer is at level 1
    subject.net.set_levels(levels)
    needed = checks.reached_macs(subject.net, subject.images)
    assert needed == subject.net.deploy().macs == subject.net.macs
    assert needed != subject.net.macs_model.subnet_macs(levels, subject.net.num_subnets).tolist()
    subject.net.set_levels(subject.level_vectors()[0])
    assert checks.reached_macs(subject.net, subject.images) == subject.net.deploy().macs == subject.net.macs


class HeadsBesideImages(nn.Module):
    """Attention that joins the axes of images and heads, as timm's SAM does."""

    def __init__(self):
        super().__init__()
        self.patches, self.qkv = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).reshape(3, b * 2, n, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(y.reshape(b, 2, n, 4).transpose(1, 2).reshape(b, n, 8)).mean(1))


def test_needed_macs_of_heads_beside_images():
    """The units are the heads, the axis that they lie on holds those of all images."""
    torch.manual_seed(0)
    model = HeadsBesideImages().double().eval()
    analysis = analyse(model, (3, 16, 16))
    levels = torch.ones(analysis.num_units, dtype=torch.long)
    for group in analysis.groups:
        levels[group.units[len(group.units) // 2 :]] = 2
    net = SteppingNet(model, analysis, levels, [1, 2], 1).eval()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert checks.reached_macs(net, images) == net.macs


def test_engine_check_counts_what_runs(monkeypatch):
    subject = checks.Subject(SMALL)
    checks.convert(subject)
    assert checks.engine(subject)["idle_macs"] == [0, 0, 0]
    counted = checks.executed_macs
    monkeypatch.setattr(checks, "executed_macs", lambda *a: [m + 1 for m in counted(*a)])
    with pytest.raises(checks.Failed, match="reported by the engine"):
        checks.engine(subject)


def test_checks_can_fail(monkeypatch):
    subject = checks.Subject(SMALL)
    checks.convert(subject)
    with torch.no_grad():
        subject.net.model.get_parameter("model.blocks.0.mlp.fc1.bias").add_(1e-3)
    for stage in (checks.identity, checks.train_mode):
        with pytest.raises(checks.Failed, match="differ by"):
            stage(subject)
    monkeypatch.setattr(checks, "count_macs", lambda *_: type("Counted", (), {"total": 1}))
    with pytest.raises(checks.Failed, match="fvcore counts 1"):
        checks.macs(subject)


def test_models_are_checked_in_float64_throughout():
    class Casting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().to(dtype=torch.float32) + torch.zeros(1, dtype=torch.float32)

    x = torch.full((2,), 1 / 3, dtype=torch.float64)
    assert torch.equal(checks.InFloat64(Casting())(x), x)


def test_limits_leave_a_row():
    row = check_in_process(SMALL, seconds=0.5, gib=12)
    assert row["model"] == "test_vit" and row["status"].endswith("not finished after 0 s")
    row = check_in_process(Spec("no_such_model", "nothing", 32), seconds=100, gib=12)
    assert row["status"].startswith("build: ") and "no_such_model" in row["status"]


def test_a_process_that_crashes_leaves_a_row(monkeypatch):
    """The figures of the stages before, and the signal or the last line of what it said."""
    script = (
        "import json, os, signal; print(json.dumps({'model': 'm', 'module': 'm', 'stage': 'nested'}), flush=True); "
    )
    for end, said in (("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"), ("raise ValueError('why')", "why")):
        monkeypatch.setattr(runner, "_command", lambda spec, end=end: [sys.executable, "-c", script + end])
        row = check_in_process(SMALL, seconds=100, gib=12)
        assert row["status"].startswith("nested: ") and said in row["status"]
    hungry = "x = bytearray(3 << 30)"
    monkeypatch.setattr(runner, "_command", lambda spec: [sys.executable, "-c", script + hungry])
    assert check_in_process(SMALL, seconds=100, gib=1)["status"] == "nested: more than 1 GiB of memory"


def test_another_size_of_a_module(tmp_path):
    said: list[str] = []
    cache = tmp_path / "counts.json"
    (spec,) = select(["tiny_vit"], family_second=True, cache=cache, say=said.append)
    assert spec == Spec("tiny_vit_11m_224", "tiny_vit", None)
    assert said[0].startswith("counting the parameters of ")
    assert select(["tiny_vit"], family_second=True, cache=cache, say=said.append) == [spec] and len(said) == 1
    (reduced,) = select(["beit"], family_second=True)
    assert reduced.model == "beit_large_patch16_224" and reduced.kwargs["embed_dim"] == 256
    assert select(["gemma4_vit"], family_second=True)[0].model == "gemma4_vit_570m"  # 570m_enc gives features only
    assert select(["vgg"], family_second=True) == [Spec("vgg19_bn", "vgg", None, {"mlp_ratio": 0.25})]
    # One size only, and a first model whose name timm does not list any more.
    assert select(["inception_resnet_v2"], family_second=True) == [
        Spec("ens_adv_inception_resnet_v2", "inception_resnet_v2", 128)
    ]
    with pytest.raises(SteppingError, match="nothing matches"):
        select(["inception_v5"], family_second=True)


def test_variants_below_a_number_of_parameters():
    assert [s.model for s in select(["lcnet_0*"], all_variants_under=int(2e6))] == [
        "lcnet_035",
        "lcnet_050",
        "lcnet_075",
    ]


def test_smallest_images_that_a_model_runs_on():
    spec = fitted(Spec("test_vit", "vision_transformer", None))
    assert (spec.image, spec.kwargs) == (64, {"img_size": 64})
    assert fitted(Spec("test_resnet", "resnet", None)).kwargs == {}
    assert fitted(spec) is spec


def test_runs_resume(tmp_path, monkeypatch):
    asked = []

    def fake(spec, seconds, gib):
        asked.append(spec.model)
        status = "ok" if spec.model == "a" else "nested: leak"
        return {"model": spec.model, "module": "m", "status": status, "wall_seconds": 1.0}

    monkeypatch.setattr("stepping_plugin.studies.coverage.runner.check_in_process", fake)
    output = tmp_path / "deep" / "results.json"
    specs = [Spec(name, "m", 32) for name in ("b", "a")]
    run_coverage(specs, output)
    assert asked == ["b", "a"] and [row["model"] for row in read_results(output)] == ["a", "b"]
    run_coverage([*specs, Spec("c", "m", 32)], output, jobs=2)
    assert asked == ["b", "a", "c"]
    run_coverage(specs, output, again=True)
    assert asked == ["b", "a", "c", "b"]
    assert not list(output.parent.glob("*.part"))
    output.write_text("{}")
    with pytest.raises(SteppingError, match="not a file of coverage results"):
        run_coverage(specs, output)


def test_command(tmp_path, monkeypatch, capsys):
    row = {"model": "test_vit", "module": "vision_transformer", "status": "ok", "wall_seconds": 1.0}
    monkeypatch.setattr("stepping_plugin.studies.coverage.runner.check_in_process", lambda *_: row)
    output, table = tmp_path / "r.json", tmp_path / "t.md"
    assert main(["coverage", "--models", "test_vit", "--output", str(output), "--table", str(table)]) == 0
    assert read_results(output) == [row]
    assert "| vision_transformer | test_vit | ok |" in table.read_text()
    assert "every check passed: 1" in capsys.readouterr().out


@pytest.mark.parametrize("name, page", [("coverage_results", "coverage"), ("coverage_second", "coverage_second")])
def test_committed_results_and_table_belong_together(name, page):
    docs = Path(__file__).parents[1] / "docs" / "results"
    rows = read_results(docs / f"{name}.json")
    page = (docs / f"{page}.md").read_text()
    assert markdown_table(rows) in page
    assert "\n".join(summary_lines(rows)) in page
    assert {row["module"] for row in rows} >= {spec.module for spec in FAMILIES}


def test_results_are_sorted_and_readable(tmp_path):
    rows = [{"model": m, "module": m, "status": "ok"} for m in "cab"]
    write_results(tmp_path / "r.json", rows)
    assert [r["model"] for r in read_results(tmp_path / "r.json")] == ["a", "b", "c"]


# Subnets without any unit of their own; a layer behind an extremum over units counted once, but run once per subnet.
BROKEN_ONCE = [10_616, 12_427]


@pytest.mark.parametrize("seed", [*range(10), *range(10_000, 10_010), *BROKEN_ONCE])
def test_random_networks(seed):
    check_network(random_network(seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", [*range(10, 2010, 50), *range(10_010, 10_510, 50)])
def test_many_random_networks(first):
    for seed in range(first, first + 50):
        check_network(random_network(seed), seed)


def test_random_networks_are_repeatable_and_differ():
    a, b, c = random_network(7), random_network(7), random_network(8)
    assert str(a) == str(b) != str(c)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_structure_without_weights(capsys):
    facts = structure("test_vit")
    assert (facts["channels"], facts["pinned_channels"]) == (3136, 0) and facts["macs"] > 0
    assert main(["coverage", "--structure", "test_vit", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["results"]
    assert [row["model"] for row in measured] == ["test_vit"] and measured[0]["macs"] == facts["macs"]
    assert main(["coverage", "--structure", "resnet81"]) == 1
    assert "resnet81" in capsys.readouterr().err
    assert main(["coverage", "--models", "test_vit", "--json"]) == 1
    assert "--json goes with --structure" in capsys.readouterr().err
