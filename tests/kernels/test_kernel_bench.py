"""The kernels' benchmarks (kernels/bench): what is wrong has no time, targets, the record that impl="auto" reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prts_kernels.role_attention import IMPLEMENTATIONS, autotune_table, select, varlen
from prts_kernels.role_attention.attention_spec import AttentionSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels" / "bench"))
import harness
import info_nce
import packs
import role_attention
import targets
from baselines import BASELINES, Differentiated, build
from correctness import judge, poisoned

CPU = torch.device("cpu")
H200 = {"name": "NVIDIA H200", "type": "cuda"}
RNG = np.random.default_rng(0)


def times(**ms: float) -> list[dict]:
    """Of a pretended run on a GPU: (forward, backward, both) cost 1, 2 and 3 x `ms` in every pack."""
    return [
        {
            "cell": cell.label,
            "pack": cell.total,
            "mean": cell.mean,
            "head_dim": cell.shape.head_dim,
            "mode": mode,
            "baseline": name.replace("_", " "),
            "ms": cost * factor,
        }
        for cell in role_attention.CELLS["cuda"]
        for name, cost in ms.items()
        for mode, factor in (("forward", 1.0), ("backward", 2.0), ("both", 3.0))
    ]


def test_packs_fill_and_odd_ones_have_every_length() -> None:
    pack = packs.random_pack(3000, 300, RNG)
    assert pack.spans[0, 0] == 0 and pack.spans[-1, -1] == pack.total == 3000 and len(pack.spans) == 10
    assert (np.diff(pack.spans, axis=1) >= 0).all() and pack.pairs(causal=False) < pack.pairs(causal=True)
    odd = packs.odd_pack(RNG, CPU)
    assert sorted(odd.spans[:, 4] - odd.spans[:, 0]) == [1, 1, 63, 65, 127, 128, 129]
    assert (odd.spans[:, 2] == odd.spans[:, 4]).sum() >= 3, "some without contrastive parts"


def test_every_implementation_and_every_stock_kernel_is_timed() -> None:
    assert {b.module for b in BASELINES.values()} - {None, "auto"} == IMPLEMENTATIONS.keys() - {"reference"}
    assert {b.backend for b in BASELINES.values() if b.module == "split"} == varlen.BACKENDS.keys()


@pytest.mark.parametrize("name", [name for name, b in BASELINES.items() if "cpu" in b.devices])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_runs_on_a_cpu_is_right_by_the_rule(name: str, dtype: torch.dtype) -> None:
    pack = packs.pack_of([48] * 3, RNG, rows=3)
    shape = packs.Shape(4, 2, 16, dtype)
    spans = pack.causal_spans if BASELINES[name].peer else pack.spans
    given = packs.tensors(pack, shape, CPU, 1)
    found = judge(build(name, pack, CPU, 16), spans, given)
    assert found["why"] == "" and found["same_bits"] and found["error"] > 0
    other = pack.spans if BASELINES[name].peer else pack.causal_spans
    assert "wrong by the rule: out " in judge(build(name, pack, CPU, 16), other, given)["why"]


def test_what_is_not_written_is_wrong() -> None:
    pack = packs.pack_of([40], RNG)
    right = build("auto", pack, CPU, 16)

    class Forgets(Differentiated):
        def backward(self, state, dout):
            dq, dk, dv = super().backward(state, dout)
            partly = torch.empty_like(dk)
            partly[1:] = dk[1:]
            return dq, partly, dv

    found = judge(Forgets(right.attend), pack.spans, packs.tensors(pack, packs.Shape(2, 1, 16, torch.float32), CPU, 1))
    assert found["why"].startswith("wrong by the rule: dk nan > ")
    with poisoned(CPU):
        assert torch.empty(9).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_rows_are_the_targets() -> None:
    found = {
        row["what"]: row
        for row in targets.rows(times(triton=0.4, flex=1.2, fa3_causal=0.41, split_fa3=0.5), H200, {"GPU": 30.0})
    }
    assert len(found) == 2 + 2 + 2 + 6 + 2 + 1
    forward = found["triton, forward, 32768 / 771, head_dim 128: beside fa3 causal"]
    assert forward["met"] and forward["ratio"] == pytest.approx(0.4 / 0.41) and forward["goal"] == "<= 1.02"
    assert found["triton, forward, 8192 / 1024, head_dim 128: beside flex"]["ratio"] == pytest.approx(1 / 3)
    assert not found["mask metadata, GPU; peer: the target"]["met"]
    alone = targets.rows(times(triton=0.4), {"name": "NVIDIA H100", "type": "cuda"}, {})
    assert alone == [], "no peer, no row; milliseconds are an H200's"


def test_what_is_recorded_is_what_auto_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"Other": {"order": {"128": ["sdpa"]}, "date": "2026-01-01"}}))
    results = {
        "device": H200,
        "versions": {"torch": "2.13", "triton": "3.7"},
        "date": "2026-11-30T00:00:00",
        "tiles": {"128": {"dq": [64, 64, 4, 2, 0]}},
        "times": times(triton=0.4, split_torch=0.6, split_fa4=0.5, flex=0.7, fa4_causal=0.1),
    }
    role_attention.record(results, path)
    monkeypatch.setattr(autotune_table, "PATH", path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    for cached in (autotune_table.table, select.choose):
        cached.cache_clear()
    spec = AttentionSpec(torch.device("cuda"), (torch.bfloat16,) * 3, 128, of_samples=True, grad=True)
    assert autotune_table.order(spec)[0] == ("triton", "split", "flex", "sdpa")
    assert autotune_table.order(replace(spec, head_dim=64))[0] == ("triton", "split", "flex", "sdpa")
    assert autotune_table.tiles("NVIDIA H200", 128) == {"dq": [64, 64, 4, 2, 0]}
    assert autotune_table.table().keys() == {"Other", "NVIDIA H200"}
    for cached in (autotune_table.table, select.choose):
        cached.cache_clear()
    with pytest.raises(RuntimeError, match="some packs were not timed"):
        role_attention.record(results | {"times": results["times"][:-15]}, path)


def test_a_process_that_ends_or_hangs_costs_its_baseline_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    monkeypatch.setattr(role_attention, "__file__", str(script))
    args = type("Args", (), {"device": "cpu", "seed": 1, "quick": True})()
    for code, why in (
        ("import os; os.abort()", "exit status -6"),
        ("raise ValueError('this is why')", "this is why"),
        ("import time; time.sleep(60)", "not ready after 2 s"),
    ):
        script.write_text(code)
        assert why in role_attention.in_a_process(args, "check", "auto", 2.0)["why"]


def test_on_a_cpu_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ["--device", "cpu", "--quick", "--only", "auto", "sdpa causal", "--out", str(tmp_path)]
    assert role_attention.main(given) == 0
    results = json.loads(next(tmp_path.glob("role_attention-cpu-*.json")).read_text())
    assert {check["why"] for check in results["checks"].values()} == {""} and results["left_out"] == {}
    assert [row["goal"] for row in results["rows"]] == ["<= 1.18"] * 2
    assert role_attention.main([*given, "--record"]) == 1
    assert "on a CPU auto is sdpa" in capsys.readouterr().err


def test_info_nce_on_a_cpu_in_one_command(tmp_path: Path) -> None:
    assert info_nce.main(["--device", "cpu", "--sizes", "1024", "--out", str(tmp_path)]) == 0
    results = json.loads(next(tmp_path.glob("info_nce-cpu-*.json")).read_text())
    assert [row["unit"] for row in results["rows"]] == ["ms", "MB"] and results["rows"][1]["met"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_the_device_one_line_says_so(capsys: pytest.CaptureFixture) -> None:
    assert role_attention.main(["--device", "cuda"]) == 1
    assert capsys.readouterr().err == "role_attention.py: no CUDA device; --device cpu times what runs on a processor\n"


def test_tables_and_turns() -> None:
    assert harness.table([{"a": 0.12345, "b": "x"}]) == "a      b\n0.123  x"
    turns: list[str] = []
    calls = {name: (lambda name=name: turns.append(name)) for name in ("one", "two")}
    found = harness.interleaved(calls, CPU, rounds=2, each_ms=0.1)
    assert found["one"]["low"] <= found["one"]["ms"] <= found["one"]["high"]
    assert [a for a, b in zip(turns, [None, *turns], strict=False) if a != b] == ["one", "two"] * 2


TUNE = """
import sys; sys.path.insert(0, sys.argv[1].rpartition("/")[0])
import numpy as np, torch, tune
from functools import partial
from packs import Shape, pack_of
from prts_kernels.role_attention.triton import CANDIDATES
for kernel in CANDIDATES:
    CANDIDATES[kernel][64] = CANDIDATES[kernel][64][-2:]
tune.Shape, tune.random_pack = partial(Shape, 2, 1, dtype=torch.float16), lambda total, mean, rng: pack_of([48], rng)
tune.milliseconds = lambda call, device, ms: {64: 1.0, 128: 2.0}[call.args[1].queries]
found = tune.fastest_tiles(torch.device("cpu"), 1, True, "64")
assert set(found["tiles"]) == {"forward", "dkdv", "dq"} and found["refused"] == {}, found
assert found["tiles"]["forward"] == [64, 64, 4, 3, 0], found
"""


@pytest.mark.slow
def test_tiles_are_compared_and_timed_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TUNE, harness.__file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
