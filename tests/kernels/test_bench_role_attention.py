"""The benchmark of role attention as one command: goals, tables, what is recorded, and what a crash costs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prts_kernels.bench import goals, role_attention, run, tables, tune, worker
from prts_kernels.bench.contenders import CONTENDERS
from prts_kernels.bench.report import newest, replace_block
from prts_kernels.bench.role_attention import RESULTS, main, put_into, record
from prts_kernels.bench.run import Run
from prts_kernels.role_attention import IMPLEMENTATIONS, measured
from prts_kernels.role_attention.triton import CANDIDATES, Blocks
from prts_kernels.role_attention.varlen import BACKENDS

ROOT = Path(__file__).resolve().parents[2]


def row(contender: str, pack: int, mean: int, mode: str, ms: float, head_dim: int = 128, device: str = "cuda") -> dict:
    return {
        "contender": contender,
        "group": CONTENDERS[contender].group,
        "pack": pack,
        "mean": mean,
        "mode": mode,
        "median_ms": ms,
        "p20_ms": ms,
        "p80_ms": ms,
        "host_us": 9.0,
        "tflops": 400.0,
        "head_dim": head_dim,
        "dtype": "bfloat16",
        "device_type": device,
        "max_error": 0.01,
        "note": "",
        "runs": 9,
    }


def a_run(triton: float = 0.96, split: float = 1.01) -> dict:
    """Results of a pretended run on an H200: the peer takes 0.4 ms forward, 1 ms backward, in every pack."""
    rows = []
    for pack, mean in goals.PACKS:
        for mode, ms in (("forward", 0.4), ("backward", 1.0), ("both", 1.4)):
            rows += [
                row("fa3 causal", pack, mean, mode, ms),
                row("cudnn causal", pack, mean, mode, ms * 1.1),
                row("torch causal", pack, mean, mode, ms * 0.5),
                row("triton", pack, mean, mode, ms * triton),
                row("split fa3", pack, mean, mode, ms * split),
                row("flex", pack, mean, mode, ms * 3),
            ]
    goals.finish(rows)
    ranking, metadata = goals.ranking(rows, 128), {"host_us": 60.0, "gpu_us": 15.0}
    return {
        "name": "role_attention",
        "date": "2026-11-21T00:00:00+00:00",
        "seed": 1,
        "rows": rows,
        "ranking": ranking,
        "device": {"name": "NVIDIA H200", "type": "cuda"},
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "chosen": ranking[0],
        "goals": goals.evaluate(rows, ranking[0], "NVIDIA H200", metadata),
        "metadata": metadata,
        "excluded": {"fa4 causal": "flash-attn-4 is not installed"},
        "faults": [],
        "same_bits": {"triton": "same"},
        "tuning": {"blocks": {"128": {"forward": [128, 64, 8, 3]}}},
    }


def test_the_peer_is_the_fastest_hopper_kernel_and_no_other() -> None:
    results = a_run()
    assert {r["peer"] for r in results["rows"]} == {"fa3 causal"}  # torch's own is faster here, but no peer
    assert {round(r["ratio"], 3) for r in results["rows"] if r["contender"] == "triton"} == {0.96}
    assert results["ranking"] == ["triton", "split fa3", "flex"]
    alone = [row("triton", 8192, 771, "both", 1.0), row("torch causal", 8192, 771, "both", 1.0)]
    goals.finish(alone)
    assert all(r["ratio"] is None and r["peer"] is None for r in alone)


def test_goals_say_how_far_they_are_met() -> None:
    met = {g["what"]: (g["met"], g["value"]) for g in a_run()["goals"]}
    assert met["forward, 32k pack"] == ("target", pytest.approx(0.96))
    assert met["backward, 32k pack"] == ("stretch", pytest.approx(0.96))
    assert met["forward + backward, 8k pack"][0] == "stretch"
    assert met["forward, 32k / 771, H200"] == ("target", pytest.approx(0.384))
    assert met["backward, 32k / 771, H200"][0] == "stretch"
    assert met["forward, against FlexAttention Triton (stretch: at 8k)"][0] == "target"
    assert met["mask metadata of a step, on the GPU"] == ("must", 15.0)
    assert met["mask metadata of a step, in the training process"] == ("missed", 60.0)
    slower = {g["what"]: g["met"] for g in a_run(triton=1.2, split=1.1)["goals"]}
    assert slower["forward, 32k pack"] == "missed"
    assert {g["met"] for g in goals.evaluate([], None, "", {})} == {"not measured"}


def test_one_bad_pack_misses_the_goal() -> None:
    rows = a_run()["rows"]
    worse = next(
        r for r in rows if (r["contender"], r["pack"], r["mean"], r["mode"]) == ("triton", 32768, 1024, "forward")
    )
    worse["median_ms"] *= 2
    goals.finish(rows)
    assert goals.evaluate(rows, "triton", "NVIDIA H200", {})[0]["met"] == "missed"


def test_one_without_a_time_for_every_pack_is_not_ranked() -> None:
    rows = [r for r in a_run()["rows"] if r["contender"] != "triton" or r["pack"] != 16384]
    assert goals.ranking(rows, 128) == ["split fa3", "flex"]


def test_tables() -> None:
    results = a_run()
    text = tables.markdown(results)
    assert (
        text.count("\n| 32k / ") == 6
        and "| 32k / 771 | forward | 0.384 | 0.384 | 0.384 | 400 | 0.960 | 0.0100 |" in text
    )
    assert "NVIDIA H200; torch 2.11.0, triton 3.6.0; 2026-11-21" in text and "not measured" not in text
    shown = tables.console(results)
    assert "fa3 causal, forward, 32k: 400 TFLOP/s; published for an H100: 584" in shown
    assert "left out: fa4 causal: flash-attn-4 is not installed" in shown
    for r in results["rows"]:
        r["ratio"] = None
    assert "no Hopper peer" in tables.markdown(results)


def test_without_results_every_cell_says_so() -> None:
    lines = [line for line in tables.markdown(None).splitlines() if line.startswith("| ") and " / " in line[:12]]
    cells = [line.split(" | ") for line in lines if "pack" not in line[:8]]
    assert len(cells) == 18 and all(c[2:] == ["not measured"] * 5 + ["not measured |"] for c in cells)


def test_the_readme_shows_the_newest_results(tmp_path: Path) -> None:
    readme = ROOT / "kernels" / "README.md"
    expected = tables.markdown(newest(RESULTS, "role_attention", "cuda"))
    assert replace_block(readme.read_text(), "role_attention", expected) == readme.read_text(), (
        "python3 kernels/bench/role_attention.py --markdown kernels/README.md writes it anew"
    )
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text())
    put_into(copy, RESULTS)
    assert copy.read_text() == readme.read_text()


def test_what_is_recorded_is_what_auto_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"Other": {"order": {"128": ["sdpa"]}, "date": "2026-01-01"}}))
    record(a_run(), path)
    monkeypatch.setattr(measured, "PATH", path)
    for cached in (measured.table, measured.order):
        cached.cache_clear()
    order, why = measured.order("NVIDIA H200", 128)
    assert order[:3] == ("triton", "split", "flex") and order[-1] == "sdpa" and "2026-11-21" in why
    assert measured.blocks("NVIDIA H200", 128) == {"forward": [128, 64, 8, 3]}
    assert set(measured.table()) == {"Other", "NVIDIA H200"}
    for cached in (measured.table, measured.order):
        cached.cache_clear()


def test_every_implementation_and_backend_is_a_contender() -> None:
    assert {c.module for c in CONTENDERS.values()} - {None} == set(IMPLEMENTATIONS)
    assert {c.backend for c in CONTENDERS.values() if c.module == "split"} == set(BACKENDS)


def test_one_that_crashes_while_it_is_timed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are pretended: the process dies in the turn of `split eager`, and is started again without it."""
    asked: list[list[str]] = []

    def pretend(jobs, folder, at_once, deadline, on_line=None, on_end=None):
        found = {}
        for job in jobs:
            outcome = worker.Outcome(job.name)
            if job.task.endswith("probe:roll_call"):
                device = {"name": "cpu", "type": "cpu", "architecture": "x", "cores": 1}
                outcome.lines = [{"machine": {"device": device, "versions": {}}}]
            elif job.task.endswith("probe:check"):
                ok = job.arguments["contender"] != "reference"
                outcome.lines = [{"case": "odd lengths", "ok": ok, "why": "wrong by the rule"}]
            else:
                names, [cell, *_] = job.arguments["contenders"], job.arguments["cells"]
                asked.append(names)
                crashed = "split eager" in names
                for line in [{"turn": names[0]}, *({"turn": "split eager"},) * crashed]:
                    on_line(job.name, line)
                if crashed:
                    outcome.reason = "crashed with SIGSEGV"
                else:
                    timed = row(names[0], cell["pack"], cell["mean"], "both", 1.0, 32, "cpu")
                    on_line(job.name, {"row": timed | {"dtype": "float32"}})
                    on_line(job.name, {"done": cell})
            found[job.name] = outcome
        return found

    monkeypatch.setattr(worker, "run", pretend)
    results = Run("cpu", tmp_path, tmp_path, seed=1, quick=True, only=["sdpa", "split eager", "reference"]).all()
    assert asked == [["split eager", "sdpa"], ["sdpa"]]
    assert results["excluded"] == {
        "reference": "wrong by the rule",
        "split eager": "while it was timed: crashed with SIGSEGV",
    }
    assert results["chosen"] == "sdpa" and len(results["rows"]) == 1
    [written] = tmp_path.glob("cpu-*.json")
    assert json.loads(written.read_text())["rows"] == results["rows"]


