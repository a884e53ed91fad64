"""`prts bench sim`: LIBERO stepped in chunks and looked at where a policy would look, beside loops that do not.

Recorded action chunks (the scripted expert's) take the place of a policy; chunk 8, two cameras of 224 px. The peers are
LIBERO's own environment, which renders after every step, and our workers in other numbers and with other threads. All
take turns over the same steps. It knows no policy; where LIBERO is not installed, the rows say so.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console

from prts_core.bench.report import Row
from prts_core.io.errors import SimulatorError
from prts_core.sim import protocol
from prts_core.sim.installations import Installation
from prts_core.sim.pool import THREAD_VARIABLES, Pool, launch_for
from prts_core.sim.suite import EpisodeKey
from prts_core.sim.suites import suite

SUITE, TASK, SEED = "libero_object", "pick_up_the_milk_and_place_it_in_the_basket", 7
CHUNK, PIXELS, STEPS, ROUNDS = 8, 224, 48, 5
SETTINGS = {"image_size": PIXELS, "tasks": 1}
ABSENT = "LIBERO is not installed; `prts sim install libero`"


class SlotThroughput:
    """Workers that go through the recorded actions; every slot its own episode, as fast as it can."""

    def __init__(self, slots: int, threads: int | None, settings: Mapping[str, int] = SETTINGS) -> None:
        with no_thread_settings(threads is None):
            launch = launch_for(SUITE, threads=threads, settings=settings)
            self.pool = Pool(launch, slots=slots)
        self.slots = slots

    def steps_per_second(self, actions: np.ndarray, steps: int = CHUNK) -> float:
        """Control steps a second over all slots, a look after every `steps` of them; the reset is not counted."""
        for slot in range(self.slots):
            self.pool.send(slot, protocol.reset(EpisodeKey(SUITE, TASK, slot, SEED), observe=True))
        for _ in range(self.slots):
            self._answer()
        at, begin = [0] * self.slots, time.perf_counter()
        busy = set(range(self.slots))
        for slot in busy:
            self.pool.send(slot, protocol.step(actions[:steps], ignore_success=True))
        while busy:
            slot = self._answer()
            at[slot] += steps
            if at[slot] < len(actions):
                self.pool.send(slot, protocol.step(actions[at[slot] : at[slot] + steps], ignore_success=True))
            else:
                busy.remove(slot)
        return self.slots * len(actions) / (time.perf_counter() - begin)

    def _answer(self) -> int:
        answered = self.pool.wait()
        assert answered is not None
        slot, reply = answered
        if isinstance(reply, SimulatorError):
            raise reply
        return slot

    def close(self) -> None:
        self.pool.close()


class OwnLoop:
    """LIBERO's own environment in a process of its own (libero_peer.py), with whatever threads it takes."""

    def __init__(self, actions: np.ndarray, folder: Path) -> None:
        home = Installation("libero")
        entry = json.loads((home.path / "tasks.json").read_text())["tasks"][TASK]
        with np.load(home.path / "init_states" / entry["folder"] / f"{TASK}.npz") as file:
            np.save(folder / "state.npy", file["states"][0])
        np.save(folder / "actions.npy", actions)
        (package,) = (home.path / "venv" / "lib").glob("python3.*/site-packages/libero/libero")
        bddl = package / "bddl_files" / entry["folder"] / f"{TASK}.bddl"
        gl = os.environ.get("MUJOCO_GL") or "egl"
        kept = {key: value for key, value in os.environ.items() if key not in THREAD_VARIABLES}
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [
                home.python,
                Path(__file__).with_name("libero_peer.py"),
                bddl,
                folder / "actions.npy",
                folder / "state.npy",
                str(PIXELS),
            ],
            env=kept | {"LIBERO_CONFIG_PATH": str(home.path / "config"), "MUJOCO_GL": gl, "PYOPENGL_PLATFORM": gl},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def steps_per_second(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SimulatorError("LIBERO's own loop gave up", found=self.log.read()[-1500:])
        return STEPS / json.loads(line)["seconds"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.log.close()


@contextmanager
def no_thread_settings(wanted: bool) -> Iterator[None]:
    """The environment without the variables that limit threads, where default threads are `wanted`."""
    taken = {name: os.environ.pop(name) for name in THREAD_VARIABLES if wanted and name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def recorded(pool: Pool) -> np.ndarray:
    """(STEPS, 7) float32: what the scripted expert did at the beginning of one episode."""
    task = next(task for task in suite(SUITE).tasks if task.name == TASK)
    key = EpisodeKey(SUITE, TASK, 0, SEED)
    made = pool.ask(0, protocol.demonstrate(key, max_steps=task.max_steps, images=False))["executed"]
    if len(made) < STEPS:
        raise SimulatorError("The recorded episode is too short", found=len(made), expected=f"{STEPS} steps")
    return made[:STEPS]


def run(console: Console) -> list[Row]:
    goals = [
        (f"one worker, chunk {CHUNK} / LIBERO's own loop, a look a step", ">= 3.0"),
        (f"one worker: a look every {CHUNK} steps / a look a step", ">= 3.0"),
        ("two workers / one, one thread each", ">= 1.6"),
        ("two workers, one thread each / one worker, default threads", ">= 1.0"),
    ]
    if Installation("libero").installed() is None:
        return [Row(what, 0.0, None, "steps/s", "higher", goal, ABSENT) for what, goal in goals]
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        one, two, free = SlotThroughput(1, 1), SlotThroughput(2, 1), SlotThroughput(1, None)
        for slots in (one, two, free):
            stack.callback(slots.close)
        actions = recorded(one.pool)
        console.print(f"{STEPS} recorded actions of {SUITE}, {ROUNDS} rounds", highlight=False)
        own = OwnLoop(actions, folder)
        stack.callback(own.close)
        measured: dict[str, tuple[Callable[[], float], list[float]]] = {
            "one": (lambda: one.steps_per_second(actions), []),
            "two": (lambda: two.steps_per_second(actions), []),
            "free": (lambda: free.steps_per_second(actions), []),
            "a look a step": (lambda: free.steps_per_second(actions, 1), []),
            "own": (own.steps_per_second, []),
        }
        for number in range(ROUNDS + 1):  # the first builds renderers and compiles
            for call, seen in measured.values():
                seen.append(call())
            told = ", ".join(f"{name} {seen[-1]:.1f}" for name, (_, seen) in measured.items())
            console.print(f"round {number}: {told} steps/s", highlight=False)
        rate = {name: median(seen[1:]) for name, (_, seen) in measured.items()}
    standins = str(Installation("libero").require().get("standins", ""))
    note = f"{os.cpu_count()} cores, load average {load:.1f} before; {PIXELS} px, two cameras"
    note += f"; {standins}" if standins else ""
    pairs = [("free", "own"), ("free", "a look a step"), ("two", "one"), ("two", "free")]
    rows = []
    for (what, goal), (ours, peer) in zip(goals, pairs, strict=True):
        rows.append(Row(what, rate[ours], rate[peer], "steps/s", "higher", goal, note))
        console.print(rows[-1].line(), highlight=False)
    return rows
