"""Compare two results of one stage: what went in, down to the first cause, and what came out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prts_core.io.errors import StageError, suggest
from prts_core.io.files import read_json
from prts_core.store.entries import (
    Entry,
    all_entries,
    changes,
    files_changed,
    files_line,
    listed_files,
)
from prts_core.store.manifest import MANIFEST, OUTPUT
from prts_core.store.stage import step_name
from prts_core.store.views import RUNS, all_views

LEAST = 4  # hex digits that a key is known by
EXPECTED = "a key or the beginning of one, stage/key, recipe:stage[:dataset], a folder, or models:/<name>@<alias>"


@dataclass(frozen=True)
class Difference:
    """How two results of one stage differ. lines: of their own inputs. files: of external sources, {"added", "removed",
    "changed"}. parents: those that differ. name: stage and dataset."""

    name: str
    left: str
    right: str
    lines: tuple[str, ...] = ()
    files: dict[str, list[str]] = field(default_factory=dict)
    parents: tuple[Difference, ...] = ()

    def causes(self) -> list[str]:
        """Every difference that no other explains, the earliest stage first, each once."""
        found = [cause for parent in self.parents for cause in parent.causes()]
        return list(dict.fromkeys(found + [f"{self.name}: {line}" for line in self.lines]))


@dataclass(frozen=True)
class Comparison:
    """Two results beside each other. left, right: stage, dataset, key, recipe, overrides, finished, seconds, code,
    content digest, contracts. difference: none where the inputs are equal. metrics: name -> (left, right)."""

    left: dict[str, Any]
    right: dict[str, Any]
    difference: Difference | None
    causes: tuple[str, ...]
    metrics: dict[str, tuple[float | None, float | None]]
    same_content: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Results:
    """What an outputs folder knows of results by key: the store's, and views' that the store has not taken yet."""

    def __init__(self, outputs: Path) -> None:
        self.outputs = outputs
        self.entries: dict[str, Entry] = {entry.key: entry for entry in all_entries(outputs)}
        self.views = [(folder, raw) for folder, raw in all_views(outputs) if raw.get("key")]

    def manifest(self, key: str) -> dict[str, Any] | None:
        if key in self.entries and self.entries[key].finished:
            return self.entries[key].manifest
        return next((raw for _, raw in self.views if raw["key"] == key), None)

    def provenance(self, key: str) -> dict[str, Any]:
        return self.entries[key].provenance if key in self.entries else {}

    def find(self, text: str) -> dict[str, Any]:
        """The manifest that `text` names. StageError with the nearest names where there is none or more than one."""
        path = Path(text).expanduser()
        for folder in (path, path.parent) if path.exists() else ():
            if (folder / MANIFEST).is_file() and path.name in (folder.name, OUTPUT, MANIFEST):
                raw = read_json(folder / MANIFEST)
                if "key" in raw:
                    return raw
        if ":" in text:
            return self._shown(text)
        stage, _, start = text.rpartition("/")
        known = {key: entry.stage for key, entry in self.entries.items() if entry.finished}
        known |= {raw["key"]: raw["kind"] for _, raw in self.views}
        found = [f"{at}/{key}" for key, at in known.items() if key.startswith(start) and stage in ("", at)]
        if len(found) == 1 and len(start) >= LEAST:
            made = self.manifest(found[0].rpartition("/")[2])
            assert made is not None
            return made
        if found:
            more = f"{len(found)} results begin with {text!r}"
            raise StageError(
                more if len(found) > 1 else f"A key is known by {LEAST} digits and more",
                found=text,
                expected=_some(found),
                cure="give more digits of the key",
            )
        names = [*known, *(f"{at}/{key}" for key, at in known.items()), *self._names()]
        raise StageError(
            f"No result is called {text!r}{suggest(text, names)}",
            file=self.outputs,
            found=text,
            expected=EXPECTED,
            cure="`prts status --all` lists what there is",
        )

    def _names(self) -> dict[str, dict[str, Any]]:
        """recipe:stage[:dataset] -> manifest of every view."""
        root = self.outputs / RUNS
        return {":".join(folder.relative_to(root).parts): raw for folder, raw in self.views}

    def _shown(self, text: str) -> dict[str, Any]:
        names = self._names()
        if text in names:
            return names[text]
        inside = [name for name in names if name.startswith(f"{text}:")]
        if len(inside) == 1:
            return names[inside[0]]
        raise StageError(
            f"No recipe's view is called {text!r}{suggest(text, names)}",
            file=self.outputs / RUNS,
            found=text,
            expected=_some(inside or sorted(names)) or "a view; there is none yet",
            cure="name the dataset too: recipe:stage:dataset" if inside else None,
        )


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def compare(results: Results, left: dict[str, Any], right: dict[str, Any]) -> Comparison:
    """Put two results of one stage beside each other. StageError for two stages."""
    if left["kind"] != right["kind"]:
        raise StageError(
            "Two results of different stages cannot be compared",
            found=f"{left['kind']} and {right['kind']}",
            expected="two of one stage",
        )
    difference = _difference(results, left, right, {})
    names: Iterable[str] = dict.fromkeys([*left["metrics"], *right["metrics"]])
    return Comparison(
        _side(results, left),
        _side(results, right),
        difference,
        tuple(difference.causes() if difference else ()),
        {name: (left["metrics"].get(name), right["metrics"].get(name)) for name in names},
        left["content_digest"] == right["content_digest"],
    )


def _side(results: Results, raw: dict[str, Any]) -> dict[str, Any]:
    made = results.provenance(raw["key"])
    return {
        "stage": raw["kind"],
        "partition": raw["partition"],
        "key": raw["key"],
        "digest": raw["digest"],
        "content_digest": raw["content_digest"],
        "contracts": raw["contracts"],
    } | {name: made.get(name) for name in ("recipe", "overrides", "finished", "seconds", "host", "code")}


def _difference(
    results: Results, left: dict[str, Any], right: dict[str, Any], known: dict[tuple[str, str], Difference | None]
) -> Difference | None:
    """None where both are one result. known: pairs that were compared before."""
    pair = (left["digest"], right["digest"])
    if pair[0] == pair[1]:
        return None
    if pair in known:
        return known[pair]
    lines, files = changes(left, right), dict[str, list[str]]()
    if left["sources"] != right["sources"]:
        before, after = (listed_files(results.entries, raw) for raw in (left, right))
        if before is None or after is None:
            lines.append("sources: other files; their lists are lost")
        else:
            files = files_changed(before, after)
            lines.append(files_line(files))
    parents = []
    for role in dict.fromkeys([*left["parents"], *right["parents"]]):
        ours, theirs = left["parents"].get(role), right["parents"].get(role)
        if ours is None or theirs is None:
            lines.append(f"parent {role}: only {'right' if ours is None else 'left'}")
            continue
        old, new = results.manifest(ours), results.manifest(theirs)
        digests = [raw["parent_digests"][role] for raw in (left, right)]
        if old is None or new is None or [old["digest"], new["digest"]] != digests:
            if ours != theirs:
                lines.append(f"parent {role}: {ours[:12]} -> {theirs[:12]}, which are not both here any more")
            elif digests[0] != digests[1]:
                lines.append(f"parent {role}: made twice from equal inputs, with other content")
        elif (inner := _difference(results, old, new, known)) is not None:
            parents.append(inner)
    if not lines and not parents:
        code = [results.provenance(raw["key"]).get("code") for raw in (left, right)]
        lines.append("equal inputs, other content" + (" (other code)" if code[0] != code[1] else ""))
    name = step_name(right["kind"], right["partition"])
    known[pair] = Difference(name, left["key"], right["key"], tuple(lines), files, tuple(parents))
    return known[pair]
