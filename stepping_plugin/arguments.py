"""Types for argparse that say what they expect: numbers in a range, devices, files that can be written.

A value that cannot be used is known when the command begins, not after minutes of work. Exit status 2, one line.
"""

from __future__ import annotations

import math
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from .errors import SteppingError

__all__ = ["CLASSES", "IMAGE", "SEED", "SUBNETS", "device", "number", "output_file", "output_folder", "whole"]

# The same limits as of recipes.
IMAGE, CLASSES, SUBNETS, SEED = 2048, 1_000_000, 100, 2**63 - 1


def whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise ArgumentTypeError(f"got {text!r}, expected a whole number from {least:,} to {most:,}")
        return value

    return read


def number(least: float, most: float) -> Callable[[str], float]:
    """A finite number from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise ArgumentTypeError(f"got {text!r}, expected a number from {least:g} to {most:g}")
        return value

    return read


def device(text: str) -> str:
    """A device that this machine has."""
    from .graph.device import usable_device

    try:
        usable_device(text)
    except SteppingError as error:
        raise ArgumentTypeError(str(error)) from None
    return text


def output_file(text: str) -> str:
    """A path at which a file can be made, or replaced."""
    path = Path(text)
    if not text or path.is_dir():
        raise ArgumentTypeError(f"{text or 'nothing'}: is a folder, expected a file to write")
    _check_writable(path.parent)
    return text


def output_folder(text: str) -> str:
    """A folder that is there, or can be made."""
    if not text:
        raise ArgumentTypeError("got nothing, expected a folder")
    _check_writable(Path(text))
    return text


def _check_writable(folder: Path) -> None:
    """Try it: permissions do not tell for mounted, read-only or made-up file systems."""
    there = folder
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            raise ArgumentTypeError(f"{there} is a file, expected a folder")
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(
            f"{there}: cannot be written to ({getattr(error, 'strerror', None) or error})"
        ) from None
