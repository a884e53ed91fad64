"""Describe one skill package: every field of rskill.yaml (schema 0.1), the rules between fields, reading and writing.

One concern a file; `document.py` puts them together. A key that the schema does not have is an error with a suggestion,
but for the four places where the schema ignores such keys: latency_budget, quantization, envelope and
state_contract.bindings (`document.ignored_keys` names those).
"""

from prts_core.skills.manifest.document import (
    FILE,
    Manifest,
    check_manifest,
    ignored_keys,
    manifest_path,
    read_manifest,
    write_manifest,
)

__all__ = [
    "FILE",
    "Manifest",
    "check_manifest",
    "ignored_keys",
    "manifest_path",
    "read_manifest",
    "write_manifest",
]
