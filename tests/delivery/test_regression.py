"""Suites over registered versions, against a real MLflow store: recorded, compared, blocking a promotion, drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from prts_core.cli.main import main as prts
from prts_core.config.checked_yaml import check
from prts_core.config.load import RunPlan, load_plan
from prts_core.config.schema import RegressionSection, SuiteRun
from prts_core.contract import PolicyContract
from prts_core.delivery import gate, protocol, registry, regression
from prts_core.delivery.gate import Verdict, policy_episodes
from prts_core.delivery.history import read_history, rows
from prts_core.delivery.regression import RegressionOutcome, due, regress
from prts_core.delivery.suite_results import result_of, results_of, write_result
from prts_core.io.errors import ConfigError, PrtsError, UnavailableError
from prts_core.io.files import read_json, write_json
from prts_core.rollout.benchmark import measured
from prts_core.rollout.episode_plan import EpisodePlan, make_plan
from prts_core.tracking.store import client
from tests.fixtures.tiny_policy import write_policy
from tests.fixtures.toy_package import CONTRACT, PROTOCOL, make, named, outcomes, register, toy_report, write_package

pytest.importorskip("mlflow")
ROOT = Path(__file__).resolve().parents[2]
STATES = 100
SUITE = "metaworld"
STANDINS = "two textures are stand-ins"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs")


def plan_for(name: str) -> RunPlan:
    plan = named(load_plan(ROOT / "configs" / "quickstart.yaml"), name)
    suites = RegressionSection((SuiteRun(SUITE, episodes=6 * STATES),))
    return replace(plan, recipe=replace(plan.recipe, regression=suites))


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch):
    """Stands in for the simulator alone: `rates[weights]` of the episodes succeed. Returns rates and the calls."""
    rates: dict[str, float] = {}
    calls: list[Path] = []

    real = protocol.planned
    own = SimpleNamespace(protocol_digest=PROTOCOL, keys=range(90_000, 90_120))
    monkeypatch.setattr(protocol, "planned", lambda *asked: real(*asked) if asked[1] == SUITE else own)

    def measure(plan, name, package, outputs, folder, say, dtype="auto"):
        calls.append(folder)
        if name != SUITE:
            folder.mkdir(parents=True, exist_ok=True)
            outcomes(int(rates[name]), first_seed=own.keys[0]).write_parquet(folder / "episodes.parquet")
            return result_of(toy_report(own.protocol_digest), policy_episodes(folder / "episodes.parquet"))
        episodes: EpisodePlan = protocol.planned(plan, name, CONTRACT.chunk_length)
        won = rates[(package / "model.safetensors").read_text()]
        frame = pl.DataFrame(
            [
                {
                    "condition": "policy",
                    "task": key.task,
                    "initial_state": key.initial_state,
                    "seed": key.seed,
                    "success": i < won * len(episodes.keys),
                }
                for i, key in enumerate(episodes.keys)
            ]
        )
        folder.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(folder / "episodes.parquet")
        report = {
            "suite": SUITE,
            "successes": int(frame["success"].sum()),
            "n": frame.height,
            "labels": [STANDINS],
            "protocol_digest": episodes.protocol_digest,
            "tasks": {},
            "protocol": episodes.protocol,
        }
        write_json(folder / "report.json", report)
        return result_of(report, policy_episodes(folder / "episodes.parquet"))

    monkeypatch.setattr(regression, "measure_version", measure)
    return rates, calls, own


def enter(plan: RunPlan, outputs: Path, weights: str, won: int) -> dict:
    """Register one more version whose own benchmark had `won` successes of 120."""
    make(plan, outputs, weights, outcomes(won))
    register(plan, outputs)
    return read_json(outputs / "registrations" / f"{plan.recipe.name}.json")


def holders(outputs: Path, model: str) -> tuple[str | None, str]:
    found = [registry.version_of_alias(client(outputs), model, a) for a in ("champion", "challenger")]
    return None if found[0] is None else str(found[0].version), str(found[1].version)


def night(
    plan: RunPlan, outputs: Path, version: str, attempt: str = "2026-11-21", name: str = SUITE
) -> RegressionOutcome:
    return regress(plan, name, version, outputs, attempt=attempt)


def test_a_drop_on_a_suite_blocks_the_promotion_that_the_own_benchmark_earned(outputs, simulator, tmp_path, capsys):
    rates, calls, _ = simulator
    plan = plan_for("suited")
    model = plan.recipe.register.model_name

    told = enter(plan, outputs, "w1", 118)
    assert told["aliases"] == ["challenger"] and told["verdict"]["objections"] == [["unmeasured", SUITE]]
    assert "no result on metaworld yet" in told["verdict"]["reason"] and holders(outputs, model) == (None, "1")
    assert due(plan, outputs) == [(SUITE, "1")]

    rates["w1"] = 0.9
    first = night(plan, outputs, "1")
    assert not first.alarm and first.verdict is None and holders(outputs, model) == ("1", "1")
    assert first.decision.promote and "above the floor" in first.decision.said()

    # As good on its own benchmark, much worse on the suite.
    told = enter(plan, outputs, "w2", 119)
    assert told["aliases"] == ["challenger"] and due(plan, outputs)[-1] == (SUITE, "2")
    rates["w2"] = 0.8
    worse = night(plan, outputs, "2")
    assert worse.alarm and worse.verdict is not None and worse.verdict.n_pairs == 6 * STATES
    assert holders(outputs, model) == ("1", "2")
    assert [(one.why, one.subject) for one in worse.decision.objections] == [("alarm", SUITE), ("margin", SUITE)]
    version = registry.resolve_version(client(outputs), f"models:/{model}/2")
    assert results_of(version)[SUITE].alarm and results_of(version)[SUITE].standins == STANDINS

    # The next one is no worse: promoted, and nothing is measured twice.
    enter(plan, outputs, "w3", 118)
    rates["w3"] = 0.91
    better = night(plan, outputs, "3")
    assert better.decision.promote and holders(outputs, model) == ("3", "3")
    ran = len(calls)
    assert night(plan, outputs, "2").alarm and len(calls) == ran

    client(outputs).delete_model_version_tag(model, "2", "prts.suite.benchmark")  # a version of before there were any
    rates["benchmark"] = 117
    own = night(plan, outputs, "2", name="benchmark")
    assert own.result.successes == 117 and not own.again and own.verdict is not None and len(calls) == ran + 1

    run = client(outputs).get_run(results_of(version)[SUITE].run_id)
    assert run.data.metrics[f"success_rate/{SUITE}"] == pytest.approx(0.8) and run.data.metrics["alarm"] == 1.0
    assert run.data.tags["prts.standins"] == STANDINS
    kept = {item.path for item in client(outputs).list_artifacts(run.info.run_id)}
    assert kept == {"episodes.parquet", "report.json", "history.png"}
    table = rows(read_history(outputs, model))
    assert [row[1] for row in table if row[0] == SUITE] == ["1", "2", "3 @challenger @champion"]
    assert [row[3] for row in table if row[0] == SUITE] == ["", "regressed", ""]
    assert prts(["history", f"models:/{model}", "--outputs", str(outputs), "--picture", str(tmp_path / "h.png")]) == 0
    printed = capsys.readouterr().out
    assert "480/600 (stand-in assets)" in printed and printed.count("regressed") == 1
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_the_champion_is_held_against_its_own_record(outputs, simulator):
    rates, calls, _ = simulator
    plan = plan_for("kept")
    enter(plan, outputs, "k1", 118)
    rates["k1"] = 0.9
    night(plan, outputs, "1", "monday")
    same = night(plan, outputs, "1", "tuesday")
    assert same.again and not same.alarm and same.verdict is not None and same.verdict.lower < 0 < same.verdict.upper
    rates["k1"] = 0.8  # the code has changed, the policy has not
    fallen = night(plan, outputs, "1", "wednesday")
    assert fallen.alarm and [folder.name.partition("-")[0] for folder in calls[1:]] == ["tuesday", "wednesday"]
    version = registry.resolve_version(client(outputs), "models:/kept/1")
    assert results_of(version)[SUITE].successes == 540  # the record stays
    again = json.loads(version.tags[f"prts.again.{SUITE}"])
    assert again["successes"] == 480 and again["alarm"] and again["attempt"] == "wednesday"
    assert holders(outputs, "kept") == ("1", "1")


def test_a_changed_benchmark_freezes_promotion_only_until_the_champion_is_measured_again(outputs, simulator, capsys):
    """Through the commands that the refusals name."""
    rates, calls, own = simulator
    plan = named(load_plan(ROOT / "configs" / "quickstart.yaml"), "thawed")
    where = ["--outputs", str(outputs), "--set", "name=thawed", "--set", "register.model_name=thawed"]
    enter(plan, outputs, "w1", 118)
    own.protocol_digest, own.keys = "sha256:longer", range(5, 125)
    make(plan, outputs, "w2", outcomes(119, first_seed=5), protocol=own.protocol_digest)
    assert register(plan, outputs)["verdict"]["objections"] == [["protocol", "benchmark"]]
    assert prts(["promote", *where]) == 5 and "prts regress --champion" in capsys.readouterr().out
    rates["benchmark"] = 118
    assert prts(["regress", "--champion", *where]) == 0 and len(calls) == 1
    assert holders(outputs, "thawed") == ("2", "2")
    assert prts(["promote", *where]) == 0 and "version 2 is champion" in capsys.readouterr().out
    assert prts(["regress", *where]) == 0 and "a result on every suite" in capsys.readouterr().out and len(calls) == 1
    rates["benchmark"] = 60
    assert prts(["regress", "--champion", *where]) == 4 and len(calls) == 2


def test_a_first_champion_is_one_under_the_present_protocol_and_the_night_measures_the_challenger_by_it(
    outputs, simulator, capsys
):
    rates, calls, own = simulator
    plan = named(load_plan(ROOT / "configs" / "quickstart.yaml"), "first")
    where = ["--outputs", str(outputs), "--set", "name=first", "--set", "register.model_name=first"]
    own.protocol_digest, own.keys = "sha256:longer", range(5, 125)  # after the benchmark had run
    make(plan, outputs, "w1", outcomes(118))
    assert register(plan, outputs)["verdict"]["objections"] == [["outdated", "benchmark"]]
    assert prts(["promote", *where]) == 5 and "`prts regress`" in capsys.readouterr().out
    assert due(plan, outputs) == [("benchmark", "1")] and holders(outputs, "first") == (None, "1")
    rates["benchmark"] = 118
    assert prts(["regress", *where]) == 0 and len(calls) == 1 and holders(outputs, "first") == ("1", "1")

    own.protocol_digest = "sha256:longer still"
    make(plan, outputs, "w2", outcomes(60, first_seed=5), protocol="sha256:longer")
    register(plan, outputs)
    assert due(plan, outputs) == [("benchmark", "1"), ("benchmark", "2")], "both by the present protocol"


def test_a_protocol_that_cannot_be_told_here_is_due_and_costs_nobody_the_night(outputs, simulator, monkeypatch):
    """A simulator that is not installed, or a recipe that does not fit the challenger's chunks."""
    plan = named(load_plan(ROOT / "configs" / "quickstart.yaml"), "untold")
    enter(plan, outputs, "w1", 118)
    enter(plan, outputs, "w2", 60)

    def planned(*asked):
        raise UnavailableError("The simulator is not installed", cure="prts sim install metaworld")

    monkeypatch.setattr(protocol, "planned", planned)
    assert due(plan, outputs) == [("benchmark", "1"), ("benchmark", "2")]
    first = named(plan, "untold-first")
    assert enter(first, outputs, "w3", 118)["verdict"]["objections"] == [["unknown", "benchmark"]]
    monkeypatch.undo()  # the cure: where the simulator is
    register(first, outputs)
    assert holders(outputs, "untold-first") == ("1", "1")


