"""The house: imports point down the floors of CONTRIBUTING.md's table, and none in a circle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("stepping_plugin", "integrations")

Imports = dict[str, set[str]]  # module -> modules that it imports, both as paths such as "graph/labels"


def floors(text: str) -> dict[str, int]:
    """Room -> floor, from the rows `| floor | rooms | ... |` of CONTRIBUTING.md; 0 is the ground."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.M)
    return {room: int(floor) for floor, rooms in rows for room in re.findall(r"`([^`]+)`", rooms)}


def modules() -> dict[str, Path]:
    """Every module by its path below the package: `integrations` counts as a folder of it."""
    found = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("stepping_plugin/")
            found[name.removesuffix("/__init__")] = path
    found.pop("__init__", None)  # the lazy table of public names
    return found


def imports(name: str, source: str, package: bool, known: set[str]) -> Iterator[str]:
    """Modules of the house that a module imports: at the top, in functions, for type checkers only."""
    here = name.split("/") if package else name.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = here[: len(here) - node.level + 1] + base
            elif base[:1] == ["stepping_plugin"]:
                base = base[1:]
            else:
                continue
            for alias in node.names:
                candidates = ["/".join([*base, alias.name]), "/".join(base)]
                yield from [c for c in candidates if c in known][:1]


def graph(sources: dict[str, tuple[str, bool]]) -> Imports:
    known = set(sources)
    return {name: set(imports(name, text, package, known)) - {name} for name, (text, package) in sources.items()}


def house() -> Imports:
    return graph({name: (path.read_text(), path.name == "__init__.py") for name, path in modules().items()})


def room(module: str, plan: dict[str, int]) -> str | None:
    """The room of a module: the longest entry of the plan that is it, or a folder around it."""
    fitting = [r for r in plan if module == r or (r.endswith("/") and f"{module}/".startswith(r))]
    return max(fitting, key=len, default=None)


def upward(found: Imports, plan: dict[str, int]) -> list[str]:
    """Imports that do not lead to a lower floor, or stay in their room."""
    wrong = []
    for module, targets in found.items():
        for target in targets:
            own, other = room(module, plan), room(target, plan)
            if own is None or other is None:
                wrong.append(f"{module if own is None else target}: in no room of CONTRIBUTING.md")
            elif own != other and plan[other] >= plan[own]:
                wrong.append(f"{module} (floor {plan[own]}) imports {target} (floor {plan[other]})")
    return sorted(set(wrong))


def circle(found: Imports) -> list[str]:
    """Modules of one circle, if there is any."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :] + [module]
        if module in done:
            return []
        for target in sorted(found.get(module, ())):
            if back := visit(target, [*path, module]):
                return back
        done.add(module)
        return []

    return next((back for module in sorted(found) if (back := visit(module, []))), [])


@pytest.fixture(scope="module")
def plan() -> dict[str, int]:
    return floors((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_imports_point_down(plan: dict[str, int]) -> None:
    assert upward(house(), plan) == []


def test_no_circle() -> None:
    assert circle(house()) == []


def test_every_room_exists(plan: dict[str, int]) -> None:
    present = modules()
    rooms = {room(module, plan) for module in present}
    assert rooms - {None} == set(plan), "a room of CONTRIBUTING.md holds no module"


def test_few_files_at_the_root() -> None:
    assert len(list((ROOT / "stepping_plugin").glob("*.py"))) <= 10


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_no_file_is_too_long_to_read(folder: str) -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {name: n for name, n in lines.items() if n > 450} == {}


def test_a_planted_upward_import_is_found(plan: dict[str, int]) -> None:
    sources = {
        "graph/labels": ("def f():\n    from ..engine.engine import Engine\n", False),
        "engine/engine": ("", False),
    }
    (text,) = upward(graph(sources), plan)
    assert text.startswith("graph/labels (floor 1) imports engine/engine")


@pytest.mark.parametrize("line", ["from .b import x", "if TYPE_CHECKING:\n    from . import b"])
def test_a_planted_circle_is_found(line: str) -> None:
    sources = {"units/a": (line, False), "units/b": ("from stepping_plugin.units.a import y", False)}
    assert circle(graph(sources)) == ["units/a", "units/b", "units/a"]
