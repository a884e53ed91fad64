"""Records or measures a suite's scripted experts through workers: one HDF5 file a task, in robomimic's layout.

A family's `layout.py` says how its own demonstrations are written; without one a demonstration holds obs/proprio and
obs/<camera>_rgb. An attempt is the pure function of (task, number of the attempt, settings). Each
is on disk before it counts, so that the same command goes on after any death; failures are counted and never repaired.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.io.errors import DataError, require
from prts_core.io.files import atomic_path
from prts_core.io.journal import Journal
from prts_core.io.progress import Bar
from prts_core.sim import protocol
from prts_core.sim.pool import Pool, WorkerLost
from prts_core.sim.suite import EpisodeKey, SuiteSpec, Task
from prts_core.sim.suites import task_of

LOST_AT_MOST = 3  # workers an attempt may cost before it is the simulator's fault
SPARE_FAILURES = 20
ATTEMPTS, PARTS = "attempts.jsonl", ".parts"


@dataclass(frozen=True)
class RecorderSettings:
    """What decides the recordings. episodes: a task. noise: levels of the pushes, taken in turn; task_noise: those of
    single tasks. record: False only measures; then `episodes` counts attempts, not successes. worker_settings: what the
    workers are made with. max_steps: 0 for the task's own. first: number of the first attempt."""

    suite: str
    tasks: tuple[str, ...]
    episodes: int
    noise: tuple[float, ...] = (0.0,)
    task_noise: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seed: int = 0
    record: bool = True
    worker_settings: Mapping[str, Any] = field(default_factory=dict)
    tail_steps: int = 0
    max_steps: int = 0
    first: int = 0


@dataclass
class Attempts:
    """One task's: what is known of each number, and which are under way."""

    task: Task
    known: dict[int, dict[str, Any]] = field(default_factory=dict)
    under_way: set[int] = field(default_factory=set)
    lost: dict[int, int] = field(default_factory=dict)

    @property
    def successes(self) -> int:
        return sum(bool(row["success"]) for row in self.known.values())

    @property
    def failures(self) -> int:
        return len(self.known) - self.successes

    def done(self, settings: RecorderSettings) -> int:
        return self.successes if settings.record else len(self.known)

    def next(self, settings: RecorderSettings) -> int | None:
        """The next attempt that is needed even if all under way succeed: so that the same ones are made whatever the
        number of workers."""
        if self.done(settings) + len(self.under_way) >= settings.episodes:
            return None
        taken = self.known.keys() | self.under_way
        return next(number for number in range(len(taken) + 1) if number not in taken)