def test_a_suite_is_measured_in_the_precision_of_the_champions_result_whatever_the_machine_takes(
    outputs, simulator, monkeypatch
):
    """A champion measured on a GPU is compared, on a CPU too, and stays the baseline; `dtype` in the recipe decides."""
    rates, _, _ = simulator
    rates["benchmark"], asked = 60, []
    plan = named(load_plan(ROOT / "configs" / "quickstart.yaml"), "half")
    enter(plan, outputs, "w1", 118)
    version = registry.resolve_version(client(outputs), "models:/half/1")
    known = results_of(version)["benchmark"]
    write_result(outputs, version, "benchmark", replace(known, dtype="bf16"))
    stood_in = regression.measure_version

    def measure(*given):
        asked.append(given[-1])
        return replace(stood_in(*given), dtype=given[-1])

    monkeypatch.setattr(regression, "measure_version", measure)
    outcome = night(plan, outputs, "1", name="benchmark")
    assert asked == ["bf16"] and isinstance(outcome.comparison, Verdict) and outcome.comparison.alarm
    make(plan, outputs, "w2", outcomes(118))
    assert register(plan, outputs)["verdict"]["objections"] == [["precision", "benchmark"]]
    second = registry.resolve_version(client(outputs), "models:/half/2")
    assert protocol.lacking(plan, outputs, second) == ["benchmark"]
    full = named(load_plan(ROOT / "configs" / "quickstart.yaml", ["benchmark.dtype=fp32"]), "half")
    assert protocol.lacking(full, outputs, second) == []
    rates["benchmark"] = 118
    night(plan, outputs, "2", name="benchmark")
    assert asked == ["bf16", "bf16"] and holders(outputs, "half") == ("2", "2"), "the cure"


