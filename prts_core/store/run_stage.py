"""Run a stage, or find its result: the one door that the command line, Dagster and DVC go through.

A stage's key is computed from the plan alone, its parents' keys included, so that a result made under another plan, by
another behaviour version or from other files is simply another result. See `manifest.py` for what a result says.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prts_core import __version__
from prts_core.config.identity import identity
from prts_core.config.load import RunPlan, source_root, source_url
from prts_core.io.errors import DataError, PrtsError, StageError, lookup
from prts_core.io.files import digest_value, explain_os_errors, read_json, write_json
from prts_core.io.locks import is_locked, locked
from prts_core.store.code import code_digest
from prts_core.store.listing import list_files, tree_digest
from prts_core.store.manifest import FILES, MANIFEST, OUTPUT, PROVENANCE, STORE, Manifest, entry_folder
from prts_core.store.sources import (
    cache_of,
    external_source,
    fetch_revisions,
    files_read,
    looks,
    require_looked_at,
    sources_digest,
    sources_stamp,
)
from prts_core.store.stage import NullRun, Stage, StageContext, StageResult, Tracker, Work
from prts_core.store.views import link_tree, show, view_folder

GC_LOCK = ".gc.lock"  # in the store: held shared by who relies on results that nothing names yet
KEY_LENGTH = 20  # hex digits: 80 bits
# How a stage's function is called: inline, in a child process, over ranks (prts_core.launch).
Execute = Callable[[Stage, Any, dict[str, Manifest], StageContext], StageResult]


def inline(stage: Stage, config: Any, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    """Call the stage's function in this process."""
    return stage.run(config, inputs, context)


@contextlib.contextmanager
def untracked(work: Work) -> Iterator[NullRun]:
    yield NullRun()


@dataclass(frozen=True)
class Resolved:
    """A stage under a plan: everything its key is made of. identity: the configuration that can change the result, and
    `files`, what the stage reads from outside besides its dataset. sources: the listing of that."""

    stage: Stage
    partition: str | None
    config: Any
    identity: dict[str, Any]
    parents: dict[str, Resolved]
    seed: int | None
    sources: str
    key: str

    @property
    def name(self) -> str:
        return self.stage.name + (f":{self.partition}" if self.partition else "")


