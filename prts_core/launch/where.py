"""Say where a stage's function runs: `inline`, `process`, or `torchrun:4`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from prts_core.io.errors import ConfigError, suggest

VARIABLE = "PRTS_LAUNCH"
KINDS = {
    "inline": "in this process",
    "process": "in a process of its own",
    "torchrun": "over N processes of this machine, as torchrun:N",
}
EXPECTED = ", ".join(["inline", "process", "torchrun:N"])


@dataclass(frozen=True)
class Launch:
    """kind: one of KINDS. processes: how many work on the stage; what keeps the books is none of them."""

    kind: str = "inline"
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.kind}:{self.processes}" if self.kind == "torchrun" else self.kind


INLINE = Launch()


def parse_launch(text: str, field: str = "launch") -> Launch:
    """`inline`, `process` or `torchrun:N`; ConfigError, naming `field`, for anything else."""
    kind, colon, count = text.strip().partition(":")
    if kind not in KINDS:
        raise ConfigError(f"Unknown launch {kind!r}{suggest(kind, KINDS)}", field=field, found=text, expected=EXPECTED)
    if kind != "torchrun":
        if colon:
            raise ConfigError(
                f"{kind!r} takes no number of processes",
                field=field,
                found=text,
                expected=EXPECTED,
                cure=f"write {kind}, or torchrun:{count}",
            )
        return Launch(kind)
    if not count.isdecimal() or int(count) < 1:
        raise ConfigError(
            "torchrun needs a number of processes",
            field=field,
            found=text,
            expected="torchrun:N, N at least 1",
            cure="write torchrun:2 for two processes",
        )
    return Launch(kind, int(count))


def default_launch() -> Launch:
    """What $PRTS_LAUNCH says; inline where it is not set."""
    return parse_launch(os.environ.get(VARIABLE) or "inline", f"${VARIABLE}")
