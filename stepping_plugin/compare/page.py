"""The page of a comparison."""
from __future__ import annotations
from pathlib import Path
def write_page(results: Path, page: Path) -> list[Path]:
    raise NotImplementedError
