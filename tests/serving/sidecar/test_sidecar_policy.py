"""A policy behind a sidecar answers as its server does, keeps sessions apart, and comes back when its server dies."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import yaml

from prts_core.contract import Camera, Dimension
from prts_core.io.errors import ConfigError, ContractError, ServeError
from prts_core.policy.observation import STATE, Remembers
from prts_core.robot.groot_arrays import ModalityConfig
from prts_core.serving.engine import Limits, _Request, answer, warm_up
from prts_core.serving.observations import Observation
from prts_core.serving.protocols.groot_modality import Modality
from prts_core.serving.service import PolicyService, ServerConfig
from prts_core.serving.sessions import Session
from prts_core.serving.sidecar import policy as policy_module
from prts_core.serving.sidecar import supervisor
from prts_core.serving.sidecar.contract import StatedContract, agree
from prts_core.serving.sidecar.policy import SidecarPolicy
from prts_core.serving.sidecar.supervisor import MOST_RESTARTS, Sidecar
from prts_core.serving.versions import Version
from tests.serving.fake_policy import CONTRACT
from tests.serving.sidecar.conftest import GROUPS
from tests.serving.sidecar.test_sidecar_child import is_gone

CONFIGS = {
    "video": ModalityConfig([0], ["top", "wrist"]),
    "state": ModalityConfig([0], ["position", "gripper"]),
    "action": ModalityConfig([0, 1, 2, 3], ["move"]),
    "language": ModalityConfig([0], ["task"]),
}


def seen(batch: int = 1) -> dict[str, np.ndarray]:
    state = np.float32([[0.25, 0.5, 1.0]]) + np.arange(batch, dtype=np.float32)[:, None]
    pictures = {"top": 3, "wrist": 4}
    return {STATE: state} | {
        f"observation.images.{name}": np.full((batch, 8, 8, 3), value, np.uint8) for name, value in pictures.items()
    }


def expected(batch: int = 1) -> np.ndarray:
    total = seen(batch)[STATE].sum(axis=1) + 7
    return (total[:, None, None] + np.arange(4)[None, :, None] + np.array([0, 10])).astype(np.float32)


@pytest.fixture
def contract(tmp_path) -> StatedContract:
    CONTRACT.save(tmp_path / "policy_contract.json")
    return StatedContract(tmp_path / "policy_contract.json")


@pytest.fixture
def policy(launch, contract, monkeypatch):
    monkeypatch.setattr(supervisor, "PAUSE_S", 0.05)
    with Sidecar(launch) as sidecar:
        made = SidecarPolicy(sidecar, contract, GROUPS, timeout_s=60.0)
        yield made
        made.close()


def wait_until(true, what: str) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    pytest.fail(f"not within half a minute: {what}")


def pid_of(policy: SidecarPolicy, notes) -> int:
    return notes("pid")[-1]


def test_batches_are_answered_under_the_server_s_keys(policy):
    assert isinstance(policy, Remembers) and policy.contract == CONTRACT and policy.unready is None
    np.testing.assert_allclose(policy.answer(seen(3), ["go"] * 3, [0] * 3).actions, expected(3), atol=1e-5)
    assert warm_up(Version("rldx", policy), (policy,), Limits()) > 0


def test_sessions_have_names_there_and_forget_when_their_task_begins(policy, notes, monkeypatch):
    monkeypatch.setattr(policy_module, "SLOTS", 2)
    asked = [
        [("robot a", True), ("robot b", True)],
        [("robot b", False), ("robot a", False)],
        [("robot b", True)],
        [("robot c", False)],  # takes the place of a, which was asked for longest ago, and knows nothing of it
        [("robot a", False)],  # comes back, and has been forgotten
    ]
    for sessions in asked:
        policy.answer_in(sessions, seen(len(sessions)), ["go"] * len(sessions), [0] * len(sessions))
    told = [(options["session_ids"], options["reset_memory"]) for options in notes("options")]
    assert told == [
        (["prts-0", "prts-1"], [True, True]),
        (["prts-1", "prts-0"], [False, False]),
        (["prts-1"], [True]),
        (["prts-0"], [True]),
        (["prts-1"], [True]),
    ]


def test_a_value_is_refused(policy):
    with pytest.raises(ServeError, match="has no value"):
        policy.answer(seen(), ["go"], [0], value=True)


def test_a_chunk_under_way_is_not_said_to_be_held(policy):
    """A robot that counts its steps gets a fresh chunk, and is not told that its first rows are the old ones."""
    loop = asyncio.new_event_loop()
    session = Session("arm", Version("rldx", policy), chunk=np.zeros((4, 2), np.float32), chunk_step=0)
    pictures = {key: picture[0] for key, picture in seen().items() if key != STATE}
    observed = Observation(pictures, seen()[STATE][0], "go", step=1, delay=1)
    request = _Request(observed, session, 0, loop.create_future(), 0.0)
    found, held = answer(policy, [request], Limits())
    assert held == [0]
    np.testing.assert_allclose(found.actions, expected(), atol=1e-5)
    loop.close()


def test_a_server_that_is_killed_comes_back(policy, notes):
    assert policy.answer(seen(), ["go"], [0]).actions.shape == (1, 4, 2)
    first = pid_of(policy, notes)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: policy.unready, "its death was seen")
    service = PolicyService(policy, ServerConfig())
    assert service.unready == policy.unready and service.unwell is None
    assert "ended by SIGKILL" in policy.unready and f"attempt 1 of {MOST_RESTARTS}" in policy.unready
    with pytest.raises(ServeError, match="is being started again"):
        policy.answer(seen(), ["go"], [0])
    wait_until(lambda: policy.unready is None, "another one answers")
    np.testing.assert_allclose(policy.answer(seen(), ["go"], [0]).actions, expected(), atol=1e-5)
    assert pid_of(policy, notes) != first and policy.sidecar.restarts == 0


def test_a_request_does_not_wait_for_a_server_that_died_over_it(policy):
    begun = time.monotonic()
    with pytest.raises(ServeError, match="ended with status 7"):
        policy.answer(seen(), ["die"], [0])
    assert time.monotonic() - begun < policy.timeout_s / 2
    wait_until(lambda: policy.unready is None, "another one answers")


def test_a_server_that_somebody_else_ended_is_started_by_us(policy, contract, notes, monkeypatch):
    with Sidecar(policy.sidecar.launch) as found:
        second = SidecarPolicy(found, contract, GROUPS)
        assert len(notes("pid")) == 1, "the two share one server"
        second.answer(seen(), ["go"], [0])
        policy.close()
        wait_until(lambda: len(notes("pid")) == 2 and second.unready is None, "a server of its own")
        np.testing.assert_allclose(second.answer(seen(), ["go"], [0]).actions, expected(), atol=1e-5)
        second.close()
    assert all(map(is_gone, notes("pid")))


def test_a_server_that_cannot_be_started_again_is_given_up(policy, notes, monkeypatch):
    monkeypatch.setenv("STANDIN", "die")
    os.kill(pid_of(policy, notes), signal.SIGKILL)
    wait_until(lambda: policy.unready and "not started again" in policy.unready, "it was given up")
    service = PolicyService(policy, ServerConfig())
    assert service.unwell == service.unready == policy.unready
    assert "no such checkpoint" in policy.unready and str(policy.sidecar.launch.log) in policy.unready
    assert len(notes("pid")) == 1 + MOST_RESTARTS
    with pytest.raises(ServeError, match="not started again"):
        policy.answer(seen(), ["go"], [0])


def test_a_late_answer_is_not_given_to_the_next_request(policy):
    policy._client.timeout_s = policy.timeout_s = 0.5
    with pytest.raises(ServeError, match="does not answer") as caught:
        policy.answer(seen(), ["sleep"], [0])
    assert policy.unready is None and "0.5 s" in caught.value.expected
    policy._client.timeout_s = policy.timeout_s = 60.0
    other = seen() | {STATE: np.zeros((1, 3), np.float32)}
    np.testing.assert_allclose(policy.answer(other, ["go"], [0]).actions[0, :, 0], [7, 8, 9, 10], atol=1e-5)


def test_close_ends_a_request_that_is_under_way(policy, notes):
    told: list[BaseException] = []

    def ask() -> None:
        try:
            policy.answer(seen(), ["sleep"], [0])
        except ServeError as err:
            told.append(err)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: notes("options"), "the server has the request")
    policy.close()
    asking.join(30)
    assert "about to end" in str(told[0]) and is_gone(pid_of(policy, notes))


# ---- what the numbers mean -----------------------------------------------------------------------------------------
def test_a_robot_s_file_is_a_contract_with_its_rate_and_pictures(tmp_path):
    names = {"state": ["x", "y", "gripper"], "action": ["dx", "dy"]}
    robot = {kind: [{"name": name, "unit": "m"} for name in given] for kind, given in names.items()}
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({"embodiment_tag": "toy", **robot}))
    found = StatedContract(path, 20.0, (8, 16)).read(CONFIGS)
    assert found.chunk_length == 4 and found.contract.control_hz == 20.0
    assert found.contract.action == (Dimension("dx", "m"), Dimension("dy", "m"))
    assert found.contract.cameras[0] == Camera("observation.images.top", "Camera top", 8, 16)
    with pytest.raises(ConfigError, match="does not say enough") as caught:
        StatedContract(path)
    assert caught.value.field == "--control-hz"
    path.write_text(yaml.safe_dump({"embodiment_tag": "toy"}))
    with pytest.raises(ConfigError, match="does not say enough"):
        StatedContract(path, 20.0)
    with pytest.raises(ConfigError, match="no such contract"):
        StatedContract(tmp_path / "nothing.json")


def test_a_dataset_s_contract_takes_the_server_s_horizon(tmp_path):
    CONTRACT.contract.save(tmp_path / "contract.json")
    found = StatedContract(tmp_path / "contract.json").read(CONFIGS)
    assert found.contract == CONTRACT.contract and found.chunk_length == 4


@pytest.mark.parametrize(
    ("configs", "groups", "told"),
    [
        ({}, {}, "--groot-key state.position=x,y"),
        ({}, {"state.position": ("x", "y")}, "--groot-key action.move=x,y"),
        ({"action": ModalityConfig([0, 1], ["move"])}, GROUPS, "Found: 2. Expected: 4"),
        ({"video": ModalityConfig([-2, 0], ["top", "wrist"])}, GROUPS, "several moments of video"),
        ({"video": ModalityConfig([0], ["front", "wrist"])}, GROUPS, "--camera KEY="),
        ({"video": ModalityConfig([0], ["top"])}, GROUPS, "other cameras"),
        ({"state": ModalityConfig([0], ["gripper"])}, GROUPS, "without position"),
    ],
)
def test_a_contract_of_another_server_is_refused(configs, groups, told):
    with pytest.raises(ContractError, match=told):
        agree(Modality.of(CONTRACT, groups), CONFIGS | configs)


def test_the_cures_of_the_contract_work():
    aliases = {"front": "observation.images.top"}
    video = ModalityConfig([0], ["front", "wrist"])
    found = agree(Modality.of(CONTRACT, GROUPS, aliases), CONFIGS | {"video": video})
    assert found == {"front": "observation.images.top", "wrist": "observation.images.wrist"}


def test_actions_of_another_form_are_refused(policy):
    policy.modality = Modality.of(replace(CONTRACT, chunk_length=5), GROUPS)
    with pytest.raises(ServeError, match="not those of the contract") as caught:
        policy.answer(seen(), ["go"], [0])
    assert caught.value.field == "action.move" and "(1, 4, 2)" in caught.value.found
