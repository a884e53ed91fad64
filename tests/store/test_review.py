"""What a reader of the store found: results are kept, and recorded listings make none."""

from __future__ import annotations

from pathlib import Path

import pytest

from prts_core.io.errors import StageError, UnavailableError
from prts_core.io.files import read_json, write_text
from prts_core.stages import chain as real
from tests.store.toy_chain import Chain


def test_an_intact_result_of_a_parent_that_came_out_different_is_put_aside(chain: Chain):
    chain.run("first")
    before = chain.run("second")
    text = chain.folder("first") / "output" / "a" / "text.txt"
    text.chmod(0o644)
    text.write_text("vandal")
    chain.work = lambda context: write_text(context.output / "noise.txt", "as a GPU would")
    chain.run("first")
    chain.work = lambda context: None
    after = chain.run("second")
    assert after.key == before.key and after.parent_digests != before.parent_digests
    (aside,) = chain.folder("second").glob("work-*")
    assert read_json(aside / "manifest.json")["digest"] == before.digest
    assert (aside / "output" / "a" / "text.txt").read_text() == "first: hello\nsecond: hello\n"


RECIPE = "name: r\ndatasets: [a, b]\ndeploy: a\nmodel: smoke\n"
DATASET = "name: {name}\nsource: {{kind: lerobot, root: '{root}'}}\n"


def test_recorded_listings_find_results_and_never_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from prts_core.config.load import load_plan
    from prts_core.store.run_stage import untracked

    monkeypatch.setattr("prts_core.tracking.runs.stage_run", untracked)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "r.yaml").write_text(RECIPE)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.txt").write_text(name)
        (tmp_path / "datasets" / f"{name}.yaml").write_text(DATASET.format(name=name, root=tmp_path / name))
    plan, outputs = load_plan(tmp_path / "r.yaml"), tmp_path / "outputs"
    made = real.run("collect", plan, "a", outputs)
    monkeypatch.setenv("PRTS_SOURCES", "recorded")
    assert real.run("collect", plan, "a", outputs) == made
    with pytest.raises(UnavailableError, match="No listing of dataset 'b' was recorded"):  # a's is not b's
        real.run("collect", plan, "b", outputs)
    (tmp_path / "a" / "data.txt").write_text("changed since")
    with pytest.raises(StageError, match="not what was recorded") as caught:
        real.run("convert", load_plan(tmp_path / "r.yaml"), "a", outputs)
    assert caught.value.cure == "unset PRTS_SOURCES"
    monkeypatch.delenv("PRTS_SOURCES")
    assert real.run("collect", load_plan(tmp_path / "r.yaml"), "a", outputs).sources != made.sources
