"""Real-time chunking against reference numbers (RLDX-1's form: through the Jacobian), and its laws.

LeRobot's guided form leaves the Jacobian out; it is not ours, and its cases are skipped.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from prts_core.config.places import shared_folder
from prts_core.io.errors import ConfigError
from prts_core.models.heads.flow import realtime
from prts_core.models.heads.flow.realtime import Committed
from prts_core.models.heads.flow.sampler import sample_actions

D = torch.float64


def read(name: str) -> Any:
    path = shared_folder() / "golden" / "rtc" / name
    if not path.exists():
        pytest.skip("no golden/rtc: set PRTS_SHARED to a folder that has it")
    return json.loads(path.read_text())


def test_golden_weights():
    for case in read("weights.json")["rldx"]:
        wanted = torch.tensor(case.get("float64") or case["batched"], dtype=D)
        delay = torch.tensor(case["d"]).reshape(-1)
        found = realtime.prefix_weights(delay, torch.full_like(delay, case["s"]), case["H"])
        assert torch.allclose(found.reshape(wanted.shape), wanted, atol=1e-7), case


def test_golden_coefficient():
    for case in read("guidance.json")["rldx"]:
        assert realtime.guidance(case["tau"], case["beta"]) == pytest.approx(case["c"], rel=1e-9), case


def test_golden_configurations():
    for case in read("rldx_config_validity.json"):
        if case["mode"] != "guided":
            continue  # the other modes' rules are of settings that do not exist here
        try:
            realtime.draw_delays(1, case["training_max_delay"], case["H"], torch.Generator())
            realtime.require_fits(case["d"], case["s"] or case["d"], case["H"])  # 0 there: as many as the delay
            fits = True
        except ConfigError:
            fits = False
        assert fits == case["valid"], case


class Field:
    def __init__(self) -> None:
        self.raw = read("toy_field.json")
        self.k, self.m, self.c, self.x0, self.prev = (
            torch.tensor(self.raw[name], dtype=D) for name in ("K", "M", "C", "x0", "prev")
        )

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        time = (time if time.ndim == 2 else time[:, None]).double()[..., None]
        return torch.tanh(self.k @ x @ self.m) + time * self.c

    def committed(self, case: dict[str, Any]) -> Committed:
        delay = torch.full((len(self.x0),), case["d"])
        return Committed(self.prev, delay, torch.full_like(delay, case.get("s", 0)))


@pytest.fixture(scope="module")
def field() -> Field:
    return Field()


def test_golden_toy_field(field: Field):
    met, left_out = 0, 0
    for case in field.raw["cases"]:
        committed = field.committed(case)
        if case["impl"] == "rldx.guided_velocity":
            weights = realtime.prefix_weights(committed.delay, committed.executed, field.x0.shape[1])
            found = realtime.guided_velocity(field, field.x0, case["tau"], field.prev, weights, case["beta"])
            wanted = case["v_guided"]
        elif case["impl"].startswith("rldx guided loop"):
            found = realtime.sample_guided(
                field, field.x0, case["N"], committed, case["steps_only"], case["beta"], fixed=False
            )
            wanted = case["x_final"]
        elif case["impl"].startswith("rldx trained loop"):
            found, wanted = realtime.sample_trained(field, field.x0, case["N"], committed), case["x_final"]
        else:
            left_out += 1
            continue
        met += 1
        # float32 times, as networks are given: 1e-6 instead of the reference's float64.
        assert torch.allclose(found, torch.tensor(wanted, dtype=D), atol=2e-6), (case["impl"], case.get("d"))
    assert met
    if left_out:
        print(f"{left_out} cases of another form of guidance")


def test_golden_training():
    raw = read("training.json")
    for case in raw["prefix_lengths"]:
        generator = torch.Generator().manual_seed(case["generator_seed"])
        drawn = realtime.draw_delays(case["batch"], case["max_delay"], case["H"], generator)
        assert drawn.tolist() == case["prefix_lengths"]
    noisy = {name: torch.tensor(values, dtype=D) for name, values in raw["noisy"].items()}
    x, time, counted = realtime.give_rows(
        noisy["actions"], noisy["noise"], noisy["tau"], noisy["prefix_mask"].sum(1).long()
    )
    assert torch.allclose(x, noisy["x_t"]) and torch.allclose(time, noisy["t_per_token"])
    assert torch.equal(counted, noisy["prefix_mask"] == 0)


def toy(x: Tensor, time: Tensor) -> Tensor:
    return torch.tanh(x.roll(1, 1)) - x


@pytest.mark.parametrize("sample", [realtime.sample_guided, realtime.sample_trained])
def test_rows_that_are_executed_anyway_come_out_as_given(sample: Any):
    torch.manual_seed(0)
    noise, old = torch.randn(3, 8, 2), torch.randn(3, 8, 2)
    made = sample(toy, noise, 4, Committed(old, torch.tensor([0, 1, 3]), torch.tensor([3, 3, 3])))
    for at, delay in enumerate((0, 1, 3)):
        assert torch.equal(made[at, :delay], old[at, :delay])
        assert not torch.equal(made[at, delay:], old[at, delay:])


def test_without_a_delay_or_a_tail_it_is_the_plain_sampler():
    torch.manual_seed(0)
    noise = torch.randn(2, 8, 2)
    nothing = Committed(torch.zeros_like(noise), torch.tensor([0, 0]), torch.tensor([8, 8]))
    plain = sample_actions(toy, noise, 4)
    assert torch.equal(realtime.sample_trained(toy, noise, 4, nothing), plain)
    assert torch.allclose(realtime.sample_guided(toy, noise, 4, nothing), plain, atol=1e-6)


def test_guidance_brings_the_tail_nearer_to_the_old_chunk():
    torch.manual_seed(0)
    noise, old = torch.randn(64, 8, 2), torch.randn(64, 8, 2)
    committed = Committed(old, torch.full((64,), 2), torch.full((64,), 2))
    tail = slice(2, 5)
    free = (sample_actions(toy, noise, 4) - old)[:, tail].square().mean()
    guided = (realtime.sample_guided(toy, noise, 4, committed) - old)[:, tail].square().mean()
    assert guided < 0.75 * free


@pytest.mark.parametrize(("delay", "executed"), [(-1, 4), (3, 2), (4, 5)])
def test_a_chunk_that_cannot_bridge_the_delay_is_refused(delay: int, executed: int):
    with pytest.raises(ConfigError, match="too short for real-time"):
        realtime.require_fits(delay, executed, 8)
