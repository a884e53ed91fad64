"""Write a run's curves as TensorBoard events, beside what MLflow gets: the same names, the same steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prts_core.io.errors import MissingExtraError, require

logger = logging.getLogger("prts.tracking")
Log = Callable[[dict[str, float], int], None]


class EventLog:
    """Events under `folder`, one file an attempt. Steps that an earlier attempt recorded and this one comes to again
    are replaced (TensorBoard's purge_step)."""

    def __init__(self, folder: Path) -> None:
        """MissingExtraError where the package is absent."""
        require("tensorboard", "tensorboard")
        self.folder = folder
        self._writer: Any = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One point a metric; what is no number is kept as such. On disk when it returns."""
        writer = self._opened(step)
        for name, value in metrics.items():
            writer.add_scalar(name, float(value), step)
        writer.flush()

    def _opened(self, step: int) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            again = any(self.folder.glob("events.*"))
            self._writer = SummaryWriter(str(self.folder), purge_step=step if again else None)
        return self._writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@contextmanager
def event_log(folder: Path, wanted: bool, log: Log) -> Iterator[Log]:
    """`log`, and where it is wanted events under `folder` too. Where the package is absent a line says what to install,
    and the work goes on without."""
    events = None
    if wanted:
        try:
            events = EventLog(folder)
        except MissingExtraError as err:
            logger.warning("no events for TensorBoard: %s", err)
    if events is None:
        yield log
        return

    def both(metrics: dict[str, float], step: int) -> None:
        log(metrics, step)
        events.log(metrics, step)

    try:
        yield both
    finally:
        events.close()
