"""A plan: what was typed wins, what is absent is told honestly, and its own command runs it again."""

from __future__ import annotations

import errno
import shlex
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError

from prts_core.cli.main import build_parser
from prts_core.config.load import RunPlan, load_plan, present_root
from prts_core.config.sources import LeRobotSource, RecordingSource
from prts_core.io.errors import ConfigError, Skipped, StageError, UnavailableError
from prts_core.stages import declarations

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
OPTIONAL = {"optional": True}


def plan_of(folder: Path, dataset: dict | None = None, overrides: list[str] | None = None, **recipe) -> RunPlan:
    files = {
        "datasets/a.yaml": {"name": "a", "source": {"kind": "lerobot", "root": "/nowhere"}, **(dataset or {})},
        "models/m.yaml": {"name": "m"},
        "r.yaml": {"name": "r", "datasets": ["a"], "deploy": "a", "model": "m", **recipe},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(yaml.safe_dump(content))
    return load_plan(folder / "r.yaml", overrides)


# ---- what is typed last wins ---------------------------------------------------------------------------------------
def test_set_wins_over_the_datasets_own_sft():
    typed = ["sft.train.steps=30", "sft.train.learning_rate=3.0e-3", "seed=8"]
    train = load_plan(QUICKSTART, typed).sft("g1_bottle").train
    assert (train.steps, train.learning_rate) == (30, 3e-3)
    assert (train.batch_size, train.weights.contrastive) == (16, 0.0)  # still the dataset's
    assert load_plan(QUICKSTART).sft("g1_bottle").train.steps == 20


def test_overrides_of_other_sections_leave_sft_alone():
    assert load_plan(QUICKSTART, ["pretrain.train.steps=3"]).sft("g1_bottle").train.steps == 20


# ---- a command for the very plan -----------------------------------------------------------------------------------
def test_the_defaults_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PRTS_RECIPE", raising=False)
    monkeypatch.chdir(ROOT)
    plan = load_plan(Path("configs/quickstart.yaml"))
    assert plan.command("convert", "g1_bottle", Path("outputs")) == "prts convert --dataset g1_bottle"
    assert plan.command("pretrain") == "prts pretrain"


def test_a_command_leads_back_to_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    typed = ["seed=8", "benchmark.tasks=[open it, 'close']", "sft.train.steps=30"]
    plan = plan_of(tmp_path / "with space", overrides=typed)
    words = shlex.split(plan.command("sft", "a", tmp_path / "out"))
    args = build_parser().parse_args(words[1:])
    assert load_plan(args.config, args.overrides) == plan
    assert (words[0], args.command, args.dataset, args.outputs) == ("prts", "sft", "a", tmp_path / "out")
    monkeypatch.setenv("PRTS_RECIPE", str(plan.path))
    monkeypatch.setenv("PRTS_OUTPUTS", str(tmp_path / "out"))
    assert "--config" not in plan.command("sft") and "--outputs" not in plan.command("sft", None, tmp_path / "out")
    args = build_parser().parse_args(shlex.split(plan.command("sft", "a", tmp_path / "out"))[1:])
    assert (args.config, args.outputs) == (plan.path, tmp_path / "out")


# ---- absent data ---------------------------------------------------------------------------------------------------
def test_an_absent_dataset_is_an_error_and_an_optional_one_is_skipped(tmp_path: Path):
    source = LeRobotSource(kind="lerobot", root=str(tmp_path / "nowhere"))
    with pytest.raises(UnavailableError, match="not on this machine"):
        present_root("a", source)
    with pytest.raises(Skipped, match="not on this machine"):
        present_root("a", source, optional=True)
    assert not issubclass(Skipped, UnavailableError) and not issubclass(UnavailableError, Skipped)


def test_the_path_as_expanded_and_as_written_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIBERO_ROOT", str(tmp_path / "nope"))
    with pytest.raises(UnavailableError) as caught:
        present_root("a", LeRobotSource(kind="lerobot", root="${LIBERO_ROOT}/x"))
    said = str(caught.value)
    assert str(tmp_path / "nope" / "x") in said and "${LIBERO_ROOT}/x" in said
    assert "`export LIBERO_ROOT=/path/to/the/folder`" in said


def test_an_unset_variable_is_absent_data_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LIBERO_ROOT", raising=False)
    source = RecordingSource(kind="robomimic", root="${LIBERO_ROOT}", mapping="libero")
    with pytest.raises(UnavailableError, match=r"\$LIBERO_ROOT is not set.*`export LIBERO_ROOT=/path/to/the/folder`"):
        present_root("a", source)
    with pytest.raises(Skipped):
        present_root("a", source, optional=True)


def test_a_file_is_no_lerobot_folder_but_may_be_a_recording(tmp_path: Path):
    (tmp_path / "x.hdf5").write_text("")
    root = str(tmp_path / "x.hdf5")
    with pytest.raises(UnavailableError, match="Found: a file"):
        present_root("a", LeRobotSource(kind="lerobot", root=root))
    assert present_root("a", RecordingSource(kind="robomimic", root=root, mapping="m")) == Path(root)


@pytest.mark.parametrize("optional", [False, True])
def test_what_the_hub_refuses_is_an_error_never_a_skip(optional: bool, monkeypatch: pytest.MonkeyPatch):
    source = LeRobotSource(kind="lerobot", repo_id="lab/x", revision="v2.1")
    asked: list[tuple] = []
    faults = {
        "no network": LocalEntryNotFoundError("no network"),
        "the disk is full": OSError(errno.ENOSPC, "No space left", "/cache/blob"),
        "reset": ConnectionError("reset"),
    }
    for said in faults:

        def download(repo_id, revision, repo_type, local_files_only, said=said):
            asked.append((repo_id, revision, repo_type))
            raise LocalEntryNotFoundError("not here") if local_files_only else faults[said]

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(StageError, match=said) as caught:
            present_root("a", source, optional=optional)
        assert caught.value.field == "repo_id" and caught.value.cure
    assert set(asked) == {("lab/x", "v2.1", "dataset")}


def test_the_g1_recording_is_optional_and_nothing_else_is():
    assert [name for name, d in load_plan(QUICKSTART).datasets.items() if d.optional] == ["g1_bottle"]


# ---- every file that a recipe names --------------------------------------------------------------------------------
def test_a_robot_without_a_file_says_what_to_do(tmp_path: Path):
    plan = plan_of(tmp_path, {"embodiment_tag": "my_g1"})
    with pytest.raises(ConfigError, match=r"robots/my_g1\.yaml.*leave `embodiment_tag` out"):
        plan.read_all()


@pytest.mark.parametrize(
    ("dataset", "recipe", "said"),
    [
        ({"sft": {"train": {"steps": 0}}}, {}, "steps: 0"),
        ({}, {"model": "n"}, r"models/n\.yaml"),
        ({}, {"datasets": ["b"]}, r"datasets/b\.yaml"),
        ({}, {"pretrain": {"mixture": {"b": 1.0}}}, "'b'"),
    ],
)
def test_read_all_finds_faults_beyond_the_recipe(tmp_path: Path, dataset: dict, recipe: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        plan_of(tmp_path, dataset, **recipe).read_all()


# ---- training defaults of a model --------------------------------------------------------------------------------
def large_model(folder: Path, train: str) -> Path:
    (folder / "models").mkdir()
    sizes = "{hidden_size: 2560, num_layers: 36, num_heads: 32, num_kv_heads: 8, head_dim: 128, intermediate_size: 9728"
    text = sizes + ", mrope_section: [24, 20, 20]}"
    (folder / "models/large.yaml").write_text(f"name: large\ntext: {text}\n{train}")
    recipe = folder / "r.yaml"
    recipe.write_text("name: r\ndatasets: [d]\ndeploy: d\nmodel: large\nsft:\n  train: {steps: 7, clip_norm: 0.5}\n")
    return recipe


def test_a_recipe_takes_what_it_does_not_say_from_its_model(tmp_path):
    recipe = large_model(tmp_path, "train: {learning_rate: 1.0e-5, clip_norm: 2.0, precision: bf16}\n")
    train = load_plan(recipe, ["sft.train.precision=fp32"]).recipe.sft.train
    assert (train.learning_rate, train.clip_norm, train.steps, train.precision) == (1e-5, 0.5, 7, "fp32")
    assert load_plan(recipe).recipe.pretrain.train.learning_rate == 1e-5


def test_a_large_model_without_a_rate_is_refused_and_the_cure_works(tmp_path):
    recipe = large_model(tmp_path, "")
    (tmp_path / "datasets").mkdir()
    dataset = tmp_path / "datasets/d.yaml"
    dataset.write_text('name: d\nsource: {kind: lerobot, root: "/d"}\n')
    for text, cure in (
        (recipe.read_text(), ["sft.train.learning_rate=1.0e-5"]),
        ("name: r\ndatasets: [d]\ndeploy: d\nmodel: large\n", ["sft.train.learning_rate=1.0e-5"]),  # no word of sft
    ):
        recipe.write_text(text)
        with pytest.raises(ConfigError, match="how fast it learns") as caught:
            load_plan(recipe).sft("d")
        assert caught.value.field == "sft.train.learning_rate"
        assert load_plan(recipe, cure).sft("d").train.learning_rate == 1e-5
    with pytest.raises(ConfigError, match=r"pretrain\.train\.learning_rate"):
        declarations.STAGES["pretrain"].config(load_plan(recipe), None)
    dataset.write_text(dataset.read_text() + "sft: {train: {learning_rate: 2.0e-5}}\n")
    assert load_plan(recipe).sft("d").train.learning_rate == 2e-5, "a dataset's own"


def test_a_fault_in_a_models_defaults_names_its_file(tmp_path):
    with pytest.raises(ConfigError, match="learning_rat") as caught:
        load_plan(large_model(tmp_path, "train: {learning_rat: 1.0e-5}\n"))
    assert caught.value.file == str(tmp_path / "models/large.yaml")


# ---- reinforcement learning and whose policy goes on --------------------------------------------------------------
PRESETS = {
    "quick": {"iterations": 3, "algorithm": {"name": "grpo", "group_size": 4}},
    "long": {"iterations": 500},
    "odd": {"algorithm": {"gama": 0.5}},
    "uneven": {"episodes": 6, "algorithm": {"group_size": 4}},
}


def rl_of(tmp_path: Path, overrides: list[str] | None = None, **section):
    return plan_of(tmp_path, overrides=overrides, rl={"iterations": 50, "presets": PRESETS, **section}).rl


def test_a_preset_is_laid_over_the_section_and_what_is_typed_over_both(tmp_path: Path):
    plain = rl_of(tmp_path)
    assert (plain.iterations, plain.preset, plain.presets) == (50, None, {})
    quick = rl_of(tmp_path, preset="quick", algorithm={"gamma": 0.9})
    assert (quick.iterations, quick.algorithm.group_size, quick.algorithm.gamma) == (3, 4, 0.9)
    assert (quick.preset, quick.presets) == (None, {})
    typed = rl_of(tmp_path, ["rl.iterations=9", "rl.preset=quick"], preset="long")
    assert (typed.iterations, typed.algorithm.name) == (9, "grpo")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"preset": "quik"}, "Unknown preset of rl 'quik'.*did you mean 'quick'"),
        ({"preset": "odd"}, r"rl\.presets\.odd.*algorithm\.gama: unknown key.*'gamma'"),
        ({"preset": "uneven"}, r"rl\.presets\.uneven.*groups of algorithm\.group_size 4"),
        ({"start": "pretrain"}, r"rl\.start"),
        ({"learner": {"epochs": 0}}, "epochs: 0"),
    ],
)
def test_faults_of_the_rl_section_are_told_before_any_work(tmp_path: Path, section: dict, said: str):
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        plan_of(tmp_path, rl={"presets": PRESETS, **section}).read_all()


