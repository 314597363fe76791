"""The incremental engine: step programs, sessions, early exit and deadlines, export."""

from .emit import StepProgram
from .engine import Engine, Prediction, compile_engine, load_engine
from .exit import entropy, margin, max_probability
from .session import Session

__all__ = [
    "Engine",
    "Prediction",
    "Session",
    "StepProgram",
    "compile_engine",
    "entropy",
    "load_engine",
    "margin",
    "max_probability",
]
