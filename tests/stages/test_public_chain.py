"""The public release's dataset YAML trains as it is: collect to sft on a tiny dataset, every kind of field in use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prts_core.config.load import load_plan
from prts_core.io.errors import ContractError
from prts_core.io.files import read_json
from prts_core.policy.policy import load_policy
from prts_core.stages import chain
from prts_core.store.run_stage import untracked
from tests.data.conftest import convert_toy, write_raw

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
TRAIN = "{steps: 3, batch_size: 8, warmup_steps: 1, checkpoint_every: 3, log_every: 1, threads: 1, augment: true"
FILES = {
    "r.yaml": f"""\
name: r
datasets: [lab]
deploy: lab__faucet
model: m
pretrain:
  vocab_size: 400
  fast_vocab_size: 200
  train: {TRAIN}}}
sft:
  train: {TRAIN}, normalization: MEAN_STD, weights: {{fast: 0.0, flow: 1.0, contrastive: 0.1}}}}
""",
    "datasets/lab.yaml": """\
lerobot_datasets:
  - repo_id: lab/faucet
    root: ${TOY_ROOT}
    episodes: [0, 1, 2, 3]
    state_mode: MEAN_STD
    state_relative_action: true
    embodiment_tag: arm
    train_subtask: "mixture:0.5"
    select_video_keys: [observation.images.top]
    load_quantile_stats: true
    weight: 2.0
  - repo_id: lab/dial
    root: ${TOY_ROOT}
    episodes: [4, 5]
    embodiment_tag: arm
    train_subtask: cumulate
  - repo_id: lab/knob
    root: ${TOY_ROOT}
    episodes: [3, 4]
    state_relative_action: true
    embodiment_tag: arm
    select_video_keys: [observation.images.top]
    weight: 0.5
mm_datasets:
  - name: captions
    json_path: ${TOY_ROOT}/../captions.jsonl
    sampling_strategy: first:50%
    vision_base_path: ${TOY_ROOT}/..
    weight: 20.0
""",
    "robots/arm.yaml": "embodiment_tag: arm\nrelative: [true, true, true, false]\n",
}


SAME = ("lab__faucet", "lab__knob")


@pytest.mark.slow
def test_the_public_yaml_trains_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prts_core.tracking.runs.stage_run", untracked)
    made = convert_toy(tmp_path, write_raw(tmp_path / "raw"))
    (made.root / "meta/contract.json").unlink()  # as a foreign dataset comes
    monkeypatch.setenv("TOY_ROOT", str(made.root))
    Image.new("RGB", (48, 40), (200, 30, 30)).save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Red."}]
    lines = [json.dumps({"image": "red.png", "conversations": turns})] * 6
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "models").mkdir()
    shutil.copy(MODELS / "smoke.yaml", tmp_path / "models/m.yaml")

    with pytest.warns(UserWarning, match="state_mode MEAN_STD is not used"):
        plan = load_plan(tmp_path / "r.yaml")
        assert plan.mixture == {"lab__faucet": 2.0, "lab__dial": 1.0, "lab__knob": 0.5}
    outputs = tmp_path / "outputs"
    for name in plan.datasets:
        for stage in ("collect", "convert", "validate", "stats"):
            chain.run(stage, plan, name, outputs)
    stats = outputs / "runs/r/stats/lab__faucet/output"
    assert (stats / "state_relative_ck8_norm_stats.json").is_file() and (stats / "norm_stats.json").is_file()
    assert not (outputs / "runs/r/stats/lab__dial/output/state_relative_ck8_norm_stats.json").exists()

    pretrained = chain.run("pretrain", plan, None, outputs)
    assert np.isfinite(pretrained.metrics["loss"])
    curve = (outputs / "runs/r/pretrain/output/training.csv").read_text().splitlines()[0].split(",")
    assert {"vqa/captions", "flow_matching/lab/faucet", "flow_matching/lab/dial"} <= set(curve)
    chain.run("sft", plan, "lab__faucet", outputs)
    folder = outputs / "runs/r/sft/lab__faucet/output"
    policy = load_policy(folder)
    own = policy.contract
    assert own.normalization == "MEAN_STD" and own.contract.relative == (True, True, True, False)
    assert [camera.key for camera in own.contract.cameras] == ["observation.images.top"]
    assert read_json(folder / "norm_stats.json") == read_json(stats / "state_relative_ck8_norm_stats.json")
    seen = {"observation.state": np.full(4, 0.3, np.float32), "observation.images.top": np.zeros((32, 32, 3), np.uint8)}
    near = policy.act(seen, "open the faucet", 1)
    seen["observation.state"] = np.full(4, 0.3001, np.float32)  # the same words, another place to start from
    moved = policy.act(seen, "open the faucet", 1) - near
    assert near.shape == (8, 4) and np.allclose(moved, [1e-4, 1e-4, 1e-4, 0], atol=2e-6)

    # ---- the same robot's other dataset, and words, beside it ----
    typed = ["sft.mixture={lab__faucet: 0.5, lab__knob: 0.25}", "sft.mix_by=samples", "sft.train.batch_size=16"]
    typed += [f"sft.image_text={{words: {{json_path: {tmp_path / 'captions.jsonl'}, weight: 0.25}}}}"]
    typed += ["sft.train.weights.text=0.1"]
    with pytest.warns(UserWarning, match="state_mode"):
        mixed = load_plan(tmp_path / "r.yaml", typed)
        assert not mixed.sft("lab__dial").mixture, "the others are fine-tuned alone"
    manifest = chain.run("sft", mixed, "lab__faucet", outputs)
    folder = manifest.folder(outputs)
    curve = (folder / "training.csv").read_text().splitlines()[0].split(",")
    assert {"vqa/words", "flow_matching/lab/faucet", "flow_matching/lab/knob"} <= set(curve)
    pooled = read_json(folder / "norm_stats.json")
    apart = [read_json(outputs / f"runs/r/stats/{name}/output/state_relative_ck8_norm_stats.json") for name in SAME]
    assert pooled["count"] == sum(one["count"] for one in apart)
    assert load_policy(folder).contract.contract.fingerprint == own.contract.fingerprint
    with pytest.warns(UserWarning, match="state_mode"):
        other = load_plan(tmp_path / "r.yaml", ["sft.mixture={lab__faucet: 1.0, lab__dial: 1.0}"])
        with pytest.raises(ContractError, match="lab__dial"):
            chain.run("sft", other, "lab__faucet", outputs)
