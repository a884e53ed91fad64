"""`prts bench attention`: the kernels' results as rows with goals, and the CPU's own comparison."""

from __future__ import annotations

import numpy as np
import pytest

from prts_core.bench import attention
from prts_kernels.bench import goals, packs
from prts_kernels.bench.timing import TimingPlan


def pretended(device: str = "NVIDIA H200", peer: str = "peer") -> dict:
    """triton 0.38 ms and 1.2 ms, the peer 0.4 and 1.0, flex 1.2 and 3; slower by a tenth in samples of 1024."""
    rows = []
    for pack, mean in goals.PACKS:
        for name, group, forward, backward in (
            ("triton", "ours", 0.38, 1.2),
            ("fa3 causal", peer, 0.4, 1.0),
            ("flex", "ours", 1.2, 3.0),
        ):
            slower = 1.1 if mean == 1024 and name == "triton" else 1.0
            for mode, ms in (("forward", forward), ("backward", backward), ("both", forward + backward)):
                rows.append(
                    {
                        "contender": name,
                        "group": group,
                        "pack": pack,
                        "mean": mean,
                        "mode": mode,
                        "head_dim": 128,
                        "dtype": "bfloat16",
                        "device_type": "cuda",
                        "median_ms": ms * slower,
                    }
                )
    goals.finish(rows)
    judged = goals.evaluate(rows, "triton", device, {"gpu_us": 30.0, "host_us": 1.0})
    return {"rows": rows, "chosen": "triton", "goals": judged}


def test_rows_are_the_goals_at_the_worst_pack() -> None:
    rows = {
        row.what.removeprefix("triton, ").removesuffix("; peer: the goal"): row
        for row in attention.rows_of(pretended())
    }
    forward = rows["forward, 32k pack"]
    assert forward.ratio == pytest.approx(0.38 * 1.1 / 0.4 / 1.02) and forward.goal == "<= 1.0" and not forward.met
    assert rows["forward, 32k / 771, H200"].met and rows["backward, 32k / 771, H200"].met
    flex = rows["forward, against FlexAttention Triton (stretch: at 8k)"]
    assert flex.met and flex.better == "higher" and flex.ours == pytest.approx(1.2 / (0.38 * 1.1))
    assert not rows["mask metadata of a step, on the GPU"].met
    assert len(rows) == 8


def test_without_a_hopper_peer_or_an_h200_nothing_is_compared_with_them() -> None:
    rows = [row.what for row in attention.rows_of(pretended("NVIDIA H100", peer="shown"))]
    assert len(rows) == 3 and "FlexAttention" in rows[0] and all("mask metadata" in what for what in rows[1:])


@pytest.mark.parametrize(("lengths", "row"), [([24] * 4, 24), ([40, 24], 64)])
def test_the_cpus_contenders_run(lengths: list[int], row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CPU_PLAN", TimingPlan(each_ms=1, rounds=1, warmup=1, pause_s=0))
    times = attention.cpu_times(packs.pack_of(lengths, np.random.default_rng(0)), row)
    assert len(times) == 3 and min(times) > 0