def test_only_a_stage_that_makes_a_policy_can_be_the_recipes(tmp_path: Path):
    assert plan_of(tmp_path).recipe.policy == "sft"
    with pytest.raises(ConfigError, match=r"policy.*'pretrain'"):
        plan_of(tmp_path, policy="pretrain")


def test_a_policy_of_stage_rl_is_benchmarked_on_states_that_it_has_not_met(tmp_path: Path):
    def skipped(rl: dict, benchmark: dict | None = None) -> int | None:
        return plan_of(tmp_path, policy="rl", rl=rl, benchmark=benchmark or {}).benchmark.skip_states

    assert skipped({"eval_episodes": 50}) == 50  # drawn: evaluations meet the first
    assert skipped({"train_states": [0, 20], "eval_episodes": 10}) == 30
    assert skipped({"train_states": [10, 20], "eval_episodes": 15}) == 25
    assert skipped({"train_states": [20, 30], "eval_episodes": 15}) == 30
    assert skipped({"shared_states": True}) is None
    assert skipped({"eval_episodes": 5}, {"skip_states": 9}) == 9
    with pytest.raises(ConfigError, match=r"skip_states.*Cure: benchmark: {skip_states: 5}, or leave it out"):
        skipped({"eval_episodes": 5}, {"skip_states": 4})
    assert plan_of(tmp_path).benchmark.skip_states is None
