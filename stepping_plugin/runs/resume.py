"""Where a killed run left its construction: the file is looked at before anything is taken from it."""

from __future__ import annotations

from pathlib import Path

from ..construction.flow import Construction
from ..errors import CheckpointError, SteppingError, explain
from ..training.checkpoint import ADVICE, check_random_state, load_checkpoint, restore_random_state

__all__ = ["resume_construction"]


def resume_construction(construction: Construction, path: Path) -> None:
    """Where an earlier run left the construction.

    Raises:
        CheckpointError: the file is damaged, or belongs to another construction.
    """
    content = load_checkpoint(path)
    try:
        state, generators = content["construction"], content["random"]
        check_random_state(generators)
        construction.load_state_dict(state)
    except SteppingError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        text = f"damaged checkpoint of a construction ({type(error).__name__}: {error})"
        raise CheckpointError(explain(text, where=str(path), action=ADVICE)) from None
    restore_random_state(generators)
