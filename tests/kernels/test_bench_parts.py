"""The benchmark's parts: a job's hang or crash costs that job, times are taken in turns, the rule can say no."""

from __future__ import annotations

import time
from pathlib import Path

import bench_jobs
import numpy as np
import pytest
import torch

from prts_kernels.bench import contenders, packs, probe, timing, worker
from prts_kernels.bench.contenders import CONTENDERS
from prts_kernels.bench.correctness import Yardstick, by_sample, eager, poisoned
from prts_kernels.bench.packs import Shape
from prts_kernels.bench.report import file_name, newest, number, replace_block, write_json
from prts_kernels.bench.timing import TimingPlan, measure
from prts_kernels.bench.worker import Job
from prts_kernels.role_attention import reference

CPU = torch.device("cpu")
SMALL = Shape(4, 2, 16, "float32")


# ---- jobs ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def own_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(bench_jobs.__file__).parent))


def test_a_hang_or_crash_costs_one_job(tmp_path: Path, own_jobs: None) -> None:
    jobs = [
        Job("talk", "bench_jobs:talk", {"words": ["a", "b"]}, 120),
        Job("crash", "bench_jobs:crash", {}, 120),
        Job("fail", "bench_jobs:fail", {}, 120),
        Job("hang", "bench_jobs:hang", {}, 5),  # until then it has started and said its word on a loaded machine, too
        Job("silent", "bench_jobs:hang", {}, 120, stall_s=0.8),
    ]
    heard: list[tuple[str, str]] = []
    found = worker.run(jobs, tmp_path, 3, time.monotonic() + 200, lambda job, line: heard.append((job, line["word"])))
    assert list(found) != [] and {n: o.reason is None for n, o in found.items()} == {
        "talk": True,
        "crash": False,
        "fail": False,
        "hang": False,
        "silent": False,
    }
    assert [line["word"] for line in found["talk"].lines] == ["a", "b"]
    assert found["crash"].lines == [{"word": "before"}] and "SIGSEGV" in str(found["crash"].reason)
    assert found["fail"].reason == "ValueError: this is why and advice"
    assert "stopped: not ready after" in str(found["hang"].reason) and found["hang"].lines == [{"word": "before"}]
    assert "silent for" in str(found["silent"].reason)
    assert ("talk", "b") in heard and ("hang", "before") in heard


def test_no_job_outlives_the_deadline(tmp_path: Path, own_jobs: None) -> None:
    jobs = [Job("hang", "bench_jobs:hang", {}, 60), Job("late", "bench_jobs:talk", {"words": []}, 60)]
    begin = time.monotonic()
    found = worker.run(jobs, tmp_path, 1, begin + 0.8)
    assert time.monotonic() - begin < 30  # the first alone takes a minute
    assert found["late"].reason == "not started: no time left" and found["hang"].reason is not None


# ---- time ----------------------------------------------------------------------------------------------------------
def test_contenders_take_turns_and_inputs_rotate() -> None:
    seen: list[str] = []
    calls = {name: [lambda n=name, i=i: seen.append(f"{n}{i}") or time.sleep(2e-3) for i in range(2)] for name in "ab"}
    plan = TimingPlan(each_ms=8, rounds=2, warmup=1, pause_s=0)
    timings, failed = measure(calls, CPU, plan)
    assert failed == {} and {n for n, t in timings.items() if 2 <= t.median_ms < 1000} == {"a", "b"}
    turns = "".join(s[0] for s in seen)
    assert turns.strip("a").count("ab") + turns.count("ba") >= 2  # a, b, a, b: never all of one first
    assert seen.count("a0") - seen.count("a1") in (-2, -1, 0, 1, 2)  # both sets, alike


def test_one_that_fails_is_named_and_the_others_are_timed() -> None:
    def broken() -> None:
        raise RuntimeError("out of\nmemory")

    timings, failed = measure({"good": [lambda: None], "bad": [broken]}, CPU, TimingPlan(each_ms=1, rounds=1))
    assert list(timings) == ["good"] and failed == {"bad": "RuntimeError: out of memory"}


