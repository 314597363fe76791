"""Our files: safetensors with texts beside the tensors, written whole or not at all. Anything may be in one.

Beside the caller's texts a file has two of its own: `digests`, a JSON list with one hash per tensor in the order of
their names (of name, type, shape and bytes), and `digest`, the hash of all other texts. One flipped bit anywhere is
found. The hashes guard against damage, not against somebody who computes them anew; what a file asks for is therefore
checked by its reader as well (`headers`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError, SteppingError, explain

__all__ = ["ENGINE", "NET", "is_signed", "not_finite", "pack_header", "read_file", "read_tensors", "write_bytes",
           "write_tensors"]  # fmt: skip

NET, ENGINE = "stepping-plugin net", "stepping-plugin engine"
_WRITERS = {NET: "SteppingNet.save", ENGINE: "Engine.save"}
_OTHERS = {
    NET: "holds a net, not an engine. Call stepping_plugin.load(path).deploy()",
    ENGINE: "holds an engine, not a net. Call stepping_plugin.engine.load_engine(path)",
}
_HEADER, _DIGESTS, _DIGEST = "stepping", "digests", "digest"

# ------------------------------------------------------------------------------------------------- writing


def checked_path(path: Any) -> Path:
    """A path as a Path.

    Raises:
        SteppingError: it is none.
    """
    if not isinstance(path, (str, os.PathLike)) or "\0" in os.fspath(path):
        raise SteppingError(explain("not a path of a file", where="path", got=path, expected="a string or a Path"))
    return Path(path)


def pack_header(header: Mapping[str, Any]) -> dict[str, str]:
    """A header as the text that `read_file` looks for."""
    return {_HEADER: json.dumps(header, separators=(",", ":"))}


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], texts: Mapping[str, str], *, durable: bool = False
) -> None:
    """Write a file: what is at `path` afterwards is the old one or the complete new one.

    The mode of a file that is replaced is kept; a new one gets what umask leaves. A link is written through.

    Args:
        path: the file; folders are made.
        tensors: by name; copied to the CPU.
        texts: by key, beside the tensors.
        durable: make it survive a power cut before returning.

    Raises:
        OSError: it cannot be written; the file that was there is untouched.
    """
    plain = _plain(tensors)
    try:
        with _replacing(path, durable) as partial:
            save_file(plain, partial, metadata=_signed(plain, texts))
            _sort_texts(partial)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


def _sort_texts(path: Path) -> None:
    """safetensors writes the texts in an order drawn by lot: equal content is to give equal files."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def write_bytes(path: str | os.PathLike[str], content: bytes, *, durable: bool = True) -> None:
    """Write any other file in the same way: the old one or the complete new one.

    Raises:
        OSError: it cannot be written; the file that was there is untouched.
    """
    with _replacing(path, durable) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str], durable: bool) -> Iterator[Path]:
    """A file to be filled, which then takes the place of `path`; its name is no other thread's or process's."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    partial = path.with_name(
        _PARTIAL.format(tag=_host(), pid=os.getpid(), thread=threading.get_ident(), n=next(_count))
    )
    try:
        with open(partial, "xb"):
            mode = (path if path.exists() else partial).stat().st_mode & 0o777
        yield partial
        os.chmod(partial, mode)  # safetensors makes files that only their owner may read
        if durable:
            _sync(partial)
        os.replace(partial, path)
        if durable:
            _sync(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # the name that people know
    finally:
        partial.unlink(missing_ok=True)


_PARTIAL = ".stepping-{tag}-{pid}-{thread}-{n}.partial"  # short: the name itself may be as long as the system allows
_count = itertools.count()


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _sweep(folder: Path) -> None:
    """Remove what killed processes of this machine left half written."""
    for left in folder.glob(_PARTIAL.format(tag=_host(), pid="*", thread="*", n="*")):
        pid = left.name.split("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, row by row, each with memory of its own: safetensors refuses shared memory."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        if place in seen or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        seen.add(place)
        result[name] = value
    return result


def _sync(path: Path) -> None:
    """Make a file, or a rename in a folder, survive a power cut; not every system lets a folder be opened."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------- checksums


