"""`prts bench sim`: LIBERO stepped in chunks and looked at where a policy would look, beside loops that do not.

Recorded action chunks (the scripted expert's) take the place of a policy; chunk 8, two cameras of 224 px. The peers are
LIBERO's own environment, which renders after every step, and our workers in other numbers and with other threads. All
take turns over the same steps.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console

from prts_core.bench.peer import Peer
from prts_core.bench.report import Row, interleave
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
GOALS = (
    (f"one worker, chunk {CHUNK} / LIBERO's own loop, a look a step", "free", "own", ">= 3.0"),
    (f"one worker: a look every {CHUNK} steps / a look a step", "free", "a look a step", ">= 3.0"),
    ("two workers / one, one thread each", "two", "one", ">= 1.6"),
    ("two workers, one thread each / one worker, default threads", "two", "free", ">= 1.0"),
)


class SlotThroughput:
    """Workers that go through the recorded actions; every slot its own episode, as fast as it can."""

    def __init__(self, slots: int, threads: int | None, settings: Mapping[str, int] = SETTINGS) -> None:
        with no_thread_settings(threads is None):
            self.pool = Pool(launch_for(SUITE, threads=threads, settings=settings), slots=slots)
        self.slots, self.close = slots, self.pool.close

    def steps_per_second(self, actions: np.ndarray, steps: int = CHUNK) -> float:
        """Control steps a second over all slots, a look after every `steps` of them; the reset is not counted."""
        for slot in range(self.slots):
            self.pool.send(slot, protocol.reset(EpisodeKey(SUITE, TASK, slot, SEED), observe=True))
        for _ in range(self.slots):
            self._answer()
        chunks = np.split(actions, range(steps, len(actions), steps))
        left = {
            slot: iter([protocol.step(chunk, ignore_success=True) for chunk in chunks]) for slot in range(self.slots)
        }
        begin = time.perf_counter()
        for slot in left:
            self.pool.send(slot, next(left[slot]))
        for _ in range(self.slots * len(chunks)):
            slot = self._answer()
            if (message := next(left[slot], None)) is not None:
                self.pool.send(slot, message)
        return self.slots * len(actions) / (time.perf_counter() - begin)

    def _answer(self) -> int:
        answered = self.pool.wait()
        assert answered is not None
        slot, reply = answered
        if isinstance(reply, SimulatorError):
            raise reply
        return slot


def own_loop(actions: np.ndarray, folder: Path) -> Peer:
    """LIBERO's own environment in a process of its own (libero_peer.py), with whatever threads it takes."""
    home = Installation("libero")
    entry = json.loads((home.path / "tasks.json").read_text())["tasks"][TASK]
    with np.load(home.path / "init_states" / entry["folder"] / f"{TASK}.npz") as file:
        np.save(folder / "state.npy", file["states"][0])
    np.save(folder / "actions.npy", actions)
    (package,) = (home.path / "venv" / "lib").glob("python3.*/site-packages/libero/libero")
    bddl = package / "bddl_files" / entry["folder"] / f"{TASK}.bddl"
    script = Path(__file__).with_name("libero_peer.py")
    command = [home.python, script, bddl, folder / "actions.npy", folder / "state.npy", str(PIXELS)]
    gl = os.environ.get("MUJOCO_GL") or "egl"
    env = {key: value for key, value in os.environ.items() if key not in THREAD_VARIABLES}
    env |= {"LIBERO_CONFIG_PATH": str(home.path / "config"), "MUJOCO_GL": gl, "PYOPENGL_PLATFORM": gl}
    return Peer(command, env, folder / "log")


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
    executed = pool.ask(0, protocol.demonstrate(key, max_steps=task.max_steps, images=False))["executed"]
    if len(executed) < STEPS:
        raise SimulatorError("The recorded episode is too short", found=len(executed), expected=f"{STEPS} steps")
    return executed[:STEPS]


def run(console: Console) -> list[Row]:
    if Installation("libero").installed() is None:
        return [Row(what, 0.0, None, "steps/s", "higher", goal, ABSENT) for what, _, _, goal in GOALS]
    note = f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before; {PIXELS} px, two cameras"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        one, two, free = (stack.enter_context(closing(SlotThroughput(*how))) for how in ((1, 1), (2, 1), (1, None)))
        actions = recorded(one.pool)
        console.print(f"{STEPS} recorded actions of {SUITE}, {ROUNDS} rounds", highlight=False)
        own = stack.enter_context(own_loop(actions, folder))
        calls = {
            "one": lambda _: one.steps_per_second(actions),
            "two": lambda _: two.steps_per_second(actions),
            "free": lambda _: free.steps_per_second(actions),
            "a look a step": lambda _: free.steps_per_second(actions, 1),
            "own": lambda _: STEPS / own.ask()["seconds"],
        }
        found = interleave(calls, range(ROUNDS + 1))  # the first builds renderers and compiles
    for name, rates in found.items():
        console.print(f"{name}: {', '.join(f'{rate:.1f}' for rate in rates)} steps/s", highlight=False)
    rate = {name: median(rates) for name, rates in found.items()}
    standins = Installation("libero").require().get("standins")
    note += f"; {standins}" if standins else ""
    return [Row(what, rate[ours], rate[peer], "steps/s", "higher", goal, note) for what, ours, peer, goal in GOALS]
