"""Hold outputs and behaviour versions together: what a stage makes of the same inputs changes only with its version.

The record, smoke.json, says of every stage of the smoke recipe its version and what its output was like (figures.py).
A key is made of the versions of a stage and of all its ancestors, so that a change is also lawful where it follows from
that of a parent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prts_core.io.files import read_json, write_text
from tests.stages.behaviour.figures import differences

RECORD = Path(__file__).parent / "smoke.json"
UPDATE = "PRTS_UPDATE_BEHAVIOUR=1 pytest tests/stages/test_behaviour.py"
RAISE = (
    "Cure: put back what changed it; or, where it is meant, raise {stage!r} in prts_core/stages/versions.py, then\n"
    f"  `{UPDATE}`"
)
SHOWN = 8  # differences of a stage

# Relative tolerances. Measured under the instruction sets of older processors (AVX2, SSE4): physics, pictures, tables
# and statistics keep every digit, weights move by 1e-5 and what a policy of three steps does by 1e-3.
PIXELS, VIDEO_BYTES = 5e-3, 5e-2  # of pictures: Mesa and matplotlib differ between their versions
TRAINED, ACTED, COMPUTED = 1e-3, 1e-2, 1e-6
TRAINS, ACTS = ("pretrain", "sft", "subtask"), ("benchmark", "value", "package")


def allowed(stage: str) -> Callable[[str, str], float]:
    """Of (file, number) the relative tolerance."""

    def of(path: str, number: str) -> float:
        if number.endswith("pixels") or ".images." in number:
            return PIXELS
        if number == "bytes":
            return VIDEO_BYTES
        if stage in TRAINS or path.endswith(".safetensors"):
            return TRAINED
        return ACTED if stage in ACTS else COMPUTED

    return of


def broken(
    found: Mapping[str, Any], record: Mapping[str, Any], parents: Mapping[str, set[str]], *, update: bool = False
) -> list[str]:
    """Where the law is broken, a paragraph each. found: in the chain's order. update: the record is to be written anew,
    so that only what has no new version is told."""
    changed: set[str] = set()
    told = []
    for stage, now in found.items():
        before = record.get(stage)
        if before is None or now["version"] != before["version"]:
            changed.add(stage)
            if before is not None and now["version"] < before["version"]:
                told.append(f"{stage}: its version went back from {before['version']} to {now['version']}")
            elif not update:
                said = "nothing" if before is None else f"version {before['version']}"
                told.append(f"{stage}: its version is {now['version']}, the record says {said}.\nCure: `{UPDATE}`")
            continue
        lines = list(differences(now["files"], before["files"], allowed(stage)))
        if lines:
            if not parents[stage] & changed:
                more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
                shown = [f"  {RECORD.name}, stage {stage}, {line}" for line in lines[:SHOWN]]
                what = f"{stage}: the same inputs give another output, and its version is still {now['version']}"
                told.append("\n".join([what, *shown, *more, RAISE.format(stage=stage)]))
            changed.add(stage)
    if not update:
        told += [f"{stage}: in the record, but no stage.\nCure: `{UPDATE}`" for stage in record.keys() - found.keys()]
    return told


def read_record() -> dict[str, Any]:
    return read_json(RECORD) if RECORD.exists() else {}


def write_record(found: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """A line a file; what has not changed keeps the figures that it had."""
    parts = []
    for stage, now in found.items():
        before = record.get(stage)
        same = before is not None and not list(differences(now["files"], before["files"], allowed(stage)))
        files = before["files"] if same and before is not None else now["files"]
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(files[name])}" for name in sorted(files))
        parts.append(f'{json.dumps(stage)}: {{"version": {now["version"]}, "files": {{\n{lines}\n}}}}')
    write_text(RECORD, "{\n" + ",\n".join(parts) + "\n}\n")
