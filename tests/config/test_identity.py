"""What cannot change a result is no part of what the result is, by one declaration a field."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from prts_core.config.identity import identity
from prts_core.config.schema import BenchmarkSection, PretrainSection, SftConfig, SuiteRun
from prts_core.config.sources import (
    ExpertSource,
    ImageTextSource,
    LeRobotSource,
    MetaworldSource,
    RecordingSource,
    TaskSpec,
)
from prts_core.config.train import TrainConfig
from prts_core.io.files import canonical_json
from prts_core.training.checkpoint import State, check_same_run

MACHINE = {
    "attention": "flex",
    "compile": True,
    "activation_checkpointing": True,
    "workers": 3,
    "threads": 7,
    "engine": "zero2",
    "fsdp_group": 8,
    "keep": 5,
    "checkpoint_every": 9,
    "log_every": 1,
}
METAWORLD = MetaworldSource("metaworld", (TaskSpec("a", "do a", 9),)).expert()
LEROBOT = LeRobotSource("lerobot", root="/here")
URL = LeRobotSource("lerobot", root="s3://here/x")
RECORDING = RecordingSource("robomimic", "/here", "libero")
PICTURES = ImageTextSource("/here/a.jsonl", "/here", digest="sha256:0")


def test_exactly_these_fields_of_training_cannot_change_a_result():
    plain = TrainConfig()
    assert {f.name for f in fields(plain)} - identity(plain).keys() == MACHINE.keys()
    for name, value in MACHINE.items():
        assert identity(replace(plain, **{name: value})) == identity(plain)
    for name, value in {"early_fraction": 0.1, "batch_size": 8, "eval_every": 2, "precision": "bf16"}.items():
        assert identity(replace(plain, **{name: value})) != identity(plain)


def test_a_checkpoint_and_a_key_ask_the_same(tmp_path):
    plain = TrainConfig()
    check_same_run(State(1, {}, 7, identity(plain)), replace(plain, **MACHINE), 7, tmp_path)


@pytest.mark.parametrize(
    ("config", "free", "not_free"),
    [
        (METAWORLD, {"workers": 9}, {"train_episodes": 3}),
        (ExpertSource("expert", "libero_object"), {"workers": 9}, {"noise": (0.5,)}),
        (LEROBOT, {"root": "/there"}, {"episodes": (1,)}),
        (LEROBOT, {}, {"link": "copy"}),
        (LEROBOT, {}, {"link": "symlink"}),
        (LEROBOT, {}, {"root": "s3://here/x"}),
        (URL, {}, {"root": "s3://there/x"}),
        (replace(LEROBOT, link="copy"), {"link": "hardlink", "root": "s3://here/x"}, {"link": "auto"}),
        (LEROBOT, {}, {"repo_id": "lab/x"}),
        (LeRobotSource("lerobot", repo_id="lab/x"), {}, {"revision": "v2"}),
        (RECORDING, {"root": "/there", "workers": 9}, {"mapping": "other"}),
        (PICTURES, {"json_path": "/there/b.jsonl", "vision_base_path": None, "digest": "sha256:1"}, {"max_tokens": 9}),
        (BenchmarkSection(), {"workers": 3}, {"batch": 3}),
        (SuiteRun("s"), {"workers": 3}, {"episodes": 3}),
    ],
)
def test_sources_and_suites(config, free: dict, not_free: dict):
    assert identity(replace(config, **free)) == identity(config)
    assert identity(replace(config, **not_free)) != identity(config)


def test_a_dataset_of_plain_files_keeps_its_key(monkeypatch: pytest.MonkeyPatch):
    assert not {"root", "link"} & identity(LEROBOT).keys()
    source = LeRobotSource("lerobot", root="${SOME_ROOT}")
    assert identity(source) == identity(LEROBOT)
    monkeypatch.setenv("SOME_ROOT", "s3://here/x")
    assert identity(source) == identity(URL), "a URL counts as it is, not as it is written"


def test_fields_deep_inside_count_too():
    one, other = (SftConfig(dataset="a", train=TrainConfig(workers=w)) for w in (0, 4))
    assert identity(one) == identity(other)
    mixed = [PretrainSection(image_text={"a": replace(PICTURES, json_path=path)}) for path in ("/x", "/y")]
    assert identity(mixed[0]) == identity(mixed[1]) and canonical_json(identity(mixed[0]))
