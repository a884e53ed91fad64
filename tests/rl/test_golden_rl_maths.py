"""Prove that advantages, losses and masks give the public implementation's numbers, except where those are wrong."""

from __future__ import annotations

import pytest

from tests.rl import golden_advantages, golden_losses
from tests.rl.golden_rl import folder, load, names

# A case's reader is that of the longest prefix of its name.
READERS = {
    name.removeprefix("read_"): reader
    for module in (golden_advantages, golden_losses)
    for name, reader in vars(module).items()
    if name.startswith("read_")
}
# Prefixes that tests of other rooms read.
ELSEWHERE = {
    "tests/models": ("flow", "noise", "oft", "logits", "value"),
    "tests/sim": ("chunk_step", "eval_ids", "evaluate", "reset_ids", "libero"),
    "tests/rollout": ("rtc",),
}


def reader_of(name: str) -> str | None:
    return max((prefix for prefix in READERS if name.startswith(f"{prefix}_") or name == prefix), key=len, default=None)


@pytest.mark.parametrize("name", [name for name in names() if reader_of(name)] or ["absent"])
def test_golden_case(name: str) -> None:
    if not folder().exists():
        pytest.skip("golden/rl is absent: set PRTS_SHARED to a folder that has it")
    READERS[reader_of(name)](load(name))


def test_every_golden_case_has_a_reader() -> None:
    if not folder().exists():
        pytest.skip("golden/rl is absent: set PRTS_SHARED to a folder that has it")
    others = tuple(prefix for prefixes in ELSEWHERE.values() for prefix in prefixes)
    assert not [name for name in names() if not reader_of(name) and not name.startswith(others)]
    assert not [name for name in names() if reader_of(name) and name.startswith(others)]
