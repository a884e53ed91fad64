"""Fill an outputs folder with many results of realistic size, for measurements."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

STAGES = ("collect", "convert", "validate", "stats", "pretrain", "sft", "subtask", "benchmark", "value", "package")


def fill(outputs: Path, count: int) -> None:
    """`count` results in chains of ten; every second chain's end is shown by a view. Manifests of 3 to 4 kB."""
    config = {f"field_{i}": {"steps": i, "sizes": [1, 2, 3], "name": "text of a field"} for i in range(22)}
    before = ""
    for number in range(count):
        stage = STAGES[number % len(STAGES)]
        key = hashlib.sha256(str(number).encode()).hexdigest()[:20]
        chained = {"parent": before} if number % len(STAGES) else {}
        manifest = {
            "kind": stage,
            "key": key,
            "version": 1,
            "partition": "d",
            "config": config,
            "seed": 7,
            "sources": "",
            "parents": chained,
            "parent_digests": dict.fromkeys(chained, f"sha256:{0:064}"),
            "content_digest": f"sha256:{number:064x}",
            "contracts": {"d": f"sha256:{1:064}"},
            "metrics": {f"metric_{i}": i / 7 for i in range(10)},
            "digest": f"sha256:{number:064x}",
        }
        provenance = {
            "bytes": 10**6,
            "code": f"sha256:{2:064}",
            "started": "2026-01-01T00:00:00+00:00",
            "seconds": 12.5,
            "finished": "2026-01-01T00:00:12+00:00",
            "recipe": "r",
            "overrides": [],
            "host": "host",
            "caller": {},
            "mlflow": {"run_id": "0" * 32, "url": "http://localhost:5000/#/experiments/1/runs/" + "0" * 32},
        }
        folder = outputs / "store" / stage / key
        (folder / "output").mkdir(parents=True)
        text = json.dumps(manifest, indent=2, sort_keys=True)
        (folder / "manifest.json").write_text(text)
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=2))
        (folder / ".lock").touch()
        if number % 20 == 19:
            view = outputs / "runs" / f"recipe{number // 20}" / stage
            view.mkdir(parents=True)
            (view / "manifest.json").write_text(text)
        before = key


if __name__ == "__main__":
    fill(Path(sys.argv[1]), int(sys.argv[2]))
