"""One real MLflow store a module (making its tables takes seconds)."""

from __future__ import annotations

from pathlib import Path

import pytest

from prts_core.config.load import RunPlan, load_plan

pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="session")
def plan() -> RunPlan:
    return load_plan(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
