"""Keep what a run needs to go on after a kill: weights, moments, rates, and the iterations that are done.

Initial states, groups, noise and the order of samples are functions of the seed and the iteration, so that nothing else
has to be remembered. A checkpoint is a folder that appears whole; the last two stay, and the best weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from prts_core.io.errors import CheckpointError
from prts_core.io.files import new_folder, read_json, write_json
from prts_core.io.tensors import load_tensors, save_tensors

KEEP = 2
TENSORS, PROGRESS = "tensors.safetensors", "progress.json"


@dataclass
class Progress:
    """iteration: the next one. rate: what the learning rates are multiplied by, steered by the divergence. updates: of
    the optimiser so far. best: {"iteration", "successes", "n"} of the best evaluation. episodes, steps: so far."""

    iteration: int = 0
    rate: float = 1.0
    updates: int = 0
    episodes: int = 0
    steps: int = 0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """Under `folder`, of the run that the stage's key names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """The newest one, or none. CheckpointError where it is damaged."""
        found = self._found()
        if not found:
            return None
        raw = read_json(found[-1] / PROGRESS)
        try:
            progress = Progress(**raw)
        except TypeError as err:
            raise CheckpointError(
                "A checkpoint does not say how far it is",
                file=found[-1] / PROGRESS,
                found=str(err),
                expected=", ".join(Progress.__dataclass_fields__),
                cure=f"remove {found[-1]}: the run goes on from the one before it",
            ) from err
        return progress, load_tensors(found[-1] / TENSORS)[0]

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> int:
        """The iteration of the oldest checkpoint that is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{progress.iteration:06d}"
        if not target.exists():
            with new_folder(target) as partial:
                write_json(partial / PROGRESS, asdict(progress))
                save_tensors(partial / TENSORS, tensors)
        found = self._found()
        for old in found[:-KEEP]:
            shutil.rmtree(old)
        return int(found[-KEEP:][0].name)

    def save_best(self, weights: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.folder / "best.safetensors", weights)

    def best(self) -> dict[str, Tensor]:
        return load_tensors(self.folder / "best.safetensors")[0]

    def _found(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("[0-9]*") if path.is_dir() and path.name.isdigit())


def read_rows(path: Path, below: int) -> list[dict[str, float]]:
    """The curve's rows before iteration `below`; of one that was run twice, the later."""
    if not path.exists():
        return []
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["iteration"] < below:
            rows[int(row["iteration"])] = row
    return [rows[at] for at in sorted(rows)]
