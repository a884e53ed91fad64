"""Promotions, approvals and rollbacks on a real MLflow store: every move in the trail, also of many at once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prts_core.cli.main import main as prts
from prts_core.delivery import audit, registry
from prts_core.delivery.history import move_rows, read_history
from prts_core.delivery.promote import promote, rollback
from prts_core.delivery.regression import due
from prts_core.io.errors import ConfigError, PrtsError, StageError
from prts_core.tracking.store import client
from tests.fixtures.toy_package import make, named, outcomes, register

ROOT = Path(__file__).resolve().parents[2]


def champion(outputs: Path, model: str) -> str:
    return audit.version_called(outputs, model, registry.CHAMPION)


def enter(plan, outputs: Path, count: int) -> None:
    for index in range(count):
        make(plan, outputs, f"w{index}", outcomes(118 + index % 2))
        register(plan, outputs)


def done(outputs: Path, model: str, alias: str = registry.CHAMPION) -> list[tuple[str, str]]:
    return [(m.before, m.after) for m in audit.moves(outputs, model) if (m.alias, m.state) == (alias, "done")]


def test_a_rollback_needs_a_reason_and_goes_the_way_back(plan, outputs, monkeypatch, capsys):
    monkeypatch.setenv("PRTS_USER", "ada")
    plan = named(plan, "back")
    enter(plan, outputs, 3)
    reference, where = "models:/back@champion", ["--outputs", str(outputs)]
    for reason in ("", "  "):
        with pytest.raises(ConfigError, match="needs a reason"):
            rollback(outputs, reference, reason)
    with pytest.raises(ConfigError, match="Only a champion"):
        rollback(outputs, "models:/back@challenger", "x")
    assert prts(["rollback", reference, "--reason", "drops the cup", *where]) == 0
    assert "version 2 instead of 3" in capsys.readouterr().out and champion(outputs, "back") == "2"
    last = audit.moves(outputs, "back")[-1]
    assert (last.by, last.verdict, last.reason, last.state) == ("ada", "rolled back", "drops the cup", "done")
    assert rollback(outputs, reference, "this one too") == ("2", "1")
    with pytest.raises(StageError, match="no earlier champion"):
        rollback(outputs, reference, "and this")
    assert done(outputs, "back") == [("", "1"), ("1", "2"), ("2", "3"), ("3", "2"), ("2", "1")]
    assert due(plan, outputs) == [("benchmark", "1")]

    refused = register(plan, outputs)["verdict"]  # no door lets back in what was thrown out, but a person
    assert refused["objections"] == [["withdrawn", ""]] and champion(outputs, "back") == "1"
    assert promote(plan, outputs, approve=True).promote and champion(outputs, "back") == "3"
    approval = registry.resolve_version(client(outputs), reference).tags["prts.approval"]
    assert json.loads(approval)["by"] == "ada"
    assert prts(["history", "back", *where]) == 0
    printed = capsys.readouterr().out
    assert "drops the cup" in printed and printed.count("rolled back") == 2 and "@challenger" in printed
    evidence = json.loads(audit.moves(outputs, "back")[-1].evidence)
    assert set(evidence["benchmark"]) == {"challenger", "champion"}


def test_a_recipe_may_ask_for_a_persons_approval(plan, outputs):
    plan = named(plan, "asked", approval=True)
    make(plan, outputs, "w", outcomes(118))
    assert register(plan, outputs)["verdict"]["objections"] == [["approval", ""]]
    assert promote(plan, outputs, approve=True).promote and champion(outputs, "asked") == "1"
    assert register(plan, outputs)["aliases"] == ["challenger", "champion"]
    assert done(outputs, "asked") == [("", "1")]


def test_who_follows_a_champion_that_was_taken_off_by_hand_is_a_persons_decision(plan, outputs):
    plan = named(plan, "vacant")
    enter(plan, outputs, 1)
    client(outputs).delete_registered_model_alias("vacant", registry.CHAMPION)
    make(plan, outputs, "another", outcomes(119))
    assert register(plan, outputs)["verdict"]["objections"] == [["vacant", ""]] and not champion(outputs, "vacant")
    assert promote(plan, outputs, approve=True).promote and champion(outputs, "vacant") == "2"
    assert done(outputs, "vacant") == [("", "1"), ("", "2")]


def test_a_move_that_a_kill_cut_short_is_settled_by_the_next(plan, outputs, monkeypatch):
    plan = named(plan, "cut")
    enter(plan, outputs, 1)
    monkeypatch.setattr(audit, "_end", lambda *args: None)  # killed before the state was written
    enter(plan, outputs, 2)
    assert champion(outputs, "cut") == "2" and audit.moves(outputs, "cut")[-1].state == "intended"
    assert "(intended)" in move_rows(read_history(outputs, "cut").moves)[-1][4]
    monkeypatch.undo()
    rollback(outputs, "models:/cut@champion", "no")
    assert done(outputs, "cut") == [("", "1"), ("1", "2"), ("2", "1")] and champion(outputs, "cut") == "1"


def test_a_rollback_that_a_kill_cut_short_is_not_done_twice(plan, outputs, monkeypatch):
    plan = named(plan, "twice")
    enter(plan, outputs, 3)
    monkeypatch.setattr(audit, "_end", lambda *args: None)  # killed after the alias had moved
    assert rollback(outputs, "models:/twice@champion", "drops it") == ("3", "2")
    monkeypatch.undo()
    (cut,) = [move for move in audit.moves(outputs, "twice") if move.state == "intended"]
    client(outputs).delete_run(cut.run_id)  # and somebody tidied up on MLflow's page
    assert rollback(outputs, "models:/twice@champion", "drops it") == ("3", "2"), "run the same again"
    assert champion(outputs, "twice") == "2" and done(outputs, "twice")[-1] == ("3", "2")
    assert rollback(outputs, "models:/twice@champion", "drops it too") == ("2", "1")


def test_an_alias_that_somebody_moved_meanwhile_is_left_alone(plan, outputs):
    plan = named(plan, "raced")
    enter(plan, outputs, 2)
    with audit.aliases_locked(outputs), pytest.raises(StageError, match="moved meanwhile"):
        audit.move_alias(outputs, "raced", registry.CHAMPION, "1", "2", verdict="promoted")
    assert audit.moves(outputs, "raced")[-1].state == "abandoned" and champion(outputs, "raced") == "2"


WORK = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.delivery.test_audit import work
work(Path({config!r}), Path({outputs!r}), {seed})
"""


