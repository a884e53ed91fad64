"""`prts chain`: the whole chain in order, of which this looks at what it leaves where a dataset is not here."""

from __future__ import annotations

from pathlib import Path

import pytest

from prts_core.cli.main import main
from prts_core.io.files import read_json, write_text

RECIPE = "name: r\ndatasets: [d]\ndeploy: d\nmodel: smoke\n"
DATASET = "name: d\noptional: true\nsource: {kind: lerobot, root: '/nowhere/of/mine'}\n"


@pytest.mark.parametrize("dry", [False, True])
def test_a_skip_leaves_the_note_that_dvc_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: bool):
    write_text(tmp_path / "r.yaml", RECIPE)
    write_text(tmp_path / "datasets/d.yaml", DATASET)
    write_text(tmp_path / "models/smoke.yaml", Path("configs/models/smoke.yaml").read_text())
    words = ["chain", "--config", str(tmp_path / "r.yaml"), "--outputs", str(tmp_path / "out"), "--until", "stats"]
    assert main(words + ["--dry-run"] * dry) == 0
    assert capsys.readouterr().out.count("skipped  Dataset 'd' is not on this machine") == 4
    for stage in ("collect", "convert", "validate", "stats"):
        note = tmp_path / "out/runs/r" / stage / "d/manifest.json"
        assert not note.exists() if dry else "is not on this machine" in read_json(note)["skipped"]
