"""Keep the last iterations' episodes to learn from again, on disk, so that a killed run goes on with the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from prts_core.io.errors import CheckpointError, DataError
from prts_core.io.files import atomic_path
from prts_core.io.wire import Frames, encode
from prts_core.rl.records import EpisodeRecord, plain, restored


class Replay:
    """Of `keep` iterations; 0: nothing is kept. whole: of which episodes what the policy saw is kept: those that are
    imitated; a critic reads features. A file an iteration under `folder`: one frame an episode."""

    def __init__(self, folder: Path, keep: int, whole: Callable[[EpisodeRecord], bool]) -> None:
        self.folder, self.keep, self.whole = folder, keep, whole
        self.held: dict[int, list[EpisodeRecord]] = {}

    def before(self, iteration: int) -> list[EpisodeRecord]:
        """The episodes of up to `keep` iterations before this one, oldest first."""
        wanted = range(max(0, iteration - self.keep), iteration)
        self.held = {at: self.held[at] if at in self.held else self._read(at) for at in wanted}
        return [record for at in wanted for record in self.held[at]]

    def add(self, iteration: int, records: Sequence[EpisodeRecord]) -> None:
        """Keep these, until `forget`."""
        if not self.keep:
            return
        slim = [
            record if self.whole(record) else replace(record, seen={}, record={}, advice=None) for record in records
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._path(iteration)) as partial, partial.open("wb") as file:
            for record in slim:
                file.write(encode(plain(record)))
        self.held[iteration] = slim

    def forget(self, resumable: int) -> None:
        """Remove what no run can want any more that goes on from iteration `resumable` or later."""
        for path in self.folder.glob("[0-9]*.frames"):
            if int(path.stem) < resumable - self.keep:
                path.unlink()

    def _read(self, iteration: int) -> list[EpisodeRecord]:
        path = self._path(iteration)
        try:
            return [restored(values) for values in Frames().feed(path.read_bytes())]
        except (OSError, DataError, TypeError, KeyError) as err:
            raise CheckpointError(
                "Episodes that the run learns from again cannot be read",
                file=path,
                found=str(err),
                expected="what an iteration before the checkpoint has kept",
                cure=f"remove {self.folder.parent} to begin anew",
            ) from err

    def _path(self, iteration: int) -> Path:
        return self.folder / f"{iteration:06d}.frames"