def _signed(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> dict[str, str]:
    digests = json.dumps([_tensor_digest(name, tensors[name]) for name in sorted(tensors)], separators=(",", ":"))
    signed = {**texts, _DIGESTS: digests}
    return {**signed, _DIGEST: _text_digest(signed)}


def _text_digest(texts: Mapping[str, str]) -> str:
    listed = json.dumps(sorted((k, v) for k, v in texts.items() if k != _DIGEST))
    return hashlib.sha256(listed.encode()).hexdigest()


def _tensor_digest(name: str, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer
    return digest.hexdigest()[:16]


def _damage(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str | None:
    """What differs from the checksums of a file, if anything."""
    if texts[_DIGEST] != _text_digest(texts):
        return "its description was changed: the checksum differs"
    digests, names = json.loads(texts.get(_DIGESTS, "null")), sorted(tensors)
    if not isinstance(digests, list) or len(digests) != len(names):
        return "it has another number of tensors than checksums"
    wrong = [name for name, known in zip(names, digests) if known != _tensor_digest(name, tensors[name])]
    return f"{len(wrong)} tensors were changed: the checksum of {wrong[0]} differs" if wrong else None


def is_signed(texts: Mapping[str, str]) -> bool:
    """Whether a file with these texts has checksums; `read_tensors` has compared them then."""
    return _DIGEST in texts


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN; infinities are let pass, masks are made of them."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            return name
    return None


# ------------------------------------------------------------------------------------------------- reading


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Texts and tensors of any safetensors file; checksums are compared where it has some (`is_signed`).

    A file that is replaced meanwhile is read again: safetensors opens it more than once.

    Raises:
        CheckpointError: no such file, damaged, or no safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(explain("no such file", where=str(path), action="Check the path."))
    while True:
        before = _identity(path)
        try:
            with safe_open(path, framework="pt") as file:
                texts = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            damage = _damage(tensors, texts) if is_signed(texts) else None
            problem = damage and f"damaged: {damage}. Take a copy that is whole, or make it again."
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError, RuntimeError) as error:
            problem = f"damaged or not a safetensors file ({error})."
        if _identity(path) != before:
            continue
        if problem:
            raise CheckpointError(f"{path}: {problem}")
        return texts, tensors


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Changes when another file takes this place."""
    with contextlib.suppress(OSError):
        facts = path.stat()
        return facts.st_ino, facts.st_mtime_ns, facts.st_size
    return None


def read_file(path: Path, kind: str, version: int, oldest: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file.

    Args:
        path: the file.
        kind: `NET` or `ENGINE`.
        version: of the format, that the caller writes; files of this version have checksums.
        oldest: version that the caller still reads.

    Raises:
        CheckpointError: no such file, damaged, not ours, of the other kind, or of another version.
    """
    texts, tensors = read_tensors(path)
    header: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        header = json.loads(texts.get(_HEADER, "{}"))
    found = header.get("format") if isinstance(header, dict) else None
    if found != kind:
        ours = found in (NET, ENGINE)
        text = _OTHERS[str(found)] if ours else f"a safetensors file, but not one that {_WRITERS[kind]} wrote"
        raise CheckpointError(f"{path}: {text}.")
    got = header.get("version")
    if isinstance(got, bool) or not isinstance(got, int) or not oldest <= got <= version:
        older = isinstance(got, int) and got < oldest
        action = f"Make it again: {_WRITERS[kind]} of this version." if older else "Update stepping-plugin."
        raise CheckpointError(
            explain("unknown version", where=str(path), got=got, expected=str(version), action=action)
        )
    if got == version and not is_signed(texts):
        raise CheckpointError(f"{path}: damaged: its checksums are missing. Take a copy that is whole.")
    return header, tensors