class Store:
    """The results under one outputs folder, for the stages of one chain."""

    def __init__(self, outputs: Path, stages: Mapping[str, Stage]) -> None:
        self.outputs, self.stages = outputs, dict(stages)

    # ---- keys ------------------------------------------------------------------------------------------------------
    def resolve(
        self,
        name: str,
        plan: RunPlan,
        partition: str | None = None,
        *,
        fetch: bool = False,
        known: dict[tuple[str, str | None], Resolved] | None = None,
    ) -> Resolved:
        """Compute a stage's key from the plan. Runs nothing; reads the listing of external sources.

        fetch: download a dataset of the hub where that is needed. known: what was resolved before under this plan.
        """
        stage = lookup(self.stages, name, "stage")
        if stage.partitioned and partition is None:
            partition = plan.recipe.deploy
        if not stage.partitioned and partition is not None:
            raise StageError(
                f"Stage {name!r} is not split by dataset", found=f"--dataset {partition}", cure="leave it out"
            )
        known = {} if known is None else known
        if (name, partition) in known:
            return known[name, partition]
        config = stage.config(plan, partition)
        plain = identity(config)
        if files := files_read(stage, plan, partition, self.outputs, recorded=not looks()):
            plain["files"] = files
        parents = {
            parent.role: self.resolve(parent.stage, plan, parent.partition, fetch=fetch, known=known)
            for parent in stage.parents(plan, partition)
        }
        seed = plan.recipe.seed if stage.seeded else None
        listed = next((parent.sources for parent in parents.values() if parent.stage.external), None)
        if stage.external and listed is None:  # convert reads what collect has listed: one look is enough
            listed = sources_digest(plan, partition, self.outputs, fetch=fetch)
        sources = listed or "" if stage.external else ""
        about = {
            "stage": name,
            "version": stage.version,
            "config": plain,
            "seed": seed,
            "sources": sources,
            "parents": {role: parent.key for role, parent in parents.items()},
        }
        key = digest_value(about)[len("sha256:") :][:KEY_LENGTH]
        known[name, partition] = Resolved(stage, partition, config, plain, parents, seed, sources, key)
        return known[name, partition]

    def folder(self, resolved: Resolved) -> Path:
        return entry_folder(self.outputs, resolved.stage.name, resolved.key)

    # ---- finding ---------------------------------------------------------------------------------------------------
    def find(self, resolved: Resolved, plan: RunPlan | None = None) -> Manifest | None:
        """The result with this key if its content is intact and its parents are those it was made from, else none.

        plan: also look into the recipe's view, which `dvc pull` may have filled, and take its result into the store.
        """
        path = self.folder(resolved) / MANIFEST
        if not path.exists():
            return None if plan is None else self._adopt(resolved, plan)
        try:
            manifest = Manifest.load(path)
            return manifest if self._agrees(manifest, resolved) and manifest.verify(self.outputs) else None
        except (DataError, FileNotFoundError):
            if path.exists():
                raise
            return None  # garbage collection took it meanwhile

    def _agrees(self, manifest: Manifest, resolved: Resolved, seen: dict[str, bool] | None = None) -> bool:
        """Whether a result was made from the very parents that are here now, and these from theirs. One that was
        damaged may have come out different when it was made again. seen: parents that were looked at before, by key."""
        seen = {} if seen is None else seen
        for role, parent in resolved.parents.items():
            path = self.folder(parent) / MANIFEST
            if not path.exists():
                continue
            present = Manifest.load(path)
            if parent.key not in seen:
                seen[parent.key] = self._agrees(present, parent, seen)
            if present.digest != manifest.parent_digests[role] or not seen[parent.key]:
                return False
        return True

    def _adopt(self, resolved: Resolved, plan: RunPlan) -> Manifest | None:
        """Take a view's result into the store, if it has this key and its content is whole."""
        view = view_folder(self.outputs, plan.recipe.name, resolved.stage.name, resolved.partition)
        raw = read_json(view / MANIFEST) if (view / MANIFEST).is_file() else {}
        if raw.get("key") != resolved.key or raw.get("kind") != resolved.stage.name:
            return None
        manifest = Manifest.load(view / MANIFEST)
        if not self._agrees(manifest, resolved) or not (view / OUTPUT).is_dir():
            return None
        if tree_digest(list_files(view / OUTPUT)) != manifest.content_digest:
            return None
        folder = self.folder(resolved)
        with locked(folder / ".lock"):
            if not (folder / MANIFEST).exists():
                shutil.rmtree(folder / OUTPUT, ignore_errors=True)
                link_tree(view / OUTPUT, folder / OUTPUT)
                if tree_digest(list_files(folder / OUTPUT, folder / FILES)) != manifest.content_digest:
                    shutil.rmtree(folder / OUTPUT)  # the view was moved meanwhile
                    return None
                _protect(folder / OUTPUT, links=2)  # its own and the view's
                write_json(folder / PROVENANCE, {"adopted": datetime.now(UTC).isoformat(), "recipe": plan.recipe.name})
                manifest.save(folder / MANIFEST)
        return manifest

    # ---- running ---------------------------------------------------------------------------------------------------
    def run(
        self,
        name: str,
        plan: RunPlan,
        partition: str | None = None,
        *,
        caller: dict[str, str] | None = None,
        track: Tracker = untracked,
        execute: Execute = inline,
    ) -> Manifest:
        """Return the stage's verified result, running or resuming the stage only where it must.

        A second caller waits for the first and then finds the work done. A run without `--set` moves the recipe's
        view. Raises StageError where a parent has not run, Skipped for an optional dataset that is absent.
        """
        # What is asked for itself may be downloaded; a stage behind it says that collect comes first.
        fetch = name in self.stages and self.stages[name].external
        if name in self.stages:
            fetch_revisions(self.stages[name], plan, partition)
        resolved = self.resolve(name, plan, partition, fetch=fetch)
        folder = self.folder(resolved)
        while True:
            manifest = self.find(resolved, plan)
            if manifest is None:
                with explain_os_errors(self.outputs), locked(folder / ".lock", on_wait=lambda: _say_waiting(folder)):
                    _finish(folder)
                    manifest = self.find(resolved) or self._make(resolved, plan, caller or {}, track, execute)
            with explain_os_errors(self.outputs), locked(self.outputs / STORE / GC_LOCK, shared=True):
                if not (folder / MANIFEST).exists():  # garbage collection was told to keep nothing
                    continue
                with contextlib.suppress(PermissionError):  # somebody else's, which one may read
                    os.utime(folder / MANIFEST)  # its age counts from the last time it was asked for
                if not plan.overrides:
                    view = view_folder(self.outputs, plan.recipe.name, name, resolved.partition)
                    show(view, manifest, self.outputs, resolved.stage.headline)
            return manifest

    def inputs(self, resolved: Resolved, plan: RunPlan) -> dict[str, Manifest]:
        """The parents' results. StageError names the command for one that has not run or whose content has changed."""
        found = {}
        for role, parent in resolved.parents.items():
            manifest = self.find(parent, plan)
            if manifest is None:
                command = plan.command(parent.stage.name, parent.partition, self.outputs)
                folder = self.folder(parent)
                if (folder / MANIFEST).exists():
                    raise StageError(
                        f"The output of stage {parent.name!r} (role {role!r}) was changed after it was made",
                        file=folder / OUTPUT,
                        expected=Manifest.load(folder / MANIFEST).content_digest,
                        cure=f"run `{command}`: it makes its output again",
                    )
                raise StageError(
                    f"Stage {parent.name!r} has not run yet under this plan",
                    file=folder,
                    found="no result",
                    cure=f"run `{command}` first",
                )
            found[role] = manifest
        return found

    def _make(
        self, resolved: Resolved, plan: RunPlan, caller: dict[str, str], track: Tracker, execute: Execute
    ) -> Manifest:
        """Run or resume the stage in its work folder. The caller holds the entry's lock."""
        stage, folder = resolved.stage, self.folder(resolved)
        work = folder / "work"
        if (folder / MANIFEST).exists():
            self._wait_for_readers(resolved)
        # Until plan.json names them, garbage collection does not know that this work needs its parents.
        with locked(self.outputs / STORE / GC_LOCK, shared=True):
            inputs = self.inputs(resolved, plan)
            files = resolved.identity.get("files", {})
            require_looked_at(stage, plan, resolved.partition, resolved.sources, files, self.outputs)
            _make_room(folder, self.outputs)
            seen = sources_stamp(stage, plan, resolved.partition, self.outputs)
            record = _plan_record(resolved, plan) | {
                "parent_digests": {role: m.digest for role, m in inputs.items()},
                "seen": seen,
            }
            _set_aside_other(folder, record, stage.external)
            (work / OUTPUT).mkdir(parents=True, exist_ok=True)
            for torn in (work / OUTPUT).rglob(".*.partial-*"):  # a file that a kill cut (files.atomic_path)
                torn.unlink()
            write_json(work / "plan.json", record)
        context = StageContext(self.outputs, work, plan.recipe.seed, plan.recipe.name, resolved.partition)
        config_digest = digest_value(resolved.identity)
        tracking = Work(
            stage.name,
            resolved.partition,
            plan.recipe.name,
            plan.path.name,
            plan.overrides,
            resolved.key,
            stage.version,
            resolved.config,
            config_digest,
            inputs,
            resolved.seed,
            self.outputs,
            work,
            caller,
        )
        started, before, clock = datetime.now(UTC), _spent(work), time.monotonic()
        with _stopwatch(work, before), track(tracking) as tracked:
            result = execute(stage, resolved.config, inputs, replace(context, log=tracked.log, files=files))
            self._require_same_sources(resolved, plan, seen)
            self._require_same_parents(resolved, plan, inputs)
            _lend_digests(resolved, plan, work / FILES, self.outputs)
            made = list_files(context.output, work / FILES)
            manifest = Manifest(
                kind=stage.name,
                key=resolved.key,
                version=stage.version,
                partition=resolved.partition,
                config=resolved.identity,
                parents={role: m.key for role, m in inputs.items()},
                parent_digests={role: m.digest for role, m in inputs.items()},
                seed=resolved.seed,
                sources=resolved.sources,
                content_digest=tree_digest(made),
                contracts=result.contracts,
                metrics=result.metrics,
            )
            tracked.finish(manifest, result, context.output)
        timing = work / "timing.json"
        write_json(
            work / PROVENANCE,
            {
                "started": started.isoformat(),
                "finished": datetime.now(UTC).isoformat(),
                "seconds": round(before + time.monotonic() - clock, 3),
                "host": platform.node(),
                "python": platform.python_version(),
                "prts": __version__,
                "code": code_digest(stage.name),
                "recipe": plan.recipe.name,
                "config_file": plan.path.as_posix(),
                "overrides": list(plan.overrides),
                "mlflow": tracked.links(),
                "artifacts": list(result.artifacts),
                "caller": caller,
                "bytes": sum(file.size for file in made),
                **({"timing": read_json(timing)} if timing.exists() else {}),
            },
        )
        manifest.save(work / MANIFEST)  # from here on whoever comes next completes the move
        _finish(folder)
        return manifest

    def _wait_for_readers(self, resolved: Resolved) -> None:
        """Wait for running stages that read the result that is about to be made again; none can begin to."""
        told = False
        while reader := _reader(self.outputs, resolved.key):
            if not told:
                print(f"waiting: {reader} reads {self.folder(resolved)}; Ctrl-C stops waiting", file=sys.stderr)
            told = True
            time.sleep(1.0)

    def _require_same_parents(self, resolved: Resolved, plan: RunPlan, inputs: dict[str, Manifest]) -> None:
        """StageError where a parent's files were changed while the stage was reading them."""
        for role, manifest in inputs.items():
            path = manifest.folder(self.outputs).with_name(MANIFEST)
            if not path.exists() or Manifest.load(path) != manifest or not manifest.verify(self.outputs):
                parent = resolved.parents[role]
                first, then = (plan.command(r.stage.name, r.partition, self.outputs) for r in (parent, resolved))
                raise StageError(
                    f"The output of stage {parent.name!r} changed while stage {resolved.name!r} read it",
                    file=path.with_name(OUTPUT),
                    expected=manifest.content_digest,
                    cure=f"run `{first}`: it makes its output again; then `{then}`",
                )

    def _require_same_sources(self, resolved: Resolved, plan: RunPlan, seen: str) -> None:
        """StageError where files from outside have changed, even back again, while the stage was reading them."""
        stage, partition = resolved.stage, resolved.partition
        sources = sources_digest(plan, partition, self.outputs) if stage.external else resolved.sources
        if (sources, sources_stamp(stage, plan, partition, self.outputs)) == (resolved.sources, seen):
            return
        before, now = resolved.identity.get("files", {}), files_read(stage, plan, partition, self.outputs)
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        what = f"The source of dataset {partition!r}" if stage.external else "A file from outside"
        raise StageError(
            f"{what} changed while stage {stage.name!r} read it",
            field=", ".join(changed) or None,
            found="another listing than at the start",
            cure=f"run `{plan.command(stage.name, partition, self.outputs)}` again",
        )


