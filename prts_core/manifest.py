"""The record that passes between stages: what was made, from what, under which configuration.

A Manifest holds only what must be equal when the work is equal; times, host and tool versions stand in
`provenance.json` beside it, which no digest covers. It does not know how any stage works.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prts_core.errors import StageError
from prts_core.files import digest_tree, digest_value, read_json, write_json


@dataclass(frozen=True)
class Manifest:
    """kind: stage name. path: the content folder, relative to the run folder's root (`outputs/`).

    content_digest covers every byte under `path`; parents maps role -> the parent's own `digest`. skipped: why nothing
    was made (reference data is absent here); such a stage is tried again the next time.
    """

    kind: str
    recipe: str
    partition: str | None
    path: str
    content_digest: str
    config_digest: str
    parents: dict[str, str]
    seed: int
    contracts: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None

    @property
    def digest(self) -> str:
        """Identity of this result: the data version shown in Dagster and followed by lineage."""
        return digest_value(asdict(self))

    def folder(self, outputs: Path) -> Path:
        return outputs / self.path

    def save(self, path: Path) -> None:
        write_json(path, asdict(self) | {"digest": self.digest})

    @staticmethod
    def load(path: Path) -> Manifest:
        raw: dict[str, Any] = read_json(path)
        digest = raw.pop("digest", None)
        try:
            made = Manifest(**raw)
        except TypeError as err:
            raise StageError(
                "A manifest is malformed", file=path, found=str(err), cure="delete it and run the stage"
            ) from err
        if made.digest != digest:
            raise StageError(
                "A manifest does not match its own digest",
                file=path,
                found=str(digest),
                expected=made.digest,
                cure="it was edited by hand; delete it and run the stage again",
            )
        return made

    def verify(self, outputs: Path) -> bool:
        """True when the content on disk still has the digest recorded here."""
        folder = self.folder(outputs)
        return folder.is_dir() and digest_tree(folder) == self.content_digest
