"""Tell how another process ended, and what it wrote last."""

from __future__ import annotations

import signal
from pathlib import Path


def how_it_ended(code: int) -> str:
    """`ended by SIGKILL` or `ended with status 3`. code: as subprocess gives it."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"ended by signal {-code}"


def last_words(log: Path, most: int = 2000) -> str:
    """The end of a log, at most so many characters; a phrase where there is nothing."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - most))
            words = file.read().decode(errors="replace").strip()
    except FileNotFoundError:
        words = ""
    return f"its last words: {words}" if words else "without a word"
