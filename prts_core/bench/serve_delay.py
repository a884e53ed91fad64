"""Measure what late answers cost a robot that goes on moving, with real-time chunking and without. Rows of `prts bench
serve`, of a policy that can do something.

Meta-World stands still while the server thinks; the delay is counted in control steps. A robot that looks at step s
executes the old chunk for `late` more steps, then the new one from its row `late` on.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from prts_core.bench.report import Row
from prts_core.bench.serve_parts import Size, served, threads_of
from prts_core.contract import PolicyContract
from prts_core.io.errors import SimulatorError
from prts_core.robot.openpi import PolicyClient
from prts_core.rollout.episode_plan import EpisodePlan, SuiteSettings, make_plan
from prts_core.serving.observations import short_name
from prts_core.sim import protocol
from prts_core.sim.adapter import Adapter, adapt
from prts_core.sim.pool import Pool, launch_for
from prts_core.sim.suite import EpisodeKey
from prts_core.sim.suites import suite
from prts_core.statistics.binomial import mcnemar_exact

LATE_S = 0.1
ROBOTS = 4
How = Literal["at once", "late", "real-time chunking"]


def delay_rows(console: Console, size: Size, folder: Path, contract: PolicyContract) -> list[Row]:
    """Successes of the same episodes without a delay, and with one that real-time chunking bridges."""
    spec = suite("metaworld")
    late = round(LATE_S * contract.contract.control_hz)
    execute = max(1, contract.chunk_length - late)
    if not 1 <= late <= execute <= contract.chunk_length - late:
        console.print(f"no delay of {late} steps fits chunks of {contract.chunk_length}: left out", highlight=False)
        return []
    count = size.delayed * len(spec.tasks)
    plan = make_plan(spec, contract.chunk_length, SuiteSettings(episodes=count, execute=execute))
    solved: dict[How, list[bool]] = {}
    with served(policy=str(folder)) as server:
        ways: tuple[How, ...] = ("at once", "late", "real-time chunking")
        for how in ways:
            solved[how] = _episodes(server.openpi, plan, contract, how, late)
            console.print(f"{how}: {sum(solved[how])} of {count} solved", highlight=False)
    plain, held = np.array(solved["at once"]), np.array(solved["real-time chunking"])
    won, lost = int((held & ~plain).sum()), int((plain & ~held).sum())
    note = (
        f"{count} episodes, {late} control steps late, {execute} rows between two looks; paired: {won} won, {lost} "
        f"lost, p {mcnemar_exact(won, lost):.2g}; late without real-time chunking: {sum(solved['late'])} solved"
    )
    what = f"Meta-World at {LATE_S * 1e3:.0f} ms with real-time chunking / without delay"
    return [Row(what, float(held.sum()), float(plain.sum()), "episodes", "higher", ">= 0.97", note)]


def _episodes(url: str, plan: EpisodePlan, contract: PolicyContract, how: How, late: int) -> list[bool]:
    """Whether each of the plan's episodes was solved."""
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(plan.keys)):
        left.put(index)
    solved = [False] * len(plan.keys)
    adapter = adapt(contract.contract, plan.suite.contract, policy_name="the policy", suite_name=plan.suite.name)
    launch = launch_for(plan.suite.name, settings=plan.worker_settings)

    def robot() -> None:
        with Pool(launch) as pool, PolicyClient(url) as client:
            while True:
                try:
                    index = left.get_nowait()
                except queue.Empty:
                    return
                key = plan.keys[index]
                solved[index] = _episode(_asking(pool), client, plan, key, adapter, contract, how, late)

    threads_of([robot] * ROBOTS)
    return solved


def _asking(pool: Pool) -> Callable[[protocol.Message], protocol.Message]:
    def ask(message: protocol.Message) -> protocol.Message:
        pool.send(0, message)
        answered = pool.wait()
        assert answered is not None
        if isinstance(answered[1], SimulatorError):
            raise answered[1]
        return answered[1]

    return ask


def _episode(
    simulator: Callable[[protocol.Message], protocol.Message],
    client: PolicyClient,
    plan: EpisodePlan,
    key: EpisodeKey,
    adapter: Adapter,
    contract: PolicyContract,
    how: How,
    late: int,
) -> bool:
    reply = simulator(protocol.reset(key, perturbation=plan.perturbation))
    said, most = reply["instruction"], plan.task(key).max_steps
    before: np.ndarray | None = None
    for step in range(0, most, plan.execute):
        seen = _request(adapter.observation(reply["observation"]), contract) | {"prompt": said}
        delay = late if how == "real-time chunking" and before is not None else None
        chunk = client.infer(seen, seed=step, step=step, delay=delay, reset=step == 0)["actions"]
        rows = chunk[: plan.execute]
        if how != "at once" and before is not None:
            rows = np.concatenate([before[plan.execute :][:late], rows[late:]])
        before = chunk
        actions = np.asarray(adapter.actions(rows[: most - step]), np.float32)
        reply = simulator(protocol.step(actions, observe=step + len(actions) < most))
        if reply["successes"].any():
            return True
    return False


def _request(seen: Any, contract: PolicyContract) -> dict[str, Any]:
    shown = {f"observation/{short_name(camera)}": seen[camera.key] for camera in contract.contract.cameras}
    return shown | {"observation/state": seen["observation.state"]}
