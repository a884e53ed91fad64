"""Training starts from folders of others: Qwen3-VL in pretrain, a released checkpoint or a policy of ours in sft."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.load import RunPlan, load_plan
from prts_core.config.model import ModelConfig
from prts_core.config.schema import SftConfig, SftSection
from prts_core.io.errors import CheckpointError, ConfigError
from prts_core.io.files import read_json, write_json
from prts_core.io.tensors import load_sharded, save_sharded
from prts_core.models.backbone import qwen3vl_config
from prts_core.policy.policy import load_policy
from prts_core.release.checkpoint import load_released
from prts_core.stages import chain, declarations
from prts_core.store.run_stage import untracked
from prts_core.text import prompt
from prts_core.text.tokenizer import TextTokenizer
from prts_core.training.initial_weights import checkpoint_start
from tests.data.conftest import convert_toy, write_raw
from tests.fixtures.released import CASE, needs_case, write_checkpoint, write_fast, write_tokenizer

SMOKE = Path(__file__).resolve().parents[2] / "configs/models/smoke.yaml"
TRAIN = "steps: 2, batch_size: 4, warmup_steps: 1, checkpoint_every: 2, log_every: 1, threads: 1"
RECIPE = f"""\
name: r
datasets: [toy]
deploy: toy
model: m
pretrain:
  fast: ${{FAST}}
  train: {{{TRAIN}, freeze: [llm, vision, merger]}}
sft:
  train: {{{TRAIN}, weights: {{fast: 0.0, text: 0.0, flow: 1.0, contrastive: 0.0}}}}
"""
TOY = "name: toy\nsource: {kind: lerobot, root: '${TOY_ROOT}', select_video: [observation.images.top]}\n"
ROWS = 600  # of the embeddings: more than the tokenizer has tokens, as in Qwen's own checkpoints


@dataclass
class Project:
    """A recipe on a tiny dataset, whose statistics are made."""

    folder: Path
    model: ModelConfig

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def reads(self, stage: str, plan: RunPlan) -> dict[str, str]:
        """What stands in the stage's key for files from outside."""
        return chain.store(self.outputs).resolve(stage, plan).identity["files"]

    def plan(self, *overrides: str, **model: object) -> RunPlan:
        wanted = json.dumps({**read_yaml(SMOKE), **model})  # JSON is YAML
        (self.folder / "models/m.yaml").write_text(wanted)
        return load_plan(self.folder / "r.yaml", list(overrides))

    def run(self, stage: str, plan: RunPlan) -> Path:
        manifest = chain.run(stage, plan, None if stage == "pretrain" else "toy", self.outputs)
        if "loss" in manifest.metrics:
            assert np.isfinite(manifest.metrics["loss"])
        return manifest.folder(self.outputs)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    toy = convert_toy(folder, write_raw(folder / "raw", train=1, heldout=1, rows=8))
    (toy.root / "meta/contract.json").unlink()
    for name in ("models", "datasets"):
        (folder / name).mkdir()
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "datasets/toy.yaml").write_text(TOY)
    return folder


