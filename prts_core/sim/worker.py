"""The process that a simulator runs in: `python -m prts_core.sim.worker --family F --socket FD --parent PID`.

It knows the messages (sim/protocol.py) and the plug-ins (sim/suites), no policy and no runner; sim/pool.py starts it.
It runs in the simulator's own environment: this module and what it imports need numpy, msgpack and the simulator only.

What a simulator raises ends the process: after a fault nobody knows what state it is in. Only a request that is itself
wrong (a PrtsError) is answered, with `refused`. When its runner is gone, by whatever death, the worker ends by itself.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np

from prts_core.io.errors import PrtsError, SimulatorError
from prts_core.policy.observation import STATE
from prts_core.sim import protocol
from prts_core.sim.expert_episode import run_expert
from prts_core.sim.protocol import FrameDecoder, Message
from prts_core.sim.suite import Environment, Expert, SuiteSpec, Task
from prts_core.sim.suites import part, suites_of, task_of

WATCH_SECONDS = 2.0


class Session:
    """One worker's life: its environment and the episode under way."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.environment: Environment | None = None
        self.suites: dict[str, SuiteSpec] = {}
        self.suite: SuiteSpec | None = None
        self.task: Task | None = None
        self.expert: Expert | None = None  # of the episode under way, once it was asked for
        self.steps = 0

    def answer(self, request: Message) -> Message:
        """The reply to one checked request. PrtsError where the request is wrong."""
        fields = {name: value for name, value in request.items() if name != "kind"}
        return {"kind": request["kind"], **getattr(self, "_" + request["kind"])(**fields)}

    def _handshake(self) -> dict[str, Any]:
        return {"protocol": protocol.VERSION, "family": self.family, "pid": os.getpid()}

    def _build(self, settings: dict[str, Any]) -> dict[str, Any]:
        self.environment = part(self.family, "environment").build(settings)
        self.suites = suites_of(self.family, settings)
        return {}

    def _begin(self, suite: str, task: str, initial_state: int, seed: int, perturbation: dict[str, Any]) -> Task:
        self.suite = None  # no episode, should this one be refused
        if self.environment is None:
            raise SimulatorError("The simulator was not built", expected="a 'build' message first")
        if suite not in self.suites:
            raise SimulatorError("The simulator has no such suite", found=suite, expected=", ".join(self.suites))
        spec = self.suites[suite]
        chosen = task_of(spec, task)
        if initial_state < 0 or (chosen.initial_states and initial_state >= chosen.initial_states):
            raise SimulatorError(
                f"Task {task!r} has no such initial state",
                field="initial_state",
                found=initial_state,
                expected=f"0 to {chosen.initial_states - 1}" if chosen.initial_states else "0 or more",
            )
        if seed < 0:
            raise SimulatorError("A seed is negative", field="seed", found=seed, expected="0 or more")
        chosen = replace(chosen, perturbation={**chosen.perturbation, **perturbation})
        self.environment.reset(spec, chosen, initial_state, seed)
        self.suite, self.task, self.expert, self.steps = spec, chosen, None, 0
        return chosen

    def _episode(self) -> tuple[Environment, SuiteSpec]:
        if self.environment is None or self.suite is None:
            raise SimulatorError("No episode is under way", expected="a 'reset' message first")
        return self.environment, self.suite

    def _observation(self) -> dict[str, np.ndarray]:
        environment, _ = self._episode()
        return {STATE: np.asarray(environment.proprioception(), np.float32), **environment.images()}

    def _reset(self, *, observe: bool, render: bool, **episode: Any) -> dict[str, Any]:
        task = self._begin(**episode)
        return {
            "observation": self._observation() if observe else None,
            "frame": self._episode()[0].render() if render else None,
            "instruction": task.instruction,
        }

    def _step(
        self, actions: np.ndarray, observe: bool, render: int, ignore_success: bool, expert: str
    ) -> dict[str, Any]:
        environment, suite = self._episode()
        width = len(suite.contract.action)
        if not 0 < len(actions) <= protocol.MAX_ACTIONS or actions.shape[1] != width or not np.isfinite(actions).all():
            raise SimulatorError(
                "Actions that the suite cannot take",
                field="actions",
                found=f"shape {actions.shape}" + ("" if np.isfinite(actions).all() else ", not all finite"),
                expected=f"(1 to {protocol.MAX_ACTIONS}, {width}), finite",
            )
        if expert not in protocol.EXPERT:
            raise SimulatorError("No such part of an expert", field="expert", found=expert, expected=protocol.EXPERT)
        rewards, successes, frames, advice = [], [], [], []
        for action in actions:
            if expert:
                advice.append(self._advice(environment, suite))
            reward, success = environment.step(advice[-1] if expert == "act" else action)
            self.steps += 1
            rewards.append(reward)
            successes.append(success)
            if render > 0 and self.steps % render == 0:
                frames.append(environment.render())
            if success and not ignore_success:
                break
        return {
            "rewards": np.asarray(rewards, np.float32),
            "successes": np.asarray(successes, bool),
            "steps": len(rewards),
            "observation": self._observation() if observe else None,
            "frames": np.stack(frames) if frames else None,
            "expert": np.stack(advice) if advice else None,
        }

    def _advice(self, environment: Environment, suite: SuiteSpec) -> np.ndarray:
        """What the scripted expert would do now; it must have been asked from the episode's first step on, if it goes
        through phases."""
        if self.expert is None:
            assert self.task is not None
            self.expert = part(self.family, "expert").expert(suite, self.task)
        return np.clip(np.asarray(self.expert.act(environment), np.float32), -1.0, 1.0)

    def _observe(self) -> dict[str, Any]:
        return {"observation": self._observation()}

    def _state(self) -> dict[str, Any]:
        return {"state": np.asarray(self._episode()[0].state(), np.float64)}

    def _demonstrate(
        self, *, noise: float, noise_seed: int, max_steps: int, tail_steps: int, images: bool, **episode: Any
    ) -> dict[str, Any]:
        task = self._begin(**episode)
        environment, suite = self._episode()
        expert = part(self.family, "expert").expert(suite, task)
        made = run_expert(
            environment,
            expert,
            max_steps=max_steps or task.max_steps,
            tail_steps=tail_steps,
            noise=noise,
            noise_seed=noise_seed,
            images=images,
        )
        self.suite = None  # the expert's episode is over
        return made | {"instruction": task.instruction}


