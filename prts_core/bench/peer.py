"""Ask a peer that runs in a process, and often a Python, of its own: one JSON line there, one back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prts_core.io.errors import UnavailableError


class Peer(AbstractContextManager["Peer"]):
    """A running command. log: where its standard error goes, shown when it ends early."""

    def __init__(self, command: Sequence[str | Path], env: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )

    def ask(self, **question: Any) -> Any:
        """Its answer. Raises UnavailableError where it has ended, with the end of its log."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise UnavailableError("A benchmark's peer gave up", file=self.log, found=self.log.read_text()[-2000:])
        return json.loads(line)

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def answer_of(arguments: Sequence[str], **env: str) -> Any:
    """The JSON in the last line that a run of this Python with `arguments` prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=os.environ | env)
    if done.returncode:
        raise UnavailableError("A process of a benchmark failed", found=done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])
