"""Laws of GR00T's keys: what a client puts under them the policy sees, and what it says comes back under them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.contract import Camera, Dimension, PolicyContract
from prts_core.io.errors import ContractError, ServeError
from prts_core.serving.protocols.groot_modality import LANGUAGE_KEYS, Modality
from tests.serving.fake_policy import CONTRACT, groot_observation


@st.composite
def keyed(draw: st.DrawFn) -> tuple[PolicyContract, dict[str, tuple[str, ...]]]:
    """A contract of up to six numbers a side, and some of them under common keys."""
    names = [f"n{i}" for i in range(6)]
    sides, groups = {}, {}
    for side in ("state", "action"):
        own = names[: draw(st.integers(1, 6))]
        sides[side] = tuple(Dimension(name) for name in own)
        left = draw(st.permutations(own))
        for number in range(draw(st.integers(0, 2))):
            size = draw(st.integers(1, 3))
            taken, left = left[:size], left[size:]
            if taken:
                groups[f"{side}.group{number}"] = tuple(taken)
    return replace(CONTRACT, contract=replace(CONTRACT.contract, **sides)), groups


@given(keyed(), st.integers(1, 3), st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_number_has_one_place(made: tuple[PolicyContract, dict[str, Any]], batch: int, flat: bool):
    contract, groups = made
    modality = Modality.of(contract, groups)
    order = {side: [d.name for d in getattr(contract.contract, side)] for side in ("state", "action")}
    configs = modality.configs()
    for side in order:
        members = [name for key in configs[side].modality_keys for name in groups.get(f"{side}.{key}", (key,))]
        assert sorted(members) == order[side]
    rows = np.arange(batch * len(order["state"]), dtype=np.float32).reshape(batch, 1, -1)
    told = groot_observation(batch, flat=flat)
    state = {}
    for key in configs["state"].modality_keys:
        places = [order["state"].index(name) for name in groups.get(f"state.{key}", (key,))]
        state[key] = rows[:, :, places]
    if flat:
        told |= {f"state.{key}": array for key, array in state.items()}
    else:
        told["state"] = state
    samples, nested, _ = modality.read(told)
    assert nested is not flat
    np.testing.assert_array_equal(np.stack([sample.state for sample in samples]), rows[:, 0])
    actions = np.random.default_rng(0).normal(size=(batch, contract.chunk_length, len(order["action"])))
    answer = modality.answer(actions.astype(np.float32), nested)
    for key, array in answer.items():
        name = key.removeprefix("action.")
        places = [order["action"].index(member) for member in groups.get(f"action.{name}", (name,))]
        np.testing.assert_array_equal(array, actions[:, :, places].astype(np.float32))
    assert sum(array.shape[2] for array in answer.values()) == len(order["action"])


@pytest.mark.parametrize("key", LANGUAGE_KEYS)
@pytest.mark.parametrize("flat", [False, True])
def test_language_is_read_under_each_of_its_names(key: str, flat: bool):
    told = groot_observation(2, flat=flat)
    if flat:
        del told[LANGUAGE_KEYS[0]]
        told[key] = ["one", "two"]
    else:
        told["language"] = {key: [["one"], ["two"]], "other": 3}
    samples, *_ = Modality.of(CONTRACT).read(told)
    assert [sample.prompt for sample in samples] == ["one", "two"]


def test_what_nobody_asked_for_is_ignored():
    told = groot_observation()
    told["state"]["more"] = "x"
    told["video"]["other"] = np.zeros(3)
    told["anything"] = None
    assert len(Modality.of(CONTRACT).read(told)[0]) == 1


def test_a_contract_without_cameras_or_with_two_of_one_name():
    own = CONTRACT.contract
    blind = Modality.of(replace(CONTRACT, contract=replace(own, cameras=())))
    assert list(blind.configs()) == ["state", "action", "language"]
    told = groot_observation()
    del told["video"]
    assert blind.read(told)[0][0].images == {}
    twins = tuple(Camera(f"{side}.images.top", side, 8, 8) for side in ("left", "right"))
    modality = Modality.of(replace(CONTRACT, contract=replace(own, cameras=twins)))
    assert modality.configs()["video"].modality_keys == ["left.images.top", "right.images.top"]


def test_the_cure_of_a_missing_key_is_the_servers_own_word():
    modality = Modality.of(CONTRACT)
    told = groot_observation()
    told["state"]["grippr"] = told["state"].pop("gripper")
    with pytest.raises(ServeError, match=r"did you mean 'grippr'.*get_modality_config") as refused:
        modality.read(told)
    assert refused.value.field == "state.gripper" and "gripper" in modality.configs()["state"].modality_keys


def test_a_client_that_means_other_numbers_is_refused():
    other = replace(CONTRACT, chunk_length=8)
    with pytest.raises(ContractError, match="chunk_length"):
        Modality.of(CONTRACT).read(groot_observation(), {"policy_contract": other.to_json()})
