"""Digest the code that a stage runs: its module and every module of the project that this one can import.

A hint for people, no part of any key: where it differs, a result was made by other code, and nothing is run again.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from prts_core.io.files import digest_bytes, digest_value

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"prts_core": ROOT / "prts_core", "prts_kernels": ROOT / "kernels" / "prts_kernels"}
# What carries a stage but computes nothing of its result.
CARRIERS = (
    "prts_core.store",
    "prts_core.stages.chain",
    "prts_core.stages.declarations",
    "prts_core.tracking",
    "prts_core.launch",
    "prts_core.cli",
)
_IMPORT = re.compile(
    r"^\s*(?:from\s+(?P<base>prts_(?:core|kernels)[\w.]*)\s+import\s+(?P<names>\([^)]*\)|[^\n]*)"
    r"|import\s+(?P<plain>prts_(?:core|kernels)[\w.]*))",
    re.MULTILINE,
)


@cache
def _modules() -> dict[str, tuple[str, frozenset[str]]]:
    """Module -> (digest, names that its imports may mean)."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            text = path.read_bytes()
            named: set[str] = set()
            for match in _IMPORT.finditer(text.decode()):
                base = match["base"] or match["plain"]
                named.add(base)
                named |= {f"{base}.{word}" for word in re.findall(r"\w+", match["names"] or "")}
            found[name] = (digest_bytes(text), frozenset(named))
    return found


@cache
def code_digest(stage: str) -> str:
    """Digest of the code behind `prts_core.stages.<stage>`; empty for a stage that is none of the project's."""
    modules = _modules()
    waiting, seen = [f"prts_core.stages.{stage}"], set()
    while waiting:
        name = waiting.pop()
        if name in modules and name not in seen and not name.startswith(CARRIERS):
            seen.add(name)
            waiting += modules[name][1]
            parent = name.rpartition(".")[0]
            waiting += [parent] if parent else []
    return digest_value({name: modules[name][0] for name in seen}) if seen else ""
