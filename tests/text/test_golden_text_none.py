"""Under compat "none", the default, the golden inputs get the words that the public release should have given them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prts_core.config.places import shared_folder
from prts_core.data.embodiment import camera_label
from prts_core.io.errors import DataError
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer

CASE = shared_folder() / "golden" / "prts" / "normalize"
needs_case = pytest.mark.skipif(not CASE.is_dir(), reason=f"golden case {CASE.name} is not on this machine")


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return json.loads((CASE / "text_cases.json").read_text())


@needs_case
def test_golden_none_instructions_are_sentences(cases: dict[str, Any]) -> None:
    """One mark at the end with nothing before it but the word; a dot alone is no instruction."""
    for case in cases["instruction_cleaning"]:
        ours = prompt.clean_instruction(case["input"], case["episode_tasks_0"])
        assert ours[-1] in ".!?。！？" and not (ours[-1] == "." and ours[-2:-1] in set(" .!?。！？")), ours
        assert ours == " ".join(ours.split()) and ours == ours.capitalize()
        words = (case["input"] or "").strip(" \t\r\n.")
        if not words:
            assert ours == prompt.clean_instruction(case["episode_tasks_0"] or prompt.DEFAULT_INSTRUCTION)
        elif words[-1].isalnum() and case["output"][-2].isalnum() and "\t" not in words:
            assert ours == case["output"], "a plain sentence reads as in the release"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("open drawer . ", "Open drawer."),
        ("close the door!", "Close the door!"),
        ("Where is it?", "Where is it?"),
        ("pick the cup。", "Pick the cup。"),
        ("\tTab and space \t.", "Tab and space."),
        ("put  it   down...", "Put it down."),
        (" . ", prompt.DEFAULT_INSTRUCTION),
        ("", prompt.DEFAULT_INSTRUCTION),
        (None, prompt.DEFAULT_INSTRUCTION),
    ],
)
def test_none_instruction(raw: str | None, clean: str) -> None:
    assert prompt.clean_instruction(raw) == clean
    assert prompt.clean_instruction(raw, "the EPISODE") == (
        "The episode." if clean == prompt.DEFAULT_INSTRUCTION else clean
    )


@needs_case
def test_golden_none_one_sentence_is_one_task(cases: dict[str, Any]) -> None:
    for case in cases["crl_task_ids"]:
        text = case["input"]
        assert prompt.task_id(text) == prompt.task_id(prompt.clean_instruction(text)) == prompt.task_id(f" {text} . ")
        assert -(2**63) <= prompt.task_id(text) < 2**63
    ids = {prompt.clean_instruction(c["input"]): prompt.task_id(c["input"]) for c in cases["crl_task_ids"]}
    assert len(set(ids.values())) == len(ids), "other sentences are other tasks"
    assert prompt.task_id("open it", "prts") != prompt.task_id("open it.", "prts"), "which the release tells apart"


@needs_case
def test_golden_none_camera_names_replace_whole_words(cases: dict[str, Any]) -> None:
    for case in cases["camera_names"]:
        ours = camera_label(case["input"])
        words = ours.lower().split()
        assert words.count("camera") == 1 and not [w for w in words if w != "camera" and "camera" in w], ours
        if not any("camera" in word and word != "camera" for word in case["output"].lower().split()):
            assert ours == case["output"], "names the release gets right stay"
    assert camera_label("camera_front") == "Camera front" and camera_label("images_rgb_LEFT") == "Camera rgb left"


@needs_case
def test_golden_none_states_below_the_range_are_told(cases: dict[str, Any]) -> None:
    """-1.002 is below the range, not in its lowest bin; bfloat16 is widened before it is cut; 1e9 is at the top."""
    for case in cases["state_to_text"]:
        state = torch.tensor([float(v) for v in case["normalized_state"]]).to(getattr(torch, case["dtype"]))
        if not torch.isfinite(state).all():
            with pytest.raises(DataError, match="not finite"):
                prompt.state_bins(state)
        state = state[torch.isfinite(state)]
        bins = prompt.state_bins(state)
        # float32 as in the release: 0.01 of a bin is beyond its digits near a bin's edge
        exact = np.clip((state.double().numpy() + 1) / 2 * prompt.STATE_BINS, -1, prompt.STATE_BINS)
        assert ((bins <= exact + 1e-3) & (exact < bins + 1 + 1e-3)).all(), case
        assert (bins[state.float().numpy() < -1] == -1).all() and (bins[state.float().numpy() >= 1] == 1000).all()
    assert prompt.state_bins(np.array([-1.002, -1.0, 1e9, -1e9], np.float32)).tolist() == [-1, 0, 1000, -1]


@needs_case
def test_golden_none_writes_the_nearest_coefficient(cases: dict[str, Any], tmp_path: Path) -> None:
    """The release drops coefficients that its vocabulary cannot write, after which the tokens decode to nothing."""
    settings = {name: cases["fast_tokenizer"][name] for name in ("scale", "vocab_size", "min_token")}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_bytes((CASE / "fast_tokenizer.json").read_bytes())
    (tmp_path / "processing_action_tokenizer.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    ours, theirs = (FastTokenizer.from_published(tmp_path, compat) for compat in ("none", "prts"))
    wild = np.full((1, 4, 2), 40.0)
    (tokens,) = ours.encode_many(wild)
    back = ours.decode(tokens, 4, 2)
    assert (back > 0).all() and back[0, 0] == pytest.approx(ours.writable[-1] / ours.scale / 2)
    (dropped,) = theirs.encode_many(wild)
    assert (theirs.decode(dropped, 4, 2) == 0).all()
    with pytest.raises(DataError, match="whole chunk"):
        ours.decode(dropped, 4, 2)