def recording(
    spec: SuiteSpec,
    tasks: tuple[str, ...],
    episodes: int,
    *,
    image_size: int | None = None,
    stored: bool = False,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> RecorderSettings:
    """Settings that record `episodes` successes of each task.

    tasks: none for all. image_size: none for the suite's. stored: start from the stored initial states, where the suite
    has them, instead of states that its sampler draws. settings: of the workers besides. more: further fields of
    RecorderSettings.
    """
    made = dict(settings or {})
    if any(task.initial_states for task in spec.tasks) and not stored:
        made["placement"] = "drawn"
    if image_size not in (None, spec.contract.cameras[0].height):
        made["image_size"] = image_size
    names = tuple(task_of(spec, name).name for name in tasks) or tuple(task.name for task in spec.tasks)
    return RecorderSettings(spec.name, names, episodes, worker_settings=made, **more)


def demonstrate(spec: SuiteSpec, settings: RecorderSettings, pool: Pool, output: Path) -> list[Attempts]:
    """Make what is missing in `output`; every task's attempts. pool: of workers made with `settings.worker_settings`.

    DataError where an expert fails more often than it succeeds and SPARE_FAILURES times beyond, StageError where the
    folder holds attempts of other settings, WorkerLost where one attempt ends LOST_AT_MOST workers.
    """
    chosen = {task.name: Attempts(task) for task in spec.tasks if task.name in settings.tasks}
    total = settings.episodes * len(chosen)
    with Journal(output / ATTEMPTS, header(spec, settings), ("task", "attempt")) as journal:
        for row in journal.rows.values():
            if row["task"] in chosen:
                chosen[row["task"]].known[row["attempt"]] = row
        with Bar(f"{spec.name} expert", total) as bar:
            _run(pool, spec, settings, chosen, output, journal, bar)
        for attempts in chosen.values():
            _finish(spec, settings, attempts, output)
            shutil.rmtree(output / PARTS / attempts.task.name, ignore_errors=True)
    return list(chosen.values())


def header(spec: SuiteSpec, settings: RecorderSettings) -> dict[str, Any]:
    """What a folder's attempts have in common. Tasks may be added to it; to what is only measured, attempts too."""
    own = asdict(replace(settings, episodes=settings.episodes if settings.record else 0, tasks=()))
    return {"demonstrations": own | {"standins": spec.standins}}


def _run(
    pool: Pool,
    spec: SuiteSpec,
    settings: RecorderSettings,
    chosen: Mapping[str, Attempts],
    output: Path,
    journal: Journal,
    bar: Bar,
) -> None:
    slots: dict[int, tuple[Attempts, int]] = {}
    last: dict[int, str] = {}
    while True:
        for slot in range(pool.slots):
            if slot not in slots and (given := _give(chosen, settings, last, slot)):
                slots[slot] = given
                pool.send(slot, _message(spec, settings, *given))
        if not slots:
            return
        answered = pool.wait()
        assert answered is not None
        slot, reply = answered
        attempts, number = slots.pop(slot)
        attempts.under_way.discard(number)
        if isinstance(reply, WorkerLost):
            attempts.lost[number] = attempts.lost.get(number, 0) + 1
            if attempts.lost[number] >= LOST_AT_MOST:
                raise reply
            continue
        row = _row(settings, attempts.task, number, reply)
        if settings.record and row["success"]:
            _write_part(_part(output, attempts.task, number), spec, reply, row)
        journal.add(row)
        attempts.known[number] = row
        if settings.record and attempts.failures > attempts.successes + SPARE_FAILURES:
            raise DataError(
                "The scripted expert fails too often to record demonstrations",
                field=attempts.task.name,
                found=f"{attempts.failures} failures in {len(attempts.known)} attempts",
                cure="lower this task's noise, raise its max_steps, or leave it out",
            )
        made = sum(each.successes for each in chosen.values())
        tried = sum(len(each.known) for each in chosen.values())
        bar.update(sum(each.done(settings) for each in chosen.values()), f"{made}/{tried} succeeded")


def _give(
    chosen: Mapping[str, Attempts], settings: RecorderSettings, last: dict[int, str], slot: int
) -> tuple[Attempts, int] | None:
    """Of the slot's `last` task, else of one that is no other slot's: building a task's scene takes long."""
    others = {task for other, task in last.items() if other != slot}
    for name in sorted(chosen, key=lambda name: (name != last.get(slot), name in others)):
        attempts = chosen[name]
        number = attempts.next(settings)
        if number is not None:
            attempts.under_way.add(number)
            last[slot] = name
            return attempts, number
    return None


def episode_of(settings: RecorderSettings, task: Task, number: int) -> tuple[EpisodeKey, float, int]:
    """(episode, noise, seed of the noise) of an attempt."""
    number += settings.first
    states = task.initial_states or 1 << 30
    key = EpisodeKey(settings.suite, task.name, number % states, settings.seed + number // states)
    text = f"{key.task} {key.initial_state} {key.seed} {number}"
    noise_seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    levels = settings.task_noise.get(task.name, settings.noise)
    return key, levels[number % len(levels)], noise_seed


def _message(spec: SuiteSpec, settings: RecorderSettings, attempts: Attempts, number: int) -> protocol.Message:
    key, noise, noise_seed = episode_of(settings, attempts.task, number)
    return protocol.demonstrate(
        replace(key, suite=spec.name),
        noise=noise,
        noise_seed=noise_seed,
        max_steps=settings.max_steps,
        tail_steps=settings.tail_steps,
        images=settings.record,
    )


def _row(settings: RecorderSettings, task: Task, number: int, reply: Mapping[str, Any]) -> dict[str, Any]:
    key, noise, noise_seed = episode_of(settings, task, number)
    reached = reply["success_row"]
    return {
        "task": task.name,
        "attempt": number,
        "initial_state": key.initial_state,
        "seed": key.seed,
        "noise": noise,
        "noise_seed": noise_seed,
        "success": reached is not None,
        "steps": len(reply["actions"]) if reached is None else reached + 1,
        "instruction": reply["instruction"],
    }


def _part(output: Path, task: Task, number: int) -> Path:
    return output / PARTS / task.name / f"{number}.hdf5"


def layout_of(family: str) -> Any:
    """The family's module `layout`; none where it has no names of its own for its recordings."""
    package = family if "." in family else f"prts_core.sim.suites.{family}"
    name = f"{package}.layout"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def arrays_of(spec: SuiteSpec, episode: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of an episode in the arrays of sim/expert_episode.py, what stands in its recording beside actions and states."""
    layout = layout_of(spec.family)
    if layout is not None:
        found: dict[str, np.ndarray] = layout.datasets(episode)
        return found
    pictures = {f"obs/{key.rsplit('.', 1)[-1]}_rgb": seen for key, seen in episode["images"].items()}
    return {"obs/proprio": episode["proprio"], **pictures}


def attributes_of(spec: SuiteSpec, task: Task, image_size: int, instruction: str) -> dict[str, str]:
    """Of a recording's group `data`."""
    layout = layout_of(spec.family)
    own = {"env_args": json.dumps({"env_name": spec.name, "control_hz": spec.contract.control_hz})}
    said = json.dumps({"problem_name": spec.name, "language_instruction": instruction})
    return (layout.attributes(spec, task, image_size) if layout else own) | {"problem_info": said}


def _write_part(path: Path, spec: SuiteSpec, reply: dict[str, Any], row: dict[str, Any]) -> None:
    rows, reached = len(reply["actions"]), row["steps"] - 1
    doubles = {name: reply[name].astype(np.float64) for name in ("actions", "executed")}
    with atomic_path(path) as partial, require("h5py", "sim").File(partial, "w") as file:
        write_demo(file, spec, reply | doubles, (np.arange(rows) >= reached).astype(np.uint8))
        file.attrs["init_state"] = reply["states"][0]
        for name in ("initial_state", "seed", "noise_seed", "attempt"):
            file.attrs[name] = row[name]
        file.attrs["expert_noise"], file.attrs["success_row"] = row["noise"], reached
        file.attrs["action_config"] = json.dumps(subtask_spans(reply["phases"]))


def write_demo(group: Any, spec: SuiteSpec, episode: dict[str, Any], rewards: np.ndarray) -> None:
    """An episode's arrays, as sim/expert_episode.py has them, and how many rows it has."""
    rows = len(episode["actions"])
    for name, value in {
        "actions": episode["actions"],
        "executed_actions": episode["executed"],
        "rewards": rewards,
        "dones": (np.arange(rows) == rows - 1).astype(np.uint8),
        "states": episode["states"],
        **arrays_of(spec, episode),
    }.items():
        # Pictures are packed one by one. Level 1 takes them to a quarter; higher levels cost time and gain little.
        packed = {"compression": "gzip", "compression_opts": 1, "chunks": (1, *value.shape[1:])}
        group.create_dataset(name, data=value, track_times=False, **(packed if value.ndim == 4 else {}))
    group.attrs["num_samples"] = rows


def subtask_spans(phases: Sequence[str]) -> list[dict[str, Any]]:
    """Runs of equal phase as the public `action_config` form; `end_frame` is exclusive."""
    spans: list[dict[str, Any]] = []
    for phase, rows in groupby(phases):
        start = spans[-1]["end_frame"] if spans else 0
        spans.append({"start_frame": start, "end_frame": start + len(list(rows)), "action_text": phase})
    return spans


def _finish(spec: SuiteSpec, settings: RecorderSettings, attempts: Attempts, output: Path) -> None:
    """A task's demonstrations, in order of their attempts, become its file."""
    path = output / f"{attempts.task.name}_demo.hdf5"
    if not settings.record or path.exists():
        return
    h5py = require("h5py", "sim")
    total = 0
    good = sorted(number for number, row in attempts.known.items() if row["success"])
    with atomic_path(path) as partial, h5py.File(partial, "w", track_order=True) as file:
        data = file.create_group("data", track_order=True)
        for index, number in enumerate(good):
            with h5py.File(_part(output, attempts.task, number), "r") as part:
                demo = data.create_group(f"demo_{index}")
                for name in part:
                    part.copy(name, demo)
                demo.attrs.update(part.attrs)
                total += int(part.attrs["num_samples"])
        size = settings.worker_settings.get("image_size", spec.contract.cameras[0].height)
        data.attrs.update(attributes_of(spec, attempts.task, size, attempts.known[good[0]]["instruction"]))
        data.attrs.update(num_demos=len(good), total=total)
        data.attrs.update(failed_attempts=attempts.failures, standins=spec.standins)
