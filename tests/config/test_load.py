"""The border where YAML comes in: what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from prts_core.config.checked_yaml import check, expand, merge, parse_overrides, read_yaml
from prts_core.config.load import load_plan, source_root
from prts_core.config.schema import BenchmarkSection, DatasetConfig, Recipe
from prts_core.config.sources import LeRobotSource
from prts_core.io.errors import ConfigError
from prts_core.io.files import digest_value
from prts_core.stages.declarations import STAGES, config_json

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_committed_recipes_load_with_every_file_they_name(path: Path):
    plan = load_plan(path)
    assert plan.recipe.name == path.stem  # dvc.yaml finds the recipe by its name
    assert set(plan.mixture) <= set(plan.datasets)
    assert plan.model.chunk_length > 0
    for name in plan.datasets:
        plan.robot(name)
        assert plan.sft(name).train.steps > 0


def test_unknown_key_is_refused_with_a_suggestion(tmp_path: Path):
    path = written(tmp_path, "name: x\ndatasets: [a]\ndeploy: a\nmodel: m\nbenchmark: {epsiodes: 3}\n")
    with pytest.raises(ConfigError) as caught:
        load_plan(path)
    said = str(caught.value)
    assert str(path) in said
    assert "benchmark.epsiodes" in said
    assert "did you mean 'episodes'?" in said


def test_every_fault_of_a_file_is_told_at_once(tmp_path: Path):
    path = written(tmp_path, "name: x\ndatasets: [a]\ndeploy: a\nmodle: m\nseed: seven\n")
    with pytest.raises(ConfigError) as caught:
        load_plan(path)
    said = str(caught.value)
    assert "modle: unknown key; did you mean 'model'?" in said
    assert "seed" in said
    assert "'seven'" in said
    assert caught.value.cure


def test_a_key_written_twice_is_refused(tmp_path: Path):
    path = written(tmp_path, "name: x\nseed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="'seed' stands twice"):
        read_yaml(path)


def test_a_nested_key_written_twice_is_refused(tmp_path: Path):
    path = written(tmp_path, "sft:\n  train:\n    steps: 1\n    steps: 2\n")
    with pytest.raises(ConfigError, match="line 4"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_what_is_no_plain_mapping_is_refused(tmp_path: Path, text: str, said: str):
    with pytest.raises(ConfigError, match=said):
        read_yaml(written(tmp_path, text))


def test_missing_file_names_its_neighbours(tmp_path: Path):
    written(tmp_path, "a: 1\n", "quickstart.yaml")
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        read_yaml(tmp_path / "quikstart.yaml")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00name: x")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(path)


def test_overrides_reach_the_recipe():
    plan = load_plan(
        ROOT / "configs" / "quickstart.yaml", ["sft.train.steps=3", "seed=11", "benchmark.action_noise=[0.1]"]
    )
    assert plan.recipe.sft.train.steps == 3
    assert plan.recipe.seed == 11
    assert plan.recipe.benchmark.action_noise == (0.1,)
    assert plan.recipe.sft.train.weights.flow == 1.0  # neighbours stay


def test_overrides_of_one_branch_are_merged():
    assert parse_overrides(["a.b=1", "a.c=x", "d={e: 2}"]) == {"a": {"b": 1, "c": "x"}, "d": {"e": 2}}
    assert merge({"a": {"b": 1}}, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize("pair", ["seed", "=3"])
def test_override_without_key_or_value_is_refused(pair: str):
    with pytest.raises(ConfigError, match="key=value"):
        parse_overrides([pair])


def test_unknown_override_is_refused_like_any_key():
    with pytest.raises(ConfigError, match=r"sft\.train\.step: unknown key; did you mean 'steps'"):
        load_plan(ROOT / "configs" / "quickstart.yaml", ["sft.train.step=3"])


def test_deploying_an_unknown_dataset_is_refused(tmp_path: Path):
    written(tmp_path, "name: bottle\nsource: {kind: lerobot, root: /x}\n", "datasets/bottle.yaml")
    recipe = written(tmp_path, "name: r\ndatasets: [bottle]\ndeploy: botle\nmodel: tiny\n")
    with pytest.raises(ConfigError, match="did you mean 'bottle'"):
        _ = load_plan(recipe).datasets


def test_a_mixture_of_sft_is_the_deployed_datasets(tmp_path: Path):
    for name in ("a", "b"):
        written(tmp_path, f"name: {name}\nsource: {{kind: lerobot, root: /x}}\n", f"datasets/{name}.yaml")
    recipe = written(tmp_path, "name: r\ndatasets: [a, b]\ndeploy: a\nmodel: m\nsft: {mixture: {a: 2.0, b: 1.0}}\n")
    plan = load_plan(recipe)
    assert plan.sft("a").mixture == {"a": 2.0, "b": 1.0} and plan.sft("b").mixture == {}
    roles = [parent.role for parent in STAGES["sft"].parents(plan, "a")]
    assert {"convert:a", "stats:a", "convert:b", "stats:b", "pretrain"} <= set(roles)
    with pytest.raises(ConfigError, match=r"sft\.mixture.*a among them"):
        load_plan(written(tmp_path, recipe.read_text().replace("a: 2.0, ", ""), "other.yaml")).sft("a")
    with pytest.raises(ConfigError, match="dataset of the mixture"):
        load_plan(recipe, ["sft.mixture.c=1.0"]).sft("a")


def test_a_datasets_own_changes_lie_over_the_recipes_sft(tmp_path: Path):
    written(tmp_path, "name: a\nsource: {kind: lerobot, root: /x}\nsft: {train: {steps: 5}}\n", "datasets/a.yaml")
    recipe = written(tmp_path, "name: r\ndatasets: [a]\ndeploy: a\nmodel: m\nsft: {train: {steps: 9, batch_size: 3}}\n")
    train = load_plan(recipe).sft("a").train
    assert (train.steps, train.batch_size) == (5, 3)


def test_environment_variables_are_expanded_or_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_DATA", "/somewhere")
    monkeypatch.delenv("PRTS_SHARED", raising=False)
    assert expand("${MY_DATA}/x", "here") == "/somewhere/x"
    assert source_root(LeRobotSource(kind="lerobot", root="${PRTS_SHARED}/d")) == ROOT.parent / "shared" / "d"
    with pytest.raises(ConfigError, match="NOT_SET_ANYWHERE"):
        expand("${NOT_SET_ANYWHERE}", "here")


def test_no_machine_path_enters_a_configuration_digest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    plan = load_plan(Path("configs/quickstart.yaml"))
    before = digest_value(config_json("collect", plan, "g1_bottle"))
    monkeypatch.setenv("PRTS_SHARED", "/elsewhere")
    assert digest_value(config_json("collect", load_plan(Path("configs/quickstart.yaml")), "g1_bottle")) == before


def test_check_lists_the_allowed_fields():
    with pytest.raises(ConfigError) as caught:
        check(BenchmarkSection, {"episode": 1}, "here")
    assert "execute_steps" in str(caught.value)
    assert check(Recipe, {"name": "x", "datasets": ["a"], "deploy": "a", "model": "m"}, "here").seed == 7
    with pytest.raises(ConfigError, match="root"):
        check(DatasetConfig, {"name": "x", "source": {"kind": "lerobot"}}, "here")
