"""The package in the three forms people use it: source tree, installed wheel, editable install.

Each form is made from a copy of the tree with a probe adapter and a probe recipe added, and is looked at by a
bare interpreter (no site-packages), so that nothing installed beside it can lend a hand.
"""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import stepping_plugin
from stepping_plugin import errors

ROOT = Path(__file__).resolve().parents[1]
FORMS = ["tree", "wheel", "editable"]
PROBE_RECIPE = "probe: true\n"


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is needed to build, with probes that must come along."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").write_text("probe\n")
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "stepping_plugin", copy / "stepping_plugin", ignore=skip)
    shutil.copytree(ROOT / "integrations", copy / "integrations", ignore=skip)
    if (ROOT / "recipes").is_dir():
        shutil.copytree(ROOT / "recipes", copy / "recipes", ignore=skip)
    (copy / "recipes" / "probes").mkdir(parents=True)
    (copy / "recipes" / "probe.yaml").write_text(PROBE_RECIPE)
    (copy / "recipes" / "probes" / "inner.yaml").write_text(PROBE_RECIPE)
    (copy / "recipes" / "probe.json").write_text("{}")  # results are data of the repository, not of the package
    (copy / "integrations" / "probe").mkdir()
    (copy / "integrations" / "probe" / "__init__.py").write_text("from stepping_plugin.errors import SteppingError\n")
    return copy


def _build(source: Path, kind: str, out: Path) -> Path:
    """Call setuptools' build hook (``wheel`` or ``editable``) and unpack what it made under ``out``."""
    hook = f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))"
    name = _run(sys.executable, "-c", hook, cwd=source).splitlines()[-1]
    unpacked = out / "unpacked"
    with zipfile.ZipFile(out / name) as archive:
        archive.extractall(unpacked)
    return unpacked


