"""The process of a replica: `python -m prts_core.serving.replica_process FD PARENT FOLDER DTYPE DEVICE DIGEST`.

replicas.py starts it, hears {} once it has loaded what the digest names, and asks {observation, instruction, seeds,
...}, one call at a time; it answers {actions, values, subtask} or {refused: the error}. What is no error of ours ends
it, with its traceback as its last words. When its parent is gone, by whatever death, so is it.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any, cast

from prts_core.config.model import PolicyDtype
from prts_core.io.errors import PrtsError, to_plain
from prts_core.io.wire import encode, values
from prts_core.policy.observation import UnderWay
from prts_core.policy.policy import Policy, load_policy, policy_digest
from prts_core.sim.worker import end_with_parent


def main(argv: list[str]) -> int:
    number, parent, folder, dtype, device, digest = argv
    sock = socket.socket(fileno=int(number))
    end_with_parent(sock, int(parent))
    policy = load_policy(Path(folder), cast(PolicyDtype, dtype), device)
    if (found := policy_digest(Path(folder))) != digest:
        print(f"{folder} has changed: {found}, where {digest} is served", file=sys.stderr)
        return 1
    try:
        sock.sendall(encode({}))
        for asked in values(sock):
            try:
                told = answer(policy, asked)
            except PrtsError as err:
                told = {"refused": to_plain(err)}
            sock.sendall(encode(told))
    except (BrokenPipeError, ConnectionResetError):
        return 1
    return 0


def answer(policy: Policy, asked: dict[str, Any]) -> dict[str, Any]:
    """What the policy says, as plain values."""
    under_way = asked.pop("under_way")
    found = policy.answer(**asked, under_way=None if under_way is None else UnderWay(**under_way))
    return {"actions": found.actions, "values": found.values, "subtask": found.subtask}


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # torch's own threads may abort a process that ends while they still run