def test_a_suite_must_be_one_of_the_recipe(outputs):
    with pytest.raises(PrtsError, match="did you mean 'metaworld'"):
        night(plan_for("kept"), outputs, "1", name="metawrld")


def test_every_setting_that_can_move_a_rate_of_the_own_benchmark_is_in_its_protocol(tmp_path):
    plan = plan_for("settings")
    base, source = plan.benchmark, plan.benchmark.source
    (name, sentence, _), *rest = source.settings["tasks"]
    settings_of = [{"tasks": [[name, sentence, 200], *rest]}, {"start_jitter": 0}, {"action_repeat": 1}]
    others = [
        base,
        *(replace(base, source=replace(source, settings=source.settings | change)) for change in settings_of),
        replace(base, image_size=128),
        replace(base, execute_steps=1),
        replace(base, seed=5),
        replace(base, tasks=("faucet-open",)),
        replace(base, perturbation={"light": {"level": 2}}),
    ]
    write_package(tmp_path, "w")
    digests = []
    for config in others:
        of = SimpleNamespace(recipe=plan.recipe, benchmark=config)
        digests.append(protocol.planned(of, "benchmark", CONTRACT.chunk_length).protocol_digest)
    assert len(set(digests)) == len(others)
    spec, settings, _ = measured(base)
    standins = make_plan(replace(spec, standins="two meshes"), CONTRACT.chunk_length, settings)
    assert standins.protocol_digest not in digests
    workers = SimpleNamespace(recipe=plan.recipe, benchmark=replace(base, workers=1, batch=1, controls=()))
    assert protocol.planned(workers, "benchmark", CONTRACT.chunk_length).protocol_digest == digests[0]