def work(config: Path, outputs: Path, seed: int) -> None:
    """One process: registers, promotes and rolls back in an order of its own."""
    from prts_core.config.load import load_plan

    plan, dice = named(load_plan(config), "crowd"), random.Random(seed)
    for _ in range(4):
        try:
            what = dice.choice(["register", "promote", "rollback"])
            if what == "register":
                register(plan, outputs)
            elif what == "promote":
                promote(plan, outputs, str(dice.randint(1, 4)), approve=True)
            else:
                rollback(outputs, "models:/crowd@champion", f"seed {seed}")
        except PrtsError as err:
            assert "moved meanwhile" in str(err) or "no earlier champion" in str(err), err


def test_many_at_once_end_in_one_trail(plan, outputs):
    """Four processes, and four threads of this one."""
    mine = named(plan, "crowd")
    enter(mine, outputs, 4)
    code = [WORK.format(root=str(ROOT), config=str(plan.path), outputs=str(outputs), seed=seed) for seed in range(4)]
    processes = [subprocess.Popen([sys.executable, "-c", text]) for text in code]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: work(plan.path, outputs, seed), range(4, 8)))
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    trail = audit.moves(outputs, "crowd")
    assert [move.number for move in trail] == list(range(1, len(trail) + 1)) and len(trail) > 8
    assert {move.state for move in trail} == {"done"}
    for alias in (registry.CHAMPION, registry.CHALLENGER):
        steps = done(outputs, "crowd", alias)
        assert [before for before, _ in steps[1:]] == [after for _, after in steps[:-1]]  # each begins where one ended
        assert steps[-1][1] == audit.version_called(outputs, "crowd", alias)
    assert len(client(outputs).search_model_versions("name = 'crowd'")) == 4


def test_a_champion_from_before_the_trail_and_one_moved_by_hand_can_be_gone_back_to():
    def move(number: int, before: str, after: str) -> audit.Move:
        return audit.Move("m", "champion", before, after, "promoted", "", "", "", "", number, "done", f"r{number}")

    everybody = set("12345")
    assert audit.earlier_champion([move(1, "3", "5")], "5", everybody) == "3"
    assert audit.earlier_champion([move(1, "", "3"), move(2, "4", "5")], "5", everybody) == "4"
    trail = [move(1, "", "1"), move(2, "1", "2"), move(3, "2", "3")]
    assert audit.earlier_champion(trail, "3", {"1", "3"}) == "1", "version 2 was deleted"
    assert audit.earlier_champion(trail, "1", everybody) == ""
