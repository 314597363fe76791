"""The folder of a run: a marker that says what is in it, a lock that keeps other runs out, and what may be removed.

    .stepping-run.json   the marker: the recipe and the process that holds the folder; written before anything else
    .stepping-run.lock   locked while a run is on; the system lets it go when the process ends, however it ends
    earlier/1, 2, ...    results of recipes that the folder held before, kept where a later one replaced them

Nothing is ever replaced or removed in a folder without the marker, and with it only files that a run writes. A recipe
that differs in later stages only (see `runs.stages`) takes over what the earlier ones have left; what it replaces is
moved aside.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
from pydantic import ValidationError

from ..errors import CheckpointError, RecipeError, explain
from ..tensorfile import write_bytes
from .recipe import dump_recipe, parse_recipe
from .recipe_schema import Recipe
from .stages import STAGES, changes, first_stage, settings_of

__all__ = ["first_to_do", "locked", "opened_folder"]

MARKER, LOCK, RECIPE, EARLIER = ".stepping-run.json", ".stepping-run.lock", "recipe.yaml", "earlier"
FILES = (RECIPE, *(name for stage in STAGES for name in stage.files))
FOLDERS = {name: inside for stage in STAGES for name, inside in stage.folders.items()}
_FORMAT = "stepping-plugin run 1"
_LISTED = 6  # keys that differ
_ELSEWHERE = "Choose another folder with output=DIR."
_UNTOUCHED = "Nothing was touched."


@contextlib.contextmanager
def opened_folder(
    folder: Path,
    recipe: Recipe,
    *,
    fresh: bool = False,
    inputs: Mapping[str, Path] | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[None]:
    """Hold a folder for one run: made, marked, locked, and with nothing of another run in it.

    Args:
        folder: of the results.
        recipe: of the run; a folder of a recipe that has no stage in common with it is refused.
        fresh: discard what an earlier run left.
        inputs: what the run reads (recipe key: path); the run must not write there.
        say: told what was mended, and what of another recipe is taken over, done anew and kept aside.

    Raises:
        CheckpointError: another run is on in it, it holds something else, or it cannot be made. Nothing was removed.
    """
    with contextlib.ExitStack() as stack:
        try:
            _check_place(folder)
            _check_inputs(folder, inputs or {}, recipe, fresh)
            _check_ownership(folder, recipe)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / LOCK, lambda: _in_use(folder)))
            _check_ownership(folder, recipe)  # again: now nobody else changes it
            _take(folder, recipe, fresh, say)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            raise CheckpointError(f"{folder}: cannot be used as output folder ({reason}). {_ELSEWHERE}") from None
        yield


# ------------------------------------------------------------------------------------------------- checks


def _check_place(folder: Path) -> None:
    """Things of the wrong kind under the names that a run writes to."""
    for place in (folder, *(folder / name for name in FOLDERS)):
        if os.path.lexists(place) and not place.is_dir():
            raise CheckpointError(
                explain("in the way", where=str(place), got="a file", expected="a folder", action=_ELSEWHERE)
            )
    files = [folder / name for name in (MARKER, LOCK, *FILES)]
    files += [folder / name / inner for name, inside in FOLDERS.items() for inner in inside]
    for place in files:
        if place.is_dir():
            raise CheckpointError(
                explain("in the way", where=str(place), got="a folder", expected="a file", action=_ELSEWHERE)
            )


def _check_inputs(folder: Path, inputs: Mapping[str, Path], recipe: Recipe, fresh: bool) -> None:
    """A run that would replace or remove what it reads."""
    for key, path in inputs.items():
        name = _own_name(folder, path)
        if name is None or (key == "recipe" and name == RECIPE and not (fresh and _other_text(path, recipe))):
            continue
        raise CheckpointError(
            f"{key}: {path} is {name} of the output folder, which this run would replace or discard. {_UNTOUCHED} "
            "Choose another folder with output=DIR, or copy the file elsewhere."
        )


def _own_name(folder: Path, path: Path) -> str | None:
    """The name under which a run in this folder would write to `path`, if it would."""
    names = [*FILES, *(f"{outer}/{inner}" for outer, inside in FOLDERS.items() for inner in inside)]
    for name in names:
        own = folder / name
        if os.path.realpath(own) == os.path.realpath(path):
            return name
        with contextlib.suppress(OSError):
            if own.samefile(path):
                return name
    return None


def _other_text(path: Path, recipe: Recipe) -> bool:
    """Whether a recipe file holds something else than what the run would write in its place."""
    try:
        return _lines(path.read_text(encoding="utf-8")) != _lines(dump_recipe(recipe))
    except (OSError, UnicodeDecodeError):
        return True


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith(("output:", "device:"))]


def _check_ownership(folder: Path, recipe: Recipe) -> None:
    """Without a marker nothing of the names that a run writes may be there, but for runs of older versions."""
    if (folder / MARKER).exists():
        return
    found = sorted(name for name in (*FILES, *FOLDERS) if os.path.lexists(folder / name))
    if not found or _is_older_run(folder, recipe):
        return
    raise CheckpointError(
        f"{folder} holds {', '.join(found[:4])} but no marker of a run ({MARKER}), so nothing says what they belong "
        f"to. {_UNTOUCHED} {_ELSEWHERE}"
    )


def _is_older_run(folder: Path, recipe: Recipe) -> bool:
    """A run of this very recipe, by a version that left no marker."""
    try:
        text = (folder / RECIPE).read_text(encoding="utf-8")
        return _lines(text) == _lines(dump_recipe(recipe)) or not changes(settings_of(parse_recipe(text)), recipe)
    except (OSError, UnicodeDecodeError, RecipeError):
        return False


# ------------------------------------------------------------------------------------------------- taking it over


def first_to_do(folder: Path, recipe: Recipe) -> int:
    """Index in `STAGES` of the first stage of which nothing at hand can be used: 0 without a run that fits."""
    with contextlib.suppress(CheckpointError, OSError):
        marker = _read_marker(folder)
        if marker is not None and not marker["discarding"]:
            return first_stage(changes(marker["recipe"], recipe))
    return 0


def _take(folder: Path, recipe: Recipe, fresh: bool, say: Callable[[str], None]) -> None:
    marker = _read_marker(folder)
    interrupted = False
    if marker is not None and not fresh:
        if marker["moving"] is not None:
            _move(folder, marker["moving"])
            _write_marker(folder, marker["recipe"])
        _check_recipe_file(folder, marker["recipe"], recipe)
        interrupted = marker["discarding"]
        changed = changes(marker["recipe"], recipe)
        if changed and interrupted:
            raise CheckpointError(_another_recipe(folder, changed))
        if changed:
            _replace(folder, marker["recipe"], recipe, changed, say)
            say = lambda text: None  # noqa: E731 - of the new recipe nothing can be missing or cut
    if marker is not None and (fresh or interrupted):
        _write_marker(folder, settings_of(recipe), discarding=True)  # a kill from here on leaves no results that count
        _discard(folder)
    _write_marker(folder, settings_of(recipe))
    _write_recipe_file(folder, recipe, say if marker is not None and not (fresh or interrupted) else lambda text: None)


def _another_recipe(folder: Path, changed: list[str]) -> str:
    return (
        f"{folder} holds a run of another recipe: {_listed(changed)}. No stage of it can be used for this one. Choose "
        "another folder with output=DIR, or discard that run with --fresh."
    )


def _listed(changed: list[str]) -> str:
    more = f" and {len(changed) - _LISTED} more" if len(changed) > _LISTED else ""
    return "; ".join(changed[:_LISTED]) + more


def _replace(
    folder: Path, old: Mapping[str, Any], recipe: Recipe, changed: list[str], say: Callable[[str], None]
) -> None:
    """Make room for a recipe that differs in later stages only; their results are moved aside."""
    first = first_stage(changed)
    replaced = [stage.name for stage in STAGES[first:] if any(stage.left_in(folder))]
    if first == 0 and replaced:
        raise CheckpointError(_another_recipe(folder, changed))
    text = f"{folder}: {_listed(changed)}."
    if kept := [stage.name for stage in STAGES[:first] if any(stage.left_in(folder))]:
        text += f" From the earlier run: {', '.join(kept)}."
    if replaced:
        number = 1
        while os.path.lexists(folder / EARLIER / str(number)):
            number += 1
        moving = {"first": first, "to": f"{EARLIER}/{number}", "recipe": dict(old)}
        _write_marker(folder, settings_of(recipe), moving=moving)
        _move(folder, moving)
        text += f" Anew: {', '.join(replaced)}; what there was of it is kept in {folder / EARLIER / str(number)}."
    say(text)


def _move(folder: Path, moving: Mapping[str, Any]) -> None:
    """Carry out, or go on with, what the marker says is being moved."""
    aside = folder / moving["to"]
    aside.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ValidationError):
        write_bytes(aside / RECIPE, dump_recipe(Recipe.model_validate(moving["recipe"])).encode())
    for stage in STAGES[moving["first"] :]:
        for path in stage.left_in(folder):
            place = aside / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    with contextlib.suppress(OSError, RecipeError, UnicodeDecodeError):
        if not changes(moving["recipe"], _parsed(folder / RECIPE)):  # else it is somebody's edit
            (folder / RECIPE).unlink()


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """What the marker says, None without one.

    Raises:
        CheckpointError: it is damaged; nobody can say then whose the folder is.
    """
    path = folder / MARKER
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        marker = None
    if not isinstance(marker, dict) or marker.get("format") != _FORMAT or not isinstance(marker.get("recipe"), dict):
        raise CheckpointError(
            f"{path}: this marker of a run is damaged or of a newer version, so nothing says whether the results "
            f"beside it belong to this recipe. {_UNTOUCHED} Bring the file back from a copy, or choose another folder "
            "with output=DIR."
        )
    return {**marker, "discarding": marker.get("discarding") is True, "moving": _moving(marker)}


def _moving(marker: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was being moved aside when the process ended; only what `_replace` writes is believed."""
    moving = marker.get("moving")
    if not isinstance(moving, dict) or not isinstance(moving.get("recipe"), dict):
        return None
    fits = moving.get("first") in range(len(STAGES)) and re.fullmatch(rf"{EARLIER}/\d+", str(moving.get("to")))
    return moving if fits else None


