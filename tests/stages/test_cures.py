"""A cure names the command that works: with the recipe, the dataset, the changed values and the outputs."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from prts_core.cli.main import build_parser
from prts_core.config.load import load_plan
from prts_core.io.errors import DataError
from prts_core.stages import chain, declarations
from prts_core.store.run_stage import untracked
from prts_core.store.stage import StageResult

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml"


def test_a_bare_stage_in_a_cure_becomes_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prts_core.tracking.runs.stage_run", untracked)

    def collect(config, inputs, context) -> StageResult:
        raise DataError(
            "Statistics are stale", file="norm_stats.json", cure="run `prts stats` again, then `prts serve`"
        )

    monkeypatch.setitem(declarations.STAGES, "collect", replace(declarations.STAGES["collect"], run=collect))
    plan = load_plan(SMOKE, ["seed=8"])
    with pytest.raises(DataError) as caught:
        chain.run("collect", plan, None, tmp_path / "o")
    cure = str(caught.value.cure)
    command = cure.split("`")[1]
    assert command.startswith("prts stats ") and "`prts serve`" in cure and cure in str(caught.value)
    args = build_parser().parse_args(shlex.split(command)[1:])
    assert (args.config, args.overrides, args.outputs) == (SMOKE, ["seed=8"], tmp_path / "o")
    assert args.dataset == "metaworld_smoke"