def load_provenance(outputs: Path, manifest: Manifest) -> dict[str, Any]:
    """Times, host, versions and links of a result; empty where they were lost."""
    path = entry_folder(outputs, manifest.kind, manifest.key) / PROVENANCE
    return read_json(path) if path.exists() else {}


def _plan_record(resolved: Resolved, plan: RunPlan) -> dict[str, Any]:
    """What `prts status` and garbage collection want to know of work under way."""
    return {
        "stage": resolved.stage.name,
        "partition": resolved.partition,
        "recipe": plan.recipe.name,
        "config_file": plan.path.as_posix(),
        "overrides": list(plan.overrides),
        "config": resolved.identity,
        "parents": {role: [parent.stage.name, parent.key] for role, parent in resolved.parents.items()},
        "started": datetime.now(UTC).isoformat(),
        "pid": os.getpid(),
        "host": platform.node(),
    }


def _say_waiting(folder: Path) -> None:
    about: dict[str, Any] = {}
    with contextlib.suppress(PrtsError):  # it has not written it yet, or its work has ended meanwhile
        about = read_json(folder / "work" / "plan.json")
    who = f"process {about['pid']} on {about['host']}" if "pid" in about else "another process"
    print(f"waiting: {who} is making {folder}; Ctrl-C stops waiting", file=sys.stderr, flush=True)