def _write_marker(
    folder: Path, settings: Mapping[str, Any], *, discarding: bool = False, moving: Mapping[str, Any] | None = None
) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname()}
    marker = {"format": _FORMAT, "discarding": discarding, "moving": moving, "holder": holder, "recipe": dict(settings)}
    write_bytes(folder / MARKER, json.dumps(marker, indent=1).encode())


def _check_recipe_file(folder: Path, held: Mapping[str, Any], recipe: Recipe) -> None:
    """The readable recipe says the same as the marker or as the recipe to run, or is damaged.

    Somebody's edits are neither lost nor ignored.
    """
    path = folder / RECIPE
    if not path.exists() or _is_cut(path, recipe):
        return
    try:
        found = _parsed(path)
        changed = changes(held, found) and changes(settings_of(found), recipe)
    except (RecipeError, UnicodeDecodeError):
        changed = ["it cannot be read as a recipe"]
    if changed:
        raise CheckpointError(
            f"{path} is not the recipe of this run any more: {'; '.join(changed[:3])}. The results beside it are "
            "whole. Move that file elsewhere and start the same run again: it is written anew."
        )


def _is_cut(path: Path, recipe: Recipe) -> bool:
    """Whether the file holds only the beginning of what was written (a full disk, an old version that was killed)."""
    content, whole = path.read_bytes().strip(b"\0\n "), dump_recipe(recipe).encode()
    return whole.startswith(content)


