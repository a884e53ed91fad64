"""Write results whole or not at all, as JSON, text and Markdown tables, and marked blocks of a README."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOTHING = "not measured"


def write_json(path: Path, document: Any) -> None:
    """Under a temporary name, then renamed. NaN and infinities become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def file_name(device: str, date: str) -> str:
    """`nvidia-h200-2026-11-21.json`."""
    return f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-{date}.json"


def newest(folder: Path, name: str, device_type: str) -> dict[str, Any] | None:
    """The latest results of benchmark `name` on a device of this type, by the time written in them, or None."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    found = [d for d in found if d.get("name") == name and d["device"]["type"] == device_type]
    return max(found, key=lambda d: d["date"], default=None)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns to the left, the others to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in (lines[0], "-" * len(lines[0]), *lines[1:]))


def replace_block(text: str, name: str, body: str) -> str:
    """What stands between `<!-- name:begin -->` and `<!-- name:end -->` becomes `body`. ValueError: no such marks."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"The text needs {begin} and {end} once each")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{body.strip()}\n{end}{rest.split(end)[1]}"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent, or `not measured`."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}" if abs(value) >= 1e-3 else f"{value:.1e}"