@pytest.fixture
def project(made: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr("prts_core.tracking.runs.stage_run", untracked)
    monkeypatch.setenv("TOY_ROOT", str(made / "output"))
    project = Project(made, check(ModelConfig, read_yaml(SMOKE), SMOKE))
    plan = project.plan()
    for stage in ("collect", "convert", "validate", "stats"):
        project.run(stage, plan)
    return project


@pytest.mark.slow
def test_pretraining_on_a_qwen_folder_keeps_its_weights_and_words(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    shape = qwen3vl_config(project.model, ROWS, 261)
    stock = Qwen3VLForConditionalGeneration._from_config(shape)
    stock.save_pretrained(tmp_path / "qwen")
    write_tokenizer(tmp_path / "qwen")
    monkeypatch.setenv("QWEN", str(tmp_path / "qwen"))
    monkeypatch.setenv("FAST", str(write_fast(tmp_path / "fast", 64)))
    plan = project.plan(pretrained="${QWEN}", vision={}, text={})
    folder = project.run("pretrain", plan)

    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    known = 256 + len(prompt.CONTROL_TOKENS)
    added = [*prompt.PRTS_TOKENS, *map(prompt.fast_token, range(64))]
    assert [tokenizer.id(token) for token in added] == list(range(known, known + len(added)))
    assert tokenizer.id(prompt.IMAGE_PAD) == 261 and len(tokenizer) == known + len(added)
    trained, own = load_sharded(folder), {n.removeprefix("model."): t for n, t in stock.state_dict().items()}
    embeddings = "language_model.embed_tokens.weight"
    assert len(trained[embeddings]) == ROWS and torch.equal(trained[embeddings][:known], own[embeddings][:known])
    spread, mean = torch.std_mean(own[embeddings][:known], dim=0)
    assert ((trained[embeddings][known:] - mean) / spread).abs().max() < 0.7
    backbone = [n for n in trained if n.startswith(("visual.", "language_model.")) and n != embeddings]
    assert len(backbone) > 20 and all(torch.equal(trained[name], own[name]) for name in backbone)
    assert "QWEN" in read_json(folder / "config.json")["pretrained"], "no path of this machine"

    policy = load_policy(project.run("sft", plan))
    assert policy.processor.compat == "none" and len(policy.model.language_model.embed_tokens.weight) == ROWS
    before = project.reads("pretrain", plan)
    weights = dict(load_sharded(tmp_path / "qwen"))
    save_sharded(tmp_path / "qwen", {n: t + 1 for n, t in weights.items()})
    assert before.keys() == {"model.pretrained", "pretrain.fast"} and before != project.reads("pretrain", plan)


@pytest.mark.slow
@needs_case
def test_golden_fine_tuning_starts_from_a_released_checkpoint_and_then_from_its_policy(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    released = json.loads((CASE / "config.json").read_text())
    chunks = {"chunk_length": released["action_chunk_size"], "max_action_dim": released["max_action_dim"]}
    monkeypatch.setenv("CHECKPOINT", str(write_checkpoint(tmp_path / "released")))
    monkeypatch.setenv("FAST", str(write_fast(tmp_path / "fast")))
    choice = ["sft.checkpoint=${CHECKPOINT}", "sft.fast=${FAST}"]
    plan = project.plan(*choice, **chunks, min_view_tokens=4, max_view_tokens=9)
    assert ("pretrain", None) not in declarations.steps(plan) and ("sft", "toy") in declarations.steps(plan)
    folder = project.run("sft", plan)
    policy = load_policy(folder)
    assert policy.processor.compat == policy.model.compat == policy.processor.fast.compat == "prts"
    assert policy.model.config.min_view_tokens == 4 and policy.contract.chunk_length == chunks["chunk_length"]
    assert read_json(folder / "norm_stats.json") == read_json(
        project.outputs / "runs/r/stats/toy/output/norm_stats.json"
    )
    start = load_released(tmp_path / "released")[0].state_dict()
    now = policy.model.state_dict()
    assert now.keys() == start.keys()
    changed = {name.partition(".")[0] for name in now if not torch.equal(now[name], start[name])}
    assert changed == {"visual", "language_model", "dit_action_head"}
    assert read_json(folder / "start.json") == {
        "checkpoint": "${CHECKPOINT}",
        "files": project.reads("sft", plan)["sft.checkpoint"],
    }

    shutil.copytree(folder, tmp_path / "policy")
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "policy"))
    again = project.run("sft", project.plan("sft.checkpoint=${CHECKPOINT}", **chunks))
    assert load_policy(again).processor.compat == "prts"
    assert (again / "norm_stats.json").read_bytes() == (folder / "norm_stats.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"other chunks.*chunk_length"):
        project.run("sft", project.plan("sft.checkpoint=${CHECKPOINT}", **chunks | {"chunk_length": 3}))


@needs_case
def test_golden_what_does_not_fit_a_released_checkpoint_is_refused(tmp_path: Path):
    folder, fast = write_checkpoint(tmp_path / "released"), write_fast(tmp_path / "fast")
    released = json.loads((CASE / "config.json").read_text())
    model = ModelConfig(chunk_length=released["action_chunk_size"], max_action_dim=released["max_action_dim"])
    config = SftConfig(dataset="d", checkpoint=str(folder), fast=str(fast), model=model)
    assert checkpoint_start(config).model.compat == "prts"
    for change in ({"chunk_length": 50}, {"max_action_dim": 32}):
        with pytest.raises(CheckpointError, match=rf"other chunks.*{next(iter(change))}"):
            checkpoint_start(replace(config, model=replace(model, **change)))
    with pytest.raises(ConfigError, match=r"sft\.fast"):
        checkpoint_start(replace(config, fast=None))
    # Pre-trained only: no action head to fit, so that the recipe's model says what it is.
    kept = {n: t for n, t in load_sharded(folder).items() if not n.startswith("dit_action_head.")}
    save_sharded(folder, kept)
    start = checkpoint_start(replace(config, model=replace(model, chunk_length=50)))
    assert start.model.config.expert == model.expert and start.model.config.chunk_length == 50
    write_json(folder / "config.json", {})
    with pytest.raises(CheckpointError, match="holds no PRTS policy"):
        checkpoint_start(config)


def test_contradictions_of_a_section_are_refused():
    with pytest.raises(ValueError, match="random ones"):
        SftSection(checkpoint="a/b", from_pretrained=False)
    with pytest.raises(ValueError, match="belongs to a `checkpoint`"):
        SftSection(fast="a/b")
