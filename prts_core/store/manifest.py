"""Describe a result: what was made, from what, under which configuration.

A Manifest holds only what must be equal when the work is equal; times, host and tool versions stand in
`provenance.json` beside it, which no digest covers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prts_core.io.errors import StageError
from prts_core.io.files import digest_value, read_json, write_json

STORE = "store"
MANIFEST, PROVENANCE, FILES, OUTPUT = "manifest.json", "provenance.json", "files.tsv", "output"


def entry_folder(outputs: Path, stage: str, key: str) -> Path:
    """Where the result of a stage with this key lies, or will lie."""
    return outputs / STORE / stage / key


@dataclass(frozen=True)
class Manifest:
    """kind: the stage. key: what the result is found by. version: the stage's behaviour version.

    config: the configuration without its execution fields. parents: role -> key, parent_digests: role -> digest of the
    manifest that was read. seed: of a stage that draws random numbers. sources: digest of the listing of external
    files. content_digest covers every byte of the output.
    """

    kind: str
    key: str
    version: int
    partition: str | None
    config: dict[str, Any]
    parents: dict[str, str]
    parent_digests: dict[str, str]
    seed: int | None
    sources: str
    content_digest: str
    contracts: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identity of this result with its content: the data version in Dagster, what lineage follows."""
        return digest_value(asdict(self))

    @property
    def name(self) -> str:
        return self.kind + (f":{self.partition}" if self.partition else "")

    def folder(self, outputs: Path) -> Path:
        """The content, inside the store."""
        return entry_folder(outputs, self.kind, self.key) / OUTPUT

    def save(self, path: Path) -> None:
        write_json(path, asdict(self) | {"digest": self.digest})

    @staticmethod
    def load(path: Path, check: bool = True) -> Manifest:
        """Read a manifest. StageError where it is malformed or was edited; check=False trusts its digest."""
        raw: dict[str, Any] = read_json(path)
        if not isinstance(raw, dict):
            raw = {}
        digest = raw.pop("digest", None)
        try:
            made = Manifest(**raw)
        except TypeError as err:
            raise StageError(
                "A manifest is malformed",
                file=path,
                found=str(err),
                cure=f"remove {path.parent} and run the stage again",
            ) from err
        if check and made.digest != digest:
            raise StageError(
                "A manifest does not match its own digest",
                file=path,
                found=str(digest),
                expected=made.digest,
                cure=f"it was edited by hand: remove {path.parent} and run the stage again",
            )
        return made

    def verify(self, outputs: Path) -> bool:
        """True when the content on disk still has the digest recorded here. Unchanged files are not read again."""
        from prts_core.store.listing import list_files, tree_digest

        folder = self.folder(outputs)
        return folder.is_dir() and tree_digest(list_files(folder, folder.with_name(FILES))) == self.content_digest
