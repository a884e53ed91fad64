"""The GPU session: a part that fails, hangs or says nothing costs nobody else; at toy size all of it runs on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from prts_core.bench import gpu as gpu_session
from prts_core.bench import gpu_parts
from prts_core.bench.gpu_parts import PARTS, VOCABULARY, Setup, observation, random_network, synthetic_policy
from prts_core.bench.train import Rows
from prts_core.cli.main import main
from prts_core.io.files import read_json

SCRIPTS = {
    "right": 'print("chatter"); print(\'{"what": "a", "value": 1.5, "unit": "ms", "note": ""}\')',
    "breaks": 'print(\'{"what": "b", "value": null, "unit": "ms", "note": "out of memory"}\', flush=True); 1 / 0',
    "hangs": "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, file=sys.stderr, flush=True); "
    'print(\'{"what": "c", "value": 2, "unit": "s", "note": ""}\', flush=True); time.sleep(60)',
}


def ended(pid: int) -> bool:
    """Gone, or a zombie that nobody fetches here."""
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_every_part_is_told_whatever_becomes_of_it(tmp_path: Path) -> None:
    limits = {"breaks": 30.0, "hangs": 2.0, "right": 30.0}
    begin = time.monotonic()
    found = gpu_session.session(
        tmp_path,
        Console(quiet=True),
        limits=limits,
        command=lambda part, toy: [sys.executable, "-c", SCRIPTS[part]],
    )
    assert time.monotonic() - begin < 40
    result = read_json(found)
    assert [(row["part"], row["what"], row["value"]) for row in result["rows"]] == [
        ("breaks", "b", None),
        ("hangs", "c", 2),
        ("right", "a", 1.5),
    ]
    outcomes = {part: end["outcome"] for part, end in result["parts"].items()}
    assert outcomes["breaks"] == "exit status 1: ZeroDivisionError: division by zero"
    assert (outcomes["hangs"], outcomes["right"]) == ("stopped after 2 s", "done")
    child = int((tmp_path / "bench" / "gpu-hangs.log").read_text().split()[0])
    assert ended(child), "what a part started ends with it"
    table = (tmp_path / "bench" / "gpu.txt").read_text()
    assert "out of memory" in table and "ZeroDivisionError" in table and result["machine"]["torch"] == torch.__version__


def test_a_session_without_time_left_says_so(tmp_path: Path) -> None:
    found = gpu_session.session(
        tmp_path, Console(quiet=True), minutes=0.0, command=lambda part, toy: [sys.executable, "-c", "1 / 0"]
    )
    assert {end["outcome"] for end in read_json(found)["parts"].values()} == {"no time left"}
    assert set(read_json(found)["parts"]) == set(gpu_session.LIMITS) == set(PARTS)
    assert sum(gpu_session.LIMITS.values()) <= 60 * gpu_session.MINUTES


def test_the_synthetic_policy_acts() -> None:
    setup = Setup(torch.device("cpu"), True)
    data = Rows(4, config=setup.config())
    made = synthetic_policy(data, setup)
    assert made.dtype == "bf16" and made.model.crl_logit_scale.dtype == torch.float32
    chunks, values = made.act_and_value(observation(made, data, 2), data.texts[:2], [0, 1])
    assert chunks.shape == (2, data.config.chunk_length, 7) and np.isfinite(chunks).all()
    assert values.shape == (2,) and np.isfinite(values).all()


@pytest.mark.parametrize("gpu, toy, said", [(None, False, True), ("H200", False, False), ("H200", True, True)])
def test_toy_sizes_are_said_wherever_there_is_no_gpu(tmp_path: Path, monkeypatch, gpu, toy: bool, said: bool) -> None:
    """The parts are told what the file tells."""
    monkeypatch.setattr(gpu_session, "machine", lambda: {"gpu": gpu})
    asked: list[bool] = []

    def command(part: str, toy: bool) -> list[str]:
        asked.append(toy)
        return [sys.executable, "-c", SCRIPTS["right"]]

    found = gpu_session.session(tmp_path, Console(quiet=True), toy=toy, limits={"right": 30.0}, command=command)
    assert asked == [said] and read_json(found)["toy"] is said
    assert ("toy sizes: no measurement" in found.with_suffix(".txt").read_text()) is said


@pytest.mark.parametrize("part, status", [("right", 0), ("breaks", 1)])
def test_the_exit_status_tells_whether_every_part_was_done(tmp_path: Path, monkeypatch, part: str, status: int) -> None:
    own = partial(
        gpu_session.session, limits={part: 30.0}, command=lambda part, toy: [sys.executable, "-c", SCRIPTS[part]]
    )
    monkeypatch.setattr(gpu_session, "session", own)
    assert main(["bench", "gpu", "--outputs", str(tmp_path)]) == status
    assert (tmp_path / "bench" / "gpu.txt").exists()


def test_unequal_losses_are_told_and_fail(monkeypatch) -> None:
    monkeypatch.setattr(gpu_parts, "EQUAL", -1.0)
    figures = gpu_parts.equality(Setup(torch.device("cpu"), True))
    assert "NOT EQUAL" in next(figures).note
    with pytest.raises(SystemExit, match="not equal"):
        next(figures)


def test_the_model_of_the_release_is_made_on_the_device_in_the_dtype_asked_for() -> None:
    config = Setup(torch.device("cpu"), False).config()
    model = random_network(config, VOCABULARY, 5, torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 5_107_108_897  # as the public code counts
    kinds = {name: p.dtype for name, p in model.named_parameters() if p.dtype != torch.bfloat16}
    assert kinds == {"crl_logit_scale": torch.float32}


@pytest.mark.parametrize(
    "version, told", [("3.10", "3.11 or 3.12"), ("3.11", "gpu_session.sh --wheels {wheels} 3.11"), ("3.12", "pip")]
)
def test_the_script_looks_at_the_version_of_python_first(tmp_path: Path, version: str, told: str) -> None:
    python, wheels = tmp_path / "python", tmp_path / "wheels"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {version} || {{ echo "$2" >&2; exit 1; }}\n')
    python.chmod(0o755)
    wheels.mkdir()
    (wheels / "regex-2026.1.1-cp312-cp312-manylinux_2_17_x86_64.whl").touch()
    command = [str(Path(__file__).parents[2] / "scripts" / "gpu_session.sh"), str(tmp_path / "out"), str(wheels)]
    done = subprocess.run(command, env=os.environ | {"GPU_PYTHON": str(python)}, capture_output=True, text=True)
    assert done.returncode == 1 and told.format(wheels=wheels) in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("part", ["equality", "policy", "sft", "pretrain", "attention"])
def test_a_part_runs_at_toy_size(part: str, tmp_path: Path) -> None:
    found = gpu_session.session(tmp_path, Console(quiet=True), toy=True, limits={part: 240.0})
    result = json.loads(found.read_text())
    assert result["parts"][part]["outcome"] == "done", (tmp_path / "bench" / f"gpu-{part}.log").read_text()[-2000:]
    assert result["rows"] and all(row["value"] is not None for row in result["rows"]), result["rows"]
