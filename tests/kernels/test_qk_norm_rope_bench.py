"""The benchmark of QK norm and rotation: its yardstick is the specification, and only a win everywhere is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prts_kernels.bench import qk_norm_rope
from prts_kernels.qk_norm_rope import select


def test_eager_is_the_specification_in_fp32() -> None:
    inputs = qk_norm_rope.tensors(5, torch.device("cpu"), 0)
    pairs = (qk_norm_rope.outcome(qk_norm_rope.contender(name), inputs) for name in ("eager", "reference"))
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_a_job_refuses_a_wrong_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        qk_norm_rope, "contender", lambda name: _without_norm if name == "liger" else qk_norm_rope.eager
    )
    lines: list[dict] = []
    qk_norm_rope.task({"device": "cpu", "contender": "liger", "tokens": 4}, lines.append)
    assert lines[-1]["failed"].startswith("wrong") and not any("time" in line for line in lines)


def _without_norm(q, k, q_weight, k_weight, cos, sin):
    return q * q_weight * cos[:, None] + 0 * sin[:, None], k * k_weight * cos[:, None]


@pytest.mark.parametrize(("ours", "impl"), [(1.0, "triton"), (3.0, "reference")])
def test_only_a_win_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: float, impl: str) -> None:
    monkeypatch.setattr(select, "MEASURED", tmp_path / "measured.json")
    rows = [
        {"contender": name, "tokens": 8, "time": {"both": {"median_ms": ms}, "forward": {"median_ms": ms}}}
        for name, ms in (("triton", ours), ("compiled", 2.0))
    ]
    results = {"rows": rows, "failed": {}, "device": {"name": "NVIDIA X", "type": "cuda"}, "date": "2026-11-21T00"}
    qk_norm_rope.record(results)
    assert json.loads(select.MEASURED.read_text()) == {"NVIDIA X": {"impl": impl, "date": "2026-11-21"}}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    select._fastest.cache_clear()
    assert select._fastest(torch.device("cuda", 0)) == impl and select._fastest(torch.device("cpu")) == "reference"
    select._fastest.cache_clear()
    assert f"{2 * 8 * 128 * 2 * 41 / ours / 1e9:.1e}" in qk_norm_rope.table(results)
