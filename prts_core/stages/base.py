"""How a stage is declared and run: found finished, resumed, or run; its output swapped into place only when whole.

A stage is `stage(config, inputs, context) -> StageResult`. `run_stage` is the one door to it: the command line, the
Dagster assets and `dvc.yaml` all call it. It does not know what any stage computes.

Layout of one run folder, `outputs/runs/<stage>/<recipe>[/<partition>]/`:
    output/          the content, covered by the manifest's digest
    manifest.json    what was made from what (equal work, equal bytes)
    provenance.json  times, host, versions, MLflow run: covered by no digest and no DVC output
    work-<key>/      state of an interrupted run; <key> = configuration + parents, so another configuration starts anew
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prts_core import __version__
from prts_core.config.load import Plan
from prts_core.contract import record
from prts_core.errors import StageError, UnavailableError
from prts_core.files import digest_tree, digest_value, explain_os_errors, read_json, write_json
from prts_core.manifest import Manifest
from prts_core.tracking.runs import stage_run


@dataclass(frozen=True)
class StageContext:
    """Where a stage works. Everything it writes for keeps goes to `output`; resume state goes to `work`.

    outputs: root of all runs (parents are found with `inputs[role].folder(context.outputs)`). seed: the recipe's.
    caller: tags that lead back to who called (Dagster run, asset, partition); they go to MLflow, not into any digest.
    log(metrics, step): a point on a curve, for whoever tracks the run.
    """

    outputs: Path
    work: Path
    seed: int
    recipe: str
    partition: str | None
    caller: dict[str, str] = field(default_factory=dict)
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None

    @property
    def output(self) -> Path:
        return self.work / "output"


@dataclass(frozen=True)
class StageResult:
    """What a stage reports. metrics: flat numbers. contracts: name -> fingerprint. artifacts: paths under `output`
    worth a look in MLflow and Dagster, the first picture is the one shown. skipped: see Manifest."""

    metrics: dict[str, float] = field(default_factory=dict)
    contracts: dict[str, str] = field(default_factory=dict)
    artifacts: tuple[str, ...] = ()
    skipped: str | None = None


@dataclass(frozen=True)
class Parent:
    """One input of a stage: the role it plays and whose output it is."""

    role: str
    stage: str
    partition: str | None


@dataclass(frozen=True)
class Stage:
    """Declaration of one stage. partitioned: one run per dataset. config and parents are read off the plan."""

    name: str
    help: str
    partitioned: bool
    config: Callable[[Plan, str | None], Any]
    parents: Callable[[Plan, str | None], list[Parent]]
    run: Callable[[Any, dict[str, Manifest], StageContext], StageResult]


def run_folder(outputs: Path, stage: str, recipe: str, partition: str | None) -> Path:
    return outputs / "runs" / stage / recipe / (partition or "")


def load_manifest(outputs: Path, stage: str, recipe: str, partition: str | None) -> Manifest:
    """The manifest of a finished stage, or a StageError that says how to make it."""
    path = run_folder(outputs, stage, recipe, partition) / "manifest.json"
    if not path.exists():
        option = f" --dataset {partition}" if partition else ""
        raise StageError(
            f"Stage {stage!r} has not run yet", file=path, found="no manifest", cure=f"run `prts {stage}{option}` first"
        )
    return Manifest.load(path)


def load_provenance(outputs: Path, manifest: Manifest) -> dict[str, Any]:
    path = run_folder(outputs, manifest.kind, manifest.recipe, manifest.partition) / "provenance.json"
    return read_json(path) if path.exists() else {}


def find_finished(stage: Stage, plan: Plan, partition: str | None, outputs: Path) -> Manifest | None:
    """The verified manifest of a stage that is done under this very plan, else None. Runs and changes nothing."""
    folder = run_folder(outputs, stage.name, plan.recipe.name, partition)
    if not (folder / "manifest.json").exists():
        return None
    try:
        inputs = {
            p.role: load_manifest(outputs, p.stage, plan.recipe.name, p.partition)
            for p in stage.parents(plan, partition)
        }
    except StageError:  # a parent is missing or damaged: whoever runs the chain meets it first
        return None
    parents = {role: manifest.digest for role, manifest in inputs.items()}
    return _finished(folder, digest_value(_plain(stage.config(plan, partition))), parents, plan.recipe.seed, outputs)


@dataclass(frozen=True)
class Prepared:
    """What a stage would run with: its configuration, its verified-to-exist parents and its folders."""

    partition: str | None
    config: Any
    config_digest: str
    inputs: dict[str, Manifest]
    folder: Path
    key: str

    @property
    def parents(self) -> dict[str, str]:
        """Digests by role."""
        return {role: manifest.digest for role, manifest in self.inputs.items()}

    @property
    def work(self) -> Path:
        return self.folder / f"work-{self.key}"


def prepare(stage: Stage, plan: Plan, partition: str | None, outputs: Path) -> Prepared:
    """Resolve a stage's configuration, parents and folders; changes nothing. StageError for a missing parent."""
    recipe = plan.recipe
    if stage.partitioned and partition is None:
        partition = recipe.deploy
    if not stage.partitioned and partition is not None:
        raise StageError(
            f"Stage {stage.name!r} is not split by dataset", found=f"--dataset {partition}", cure="leave it out"
        )
    config = stage.config(plan, partition)
    config_digest = digest_value(_plain(config))
    inputs = {p.role: load_manifest(outputs, p.stage, recipe.name, p.partition) for p in stage.parents(plan, partition)}
    parents = {role: manifest.digest for role, manifest in inputs.items()}
    key = digest_value([config_digest, parents, recipe.seed])[len("sha256:") :][:12]
    folder = run_folder(outputs, stage.name, recipe.name, partition)
    return Prepared(partition, config, config_digest, inputs, folder, key)


