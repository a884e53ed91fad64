"""Progress bars on long work: one call, quiet where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")


def track(items: Iterable[T], *, total: int | None = None, what: str = "working") -> Iterator[T]:
    """Yield `items` behind a rich progress bar on a terminal; in a log, one line a tenth."""
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(items, description=what, total=total, console=Console(stderr=True), transient=True)
        return
    shown = 0
    for count, item in enumerate(items, 1):
        yield item
        if total and count * 10 // total > shown:
            shown = count * 10 // total
            print(f"{what}: {count}/{total}", file=sys.stderr, flush=True)


class Bar:
    """A bar for loops that count themselves: `with Bar("training", total) as bar: bar.update(done, "loss 0.1")`."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.tenth = what, total, 0
        self.progress: Any = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn(self.what),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
            )
            self.progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self.progress.start()
            self.task = self.progress.add_task(self.what, total=self.total, note="")
        return self

    def update(self, done: int, note: str = "") -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=done, note=note)
        elif done * 10 // self.total > self.tenth:
            self.tenth = done * 10 // self.total
            print(f"{self.what}: {done}/{self.total} {note}", file=sys.stderr, flush=True)

    def __exit__(self, *exc: object) -> None:
        if self.progress is not None:
            self.progress.stop()
