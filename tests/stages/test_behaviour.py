"""A stage whose output changes without a new behaviour version fails here.

`PRTS_UPDATE_BEHAVIOUR=1 pytest tests/stages/test_behaviour.py` writes the record anew, of stages whose version was
raised and of what follows from them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prts_core.config.schema import VideoConfig
from prts_core.stages import chain, declarations
from prts_core.store.listing import digest_tree
from prts_core.store.stage import StageContext
from tests.fixtures.smoke_run import smoke_plan
from tests.stages.behaviour import law
from tests.stages.behaviour.figures import figures

PLAN = smoke_plan()
STEPS = dict(declarations.steps(PLAN))  # the recipe has one dataset
PARENTS = {
    stage: {parent.stage for parent in declarations.STAGES[stage].parents(PLAN, partition)}
    for stage, partition in STEPS.items()
}


@pytest.fixture(scope="module")
def found(smoke_outputs: Path) -> dict[str, Any]:
    made = {}
    for stage, partition in STEPS.items():
        manifest = chain.finished(stage, PLAN, partition, smoke_outputs)
        made[stage] = {"version": manifest.version, "files": figures(manifest.folder(smoke_outputs))}
    return made


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_outputs_change_only_with_the_behaviour_version(found: dict[str, Any]) -> None:
    update = os.environ.get("PRTS_UPDATE_BEHAVIOUR") == "1"
    told = law.broken(found, law.read_record(), PARENTS, update=update)
    assert not told, "\n\n" + "\n\n".join(told)
    if update:
        law.write_record(found, law.read_record())


def one_percent_more(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*args) * 1.01


def coarser(options: Callable[[VideoConfig], dict[str, str]]) -> Callable[[VideoConfig], dict[str, str]]:
    return lambda config: options(replace(config, crf=config.crf + 1))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "stage, place, changed, told",
    [
        ("sft", "prts_core.training.losses.flow_loss", one_percent_more, "training.csv: flow_loss"),
        ("sft", "prts_core.policy.processor.normalize", one_percent_more, "training.csv: flow_loss"),
        ("convert", "prts_core.data.lerobot_v21.video._options", coarser, "mp4: bytes"),
    ],
)
def test_a_small_change_of_the_code_breaks_the_law(
    stage: str,
    place: str,
    changed: Any,
    told: str,
    smoke_outputs: Path,
    found: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One stage again on the inputs of the smoke run: as it is, the same to the byte; one function changed, told."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    store = chain.store(smoke_outputs)
    resolved = store.resolve(stage, PLAN, STEPS[stage])

    def run(name: str) -> Path:
        context = StageContext(smoke_outputs, tmp_path / name, PLAN.recipe.seed, PLAN.recipe.name, STEPS[stage])
        context.output.mkdir(parents=True)
        resolved.stage.run(resolved.config, store.inputs(resolved, PLAN), context)
        return context.output

    made = store.find(resolved)
    assert made is not None and digest_tree(run("same")) == made.content_digest
    module, name = place.rsplit(".", 1)
    monkeypatch.setattr(place, changed(getattr(importlib.import_module(module), name)))
    other = {stage: {"version": made.version, "files": figures(run("changed"))}}
    (said,) = law.broken(other, {stage: found[stage]}, PARENTS)
    assert f"raise {stage!r} in prts_core/stages/versions.py" in said and told in said, said


# ---- the law itself, on records made up ----------------------------------------------------------------------------
CHAIN = {"convert": set(), "sft": {"convert"}, "value": {"sft"}}


def record(**changes: tuple[int, float]) -> dict[str, Any]:
    """A record of the chain; changes: stage -> (version, figure)."""
    made = {}
    for stage in CHAIN:
        version, figure = changes.get(stage, (1, 1.0))
        made[stage] = {"version": version, "files": {"a.csv": {"exact": "x", "numbers": {"loss": [figure, 2.0]}}}}
    return made


@pytest.mark.parametrize(
    "now, told",
    [
        ({}, []),
        ({"sft": (1, 1.0001)}, []),  # within what processors differ by
        ({"convert": (1, 1.0001)}, ["convert: the same inputs give another output"]),
        ({"sft": (1, 1.01)}, ["sft: the same inputs give another output"]),
        ({"sft": (1, 1.01), "value": (1, 1.1)}, ["sft: the same inputs give another output"]),  # value only follows
        ({"sft": (2, 1.01), "value": (1, 1.1)}, ["sft: its version is 2, the record says version 1"]),
        ({"sft": (2, 1.0)}, ["sft: its version is 2, the record says version 1"]),
        ({"sft": (0, 1.0)}, ["sft: its version went back from 1 to 0"]),
    ],
)
def test_the_law(now: dict[str, tuple[int, float]], told: list[str]) -> None:
    said = law.broken(record(**now), record(), CHAIN)
    assert len(said) == len(told)
    for sentence, start in zip(said, told, strict=True):
        assert sentence.startswith(start)


def test_a_record_is_written_only_of_what_has_a_new_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(law, "RECORD", tmp_path / "smoke.json")
    law.write_record(record(), {})
    assert law.read_record() == record()
    assert law.broken(record(sft=(1, 1.01)), record(), CHAIN, update=True), "figures alone are not written"
    raised = record(convert=(1, 1.0000001), sft=(2, 1.01), value=(1, 1.1))
    assert law.broken(raised, record(), CHAIN, update=True) == []
    law.write_record(raised, record())
    assert law.read_record() == record(sft=(2, 1.01), value=(1, 1.1))
    assert law.broken(raised, law.read_record(), CHAIN) == []
    gone = {stage: made for stage, made in record().items() if stage != "value"}
    assert law.broken(gone, record(), CHAIN) == [f"value: in the record, but no stage.\nCure: `{law.UPDATE}`"]
