"""Make an array once for all processes of a run, and map it: token lengths, pictures of small datasets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.lib.format import open_memmap

from prts_core.io.files import atomic_path
from prts_core.io.locks import locked

SHARED = "shared"  # folder in a stage's work folder
PICTURES_GIB = 4.0  # pictures that a run keeps decoded, all of its datasets together; others are read when drawn


@dataclass
class SharedFiles:
    """folder: the stage's work folder or a part of it, which the processes of a run share; none: arrays are this
    process's own memory. left: bytes that may still be kept as decoded pictures."""

    folder: Path | None = None
    left: int = field(default=int(PICTURES_GIB * 2**30))

    def claim(self, size: int) -> bool:
        """Whether `size` more bytes of pictures may be kept. Asked in the same order, the answers are the same in every
        process."""
        fits = size <= self.left
        self.left -= size if fits else 0
        return fits

    def array(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype | type, fill: Callable[[np.ndarray], None]
    ) -> np.ndarray:
        """The array `name`, which `fill` writes where there is none yet; read-only. A process that comes while another
        one fills it waits; what a killed one left is cleared away. StageError where the disk is full."""
        if self.folder is None:
            made = np.empty(shape, dtype)
            fill(made)
            return made
        path = self.folder / f"{quote(name, safe='')}.npy"  # datasets of the hub have a slash; no pattern, either
        with locked(path.with_suffix(".lock")):
            for torn in self.folder.glob(f".{path.name}.partial-*"):
                torn.unlink()
            if not path.is_file():
                with atomic_path(path) as partial:
                    made = open_memmap(partial, "w+", dtype, shape)
                    if hasattr(os, "posix_fallocate"):  # a full disk is an error here; under a map it kills the process
                        with partial.open("r+b") as file:
                            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
                    fill(made)
                    made.flush()
                    del made
        mapped = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        assert mapped.shape == shape and mapped.dtype == np.dtype(dtype), "a run's names mean one array each"
        return mapped