def test_recipes_name_each_result_once():
    for bad in ([{"suite": "a"}, {"suite": "a"}], [{"suite": "benchmark"}], [{"suite": "a", "name": "a b"}]):
        with pytest.raises(ConfigError):
            check(RegressionSection, {"suites": bad}, "a recipe")
    assert check(RegressionSection, {"suites": [{"suite": "a"}, {"suite": "a", "name": "dark"}]}, "").suites[1].label


@pytest.mark.slow
def test_a_suite_is_measured_with_the_runner_itself(tmp_path, tiny):
    """The part that the other tests stand in for: a packaged policy, real workers, the runner's own report."""
    pytest.importorskip("metaworld")
    policy = write_policy(tmp_path / "policy", tiny)
    run = SuiteRun(SUITE, episodes=2, tasks=("faucet-open", "faucet-close"), workers=1)
    plan = plan_for("real")
    plan = replace(plan, recipe=replace(plan.recipe, regression=RegressionSection((run,))))
    result = regression.measure_version(plan, SUITE, policy, tmp_path, tmp_path / "run", lambda text: None)
    planned = protocol.planned(plan, SUITE, PolicyContract.load(policy / "policy_contract.json").chunk_length)
    assert (result.n, result.protocol_digest, result.standins) == (2, planned.protocol_digest, "")
    episodes = gate.policy_episodes(tmp_path / "run" / "episodes.parquet")
    assert sorted(episodes["task"]) == ["faucet-close", "faucet-open"]
    assert episodes["success"].sum() == result.successes
    assert regression.report_of(tmp_path / "run")["published"] == {}  # nobody has published on this protocol
