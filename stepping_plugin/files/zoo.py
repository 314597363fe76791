"""Trained nets by name: `load("zoo:digits")`.

A zoo is a folder, or an address that serves one, with `zoo.json` and the nets that it lists. `STEPPING_ZOO` names one;
the smallest nets come with the package. A net is read only after its SHA-256 was compared with the one in the list.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CheckpointError, explain, nearest
from ..tensorfile import write_bytes

__all__ = ["PREFIX", "VARIABLE", "ZooEntry", "add_net", "find_net", "list_nets"]

PREFIX, VARIABLE, LIST = "zoo:", "STEPPING_ZOO", "zoo.json"
PACKAGED = Path(__file__).parent.parent / "zoo"
TIMEOUT = 30  # seconds without an answer
LARGEST_LIST = 2**22  # bytes

Share = Annotated[float, Field(ge=0, le=1)]
Macs = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measured(_Strict):
    """MACs per image and accuracy on test pictures, of the original or of one subnet."""

    macs: Macs
    accuracy: Share


class ZooEntry(_Strict):
    """One trained net.

    Attributes:
        file: name beside `zoo.json`.
        sha256: of the file.
        about: network and data.
        command: what made it.
        data_licence: terms of the pictures that it was trained on.
        original: the network that it was made from.
        subnets: 1..N.
        versions: of the package and of what it was made with.
    """

    file: Annotated[str, Field(pattern=r"^[\w-]+\.safetensors$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    about: str
    command: str
    data_licence: str
    original: Measured
    subnets: Annotated[list[Measured], Field(min_length=1)]
    versions: dict[str, str]


class ZooList(_Strict):
    """`zoo.json`."""

    version: Annotated[int, Field(ge=1, le=1)] = 1
    nets: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], ZooEntry] = {}


def find_net(path: Path) -> Path:
    """The file that "zoo:NAME" stands for, fetched if need be; any other path as it is.

    Raises:
        CheckpointError: no zoo has that net, a zoo cannot be read, or the file is another than the one listed.
    """
    if not str(path).startswith(PREFIX):
        return path
    wanted = str(path).removeprefix(PREFIX)
    known = []
    for place in _places():
        nets = _read_list(place).nets
        if wanted in nets:
            return _checked_file(place, nets[wanted])
        known += list(nets)
    action = f"Set {VARIABLE} to the folder or address of another zoo." if VARIABLE not in os.environ else None
    where = f"{VARIABLE}={os.environ[VARIABLE]}" if VARIABLE in os.environ else "the nets that come with the package"
    raise CheckpointError(explain(f"no net {wanted!r} in {where}; {nearest(wanted, known)}", action=action))


def list_nets() -> Iterator[tuple[str, ZooEntry, str]]:
    """Name, entry and zoo of every net that `find_net` knows; a name counts where it is found first."""
    seen: set[str] = set()
    for place in _places():
        for name, entry in _read_list(place).nets.items():
            if name not in seen:
                yield name, entry, place
            seen.add(name)


def add_net(folder: Path, name: str, net: Path, facts: dict[str, Any]) -> ZooEntry:
    """Copy a net into a zoo and list it.

    Args:
        folder: the zoo, made if it is missing.
        name: letters, digits, - and _.
        net: file that `SteppingNet.save` wrote.
        facts: attributes of `ZooEntry` except `file` and `sha256`.

    Raises:
        CheckpointError: the name cannot be, another net has it, or the folder's list is damaged.
    """
    there = _read_list(str(folder)) if (folder / LIST).is_file() else ZooList()
    content = {"file": f"{name}.safetensors", "sha256": _digest(net), **facts}
    try:
        entry = ZooEntry(**content)
        nets = ZooList(nets={**there.nets, name: entry})
    except ValidationError as error:
        raise CheckpointError(f"{name}: {error.errors()[0]['msg']} ({error.errors()[0]['loc'][-1]})") from None
    if name in there.nets and there.nets[name].sha256 != entry.sha256:
        raise CheckpointError(
            explain("another net has this name", where=f"{folder / LIST}: {name}", action="Choose another name.")
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / entry.file).exists() or _digest(folder / entry.file) != entry.sha256:
        write_bytes(folder / entry.file, net.read_bytes())
    write_bytes(folder / LIST, (nets.model_dump_json(indent=1) + "\n").encode())
    return entry


# ------------------------------------------------------------------------------------------- folders and addresses


def _places() -> list[str]:
    named = os.environ.get(VARIABLE)
    return [*([named] if named else []), str(PACKAGED)]


def _is_address(place: str) -> bool:
    return place.startswith(("http://", "https://", "file://"))


def _read_list(place: str) -> ZooList:
    where = f"{place.rstrip('/')}/{LIST}"
    try:
        if _is_address(place):
            with urllib.request.urlopen(where, timeout=TIMEOUT) as answer:
                content = answer.read(LARGEST_LIST)
        else:
            content = Path(place, LIST).read_bytes()
        return ZooList.model_validate(json.loads(content))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if not isinstance(error, ValidationError) else "not a list of nets"
        action = f"{VARIABLE} is a folder with {LIST}, or the address of one."
        raise CheckpointError(explain(f"no zoo can be read here ({reason})", where=where, action=action)) from None


def _checked_file(place: str, entry: ZooEntry) -> Path:
    path = _fetched(place, entry) if _is_address(place) else Path(place, entry.file)
    if not path.is_file():
        raise CheckpointError(explain("listed, but missing", where=str(path)))
    found = _digest(path)
    if found != entry.sha256:
        raise CheckpointError(
            explain("not the file that is listed", where=str(path), got=f"SHA-256 {found}", expected=entry.sha256)
        )
    return path


def _fetched(place: str, entry: ZooEntry) -> Path:
    """The file in torch's cache folder of downloads, under its digest, so that no two zoos meet there."""
    from torch import hub

    path = Path(hub.get_dir(), "stepping_zoo", f"{entry.sha256[:16]}-{entry.file}")
    if path.is_file():
        return path
    address = f"{place.rstrip('/')}/{entry.file}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hub.download_url_to_file(address, str(path), hash_prefix=entry.sha256, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: another digest; nothing is left behind then
        raise CheckpointError(explain(f"cannot be fetched ({error})", where=address)) from None
    return path


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slowly(file)
    except OSError as error:
        raise CheckpointError(explain(f"cannot be read ({error.strerror})", where=str(path))) from None


def _slowly(file: Any) -> str:
    """Python 3.10 has no `hashlib.file_digest`."""
    state = hashlib.sha256()
    while block := file.read(2**20):
        state.update(block)
    return state.hexdigest()