def _protect(output: Path, links: int = 1) -> None:
    """Make the files of a result read-only, but not those with more hard links than these: they are somebody's own."""
    for folder, _, names in os.walk(output):
        for name in names:
            path = Path(folder, name)
            if path.lstat().st_nlink <= links and not path.is_symlink():
                with contextlib.suppress(PermissionError):  # somebody else's
                    path.chmod(0o444)


def _lend_digests(resolved: Resolved, plan: RunPlan, cache: Path, outputs: Path) -> None:
    """Begin the listing of a result with that of the external dataset, so that what links lead to is not read again."""
    source = external_source(plan, resolved.partition or plan.recipe.deploy) if resolved.stage.external else None
    if source is not None and source_url(source) is None and not cache.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(cache_of(source_root(source), outputs), cache)


def _make_room(folder: Path, outputs: Path) -> None:
    """Take away a result whose place is needed. One that is intact, and only of parents that came out different, is put
    aside, as garbage collection removes when it is old; a damaged one is removed."""
    path = folder / MANIFEST
    if path.exists() and (manifest := Manifest.load(path)).verify(outputs):
        aside = folder / f"work-{manifest.digest[len('sha256:') :][:8]}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        path.rename(aside / MANIFEST)  # first: without it there is no result here
        (folder / OUTPUT).rename(aside / OUTPUT)
    path.unlink(missing_ok=True)
    shutil.rmtree(folder / OUTPUT, ignore_errors=True)