def run_stage(
    stage: Stage, plan: Plan, partition: str | None, outputs: Path, caller: dict[str, str] | None = None
) -> Manifest:
    """Return the stage's verified manifest, running or resuming the stage only where it must."""
    recipe = plan.recipe
    ready = prepare(stage, plan, partition, outputs)
    partition, config, config_digest, inputs, folder = (
        ready.partition, ready.config, ready.config_digest, ready.inputs, ready.folder,
    )  # fmt: skip
    parents, key = ready.parents, ready.key

    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder):
            _finish_swap(folder, key, outputs)
            done = _finished(folder, config_digest, parents, recipe.seed, outputs)
            if done is not None:
                return done
            for role, manifest in inputs.items():
                if not manifest.verify(outputs):
                    raise StageError(
                        f"The output of stage {manifest.kind!r} (role {role!r}) was changed after it was made",
                        file=manifest.folder(outputs),
                        expected=manifest.content_digest,
                        cure=f"run `prts {manifest.kind}` again: it verifies and remakes its output",
                    )
            for stale in folder.glob("work-*"):
                if stale.name != f"work-{key}":
                    shutil.rmtree(stale)
            context = StageContext(outputs, folder / f"work-{key}", recipe.seed, recipe.name, partition, caller or {})
            context.output.mkdir(parents=True, exist_ok=True)
            started, clock = datetime.now(UTC), time.monotonic()
            clock_before = _spent(context.work)
            with (
                _stopwatch(context.work, clock_before),
                stage_run(stage.name, plan, config, inputs, config_digest, context, outputs) as tracked,
            ):
                result = _run_or_skip(stage, config, inputs, replace(context, log=tracked.log))
                manifest = Manifest(
                    kind=stage.name,
                    recipe=recipe.name,
                    partition=partition,
                    path=(folder / "output").relative_to(outputs).as_posix(),
                    content_digest=digest_tree(context.output),
                    config_digest=config_digest,
                    parents=parents,
                    seed=recipe.seed,
                    contracts=result.contracts,
                    metrics=result.metrics,
                    skipped=result.skipped,
                )
                tracked.finish(manifest, result, context.output)
            write_json(
                context.work / "provenance.json",
                {
                    "started": started.isoformat(),
                    "finished": datetime.now(UTC).isoformat(),
                    "seconds": round(clock_before + time.monotonic() - clock, 3),
                    "host": platform.node(),
                    "python": platform.python_version(),
                    "prts": __version__,
                    "mlflow": tracked.links(),
                    "artifacts": list(result.artifacts),
                    "caller": context.caller,
                },
            )
            manifest.save(context.work / "manifest.json")  # from here on the swap is finished by whoever comes next
            _finish_swap(folder, key, outputs)
    return manifest


def _plain(config: Any) -> Any:
    return record(config)


def _finished(folder: Path, config_digest: str, parents: dict[str, str], seed: int, outputs: Path) -> Manifest | None:
    """The manifest in `folder` if it is of the same work and its content is intact."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    manifest = Manifest.load(path)
    same = manifest.config_digest == config_digest and manifest.parents == parents and manifest.seed == seed
    return manifest if same and manifest.skipped is None and manifest.verify(outputs) else None


def _run_or_skip(stage: Stage, config: Any, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    """Run the stage, or pass on why there is nothing to run it on."""
    reason = next((m.skipped for m in inputs.values() if m.skipped), None)
    if reason is None:
        try:
            return stage.run(config, inputs, context)
        except UnavailableError as err:
            reason = str(err)
    shutil.rmtree(context.output)
    write_json(context.output / "skipped.json", {"reason": reason})
    return StageResult(skipped=reason)


def _finish_swap(folder: Path, key: str, outputs: Path) -> None:
    """Complete a swap that has begun: `work-<key>/manifest.json` exists, so the work is whole.

    Every step may be cut and taken up again: output -> old, work/output -> output, provenance and manifest, clean up.
    """
    work, old = folder / f"work-{key}", folder / ".old"
    if not (work / "manifest.json").exists():
        if old.exists():  # cut after the work folder was gone
            shutil.rmtree(old)
        return
    if (work / "output").exists():
        if (folder / "output").exists():
            if old.exists():
                shutil.rmtree(old)
            (folder / "output").rename(old)
        (work / "output").rename(folder / "output")
    for name in ("provenance.json", "manifest.json"):
        if (work / name).exists():
            shutil.copyfile(work / name, folder / f".{name}")
            (folder / f".{name}").replace(folder / name)
    shutil.rmtree(work)
    if old.exists():
        shutil.rmtree(old)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two callers never run one stage at once. The lock dies with its process."""
    import fcntl

    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise StageError(
                "Another process is running this stage", file=folder, cure="wait for it, or stop it, then run again"
            ) from err
        yield


def _spent(work: Path) -> float:
    """Seconds that earlier, interrupted attempts at this very work have used."""
    path = work / "clock.json"
    return float(read_json(path)["seconds"]) if path.exists() else 0.0


@contextlib.contextmanager
def _stopwatch(work: Path, before: float) -> Iterator[None]:
    """Keep `clock.json` honest across `kill -9`: a small thread writes the seconds spent, twice a second at most."""
    import threading

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