def test_the_clock_of_a_gpu_by_a_pretended_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: events that tell the host's time, so that every line of the GPU's clock runs."""
    leads: list[float] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: leads.append(cycles / timing.CYCLES_A_SECOND))
    plan = TimingPlan(each_ms=20, rounds=2, pause_s=0)
    timings, failed = measure({"a": [lambda: time.sleep(2e-3)]}, torch.device("cuda", 0), plan)
    assert failed == {} and 2 <= timings["a"].median_ms < 1000
    assert timings["a"].runs >= 4 and max(leads) > 2 * 2e-3  # the lead covers the host's work of a whole turn


# ---- packs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("total", "mean"), [(8192, 771), (32768, 1024), (512, 64)])
def test_packs_are_full_and_near_their_mean(total: int, mean: int) -> None:
    pack = packs.random_pack(total, mean, np.random.default_rng(0))
    lengths = pack.spans[:, 4] - pack.spans[:, 0]
    assert pack.total == total == lengths.sum() and abs(lengths.mean() / mean - 1) < 0.1
    assert (lengths > 0.7 * mean).all() and (lengths < 1.4 * mean).all() and len(set(lengths.tolist())) > 3
    assert (0.6 if mean < 100 else 0.85) < pack.visible_pairs / pack.causal_pairs < 0.95
    assert pack.causal_pairs == pack.mask("cpu", causal=True).visible_pairs
    bounds, longest = pack.segments("cpu")
    assert bounds[-1] == total and longest == lengths.max() and len(bounds) == len(lengths) + 1


def test_odd_packs_hold_the_lengths_around_a_tile_and_samples_without_contrastive_parts() -> None:
    spans = packs.odd_pack(np.random.default_rng(0)).spans
    assert {1, 127, 128, 129} <= set((spans[:, 4] - spans[:, 0]).tolist())
    long = spans[spans[:, 4] - spans[:, 0] > 60]
    assert (long[:, 2] == long[:, 4]).any() and (long[:, 2] < long[:, 4]).any()


# ---- correctness ---------------------------------------------------------------------------------------------------
def test_the_rule_accepts_what_is_right_and_nothing_else() -> None:
    pack = packs.pack_of([40, 7, 33], np.random.default_rng(0))
    q, k, v, dout = packs.tensors(pack, Shape(4, 2, 16, "bfloat16"), CPU, 0)
    rule, scale = Yardstick.of(pack.spans, q, k, v, dout), 16**-0.5
    right = by_sample(pack.spans, reference.forward, scale, q, k, v, dout)
    assert rule.judge(right).ok and rule.judge(by_sample(pack.spans, eager, scale, q, k, v, dout)).ok
    causal = rule.judge(by_sample(pack.causal_spans, reference.forward, scale, q, k, v, dout))
    assert not causal.ok and "out" in causal.why
    right[2][3, 1, 5] = float("nan")  # a hole that a kernel left
    assert not rule.judge(right).ok and rule.judge(right).why.startswith("wrong by the rule: dk nan")


def test_the_exact_result_is_the_whole_pack_at_once() -> None:
    pack = packs.odd_pack(np.random.default_rng(1), tiny=True)
    q, k, v, dout = packs.tensors(pack, SMALL, CPU, 0)
    found = by_sample(pack.spans, reference.forward, 0.25, q, k, v, dout)[0]
    torch.testing.assert_close(found, reference.forward(q, k, v, pack.mask("cpu"), 0.25))


def test_memory_is_poisoned_inside_only() -> None:
    with poisoned(CPU):
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


# ---- contenders ----------------------------------------------------------------------------------------------------
def checked(name: str, **more) -> list[dict]:
    lines: list[dict] = []
    shape = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
    cells = [{"pack": 256, "mean": 64, "shape": shape}]
    given = {"contender": name, "device": "cpu", "seed": 3, "shapes": [shape], "cells": cells, "tiny": True} | more
    probe.check(given, lines.append)
    return [line for line in lines if "case" in line]


@pytest.mark.parametrize("name", [n for n, c in CONTENDERS.items() if "cpu" in c.devices and n != "flex"])
def test_every_contender_of_the_cpu_is_right(name: str) -> None:
    cases = checked(name)
    assert len(cases) == 2 and all(c["ok"] for c in cases), cases
    assert cases[1]["cell"]["pack"] == 256 and set(cases[1]["errors"]) == {"out", "dq", "dk", "dv"}


def test_a_wrong_contender_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from prts_kernels.role_attention import sdpa

    right = sdpa.forward
    monkeypatch.setattr(sdpa, "forward", lambda q, k, v, mask, scale: right(q, k, v, mask, scale * 1.01))
    cases = checked("sdpa")
    assert not cases[0]["ok"] and "wrong by the rule" in cases[0]["why"]


def test_one_for_a_gpu_says_why_it_is_left_out() -> None:
    [case] = checked("fa3 causal")
    assert case["unfit"] == "it is not timed on cpu"
    lines: list[dict] = []
    shape = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
    probe.roll_call({"device": "cpu", "shape": shape, "contenders": ["flex", "sdpa"]}, lines.append)
    assert lines[0]["machine"]["device"]["type"] == "cpu"
    assert lines[1] == {"unfit": {"flex": "torch's flex_attention has no backward on a CPU"}}


def test_cudnns_operators_take_what_is_handed_to_them() -> None:
    """Without a GPU the dispatcher refuses, but only after it has matched the arguments with the operator's schema."""
    pack = packs.pack_of([5, 3], np.random.default_rng(0))
    q, k, v, dout = packs.tensors(pack, SMALL, CPU, 0)
    for name in ("cudnn causal", "cudnn causal expanded"):
        attend = contenders.build(CONTENDERS[name], pack, CPU, 16)
        with pytest.raises(NotImplementedError, match="_cudnn_attention_forward"):
            attend.forward(q, k, v)
        state = (q, k, v, q, torch.zeros(8, 4)), (torch.zeros(1), torch.zeros(1)), 2
        with pytest.raises(NotImplementedError, match="_cudnn_attention_backward"):
            attend.backward(state, dout)


