"""The folder of a run: nothing that is not ours is lost, no input is replaced, nobody else's results are taken."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stepping_plugin import BudgetError, CheckpointError, SteppingError
from stepping_plugin.runs.folder import FILES, FOLDERS, LOCK, MARKER, opened_folder
from stepping_plugin.runs.pipeline import run_recipe
from stepping_plugin.runs.recipe import load_recipe
from stepping_plugin.runs.weights import load_weights, save_weights
from stepping_plugin.training.checkpoint import load_checkpoint, save_checkpoint

SMALL = ["data.limit=200", "train.epochs=1", "construction.iterations=2", "construction.batches=1", "retrain.epochs=1",
         "construction.reconstruct=0", "budgets=0.3,0.7", "device=cpu"]  # fmt: skip
AGAIN = [
    "model.name=null",
    "budgets=[]",
    "retrain.distill_from=none",
    "retrain.epochs=1",
    "data.limit=200",
    "device=cpu",
]


def run(folder, *overrides, base=SMALL, **options):
    return run_recipe(load_recipe("digits", [*base, *overrides]), folder, say=lambda text: None, **options)


def take(folder, *overrides, fresh=False):
    with opened_folder(folder, load_recipe("digits", [*SMALL, *overrides]), fresh=fresh):
        pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def results(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name not in (MARKER, LOCK)}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    run(folder)
    return folder


@pytest.fixture
def folder(done, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(done, tmp_path / "run"))


# --- What is not ours


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", [*FILES, *(f"{outer}/precious.jpg" for outer in FOLDERS)])
def test_a_folder_without_the_marker_keeps_everything(name, fresh, tmp_path):
    place = tmp_path / "photos" / name
    place.parent.mkdir(parents=True)
    place.write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="no marker"):
        take(tmp_path / "photos", fresh=fresh)
    assert contents(tmp_path) == before


def test_fresh_removes_what_a_run_writes_and_nothing_else(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "original" / "holiday.jpg").write_text("precious")
    (folder / "notes.txt").write_text("mine")
    (folder / "export-torch").mkdir()
    shutil.rmtree(folder / "retrain")
    (folder / "retrain").symlink_to(elsewhere)
    (elsewhere / "mine.txt").write_text("mine")
    recipe = load_recipe("digits", [*SMALL, "seed=4"])
    with opened_folder(folder, recipe, fresh=True):
        left = contents(folder)
    assert set(left) == {MARKER, LOCK, "recipe.yaml", "notes.txt", os.path.join("original", "holiday.jpg")}
    assert (elsewhere / "mine.txt").read_text() == "mine" and (folder / "retrain").is_symlink()
    assert (folder / "export-torch").is_dir() and "seed: 4" in (folder / "recipe.yaml").read_text()


def test_an_interrupted_fresh_goes_on(folder, monkeypatch):
    """Killed between two removals: what is left of the old run does not become part of the new one."""
    seed = load_recipe("digits", [*SMALL, "seed=4"])
    unlink = Path.unlink

    def dies(path, missing_ok=False):
        if path.name == "constructed.safetensors":
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", dies)
        with opened_folder(folder, seed, fresh=True):
            pass
    assert (folder / "constructed.safetensors").exists()
    with pytest.raises(CheckpointError, match="another recipe"):
        take(folder)
    with opened_folder(folder, seed):
        assert set(contents(folder)) == {MARKER, LOCK, "recipe.yaml"}


@pytest.mark.parametrize("kind", ["file", "file in the way", "folder in the way", "no such place"])
def test_places_that_cannot_be_output_folders(kind, tmp_path):
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("mine")
    elif kind == "file in the way":
        place.mkdir()
        (place / "retrain").write_text("mine")
    elif kind == "folder in the way":
        (place / "net.safetensors").mkdir(parents=True)
    else:
        (tmp_path / "file").write_text("mine")
        place = tmp_path / "file" / "place"
    with pytest.raises(CheckpointError, match="output=DIR"):
        take(place, fresh=True)


# --- Inputs


@pytest.mark.parametrize(("fresh", "link"), [(False, True), (True, False)])
def test_inputs_in_the_output_folder_are_refused(fresh, link, folder, tmp_path):
    net, weights = folder / "net.safetensors", folder / "original.safetensors"
    if link:
        for path in (net, weights):
            (tmp_path / path.name).symlink_to(path)
        net, weights = tmp_path / net.name, tmp_path / weights.name
    before = results(folder)
    with pytest.raises(CheckpointError, match=r"model\.net: .*net\.safetensors"):
        run(folder, f"model.net={net}", base=AGAIN, fresh=fresh)
    with pytest.raises(CheckpointError, match=r"model\.checkpoint_path: "):
        run(folder, f"model.checkpoint_path={weights}", fresh=fresh)
    teacher = ["retrain.distill_from=teacher", "retrain.teacher.name=digits_net"]
    with pytest.raises(CheckpointError, match=r"retrain\.teacher\.checkpoint_path: "):
        run(folder, *teacher, f"retrain.teacher.checkpoint_path={weights}", fresh=fresh)
    assert results(folder) == before


def test_a_run_never_replaces_its_input_net(done, tmp_path):
    for name in ("net.safetensors", "constructed.safetensors"):
        place = tmp_path / name.split(".")[0]
        place.mkdir()
        shutil.copy(done / "net.safetensors", place / name)
        before = contents(place)
        with pytest.raises(CheckpointError, match="Nothing was touched"):
            run(place, f"model.net={place / name}", base=AGAIN)
        assert contents(place) == before


def test_a_recipe_file_in_the_folder_is_an_input(folder):
    own = folder / "recipe.yaml"
    own.write_text("# mine\n" + own.read_text())
    before = results(folder)
    recipe = load_recipe(own, ["seed=3"])
    with pytest.raises(CheckpointError, match=r"recipe: .*recipe\.yaml"):
        run_recipe(recipe, folder, fresh=True, source=own)
    assert results(folder) == before


def test_missing_inputs_are_told_before_a_folder_is_made(tmp_path):
    for key in ("model.checkpoint_path=nowhere.safetensors", "retrain.teacher.checkpoint_path=nowhere.safetensors"):
        teacher = ["retrain.distill_from=teacher", "retrain.teacher.name=digits_net"] if "teacher" in key else []
        with pytest.raises(SteppingError, match=r"no such file; got nowhere\.safetensors"):
            run(tmp_path / "out", *teacher, key)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "error", "text"),
    [
        ("budgets=[2]", BudgetError, "the smallest subnet"),
        ("budgets=[1e-9]", BudgetError, "less than one"),
        ("budgets=[0.001,0.5]", BudgetError, "Raise budget 1"),
        ("device=cuda:99", SteppingError, "cannot be used"),
        ("model.kwargs.foo=3", SteppingError, "foo"),
        ("data.std=[0.5,0.5]", SteppingError, "one per channel"),
        ("data.shift=9", SteppingError, "leave the frame"),
        ("retrain.batch_size=1", SteppingError, "retrain.batch_size=1: batch norm"),
        ("construction.batch_size=1", SteppingError, "construction.batch_size=1: batch norm"),
        ("retrain={distill_from: teacher, teacher: {name: lenet5, kwargs: {foo: 1}}}", SteppingError, "foo"),
    ],
)
def test_what_seconds_tell_is_told_before_anything_is_written_or_removed(override, error, text, tmp_path, folder):
    before = results(folder)
    for place, fresh in ((tmp_path / "new", False), (folder, True)):
        with pytest.raises(error, match=text):
            run(place, override, fresh=fresh)
    assert results(folder) == before and not (tmp_path / "new").exists()


# --- Recipe and marker


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "zeros"])
def test_a_damaged_recipe_file_lets_no_other_seed_in_and_is_mended(damage, folder):
    path = folder / "recipe.yaml"
    whole, before = path.read_bytes(), results(folder)
    harm = {"missing": None, "empty": b"", "cut": whole[:200], "zeros": b"\0" * 40}[damage]
    path.unlink()
    if harm is not None:
        path.write_bytes(harm)
    with pytest.raises(CheckpointError, match="seed was 0, is 9"):
        take(folder, "seed=9")
    told = []
    with opened_folder(folder, load_recipe("digits", SMALL), say=told.append):
        assert results(folder) == before
    assert "written anew" in told[0]


def test_edits_of_the_recipe_file_are_neither_lost_nor_ignored(folder):
    path, recipe = folder / "recipe.yaml", load_recipe("digits", SMALL)
    text = path.read_text()
    path.write_text("# a remark\n" + text)
    with opened_folder(folder, recipe):
        assert path.read_text().startswith("# a remark\n")
    path.write_text(text.replace("gamma: 0.4", "gamma: 0.5"))
    with (
        pytest.raises(CheckpointError, match=r"gamma was 0\.5, is 0\.4.*elsewhere") as caught,
        opened_folder(folder, recipe),
    ):
        pass
    assert "--fresh" not in str(caught.value) and "gamma: 0.5" in path.read_text()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"format": "stepping-plugin run 9"}', b"[" * 9999, b"\xff"]
)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_damaged_marker_is_no_licence(content, fresh, folder):
    (folder / MARKER).write_bytes(content)
    before = results(folder)
    with pytest.raises(CheckpointError, match="marker") as caught:
        take(folder, "seed=9", fresh=fresh)
    assert results(folder) == before and "--fresh" not in str(caught.value)


def test_a_run_of_an_older_version_is_continued(folder):
    """It left recipe.yaml and no marker."""
    (folder / MARKER).unlink()
    with pytest.raises(CheckpointError, match="no marker"):
        take(folder, "seed=9")
    with opened_folder(folder, load_recipe("digits", SMALL)):
        assert json.loads((folder / MARKER).read_text())["recipe"]["seed"] == 0


def test_weights_of_another_seed_are_refused_even_beside_the_right_marker(folder, tmp_path):
    with opened_folder(tmp_path / "other", load_recipe("digits", [*SMALL, "seed=9"])):
        shutil.copy(folder / "original.safetensors", tmp_path / "other")
    with pytest.raises(CheckpointError, match="seed was 0, is 9"):
        run(tmp_path / "other", "seed=9")


@pytest.mark.skipif(os.name != "posix", reason="umask")
def test_modes_follow_umask(done):
    os.umask(mask := os.umask(0))
    found = {name: oct((done / name).stat().st_mode & 0o666) for name in (*FILES, MARKER)}
    assert found == dict.fromkeys(found, oct(0o666 & ~mask))


# --- Weights and the state of a construction


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda t: t.mul_(float("nan")), "NaN"),
        (lambda t: t.to(torch.int8), "int8"),
        (lambda t: t.to(torch.float8_e4m3fn), "float8"),
        (lambda t: t[:-1].clone(), "shape"),
        (lambda t: None, "missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused(harm, text, tmp_path):
    model = torch.nn.Linear(3, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in before.items()}
    state["weight"] = harm(state["weight"])
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=text):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_one_flipped_bit_in_an_original_is_found(tmp_path):
    model, path = torch.nn.Linear(3, 2), tmp_path / "w.safetensors"
    save_weights(model, path, {"seed": 0})
    load_weights(model, path, {"seed": 0})
    whole = path.read_bytes()
    for position in random.Random(0).sample(range(8, len(whole)), 40):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(CheckpointError):
            load_weights(model, path, {"seed": 0})
    save_file(model.state_dict(), path)  # of an older version, or anybody's
    load_weights(model, path, {"seed": 0})


DAMAGES = {
    "no iteration": lambda s: s["construction"].pop("iteration"),
    "iteration is a word": lambda s: s["construction"].update(iteration="x"),
    "iteration beyond the end": lambda s: s["construction"].update(iteration=10**6),
    "negative": lambda s: s["construction"].update(iteration=-1),
    "no records": lambda s: s["construction"].update(records=None),
    "no levels": lambda s: s["construction"].update(levels=None),
    "no trainer": lambda s: s["construction"].pop("trainer"),
    "no settings": lambda s: s["construction"].pop("settings"),
    "no construction": lambda s: s.pop("construction"),
    "no generators": lambda s: s.pop("random"),
    "generators of words": lambda s: s.update(random={"python": "x"}),
    "pruned is a word": lambda s: s["construction"].update(pruned="x"),
}


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """A run that was ended in the middle of its construction."""
    folder = tmp_path_factory.mktemp("halfway")
    from stepping_plugin.runs import pipeline

    def say(text):
        if "iteration 2" in text:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "SAVE_EVERY", -1.0)
        run_recipe(load_recipe("digits", SMALL), folder, say=say)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_of_a_construction_is_one_error(damage, halfway, tmp_path):
    folder = Path(shutil.copytree(halfway, tmp_path / "run"))
    path = folder / "construction" / "state.safetensors"
    state = load_checkpoint(path)
    DAMAGES[damage](state)
    save_checkpoint(path, state)
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        run(folder)


# --- The lock


def test_a_second_run_is_refused_at_once_and_the_first_unharmed(folder):
    recipe, before = load_recipe("digits", SMALL), results(folder)
    with opened_folder(folder, recipe):
        for options in ({}, {"fresh": True}):
            with pytest.raises(CheckpointError, match=rf"in use by another run \(process {os.getpid()} on "):
                run(folder, **options)
        assert results(folder) == before
    with opened_folder(folder, recipe):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_the_lock_of_a_killed_process_is_taken_over(folder):
    recipe = load_recipe("digits", SMALL)
    child = os.fork()
    if child == 0:
        with opened_folder(folder, recipe):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with opened_folder(folder, recipe):
        assert json.loads((folder / MARKER).read_text())["holder"]["pid"] == os.getpid()
