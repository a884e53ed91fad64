"""Jobs in processes of their own, several at once, each with a time limit: a hang or a crash costs one job.

A job is "module:function" with JSON arguments; the function reports through `emit`, one JSON line at a time, so that
what was reported before a crash is kept.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Emit = Callable[[dict[str, Any]], None]
SOURCES = Path(__file__).resolve().parents[2]  # what `import prts_kernels` needs on the path


@dataclass(frozen=True)
class Job:
    """limit_s: of wall clock. stall_s: longest silence between two lines, None: no such limit."""

    name: str
    task: str
    arguments: dict[str, Any]
    limit_s: float
    stall_s: float | None = None


@dataclass
class Outcome:
    """reason: None when the job ended well; else what happened, in one line. lines: all that it reported."""

    name: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    seconds: float = 0.0


def run(
    jobs: Sequence[Job],
    folder: Path,
    at_once: int,
    deadline: float,
    on_line: Callable[[str, dict], None] | None = None,
    on_end: Callable[[Outcome], None] | None = None,
) -> dict[str, Outcome]:
    """All jobs, `at_once` at a time, in order; what has not ended by `deadline` (time.monotonic()) is stopped.

    folder: for the jobs' arguments, lines and output. on_line, on_end: told of each line and each end as it comes.
    """
    waiting, done = list(jobs), dict[str, Outcome]()
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once and time.monotonic() < deadline:
                running.append(_Running(waiting.pop(0), folder))
            if waiting and time.monotonic() >= deadline:
                for job in waiting:
                    done[job.name] = Outcome(job.name, reason="not started: no time left")
                waiting = []
            for one in list(running):
                ended = one.poll(min(deadline, one.limit), on_line)
                if ended is not None:
                    running.remove(one)
                    done[ended.name] = ended
                    if on_end:
                        on_end(ended)
            time.sleep(0.05)
    finally:
        for one in running:
            one.stop()
    return done


class _Running:
    def __init__(self, job: Job, folder: Path):
        stem = "".join(c if c.isalnum() else "-" for c in job.name)
        self.job, self.outcome, self.start = job, Outcome(job.name), time.monotonic()
        self.limit, self.heard, self.read = self.start + job.limit_s, self.start, 0
        self.lines, self.log = folder / f"{stem}.jsonl", folder / f"{stem}.log"
        given = folder / f"{stem}.json"
        given.write_text(json.dumps({"task": job.task, "arguments": job.arguments}), encoding="utf-8")
        self.lines.write_text("", encoding="utf-8")
        path = os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(given), str(self.lines)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,
            )

    def poll(self, limit: float, on_line: Callable[[str, dict], None] | None) -> Outcome | None:
        """The outcome once the job has ended or was stopped."""
        ended, now = self.process.poll() is not None, time.monotonic()  # asked before reading: no line is missed
        for line in self._new_lines():
            self.outcome.lines.append(line)
            self.heard = now
            if on_line:
                on_line(self.job.name, line)
        stalled = self.job.stall_s is not None and now - self.heard > self.job.stall_s
        if not ended and now < limit and not stalled:
            return None
        self.stop()
        self.outcome.seconds = now - self.start
        if not ended:
            what = f"silent for {self.job.stall_s:.0f} s" if stalled else f"not ready after {now - self.start:.0f} s"
            self.outcome.reason = f"stopped: {what}"
        elif self.process.returncode:
            self.outcome.reason = self._why(self.process.returncode)
        return self.outcome

    def stop(self) -> None:
        """The job's whole process group, so that its compilers end with it."""
        with suppress(ProcessLookupError):  # all of it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        with self.lines.open("rb") as handle:
            handle.seek(self.read)
            for raw in handle:
                if not raw.endswith(b"\n"):
                    break  # half a line, read when it is whole
                self.read += len(raw)
                yield json.loads(raw)

    def _why(self, code: int) -> str:
        said = [line for line in self.log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        if code < 0:
            return f"crashed with {signal.Signals(-code).name}; last words: {_short(said[-1:])}"
        starts = [i for i, line in enumerate(said) if line.startswith("Traceback (most recent call last)")]
        raised = [i for i, line in enumerate(said) if starts and i > starts[-1] and not line.startswith(" ")]
        return _short(said[raised[0] : raised[0] + 2] if raised else said[-1:])  # advice may follow what was raised


def _short(lines: Sequence[str]) -> str:
    return " ".join(line.strip() for line in lines)[:300] or "it said nothing"


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """SIGTERM ends the run like an exception, so that jobs are stopped and nothing is left behind."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str]) -> None:
    """In the job's process: `python -m prts_kernels.bench.worker <job.json> <lines.jsonl>`."""
    given, lines = map(Path, arguments)
    job = json.loads(given.read_text(encoding="utf-8"))
    module, function = job["task"].split(":")
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    with lines.open("a", encoding="utf-8") as handle:

        def emit(line: dict[str, Any]) -> None:
            handle.write(json.dumps(line) + "\n")
            handle.flush()

        getattr(importlib.import_module(module), function)(job["arguments"], emit)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpid(), signal.SIGKILL)  # the job leads a group of its own


if __name__ == "__main__":
    main(sys.argv[1:])
