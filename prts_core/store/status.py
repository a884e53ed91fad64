"""Say where a recipe stands: what is finished, stale and why, running, interrupted, missing. Runs nothing.

Reads manifests, views and lock files; only `verify` looks at contents.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from prts_core.config.load import RunPlan
from prts_core.io.errors import Skipped, UnavailableError
from prts_core.io.files import read_json
from prts_core.store.code import code_digest
from prts_core.store.entries import (
    Entry,
    all_entries,
    changes,
    entry_at,
    files_changed,
    files_line,
    listed_files,
    with_ancestors,
    work_command,
)
from prts_core.store.manifest import MANIFEST
from prts_core.store.run_stage import Resolved, Store
from prts_core.store.sources import external_source, listing
from prts_core.store.stage import step_name
from prts_core.store.views import all_views, view_folder

State = Literal["finished", "stale", "running", "interrupted", "missing", "skipped", "absent", "damaged"]
OTHER_CODE = "made by other code"


@dataclass(frozen=True)
class StatusRow:
    """One step of the plan. why: of what is stale, field by field; of what is absent or skipped, the reason.

    notes: what is worth knowing besides. work: of running or interrupted work: pid, host, since, recipe, overrides,
    checkpoint (step or none), seconds. command: runs the step, or goes on with it.
    """

    stage: str
    partition: str | None
    state: State
    key: str | None
    command: str
    why: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    work: dict[str, Any] | None = None
    finished: str | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        return step_name(self.stage, self.partition)


@dataclass(frozen=True)
class StoreSummary:
    """The store as a whole. unshown: results that neither a view nor this plan comes from. works: interrupted or
    running work of other plans. results: only with `listed`."""

    results: int
    bytes: int
    unshown: int
    unshown_bytes: int
    works: tuple[dict[str, Any], ...] = ()
    listed: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Status:
    recipe: str
    config_file: str
    outputs: str
    rows: tuple[StatusRow, ...]
    store: StoreSummary

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def status(
    store: Store, plan: RunPlan, steps: Iterable[tuple[str, str | None]], *, verify: bool = False, listed: bool = False
) -> Status:
    """Where every step stands and what the store holds. verify: also look for contents that have changed. listed: name
    every result that nothing shows."""
    entries = {entry.key: entry for entry in all_entries(store.outputs)}
    look = _Look(store, plan, entries, verify)
    rows = tuple(look.row(stage, partition) for stage, partition in steps)
    summary = summarise(store.outputs, entries, {row.key for row in rows if row.key}, listed)
    return Status(plan.recipe.name, plan.path.as_posix(), str(store.outputs), rows, summary)


@dataclass
class _Look:
    """Rows of one plan. failed: steps that have no key because their source is not here."""

    store: Store
    plan: RunPlan
    entries: dict[str, Entry]
    verify: bool
    known: dict[tuple[str, str | None], Resolved] = field(default_factory=dict)
    failed: dict[tuple[str, str | None], State] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)  # by key

    def row(self, stage: str, partition: str | None) -> StatusRow:
        command = self.plan.command(stage, partition, self.store.outputs)
        for parent in self.store.stages[stage].parents(self.plan, partition):
            state = self.failed.get((parent.stage, parent.partition))
            if state is not None:
                self.failed[stage, partition] = state
                why = f"its parent {step_name(parent.stage, parent.partition)} is {state}"
                return StatusRow(stage, partition, state, None, command, (why,))
        try:
            resolved = self.store.resolve(stage, self.plan, partition, known=self.known)
        except (Skipped, UnavailableError) as err:
            state = self.failed[stage, partition] = "skipped" if isinstance(err, Skipped) else "absent"
            return StatusRow(stage, partition, state, None, command, (str(err),))
        row = self._found(resolved, command)
        self.states[resolved.key] = row.state
        return row

    def _found(self, resolved: Resolved, command: str) -> StatusRow:
        stage, partition, key = resolved.stage.name, resolved.partition, resolved.key
        entry = self.entries.get(key) or entry_at(self.store.folder(resolved))
        path = view_folder(self.store.outputs, self.plan.recipe.name, stage, partition) / MANIFEST
        shown = read_json(path) if path.is_file() else {}
        if entry.running:
            return StatusRow(stage, partition, "running", key, command, work=_work(entry))
        if entry.finished:
            facts: dict[str, Any] = {
                "finished": entry.provenance.get("finished"),
                "seconds": entry.provenance.get("seconds"),
            }
            reasons = self._other_parents(resolved, entry)
            if reasons:
                return StatusRow(stage, partition, "stale", key, command, tuple(reasons), **facts)
            if self.verify and self.store.find(resolved) is None:
                return StatusRow(stage, partition, "damaged", key, command, ("its files are not those that it made",))
            notes = []
            code = entry.provenance.get("code")
            if code and code != code_digest(stage):
                notes.append(OTHER_CODE)
            if shown.get("key") != key and not self.plan.overrides:
                notes.append(f"not shown by the recipe yet: `{command}` does so and runs nothing")
            return StatusRow(stage, partition, "finished", key, command, notes=tuple(notes), **facts)
        why = tuple(self._why(resolved, shown)) if shown.get("key") else ()
        if entry.interrupted:
            return StatusRow(stage, partition, "interrupted", key, command, why, work=_work(entry))
        if shown.get("key") == key:
            return StatusRow(
                stage, partition, "finished", key, command, notes=("in the view; the store takes it when used",)
            )
        return StatusRow(stage, partition, "stale" if why else "missing", key, command, why)

    def _other_parents(self, resolved: Resolved, entry: Entry) -> list[str]:
        """Parents that were made again and came out different."""
        reasons = []
        for role, parent in resolved.parents.items():
            there = self.entries.get(parent.key)
            if there is None or not there.finished:
                continue
            if self.states.get(parent.key) == "stale":
                reasons.append(f"its parent {_name(parent)} is stale")
            elif there.manifest.get("digest") != entry.manifest.get("parent_digests", {}).get(role):
                reasons.append(f"its parent {_name(parent)} was made again and came out different")
        return reasons

    def _why(self, resolved: Resolved, shown: dict[str, Any]) -> list[str]:
        """How the result that the recipe shows differs from what the plan means now."""
        new = {
            "version": resolved.stage.version,
            "seed": resolved.seed,
            "config": resolved.identity,
            "partition": resolved.partition,
        }
        lines = changes(shown, new)
        if shown["sources"] != resolved.sources:
            before = listed_files(self.entries, shown)
            name = resolved.partition or self.plan.recipe.deploy
            if before is None or external_source(self.plan, name) is None:
                lines.append("sources: other files than before")
            else:
                now = [file.row for file in listing(self.plan, name, self.store.outputs)]
                lines.append(files_line(files_changed(before, now)))
        for role, parent in resolved.parents.items():
            if role not in shown["parents"]:
                lines.append(f"a new parent: {_name(parent)}")
            elif shown["parents"][role] != parent.key:
                lines.append(f"its parent {_name(parent)} {_became(self.states.get(parent.key))}")
        lines += [f"no parent any more: {role}" for role in shown["parents"] if role not in resolved.parents]
        return lines


def _became(state: State | None) -> str:
    return "is another one" if state in (None, "finished") else f"is {state}"


def _name(resolved: Resolved) -> str:
    return step_name(resolved.stage.name, resolved.partition)


def _work(entry: Entry) -> dict[str, Any]:
    about = {name: entry.plan.get(name) for name in ("pid", "host", "recipe", "overrides")}
    return about | {"since": entry.plan.get("started"), "checkpoint": entry.checkpoint, "seconds": entry.spent}


def summarise(outputs: Path, entries: dict[str, Entry], wanted: set[str], listed: bool = False) -> StoreSummary:
    """Count results, bytes, and what neither a view nor a key in `wanted` comes from."""
    roots = {raw["key"] for _, raw in all_views(outputs) if raw.get("key")} | wanted
    shown = with_ancestors(roots, entries)
    total = unshown = unshown_bytes = count = 0
    works, rows = [], []
    for entry in entries.values():
        if entry.finished:
            size = entry.bytes
            count, total = count + 1, total + size
            if entry.key not in shown:
                unshown, unshown_bytes = unshown + 1, unshown_bytes + size
                if listed:
                    about = entry.provenance
                    rows.append(
                        {
                            "stage": entry.stage,
                            "partition": entry.partition,
                            "key": entry.key,
                            "bytes": size,
                            "recipe": about.get("recipe"),
                            "overrides": about.get("overrides"),
                            "finished": about.get("finished"),
                        }
                    )
        elif entry.interrupted and entry.key not in wanted:
            works.append(
                {
                    "stage": entry.stage,
                    "partition": entry.partition,
                    "key": entry.key,
                    **_work(entry),
                    "running": entry.running,
                    "command": work_command(entry.plan, entry.stage, outputs),
                }
            )
    return StoreSummary(count, total, unshown, unshown_bytes, tuple(works), tuple(rows))


def when(text: str | None) -> str:
    """An ISO time in UTC as local time to the minute; empty for none."""
    if not text:
        return ""
    return datetime.datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M")
