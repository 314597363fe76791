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
        state = content["construction"]
        done, settings = state["iteration"], construction.config
        fine = isinstance(done, int) and 0 <= done <= settings.iterations and len(state["records"]) == done
        least = done * max(settings.batches, settings.importance_batches if construction.evaluator else 0)
        if not fine or state["batches"] != least:
            raise ValueError(f"iteration {done} with {len(state['records'])} records and {state['batches']} batches")
        check_random_state(content["random"])
        construction.load_state_dict(state)
    except SteppingError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        text = f"damaged state of a construction ({type(error).__name__}: {error})"
        raise CheckpointError(explain(text, where=str(path), action=ADVICE)) from None
    restore_random_state(content["random"])
