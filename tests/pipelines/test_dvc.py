"""DVC over any recipe, and Dagster beside it: whichever ran first, the other executes nothing."""

from __future__ import annotations

import csv
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml

from assets.dvc import DvcResource
from prts_core.config.identity import identity
from prts_core.config.load import RunPlan, load_plan
from prts_core.io.errors import ConfigError, PrtsError, StageError
from prts_core.io.files import read_json
from prts_core.stages import chain, declarations
from prts_core.stages.dvc_file import DvcFile, stage_name
from prts_core.stages.versions import VERSIONS
from prts_core.store.views import viewed
from tests.pipelines.conftest import ROOT, Project

RECIPE = "configs/quickstart.yaml"
G1 = ["collect g1_bottle", "convert g1_bottle", "validate g1_bottle", "stats g1_bottle", "sft g1_bottle"]
_snapshot: list[Path] = []


def plan_of(recipe: str = RECIPE) -> RunPlan:
    return load_plan(Path(recipe))


def edit(path: str, change: Callable[[dict], object]) -> None:
    """Change a YAML file in place."""
    plain = yaml.safe_load(Path(path).read_text())
    change(plain)
    Path(path).write_text(yaml.safe_dump(plain, sort_keys=False))


def versions(plan: RunPlan, outputs: Path) -> dict[str, str]:
    """Data version of every view of a recipe."""
    found = {}
    for stage, partition in declarations.steps(plan):
        manifest = viewed(outputs, plan.recipe.name, stage, partition)
        assert manifest is not None
        found[f"{stage} {partition}"] = manifest.digest
    return found


def ran(said: str) -> list[str]:
    """The stages that `dvc repro` ran."""
    return [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]


def commit_all() -> None:
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "all"], check=True)


def pushed_and_cloned(made: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Another checkout after a push to DVC's remote; from now on the current folder."""
    made.run("dvc", "push")
    commit_all()
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(made.folder), str(clone)], check=True)
    monkeypatch.chdir(clone)
    return Project(clone, made.calls_file)