def _write_recipe_file(folder: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Written where it is missing, cut short, or that of the recipe that was replaced."""
    path, text = folder / RECIPE, dump_recipe(recipe).encode()
    missing = not path.exists()
    if missing or (path.read_bytes() != text and _is_cut(path, recipe)):
        say(f"{path} was {'missing' if missing else 'cut short'}: written anew from the marker of the run")
    if missing or _is_cut(path, recipe) or changes(settings_of(_parsed(path)), recipe):
        write_bytes(path, text)


def _parsed(path: Path) -> Recipe:
    return parse_recipe(path.read_text(encoding="utf-8"))


def _discard(folder: Path) -> None:
    """Remove what a run writes, nothing else: links are taken away, not followed; folders stay if something is left."""
    (folder / RECIPE).unlink(missing_ok=True)
    for stage in STAGES:
        for path in stage.left_in(folder):
            path.unlink(missing_ok=True)
        for name in (f"{outer}{inner}" for outer in stage.folders for inner in ("/tensorboard", "")):
            with contextlib.suppress(OSError):  # not empty, not there, or a link
                (folder / name).rmdir()


# ------------------------------------------------------------------------------------------------- the lock


@contextlib.contextmanager
def locked(path: Path, refusal: Callable[[], str]) -> Iterator[None]:
    """Hold a lock file, which the system lets go when the process ends, however it ends.

    Raises:
        CheckpointError: somebody else holds it; `refusal` gives the text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CheckpointError(refusal()) from None
    try:
        yield
    finally:
        lock.release()


def _in_use(folder: Path) -> str:
    return (
        f"{folder} is in use by another run{_holder(folder)}. Wait for it to end, or choose another folder with "
        "output=DIR."
    )


def _holder(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads((folder / MARKER).read_text(encoding="utf-8"))["holder"]
        return f" (process {holder['pid']} on {holder['host']})"
    return ""
