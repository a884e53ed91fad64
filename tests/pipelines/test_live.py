"""Dagster with its daemon, queue and workers over the stub chain, driven by its own API: what a page does."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from pipelines import ui
from pipelines.home import prepare_home, prepare_instance
from prts_core.store.views import viewed
from tests.pipelines import stub_chain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
TEN = [f"arm_{n}" for n in range(10)]
LOCATION = """
import sys
from tests.pipelines import stub_child, stub_chain
stub_chain.declarations.STAGES.update(stub_chain.stubbed_stages())
import pipelines.environments as environments
from assets.launch import Launcher, launch_resource
real = environments.resources
def resources(*given):
    child = (sys.executable, stub_child.__file__)
    launcher = Launcher("process", {"collect": "inline"}, grace_s=20, command=child)
    return real(*given) | {"launch": launch_resource(launcher)}
environments.resources = resources
from pipelines.definitions import definitions
defs = definitions()
"""


class Page:
    """What a person does on Dagster's page, by GraphQL; what became of it, from the instance."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.calls_file = folder / "calls.txt"
        self.slow_file = folder / "calls.txt.slow"
        self.outputs = folder / "outputs"

    def ask(self, query: str, **variables: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            told = json.loads(answer.read())
        assert "errors" not in told, told
        return told["data"]

    def launch(self, recipe: str, stage: str, dataset: str, config: dict | None = None) -> str:
        params = {
            "selector": {
                "repositoryLocationName": "stub_location.py",
                "repositoryName": "__repository__",
                "jobName": "__ASSET_JOB",
                "assetSelection": [{"path": [recipe, stage]}],
                "assetCheckSelection": [],
            },
            "runConfigData": config or {},
            "mode": "default",
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": dataset}]},
        }
        made = self.ask(
            "mutation($p: ExecutionParams!) { launchPipelineExecution(executionParams: $p) { __typename "
            "... on LaunchRunSuccess { run { runId } } ... on PythonError { message } "
            "... on RunConfigValidationInvalid { errors { message } } } }",
            p=params,
        )["launchPipelineExecution"]
        assert made["__typename"] == "LaunchRunSuccess", made
        return made["run"]["runId"]

    def backfill(self, recipe: str, stage: str, datasets: list[str]) -> None:
        made = self.ask(
            "mutation($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) { __typename "
            "... on PythonError { message } } }",
            p={"assetSelection": [{"path": [recipe, stage]}], "partitionNames": datasets},
        )["launchPartitionBackfill"]
        assert made["__typename"] == "LaunchBackfillSuccess", made

    def cancel(self, run_id: str) -> None:
        made = self.ask("mutation($r: String!) { terminateRun(runId: $r) { __typename } }", r=run_id)
        assert made["terminateRun"]["__typename"] == "TerminateRunSuccess", made

    def calls(self, of: str) -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line for line in lines if line.startswith(of)]

    def instance(self) -> dg.DagsterInstance:
        return dg.DagsterInstance.from_config(str(self.outputs / "dagster"))

    def run(self, run_id: str) -> dg.DagsterRun:
        with self.instance() as instance:
            found = instance.get_run_by_id(run_id)
            assert found is not None
            return found

    def until(self, true: Callable[[], Any], what: str, seconds: float = 240.0) -> Any:
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            if found := true():
                return found
            time.sleep(0.5)
        with self.instance() as instance:
            state = [(run.run_id[:8], run.status.value, dict(run.tags)) for run in instance.get_runs(limit=4)]
        log = (self.folder / "dev.log").read_text()[-6000:]
        raise AssertionError(f"not within {seconds} s: {what}\n{state}\n{self.calls('')}\n{log}")

    def ends(self, run_id: str, status: dg.DagsterRunStatus) -> None:
        self.until(lambda: self.run(run_id).is_finished, f"{run_id} ends")
        assert self.run(run_id).status == status

    def worker(self, run_id: str) -> int:
        with self.instance() as instance:
            for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
                if pid := entry.get_dagster_event().engine_event_data.metadata.get("pid"):
                    return int(str(pid.value))
        raise AssertionError("no event tells the worker's process")

    def working(self, stage: str) -> dict:
        """plan.json of the stage that is under way."""
        (path,) = self.outputs.glob(f"store/{stage}/*/work/plan.json")
        return json.loads(path.read_text())


def datasets_of(folder: Path, recipe: str, names: list[str]) -> None:
    """A copy of the smoke recipe with datasets of these names."""
    configs = folder / "configs"
    one = yaml.safe_load((configs / "datasets/metaworld_smoke.yaml").read_text())
    for name in names:
        (configs / f"datasets/{name}.yaml").write_text(yaml.safe_dump(one | {"name": name}))
    text = yaml.safe_load((configs / "smoke.yaml").read_text())
    text |= {"name": recipe, "datasets": names, "deploy": names[0]}
    text["pretrain"]["mixture"] = {names[0]: 1.0}
    (configs / f"{recipe}.yaml").write_text(yaml.safe_dump(text))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("live")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / stub_chain.VERSIONS.parent).mkdir(parents=True)
    shutil.copy(ROOT / stub_chain.VERSIONS, folder / stub_chain.VERSIONS)
    datasets_of(folder, "arms", TEN)
    (folder / "stub_location.py").write_text(LOCATION)
    made = Page(folder, ui.free_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "PRTS_ENV": "test",
            "PRTS_LAUNCH": "process",
            "PRTS_RECIPE": "configs/arms.yaml,configs/smoke.yaml",
            "PRTS_OUTPUTS": "outputs",
            "PRTS_STUB_CALLS": str(made.calls_file),
            "PYTHONWARNINGS": "ignore",
            "DAGSTER_HOME": str(made.outputs / "dagster"),
            "OMP_NUM_THREADS": "1",
            "PRTS_NIGHTLY": "on",
        }.items():
            patch.setenv(name, value)
        prepare_home(made.outputs)
        with made.instance() as instance:
            prepare_instance(instance)
        command = [str(Path(sys.executable).parent / "dagster"), "dev", "-f", "stub_location.py", "-p", str(made.port)]

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return bool(made.ask("{ assetNodes { assetKey { path } } }")["assetNodes"])
            return False

        with ui.running(command, folder / "dev.log"):
            made.until(answers, "the page answers")
            yield made