def serve(family: str, sock: socket.socket) -> None:
    """Answer requests until the other end is gone. SimulatorError where no frame of ours comes in."""
    session, frames = Session(family), FrameDecoder(protocol.REQUEST_LIMITS)
    while data := sock.recv(1 << 20):
        for message in frames.feed(data):
            try:
                request = protocol.check(message, protocol.REQUESTS)
                reply = protocol.frame(session.answer(request))
            except PrtsError as err:
                reply = protocol.frame({"kind": "refused", "error": str(err)})
            sock.sendall(reply)


def end_with_parent(sock: socket.socket, parent: int) -> None:
    """A thread that ends this process, whatever it is computing, once its parent is dead or has closed the socket.

    The socket alone would not do: a process forked from the parent may hold its other end open.
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(sock, getattr(select, "POLLRDHUP", 0))
        while os.getppid() == parent and not poll.poll(WATCH_SECONDS * 1000):
            pass
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # helpers of the simulator too
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prts_core.sim.worker", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", required=True)
    parser.add_argument("--socket", type=int, required=True, help="file descriptor of a connected stream socket")
    parser.add_argument("--parent", type=int, required=True, help="process id of the runner")
    args = parser.parse_args(argv)
    sock = socket.socket(fileno=args.socket)
    end_with_parent(sock, args.parent)
    try:
        serve(args.family, sock)
    except SimulatorError as err:
        print(err, file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