def _set_aside_other(folder: Path, record: dict[str, Any], external: bool) -> None:
    """Put away the work of an attempt that read other parents or another dataset than those of now: to go on from it
    would mix the two. Garbage collection removes it when it is old.

    What `Stage.reads` names does not count: its contents are in the key, and copies of the same bytes, staged anew on
    another machine, must not cost a training its checkpoints.
    """
    path = folder / "work" / "plan.json"
    before = read_json(path) if path.exists() else record
    if any(before.get(name) != record[name] for name in ("parent_digests", *(["seen"] if external else []))):
        print(f"{path.parent} was made of other parents or files: it is put aside", file=sys.stderr, flush=True)
        path.parent.rename(folder / f"work-{digest_value(before)[len('sha256:') :][:8]}")


def _reader(outputs: Path, key: str) -> str:
    """Who is running a stage that reads the result with this key right now; empty where nobody is."""
    for path in (outputs / STORE).glob("*/*/work/plan.json"):
        with contextlib.suppress(PrtsError):  # its work has ended meanwhile
            about = read_json(path)
            if key in [parent for _, parent in about["parents"].values()] and is_locked(path.parents[1] / ".lock"):
                return f"process {about['pid']} on {about['host']}"
    return ""


def _finish(folder: Path) -> None:
    """Move a whole result out of its work folder. Every step may be cut and is taken up again by whoever comes next."""
    work, done = folder / "work", folder / ".done"
    shutil.rmtree(done, ignore_errors=True)
    if not (work / MANIFEST).exists():
        return
    if (work / OUTPUT).exists():
        shutil.rmtree(folder / OUTPUT, ignore_errors=True)
        (work / OUTPUT).rename(folder / OUTPUT)
    for name in (FILES, PROVENANCE, MANIFEST):
        if (work / name).exists():
            (work / name).replace(folder / name)
    work.rename(done)  # what is half removed must not look like work to go on with
    shutil.rmtree(done)
    _protect(folder / OUTPUT)


def _spent(work: Path) -> float:
    """Seconds that earlier, interrupted attempts at this very work have used."""
    path = work / "clock.json"
    return float(read_json(path)["seconds"]) if path.exists() else 0.0


@contextlib.contextmanager
def _stopwatch(work: Path, before: float) -> Iterator[None]:
    """Write the elapsed seconds every 2 s, so that provenance survives SIGKILL."""
    start, stop = time.monotonic(), threading.Event()

    def tick() -> None:
        while not stop.wait(2.0):
            with contextlib.suppress(OSError, StageError):  # a full disk shows in the stage itself
                write_json(work / "clock.json", {"seconds": before + time.monotonic() - start, "pid": os.getpid()})

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