@pytest.fixture(scope="module")
def forms(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder that each form puts on ``sys.path``."""
    built = {kind: _build(source, kind, tmp_path_factory.mktemp(kind)) for kind in ("wheel", "editable")}
    return {"tree": source, **built}


def _look(folder: Path, code: str, cwd: Path) -> str:
    """Run ``code`` where only the standard library and ``folder`` (its .pth files obeyed) can be imported."""
    setup = f"import site, sys; sys.path.insert(0, {str(folder)!r}); site.addsitedir({str(folder)!r})\n"
    return _run(sys.executable, "-I", "-S", "-B", "-c", setup + code, cwd=cwd)


@pytest.mark.parametrize("form", FORMS)
def test_integrations_are_a_subpackage(form: str, forms: dict[str, Path], source: Path, tmp_path: Path) -> None:
    code = (
        "import stepping_plugin.integrations.probe as p, stepping_plugin.errors as e\n"
        "assert p.SteppingError is e.SteppingError\n"
        "print(p.__name__, p.__file__)"
    )
    name, file = _look(forms[form], code, tmp_path).split()
    assert name == "stepping_plugin.integrations.probe"
    expected = forms["wheel"] if form == "wheel" else source
    assert Path(file).is_relative_to(expected)


@pytest.mark.parametrize("form", FORMS)
def test_every_recipe_is_found_as_a_resource(form: str, forms: dict[str, Path], source: Path, tmp_path: Path) -> None:
    recipes = sorted((source / "recipes").glob("**/*.yaml"))
    names = [path.relative_to(source / "recipes").as_posix() for path in recipes]
    code = (
        "from importlib.resources import files\n"
        "folder = files('stepping_plugin.recipes')\n"
        f"for name in {names!r}:\n"
        "    file = folder\n"
        "    for part in name.split('/'):\n"  # one by one: several at once need Python 3.12
        "        file = file / part\n"
        "    print(len(file.read_bytes()))"
    )
    sizes = [int(line) for line in _look(forms[form], code, tmp_path).split()]
    assert sizes == [path.stat().st_size for path in recipes]


def test_wheel_holds_the_package_and_nothing_else(forms: dict[str, Path], source: Path) -> None:
    wheel = forms["wheel"]
    top = {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"}
    assert top == {"stepping_plugin"}
    shipped = {
        path.relative_to(wheel / "stepping_plugin") for path in wheel.glob("stepping_plugin/**/*") if path.is_file()
    }
    wanted = {path.relative_to(source / "stepping_plugin") for path in source.glob("stepping_plugin/**/*.py")}
    wanted |= {path.relative_to(source) for path in source.glob("integrations/**/*.py")}
    wanted |= {path.relative_to(source) for path in source.glob("recipes/**/*.yaml")}
    for data in ("zoo/*", "runtimes/*.mjs"):
        wanted |= {path.relative_to(source / "stepping_plugin") for path in source.glob(f"stepping_plugin/{data}")}
    assert shipped == wanted | {Path("py.typed")}


def test_metadata(forms: dict[str, Path]) -> None:
    (info,) = forms["wheel"].glob("*.dist-info")
    metadata = HeaderParser().parsestr((info / "METADATA").read_text())
    assert metadata["Name"] == "stepping-plugin"
    assert metadata["Version"] == stepping_plugin.__version__
    assert metadata["License-Expression"] == "MIT"
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    entry_points = configparser.ConfigParser()
    entry_points.read(info / "entry_points.txt")
    assert dict(entry_points["console_scripts"]) == {"stepping": "stepping_plugin.cli:main"}


def test_import_needs_only_the_standard_library(forms: dict[str, Path], tmp_path: Path) -> None:
    """So it is fast: torch and the rest load with the first public name that needs them."""
    code = "import stepping_plugin, sys; print(stepping_plugin.SteppingError.__name__, 'torch' in sys.modules)"
    assert _look(forms["wheel"], code, tmp_path).split() == ["SteppingError", "False"]


def test_module_and_command_are_one() -> None:
    """Compared as syntax: ``__main__`` runs the function that the console script names."""
    tree = ast.parse((ROOT / "stepping_plugin" / "__main__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert [(node.module, node.names[0].name) for node in imports] == [("stepping_plugin.cli", "main")]


@pytest.mark.parametrize("name", stepping_plugin.__all__)
def test_public_name(name: str) -> None:
    assert name in dir(stepping_plugin)
    value = getattr(stepping_plugin, name)
    assert name == "__version__" or callable(value)


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING and the lazy table say the same."""
    tree = ast.parse((ROOT / "stepping_plugin" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.asname: node.module.removeprefix("stepping_plugin.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == stepping_plugin._HOME


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        stepping_plugin.no_such_name  # noqa: B018


def test_module_does_not_shadow_the_function_of_its_name(tmp_path: Path) -> None:
    """``verify`` is a module and a public function; whichever is imported first, the name is the function."""
    package = tmp_path / "stepping_plugin"
    package.mkdir()
    shutil.copy(ROOT / "stepping_plugin" / "__init__.py", package)
    (package / "verify.py").write_text("def verify():\n    return 'proved'\n")
    for first in ("import stepping_plugin.verify", "from stepping_plugin.verify import verify as other"):
        code = f"{first}\nfrom stepping_plugin import verify\nprint(verify())"
        assert _look(tmp_path, code, tmp_path).strip() == "proved"


def test_bare_integrations_is_never_imported() -> None:
    pattern = re.compile(r"^\s*(?:from|import)\s+integrations\b", re.MULTILINE)
    folders = ("stepping_plugin", "integrations", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert files
    assert [str(path) for path in files if pattern.search(path.read_text())] == []


def test_errors_have_one_base() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) == 6
    assert all(issubclass(cls, errors.SteppingError) for cls in classes)


def test_recipe_error_lists_every_problem() -> None:
    error = errors.RecipeError(["a: wrong", "b: unknown"], source="x.yaml")
    assert error.problems == ["a: wrong", "b: unknown"]
    assert str(error) == "2 problems in x.yaml:\n  - a: wrong\n  - b: unknown"
    assert str(errors.RecipeError("a: wrong")) == "a: wrong"


def test_nearest_and_explain() -> None:
    assert errors.nearest("Policy ", ["budget", "policy"]) == "did you mean 'policy'?"
    assert errors.nearest("zzz", []) == "valid: nothing here"
    text = errors.explain("unknown policy", where="config", got="x", expected="steppingnet", action="Pick one.")
    assert text == "config: unknown policy; got x, expected steppingnet. Pick one."
    assert errors.explain("No layer has units.", action="Report it.") == "No layer has units. Report it."