def test_rows_of_one_cell() -> None:
    lines: list[dict] = []
    shape = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
    cell = {"pack": 256, "mean": 64, "shape": shape}
    plan = {"each_ms": 2, "rounds": 1, "warmup": 1, "pause_s": 0}
    names = ["sdpa", "split eager", "sdpa causal"]
    given = {"contenders": names, "cells": [cell], "device": "cpu", "seed": 3, "plan": plan, "metadata": cell}
    probe.time_cells(given, lines.append)
    rows = [line["row"] for line in lines if "row" in line]
    assert {(r["contender"], r["mode"]) for r in rows} == {
        (n, m) for n in names for m in ("forward", "backward", "both")
    }
    ours, peer = (next(r for r in rows if r["contender"] == n and r["mode"] == "both") for n in ("sdpa", "sdpa causal"))
    assert ours["pairs"] < peer["pairs"] and ours["samples"] == 4
    assert ours["tflops"] == pytest.approx(4 * ours["pairs"] * 4 * 16 * 3.5 / ours["median_ms"] / 1e9, rel=1e-3)
    assert lines[-1] == {"done": cell}
    assert next(line for line in lines if "metadata" in line)["metadata"]["packing_us"] > 0


# ---- reports -------------------------------------------------------------------------------------------------------
def test_files_are_whole_and_the_newest_is_found(tmp_path: Path) -> None:
    for date, device, kind in (
        ("2026-11-21", "NVIDIA H200", "cuda"),
        ("2026-11-22", "NVIDIA H200", "cuda"),
        ("2026-11-23", "cpu", "cpu"),
    ):
        document = {"name": "x", "date": date, "device": {"type": kind}, "value": float("nan")}
        write_json(tmp_path / file_name(device, date), document)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cpu-2026-11-23.json",
        "nvidia-h200-2026-11-21.json",
        "nvidia-h200-2026-11-22.json",
    ]
    found = newest(tmp_path, "x", "cuda")
    assert found is not None and found["date"] == "2026-11-22" and found["value"] is None
    assert newest(tmp_path, "y", "cuda") is None


def test_a_marked_block_is_replaced_and_nothing_else() -> None:
    text = "a\n<!-- t:begin -->\nold\n<!-- t:end -->\nb\n"
    new = replace_block(text, "t", "new\nlines")
    assert new == "a\n<!-- t:begin -->\nnew\nlines\n<!-- t:end -->\nb\n"
    with pytest.raises(ValueError, match="once each"):
        replace_block("no marks", "t", "new")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (float("nan"), "not measured"),
        (0.12345, "0.123"),
        (584.2, "584"),
        (1234.5, "1234"),
        (1.0, "1.00"),
        (0, "0"),
        (3.2e-5, "3.2e-05"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text