def test_a_whole_run_on_a_gpu_by_pretended_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase: checks of every contender, tiles compiled, timed, checked again, all packs, the record."""
    seen: dict[str, worker.Job] = {}
    versions = {"torch": "2.11.0", "triton": "3.6.0"}

    def answer(job: worker.Job, on_line) -> worker.Outcome:
        given, lines, reason = job.arguments, [], None
        if job.task.endswith("probe:roll_call"):
            lines = [{"machine": {"device": {"name": "NVIDIA H200", "type": "cuda"}, "versions": versions}}]
            lines.append({"unfit": {"fa3 causal": "flash-attn 3 is not installed"}})
        elif job.task.endswith("probe:check"):
            good = {"ok": True, "why": "", "errors": {"out": 0.01}, "same_bits": {"out": True, "dq": False}}
            lines = [{"case": f"odd {i}"} | good for i in range(len(given["shapes"]))]
            lines += [
                {"case": f"{c['pack']} / {c['mean']}, bfloat16 head_dim {c['shape']['head_dim']}"} | good
                for c in given["cells"]
            ]
            assert given["contender"] != "fa3 causal"
            if given["contender"] == "flex flash":
                lines, reason = [{"begin": "odd 0"}], "crashed with SIGABRT; last words: why"
        elif job.task.endswith("tune:compile_one"):
            tile = [128, 64, 8, given["number"]]
            lines = [
                {
                    "kernel": given["kernel"],
                    "number": given["number"],
                    "tile": tile,
                    "ok": given["number"] != 3,
                    "why": "out of resource",
                    "head_dim": given["cell"]["shape"]["head_dim"],
                }
            ]
        elif job.task.endswith("tune:time_all"):
            wanted = [[k, n] for k, n in tune.candidates(given["cell"]["shape"]["head_dim"]) if n != 3]
            assert given["passed"] == wanted
            lines = [
                {"kernel": kernel, "tile": [128, 64, 8, n], "median_ms": 1 + abs(n - 1)}
                for kernel, n in given["passed"]
            ]
        else:
            assert given["metadata"]["pack"] == 32768 and Path(given["measured"]).exists()
            on_line(job.name, {"metadata": {"host_us": 50.0, "gpu_us": 12.0}})
            for cell in given["cells"]:
                for name in given["contenders"]:
                    for mode in goals.MODES:
                        timed = row(name, cell["pack"], cell["mean"], mode, 1.0, cell["shape"]["head_dim"])
                        on_line(job.name, {"row": timed})
                on_line(job.name, {"done": cell})
        return worker.Outcome(job.name, lines, reason)

    def pretend(jobs, folder, at_once, deadline, on_line=None, on_end=None):
        assert len({j.name for j in jobs}) == len(jobs)
        seen.update({j.name: j for j in jobs})
        return {j.name: answer(j, on_line) for j in jobs}

    monkeypatch.setattr(worker, "run", pretend)
    results = Run("cuda", tmp_path, tmp_path, seed=1).all()
    wanted = len(tune.candidates(128)) + len(tune.candidates(64))
    assert sum(name.startswith("tiles of") for name in seen) == wanted >= 18
    assert results["excluded"] == {
        "flex flash": "crashed with SIGABRT; last words: why",
        "fa3 causal": "flash-attn 3 is not installed",
    }
    best = {kernel: [128, 64, 8, 1] for kernel in ("forward", "dkdv", "dq")}
    assert results["tuning"]["blocks"] == {"128": best, "64": best} and len(results["tuning"]["refused"]) == 3
    assert len(results["rows"]) == (len(CONTENDERS) - 6) * 7 * 3 and results["faults"] == []
    assert [r["max_error"] for r in results["rows"]] == [0.01] * len(results["rows"])
    assert results["same_bits"]["triton"] == "two runs differ in dq" and results["metadata"]["gpu_us"] == 12.0
    assert {g["met"] for g in results["goals"]} >= {"must", "missed"} and "not measured" not in tables.markdown(results)
    [written] = tmp_path.glob("nvidia-h200-*.json")
    assert json.loads(written.read_text())["chosen"] == results["chosen"]
    record(results, tmp_path / "record.json")
    assert set(json.loads((tmp_path / "record.json").read_text())["NVIDIA H200"]["order"]) == {"64", "128"}


@pytest.mark.slow
def test_tiles_are_compiled_checked_and_timed_in_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    shape = {"q_heads": 2, "kv_heads": 1, "head_dim": 64, "dtype": "float16"}
    given = {"cell": {"pack": 96, "mean": 48, "shape": shape}, "device": "cpu", "seed": 2}
    jobs = [
        worker.Job(
            f"tiles of {kernel}", "prts_kernels.bench.tune:compile_one", given | {"kernel": kernel, "number": 1}, 240
        )
        for kernel in ("dq", "dkdv")
    ]
    plan = {"each_ms": 1, "rounds": 1, "warmup": 1}
    passed = [["forward", 0], ["forward", 1], ["dq", 0]]
    jobs.append(worker.Job("tune", "prts_kernels.bench.tune:time_all", given | {"plan": plan, "passed": passed}, 240))
    found = worker.run(jobs, tmp_path, 2, time.monotonic() + 240)
    assert all(o.reason is None for o in found.values()), found
    for kernel in ("dq", "dkdv"):
        [line] = found[f"tiles of {kernel}"].lines
        assert line["ok"] and line["head_dim"] == 64 and Blocks(*line["tile"]) == CANDIDATES[kernel][64][1]
    timed = [line for line in found["tune"].lines if "median_ms" in line]
    assert [line["kernel"] for line in timed] == ["forward", "forward", "dq"]
    assert timed[0]["tile"] != timed[1]["tile"]


def test_the_options_that_need_no_device(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no marks")
    assert main(["--markdown", str(readme)]) == 1
    assert capsys.readouterr().err.startswith("role_attention.py: The text needs <!-- role_attention:begin -->")
    assert main(["--device", "cpu", "--only", "triton"]) == 1
    assert "none of triton is timed on cpu" in capsys.readouterr().err
    assert role_attention.LONGEST_S < 480 and run.GPU_SHAPE.head_dim == 128


@pytest.mark.slow
def test_the_command_on_a_cpu(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "kernels" / "bench" / "role_attention.py"), "--out", str(tmp_path)]
    done = subprocess.run(
        [*script, "--device", "cpu", "--quick", "--seed", "5", "--only", "sdpa", "split eager", "sdpa causal"],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "chosen, the fastest of ours: " in done.stdout
    [path] = tmp_path.glob("cpu-*.json")
    results = json.loads(path.read_text())
    assert results["seed"] == 5 and len(results["rows"]) == 9 and results["faults"] == []
    assert all(r["peer"] == "sdpa causal" and r["max_error"] < 1e-3 for r in results["rows"])


@pytest.mark.slow
def test_without_a_gpu_the_command_says_what_to_do(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = [sys.executable, str(ROOT / "kernels" / "bench" / "role_attention.py"), "--out", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "no CUDA device" in done.stderr and "--device cpu" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
