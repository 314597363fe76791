"""The code on the pages of docs/ runs as it stands there, page by page, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "results" not in path.parts)
_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def name(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if _BLOCK.search(p.read_text(encoding="utf-8"))], ids=name)
def test_code_runs(page, tmp_path, monkeypatch):
    """All blocks of a page in one namespace, in order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "page"})


def test_the_example_of_the_readme_prints_what_it_says(capsys):
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    exec(compile(_BLOCK.search(text)[1], "README.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == re.search(r"```text\n(.*?)```", text, re.DOTALL)[1]


def _leaves(entries) -> list[str]:
    """Pages below an entry of the navigation."""
    if isinstance(entries, str):
        return [entries]
    inner = entries.values() if isinstance(entries, dict) else entries
    return [leaf for entry in inner for leaf in _leaves(entry)]


def test_every_page_is_in_the_navigation():
    """`mkdocs build` is strict, but runs only where mkdocs is installed."""
    site = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = _leaves(site["nav"])
    assert sorted(listed) == sorted(name(p) for p in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", [*PAGES, DOCS.parent / "README.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