@pytest.fixture
def made(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that has made the quickstart, known to DVC: run once, then copied with its hard links."""
    if not _snapshot:
        commit_all()
        for stage, partition in declarations.steps(plan_of()):
            chain.run(stage, plan_of(), partition, project.outputs)
        assert len(project.calls()) == 15
        project.run("dvc", "commit", "-f")
        place = tmp_path_factory.mktemp("snapshot") / "project"
        subprocess.run(["cp", "-a", str(project.folder), str(place)], check=True)
        _snapshot.append(place)
    else:
        subprocess.run(["cp", "-a", f"{_snapshot[0]}/.", str(project.folder)], check=True)
    return project


# ---- with Dagster ------------------------------------------------------------------------------------------------
def test_dvc_repro_after_a_dagster_run_executes_nothing(project, run_job):
    assert run_job("chain", "metaworld").success
    assert run_job("import_dataset", "g1_bottle").success
    assert len(project.calls()) == 16
    assert project.run("dvc", "status").stdout.split() == ["collect-g1_bottle:", "always", "changed"]
    said = project.run("dvc", "repro").stdout
    assert ran(said) == ["collect-g1_bottle"]  # it looks whether the source is what it was
    assert said.count("didn't change, skipping") == 14
    assert project.calls() == []


def test_a_dagster_run_after_dvc_repro_runs_nothing_and_has_the_same_versions(project, run_job):
    project.run("dvc", "repro")
    assert len(project.calls()) == 15
    before, lock = versions(plan_of(), project.outputs), Path("dvc.lock").read_text()
    results = run_job("chain", "metaworld"), run_job("import_dataset", "g1_bottle")
    assert all(result.success for result in results)
    assert project.calls() == ["register -"]
    events = [event for result in results for event in result.get_asset_materialization_events()]
    assert {
        f"{e.asset_key.path[-1]} {e.partition}": e.materialization.tags["dagster/data_version"]
        for e in events
        if e.asset_key.path[-1] in declarations.STAGES
    } == before
    assert Path("dvc.lock").read_text() == lock


def test_dvc_repro_after_dagster_skipped_a_dataset_executes_nothing(made, run_job, monkeypatch):
    """Also of the stages that Dagster passes over, and with the very notes that `dvc repro` leaves."""
    monkeypatch.setenv("PRTS_SHARED", str(made.folder / "nowhere"))
    assert run_job("import_dataset", "g1_bottle").success
    assert ran(made.run("dvc", "repro", "sft-g1_bottle").stdout) == ["collect-g1_bottle"]
    monkeypatch.setenv("PRTS_SHARED", str(made.folder.parent / "shared"))
    assert run_job("import_dataset", "g1_bottle").success
    assert ran(made.run("dvc", "repro", "sft-g1_bottle").stdout) == ["collect-g1_bottle"]
    assert made.calls() == []  # the results were in the store all the time


# ---- what runs, and what does not -----------------------------------------------------------------------------------
def test_a_change_runs_what_follows_from_it(made):
    edit(RECIPE, lambda recipe: recipe["sft"]["train"].update(steps=5))
    made.run("dvc", "repro", "package")
    assert made.calls() == ["sft metaworld", "benchmark -", "value -", "package -"]
    edit(RECIPE, lambda recipe: recipe["sft"]["train"].update(log_every=3, threads=2))
    made.run("dvc", "repro", "package")
    assert made.calls() == []  # that changes no result


def test_a_raised_behaviour_version_runs_the_stage_again(made):
    file = Path("prts_core/stages/versions.py")
    file.write_text(file.read_text().replace(f'"value": {VERSIONS["value"]}', '"value": 99'))
    made.run("dvc", "repro", "package")
    assert made.calls() == ["value -", "package -"]


def test_a_changed_source_is_seen_without_a_change_of_any_file_of_ours(made):
    (made.folder.parent / "shared" / "data" / "g1_bottle" / "episode.txt").write_text("two\n")
    made.run("dvc", "repro")
    assert made.calls() == G1
    assert ran(made.run("dvc", "repro").stdout) == ["collect-g1_bottle"]
    assert made.calls() == []


def test_an_absent_optional_dataset_is_skipped_and_comes_back(made, monkeypatch):
    monkeypatch.setenv("PRTS_SHARED", str(made.folder / "nowhere"))
    done = made.run("dvc", "repro", "sft-g1_bottle")
    assert "skipped: " in done.stdout + done.stderr and made.calls() == []
    view = made.outputs / "runs" / "quickstart" / "sft" / "g1_bottle"
    assert read_json(view / "manifest.json") == {"skipped": "Dataset 'g1_bottle' is not on this machine"}
    assert ran(made.run("dvc", "repro", "sft-g1_bottle").stdout) == ["collect-g1_bottle"]
    made.run("dvc", "metrics", "show")
    made.run("dvc", "plots", "show")
    monkeypatch.setenv("PRTS_SHARED", str(made.folder.parent / "shared"))
    made.run("dvc", "repro", "sft-g1_bottle")
    assert made.calls() == []  # the results were in the store all the time
    assert "key" in read_json(view / "manifest.json")


def test_a_key_that_an_earlier_stage_does_not_watch_yet_is_told_by_the_one_that_trains(made):
    edit("configs/datasets/g1_bottle.yaml", lambda dataset: dataset.update(video={"crf": 30}))
    done = subprocess.run(["dvc", "repro", "sft-g1_bottle"], capture_output=True, text=True)
    assert done.returncode != 0 and "'convert:g1_bottle' has not run yet under this plan" in done.stderr
    made.run(*next(text for text in done.stderr.split("`") if text.startswith("prts convert")).split())
    made.run("dvc", "repro", "sft-g1_bottle")
    assert made.calls() == G1[1:]


def test_an_interrupted_stage_goes_on_where_it_was(made, monkeypatch):
    edit(RECIPE, lambda recipe: recipe["sft"]["train"].update(steps=5))
    monkeypatch.setenv("PRTS_STUB_INTERRUPT", "sft")
    done = subprocess.run(["dvc", "repro", "sft-metaworld"], capture_output=True, text=True)
    assert done.returncode != 0 and "the same command goes on from here" in done.stderr
    monkeypatch.delenv("PRTS_STUB_INTERRUPT")
    made.run("dvc", "repro", "sft-metaworld")
    assert made.calls() == ["sft metaworld", "sft metaworld", "sft resumed"]


def test_damage_is_seen_and_made_good(made):
    view = made.outputs / "runs" / "quickstart" / "collect" / "metaworld" / "output" / "data" / "content.txt"
    content = view.read_text()
    view.unlink()
    made.run("dvc", "repro", "convert-metaworld")
    assert view.read_text() == content and made.calls() == []  # the store had it


# ---- versions, remotes, experiments ---------------------------------------------------------------------------------
def test_store_view_and_cache_share_bytes_and_a_checkout_leaves_the_store_alone(made):
    def stored() -> dict[str, str]:
        return {str(p): p.read_text() for p in sorted(made.outputs.glob("store/*/*/output/data/*"))}

    view = made.outputs / "runs" / "quickstart" / "value" / "output" / "data" / "content.txt"
    assert view.stat().st_nlink == 3
    commit_all()
    edit(RECIPE, lambda recipe: recipe["value"].update(episodes=12))
    made.run("dvc", "repro", "package")
    second, everything = view.read_text(), stored()
    subprocess.run(["git", "stash", "-q"], check=True)
    made.run("dvc", "checkout")
    assert view.read_text() != second
    assert stored() == everything
    made.calls()
    made.run("dvc", "repro", "package")
    assert made.calls() == []


def test_a_clone_pulls_what_was_pushed_and_goes_on_from_there(made, tmp_path, monkeypatch):
    made.run("dvc", "remote", "add", "-q", "-d", "team", str(tmp_path / "remote"))
    there = pushed_and_cloned(made, tmp_path, monkeypatch)
    there.run("dvc", "pull")
    assert ran(there.run("dvc", "repro").stdout) == ["collect-g1_bottle"]
    assert there.calls() == []
    edit(RECIPE, lambda recipe: recipe["sft"]["train"].update(threads=2))  # another machine, the same work
    edit(RECIPE, lambda recipe: recipe["value"].update(episodes=12))
    there.run("dvc", "repro", "package")
    assert there.calls() == ["value -", "package -"]  # parents came with the views


def test_push_and_pull_over_s3(made, tmp_path, monkeypatch):
    pytest.importorskip("dvc_s3", reason="pip install dvc-s3 'moto[server]' for a remote that is an S3 server")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    try:
        boto3 = pytest.importorskip("boto3")
        boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="team")
        made.run("dvc", "remote", "add", "-q", "-d", "team", "s3://team/prts")
        made.run("dvc", "remote", "modify", "team", "endpointurl", f"http://{host}:{port}")
        pushed_and_cloned(made, tmp_path, monkeypatch).run("dvc", "pull")
        assert versions(plan_of(), Path("outputs")) == versions(plan_of(), made.folder / "outputs")
    finally:
        server.stop()


def test_a_clone_without_the_source_takes_its_recorded_listing(made, tmp_path, monkeypatch):
    made.run("dvc", "remote", "add", "-q", "-d", "team", str(tmp_path / "remote"))
    monkeypatch.setenv("PRTS_SHARED", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PRTS_SOURCES", "recorded")
    there = pushed_and_cloned(made, tmp_path, monkeypatch)
    there.run("dvc", "pull")
    edit("configs/datasets/g1_bottle.yaml", lambda dataset: dataset["sft"]["train"].update(steps=7))
    there.run("dvc", "repro", "sft-g1_bottle")
    assert there.calls() == ["sft g1_bottle"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_experiments_here_in_a_temporary_copy_and_queued(made, monkeypatch):
    from prts_core.tracking.store import client

    commit_all()
    at = f"{RECIPE}:value.episodes"
    made.run("dvc", "exp", "run", "-S", f"{at}=12")
    assert made.calls() == ["value -", "package -"]
    assert plan_of().recipe.value.episodes == 12
    subprocess.run(["git", "checkout", "-q", "."], check=True)
    made.run("dvc", "checkout")
    monkeypatch.setenv("PRTS_STUB_TRACKED", "1")
    made.run("dvc", "exp", "run", "--temp", "--name", "thirteen", "-S", f"{at}=13")
    assert made.calls() == ["value -", "package -"]
    experiment = client(made.outputs).get_experiment_by_name("quickstart")
    runs = client(made.outputs).search_runs([experiment.experiment_id])
    assert {run.info.run_name: run.data.tags["dvc.exp"] for run in runs} == {"value": "thirteen", "package": "thirteen"}
    monkeypatch.delenv("PRTS_STUB_TRACKED")
    made.run("dvc", "exp", "run", "--queue", "-S", f"{at}=14,15")
    made.run("dvc", "exp", "run", "--run-all")
    assert made.calls() == 2 * ["value -", "package -"]
    table = csv.DictReader(made.run("dvc", "exp", "show", "--csv").stdout.splitlines())
    assert {row["value.episodes"] for row in table} == {"48", "12", "13", "14", "15"}
    assert plan_of().recipe.value.episodes == 48
    assert subprocess.run(["git", "status", "--short"], capture_output=True, text=True).stdout == ""


def test_metrics_are_a_small_table_and_plots_need_no_internet(made):
    table = made.run("dvc", "metrics", "show").stdout.splitlines()
    assert [row.split()[0].split("/", 3)[-1] for row in table[1:]] == [
        "sft/metaworld/metrics.json",
        "sft/g1_bottle/metrics.json",
        "subtask/metrics.json",
        "benchmark/metrics.json",
        "value/metrics.json",
    ]
    assert set(table[0].split()) == {
        "Path",
        "loss",
        "exact_match",
        "success_rate",
        "blind_replay_success_rate",
        "spearman",
        "auroc",
    }
    made.run("dvc", "plots", "show")
    page = Path("dvc_plots/index.html").read_text()
    pictures = [path.name for path in Path("dvc_plots/static").iterdir()]
    assert len(pictures) == 2 and all(name in page for name in pictures)
    assert "dvc_plots" not in subprocess.run(["git", "status", "--short"], capture_output=True, text=True).stdout


# ---- any recipe -----------------------------------------------------------------------------------------------------
def second_recipe() -> str:
    """A recipe beside the quickstart that differs in its fine-tuning."""
    plain = yaml.safe_load(Path(RECIPE).read_text())
    plain["name"] = "second"
    plain["sft"]["train"]["steps"] = 5
    Path("configs/second.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    return "configs/second.yaml"


def test_a_second_recipe_has_a_file_of_its_own_and_shares_equal_work(made, run_job, monkeypatch):
    recipe = second_recipe()
    monkeypatch.setenv("PRTS_RECIPE", recipe)
    assert "configs/dvc/second/dvc.yaml written" in made.run("prts", "dvc").stdout
    assert made.run("prts", "dvc", "--path").stdout == "configs/dvc/second/dvc.yaml\n"
    assert run_job("chain", "metaworld", "second").success
    new = ["benchmark -", "package -", "register -", "sft metaworld", "subtask -", "value -"]
    assert sorted(made.calls()) == new  # all before it is the quickstart's
    made.run("dvc", "repro", "configs/dvc/second/dvc.yaml")
    assert made.calls() == []  # g1_bottle says its own number of steps
    assert Path("configs/dvc/second/dvc.lock").exists()
    assert len(ran(made.run("dvc", "repro", "--all-pipelines").stdout)) == 2
    assert len(made.run("dvc", "metrics", "show").stdout.splitlines()) == 11


def recipes() -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_every_recipe_has_a_file_that_dvc_reads(project, monkeypatch):
    from dvc.repo import Repo

    for name in ("LIBERO_ROOT", "PRTS_CHECKPOINT", "MY_ROBOT_ROOT", "LIBERO_HDF5_ROOT"):
        monkeypatch.delenv(name, raising=False)
    files = {}
    for name in recipes():
        file = DvcFile(plan_of(f"configs/{name}.yaml"), project.outputs)
        file.path.parent.mkdir(parents=True, exist_ok=True)
        file.write()
        files[name] = file
    with Repo(".") as repo:
        known = {stage.addressing: stage for stage in repo.index.stages}
    assert len(known) == sum(len(declarations.steps(file.plan)) for file in files.values())
    for name, file in files.items():
        for stage, partition in declarations.steps(file.plan):
            declared = known[file.target(stage, partition)]
            option = f" --dataset {partition}" if partition else ""
            begin = f"prts {stage} --config configs/{name}.yaml{option} "
            assert declared.cmd.startswith(begin), declared.cmd
            watched = {str(dep.fs_path) for dep in declared.deps}
            for parent in declarations.STAGES[stage].parents(file.plan, partition):
                where = project.folder / "outputs" / "runs" / name / parent.stage / (parent.partition or "")
                assert str(where / "manifest.json") in watched, (stage, parent)


def leaves(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all plain values in nested mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))
    if not isinstance(value, dict | list):
        yield path


def others(value: object) -> list[object]:
    """Values near this one, of which a configuration may take one."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value / 2]
    return [f"{value}x", 0.5, 3, True] if isinstance(value, str) else [3]


def own_work(plan: RunPlan) -> dict[tuple[str, str | None], object]:
    """What of each stage's key is its own, not its parents'."""
    found = {}
    for stage, partition in declarations.steps(plan):
        declared = declarations.STAGES[stage]
        seed = plan.recipe.seed if declared.seeded else None
        found[stage, partition] = identity(declared.config(plan, partition)), seed
    return found


RL = {"iterations": 4, "algorithm": {"gamma": 0.9}, "preset": "short", "presets": {"short": {"episodes": 8}}}


@pytest.mark.parametrize("name", ["quickstart", "libero_object", "libero_posttraining", "smoke"])
def test_every_value_that_changes_a_stage_is_watched_by_it_or_by_a_parent(project, name, monkeypatch):
    monkeypatch.delenv("PRTS_CHECKPOINT", raising=False)
    if name == "smoke":
        edit("configs/smoke.yaml", lambda recipe: recipe.update(policy="rl", rl=RL))
    plan = plan_of(f"configs/{name}.yaml")
    file = DvcFile(plan, project.outputs)
    declared, before = yaml.safe_load(file.text)["stages"], own_work(plan)
    watched = {step: declared[stage_name(*step)]["params"] for step in before}
    parents = {
        (s, p): {(parent.stage, parent.partition) for parent in declarations.STAGES[s].parents(plan, p)}
        for s, p in before
    }
    files = {path for params in watched.values() for item in params for path in item if path.endswith(".yaml")}
    seen = 0
    for path in sorted(files):
        text = Path(path).read_text()
        for leaf in leaves(yaml.safe_load(text)):
            for other in others(reduce(getitem, leaf, yaml.safe_load(text))):
                plain = yaml.safe_load(text)
                reduce(getitem, leaf[:-1], plain)[leaf[-1]] = other
                Path(path).write_text(yaml.safe_dump(plain))
                try:
                    after = own_work(plan_of(f"configs/{name}.yaml"))
                except PrtsError:
                    continue
                if after.keys() != before.keys():  # other parts: the file has to be written anew
                    continue
                changed = {step for step in before if before[step] != after[step]}
                key = ".".join(map(str, leaf))
                seen += bool(changed)
                for step in changed:
                    keys = [item[path] for item in watched[step] if path in item]
                    here = any(known is None or any(f"{key}.".startswith(f"{k}.") for k in known) for known in keys)
                    assert here or parents[step] & changed, (path, key, step)
                break
        Path(path).write_text(text)
    assert seen > 20


def test_the_file_of_a_recipe_with_reinforcement_learning(project):
    path = "configs/smoke.yaml"
    before = yaml.safe_load(DvcFile(plan_of(path), project.outputs).text)["stages"]
    edit(path, lambda recipe: recipe.update(policy="rl", rl=RL))
    file = DvcFile(plan_of(path), project.outputs)
    stages, runs = yaml.safe_load(file.text)["stages"], "outputs/runs/smoke"
    assert "rl" not in before and before.keys() - stages.keys() == {"subtask"}
    assert stages["rl"] == {
        "cmd": f"prts rl --config {path} --outputs outputs --allow-skip",
        "wdir": "../../..",
        "deps": [f"{runs}/{stage}/metaworld_smoke/manifest.json" for stage in ("convert", "sft")],
        "params": [
            {"prts_core/stages/versions.py": ["VERSIONS.rl"]},
            {path: ["seed", "deploy", "rl"]},
            {"configs/datasets/metaworld_smoke.yaml": ["source"]},
        ],
        "outs": [{f"{runs}/rl/{name}": {"persist": True}} for name in ("output", "manifest.json")],
        "metrics": [{f"{runs}/rl/metrics.json": {"persist": True}}],
    }
    assert f"{runs}/rl/manifest.json" in stages["package"]["deps"]
    edit(path, lambda recipe: recipe["rl"].update(checkpoint="somewhere"))
    away = yaml.safe_load(DvcFile(plan_of(path), project.outputs).text)["stages"]
    assert away["rl"]["always_changed"] and not {"pretrain", "sft-metaworld_smoke"} & away.keys()


def test_the_committed_file_is_what_the_quickstart_says():
    command = "run `prts dvc --config configs/quickstart.yaml`"
    plan = load_plan(ROOT / RECIPE)
    assert (ROOT / "dvc.yaml").read_text() == DvcFile(plan, ROOT / "outputs", ROOT).text, command


def test_a_public_file_with_several_datasets(project):
    from dvc.repo import Repo

    Path("configs/datasets/two.yaml").write_text(
        "lerobot_datasets:\n"
        "  - {repo_id: me/one.v1, root: '${NOWHERE}/one', embodiment_tag: libero_panda, state_relative_action: true}\n"
        "  - {repo_id: me/two, root: '${NOWHERE}/two', embodiment_tag: my_robot}\n"
        "mm_datasets:\n  - {name: words, json_path: '${NOWHERE}/words.jsonl'}\n"
    )
    Path("configs/two.yaml").write_text("{name: two, datasets: [two], deploy: me__two, model: tiny, sft: {}}\n")
    file = DvcFile(plan_of("configs/two.yaml"), project.outputs)
    file.path.parent.mkdir(parents=True)
    file.write()
    with Repo(".") as repo:
        found = repo.stage.collect(file.path.relative_to(project.folder).as_posix())
    assert len(found) == len(declarations.steps(file.plan)) == 15
    stages = yaml.safe_load(file.text)["stages"]
    assert {"configs/datasets/two.yaml": ["lerobot_datasets.1"]} in stages["sft-me__two"]["params"]
    assert {"configs/models/tiny.yaml": ["chunk_length"]} in stages["stats-me__one.v1"]["params"]
    assert stages["pretrain"]["always_changed"]  # its image-text data lie outside


def test_a_file_that_is_not_what_the_recipe_says_is_told_with_a_cure_that_works(made, caplog):
    edit(RECIPE, lambda recipe: recipe.update(datasets=["metaworld"]))
    done = subprocess.run(["prts", "dvc", "--check"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "The DVC file is not what the recipe says now" in done.stderr
    dvc, log = DvcResource(), logging.getLogger("test")
    with caplog.at_level(logging.INFO):
        assert not dvc.commit(plan_of(), "package", None, made.outputs, log)
    assert caplog.records[-1].levelname == "WARNING"
    cure = done.stderr.split("`")[1]
    assert cure == "prts dvc --config configs/quickstart.yaml" and f"`{cure}`" in caplog.text
    made.run(*cure.split())
    made.run("prts", "dvc", "--check")
    assert dvc.commit(plan_of(), "package", None, made.outputs, log)
    assert ran(made.run("dvc", "repro").stdout) == []


def test_outputs_lie_where_the_file_was_written_for(project, monkeypatch):
    monkeypatch.setenv("PRTS_OUTPUTS", "elsewhere")
    project.run("prts", "dvc")
    assert "--outputs elsewhere" in Path("dvc.yaml").read_text().splitlines()[1]
    monkeypatch.delenv("PRTS_OUTPUTS")
    project.run("dvc", "repro", "collect-metaworld")
    assert (project.folder / "elsewhere" / "runs" / "quickstart" / "collect" / "metaworld" / "manifest.json").exists()
    with pytest.raises(ConfigError, match="DVC keeps only what lies inside the project"):
        DvcFile(plan_of(), project.folder.parent / "outside")
    with pytest.raises(StageError, match="in the project's folder"):
        DvcFile(plan_of(), project.outputs, project.folder / "configs")


# ---- the commit after a Dagster run ---------------------------------------------------------------------------------
def test_a_run_with_changed_values_is_not_entered(made, caplog):
    lock = Path("dvc.lock").read_text()
    plan = load_plan(Path(RECIPE), ["seed=8"])
    chain.run("pretrain", plan, None, made.outputs)
    with caplog.at_level(logging.INFO):
        assert not DvcResource().commit(plan, "pretrain", None, made.outputs, logging.getLogger("test"))
    assert "changed values" in caplog.text
    assert Path("dvc.lock").read_text() == lock
    made.calls()
    assert ran(made.run("dvc", "repro").stdout) == ["collect-g1_bottle"] and made.calls() == []


def test_what_dvc_does_not_know_is_left_alone(project, caplog):
    log = logging.getLogger("test")
    with caplog.at_level(logging.INFO):
        assert not DvcResource(enabled=False).commit(plan_of(), "package", None, project.outputs, log)
        assert caplog.text == ""
        second = second_recipe()
        assert not DvcResource().commit(plan_of(second), "package", None, project.outputs, log)
        assert f"the recipe has no DVC file; `prts dvc --config {second}` writes one" in caplog.text
        assert not DvcResource(root="configs").commit(plan_of(), "package", None, project.outputs, log)
        assert "no DVC repository" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_a_lock_that_somebody_holds_is_waited_for_and_then_told(made, caplog):
    hold = (
        "import sys\nfrom dvc.repo import Repo\nwith Repo('.') as repo, repo.lock:\n"
        "    print('held', flush=True)\n    sys.stdin.readline()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "held\n"
    log = logging.getLogger("test")
    with caplog.at_level(logging.INFO):
        assert not DvcResource(patience=1.0).commit(plan_of(), "package", None, made.outputs, log)
        assert "the result itself is in place" in caplog.records[-1].message
        assert "`dvc commit -f package`" in caplog.records[-1].message
        assert caplog.records[-1].levelname == "WARNING"
        threading.Timer(2.0, lambda: process.communicate("\n")).start()
        assert DvcResource().commit(plan_of(), "package", None, made.outputs, log)
    process.wait(10)
    made.run("dvc", "commit", "-f", "package")
