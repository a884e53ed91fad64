"""Where things lie: the environment's word, else the same defaults wherever a command is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from prts_core.config.places import outputs_folder, recipe_path, recipe_paths, shared_folder

ROOT = Path(__file__).resolve().parents[2]


def test_the_environment_says_where(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PRTS_RECIPE", "a.yaml, b/c.yaml,")
    monkeypatch.setenv("PRTS_OUTPUTS", "/elsewhere")
    monkeypatch.setenv("PRTS_SHARED", "/data")
    assert recipe_paths() == [Path("a.yaml"), Path("b/c.yaml")] and recipe_path() == Path("a.yaml")
    assert (outputs_folder(), shared_folder()) == (Path("/elsewhere"), Path("/data"))


@pytest.mark.parametrize("empty", [None, ""])
def test_defaults(empty: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("PRTS_RECIPE", "PRTS_OUTPUTS", "PRTS_SHARED"):
        monkeypatch.delenv(name, raising=False) if empty is None else monkeypatch.setenv(name, empty)
    monkeypatch.chdir(tmp_path)
    assert recipe_paths() == [Path("configs/quickstart.yaml")]
    assert outputs_folder() == Path("outputs")
    assert shared_folder() == ROOT.parent / "shared"  # beside the checkout, not beside wherever one stands