@pytest.fixture
def trained_until(page: Page) -> Callable[[str], None]:
    """Everything that `sft` of a dataset needs, made without Dagster."""

    def make(recipe: str, dataset: str) -> None:
        script = (
            "import sys\nfrom pathlib import Path\nfrom tests.pipelines import stub_chain\n"
            "from prts_core.config.load import load_plan\nfrom prts_core.store.run_stage import Store\n"
            "store = Store(Path('outputs'), stub_chain.stubbed_stages())\n"
            f"plan = load_plan(Path('configs/{recipe}.yaml'))\n"
            f"for dataset in dict.fromkeys([plan.recipe.deploy, {dataset!r}]):\n"
            "    for stage in ('collect', 'convert', 'validate', 'stats'):\n        store.run(stage, plan, dataset)\n"
            "store.run('pretrain', plan)\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True)

    return make


def test_a_backfill_of_ten_datasets(page):
    page.backfill("arms", "collect", TEN)
    page.until(lambda: len(page.calls("collect arm_")) == 10, "ten datasets are collected", 400)

    def done() -> list[dg.DagsterRun] | None:
        with page.instance() as instance:
            runs = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.SUCCESS]))
            return runs if len(runs) == 10 else None

    page.until(done, "ten runs succeed")
    assert {viewed(page.outputs, "arms", "collect", name).partition for name in TEN} == set(TEN)
    with page.instance() as instance:
        records = instance.get_run_records()
    spans = sorted((record.start_time, record.end_time) for record in records)
    assert any(later < end for (_, end), (later, _) in itertools.pairwise(spans)), "one after the other"


def test_the_daemon_watches_the_nightly_run_and_nothing_else(page):
    def states() -> dict[str, str] | None:
        keys = [dg.AssetKey(["arms", name]) for name in ("regression", "sft")]
        with page.instance() as instance:
            found = instance.get_freshness_state_records(keys)
        return {key.path[-1]: found[key].freshness_state.value for key in keys} if len(found) == 2 else None

    assert page.until(states, "the freshness daemon has looked") == {"regression": "UNKNOWN", "sft": "NOT_APPLICABLE"}


def test_a_cancelled_training_leaves_a_checkpoint_and_resumes(page, trained_until):
    """Two runs at once: the second waits for the first, and goes on where that one was stopped."""
    trained_until("arms", "arm_1")
    page.slow_file.write_text("sft")
    first = page.launch("arms", "sft", "arm_1")
    page.until(lambda: page.calls("sft arm_1"), "the training begins")
    (checkpoint,) = page.until(lambda: list(page.outputs.glob("store/sft/*/work/checkpoint.txt")), "a checkpoint")
    second = page.launch("arms", "sft", "arm_1")
    page.until(lambda: "is blocked by global concurrency" in (page.folder / "dev.log").read_text(), "the second waits")
    assert page.run(second).status == dg.DagsterRunStatus.QUEUED and page.calls("sft") == ["sft arm_1"]
    page.slow_file.unlink()
    page.cancel(first)
    page.ends(first, dg.DagsterRunStatus.CANCELED)
    page.ends(second, dg.DagsterRunStatus.SUCCESS)
    assert page.calls("sft") == ["sft arm_1", "sft arm_1", "sft resumed"]
    assert not checkpoint.exists() and viewed(page.outputs, "arms", "sft", "arm_1") is not None


def test_a_killed_training_is_tried_again_in_its_run(page, trained_until):
    trained_until("arms", "arm_2")
    page.slow_file.write_text("sft")
    run_id = page.launch("arms", "sft", "arm_2")
    page.until(lambda: page.calls("sft arm_2"), "the training begins")
    page.until(lambda: list(page.outputs.glob("store/sft/*/work/checkpoint.txt")), "a checkpoint")
    os.kill(page.working("sft")["pid"], signal.SIGKILL)
    page.ends(run_id, dg.DagsterRunStatus.SUCCESS)
    assert page.calls("sft arm_2") == ["sft arm_2"] * 2 and page.calls("sft resumed")


def test_a_killed_worker_is_retried_and_resumes(page, trained_until):
    trained_until("smoke", "metaworld_smoke")
    page.slow_file.write_text("sft")
    resumed = len(page.calls("sft resumed"))
    changed = {"resources": {"plan_smoke": {"config": {"sft": {"train": {"steps": 4}}}}}}
    run_id = page.launch("smoke", "sft", "metaworld_smoke", changed)
    page.until(lambda: page.calls("sft metaworld_smoke"), "the training begins")
    page.until(lambda: list(page.outputs.glob("store/sft/*/work/checkpoint.txt")), "a checkpoint")
    os.kill(page.worker(run_id), signal.SIGKILL)
    page.ends(run_id, dg.DagsterRunStatus.FAILURE)

    def retried() -> str | None:
        with page.instance() as instance:
            found = [run for run in instance.get_runs() if run.parent_run_id == run_id]
            return found[0].run_id if found else None

    page.ends(page.until(retried, "the run is retried"), dg.DagsterRunStatus.SUCCESS)
    assert len(page.calls("sft resumed")) == resumed + 1
    assert viewed(page.outputs, "smoke", "sft", "metaworld_smoke") is None  # with changed values: no view moves
