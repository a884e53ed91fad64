"""GR00T's protocol over real sockets: what is answered, and what is refused."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prts_core.io.errors import ServeError
from prts_core.robot.groot import GrootClient
from prts_core.robot.groot_arrays import Dialect, encode
from prts_core.robot.openpi import PolicyClient
from prts_core.serving.service import GROOT, OPENPI
from tests.fixtures.running_server import addresses, running
from tests.serving.fake_policy import CONTRACT, FakePolicy, groot_observation, observation
from tests.serving.groot_sockets import dealer, exchange, expected, server


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(server()) as found:
        yield found


# ---- what works ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_actions_come_back_by_key_and_a_seed_repeats_them(address, dialect, flat, batch):
    with GrootClient(address, dialect=dialect) as client:
        actions, info = client.get_action(groot_observation(batch, flat=flat))
        assert list(actions) == (["action.x", "action.y"] if flat else ["x", "y"])
        assert all(a.shape == (batch, 4, 1) and a.dtype == np.float32 for a in actions.values())
        assert info["infer_ms"] >= 0 and info["queue_ms"] >= 0 and "value" not in info
        seeds = info["seed"]
        again, info = client.get_action(groot_observation(batch, flat=flat), {"seed": seeds, "value": True})
    found = np.concatenate(list(again.values()), axis=2)
    np.testing.assert_array_equal(found, expected(batch, seeds))
    np.testing.assert_array_equal(found, np.concatenate(list(actions.values()), axis=2))
    assert len(info["value"]) == batch and info["seed"] == seeds


def test_a_batch_of_nothing_is_answered_with_nothing(address):
    with GrootClient(address) as client:
        actions, info = client.get_action(groot_observation(0))
    assert {key: array.shape for key, array in actions.items()} == {"x": (0, 4, 1), "y": (0, 4, 1)}
    assert info["seed"] == []


def test_both_protocols_are_one_policy():
    policy = FakePolicy()
    both = server(policy, port=0, protocols=(OPENPI, GROOT), about={"model": "toy"})
    with addresses(both) as found, PolicyClient(found[OPENPI]) as robot, GrootClient(found[GROOT]) as other:
        told = exchange(found[GROOT], encode({"endpoint": "get_policy_contract"}))
        assert told | {"protocol": OPENPI, "keys": robot.metadata["keys"]} == robot.metadata
        actions, _ = other.get_action(groot_observation(), {"seed": 7})
        np.testing.assert_array_equal(
            np.concatenate(list(actions.values()), 2)[0], robot.infer(observation(), seed=7)["actions"]
        )
        with urllib.request.urlopen(found[OPENPI].replace("ws:", "http:") + "/healthz", timeout=60) as reply:
            assert reply.status == 200
    assert len(policy.threads) == 1  # one engine


def test_keys_can_be_grouped_and_cameras_renamed():
    config = {
        "groot_keys": {"state.pose": ("y", "x"), "action.both": ("x", "y")},
        "aliases": {"front": "observation.images.top"},
    }
    with running(server(**config)) as address, GrootClient(address) as client:
        configs = client.get_modality_config()
        assert configs["state"].modality_keys == ["pose", "gripper"] and configs["action"].modality_keys == ["both"]
        told = groot_observation()
        told["video"]["front"] = told["video"].pop("top")
        told["state"]["pose"] = np.concatenate([told["state"].pop("y"), told["state"].pop("x")], 2)
        actions, _ = client.get_action(told, {"seed": 3})
        np.testing.assert_array_equal(actions["both"], expected(1, [3]))


def test_samples_of_one_request_and_of_several_clients_are_answered_together():
    policy = FakePolicy(delay_s=0.05)
    with running(server(policy, max_batch=4, max_clients=12)) as address:

        def robot(number: int) -> bool:
            with GrootClient(address) as client:
                for turn in range(3):
                    actions, _ = client.get_action(groot_observation(2), {"seed": [number, turn]})
                    found = np.concatenate(list(actions.values()), 2)
                    np.testing.assert_allclose(found, expected(2, [number, turn]), rtol=1e-5)
            return True

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(robot, range(6)))
    assert sum(policy.batches) == 36 and max(policy.batches) == 4


# ---- what is refused -----------------------------------------------------------------------------------------------
def changed(**changes: Any) -> dict[str, Any]:
    return groot_observation(flat=True) | {key.replace("__", "."): value for key, value in changes.items()}


@pytest.mark.parametrize(
    "told, options, message",
    [
        (changed(state__x=np.zeros((1, 1, 2), np.float32)), None, "another width"),
        (changed(state__x=np.full((1, 1, 1), np.nan, np.float32)), None, "x = nan"),
        (changed(state__x=np.zeros((1, 1, 1), ">f4")), None, "another form"),
        (changed(video__top=np.zeros((1, 1, 16, 8, 3), np.uint8)), None, r"\(16, 8, 3\)"),
        (changed(annotation__human__action__task_description=["x" * 3000]), None, "at most 2000 characters"),
        (groot_observation(9), None, "at most 8"),
        ([1], None, "mapping with text keys"),
        (groot_observation(), [1], "Options are a mapping"),
        (groot_observation(), {"seed": -1}, "whole number"),
        (groot_observation(2), {"seed": 1}, "one seed for each sample"),
        (groot_observation(), {"value": "yes"}, "true or false"),
        (groot_observation(), {"session_ids": ["a", "b"]}, "one for each sample"),
        (groot_observation(), {"session_ids": [1]}, "one for each sample"),
        (groot_observation(), {"reset_memory": True}, "one for each sample"),
        (groot_observation(), {"action_prefix": np.zeros((1, 2, 2), np.float32)}, "Real-time chunking"),
        (groot_observation(), {"rtc_prefix_len": 4}, "Real-time chunking"),
        (groot_observation(), {"contract_fingerprint": "sha256:0"}, "disagree on what the numbers mean"),
        (groot_observation(), {"policy_contract": replace(CONTRACT, chunk_length=8).to_json()}, "chunk_length: 8"),
        (groot_observation(prompt="explode"), None, "policy failed on this request"),
        (groot_observation(prompt="nan"), None, "not finite"),
        (groot_observation(prompt="short"), None, "wrong shape"),
    ],
)
def test_bad_requests_get_one_paragraph(address, told, options, message):
    with GrootClient(address) as client:
        with pytest.raises(ServeError, match=message) as refused:
            client.get_action(told, options)
        assert "Traceback" not in str(refused.value) and "secret path" not in str(refused.value)
        client.get_action(groot_observation())


def test_good_options_are_read(address):
    options = {"session_ids": ["a"], "reset_memory": [True], "rtc_prefix_len": 0, "other": 1, "seed": 4}
    with GrootClient(address) as client:
        client.get_action(groot_observation(), options | {"policy_contract": CONTRACT.to_json()})
        client.get_action(groot_observation(), {"contract_fingerprint": CONTRACT.fingerprint})
        assert client.reset({"session_ids": ["a", "b"]}) == {"cleared_sessions": ["a"]}
        assert client.reset({"session_ids": ["a"]}) == {"cleared_sessions": []}
        with pytest.raises(ServeError, match="options of reset"):
            client.reset({"session_ids": "a"})


def test_messages_of_several_parts_are_answered_and_those_without_a_delimiter_dropped(address):
    ping = encode({"endpoint": "ping"})
    assert "3 parts" in exchange(address, ping, b"second", b"third")["error"]
    assert "200 parts" in exchange(address, *[ping] * 200)["error"]
    assert "0 parts" in exchange(address)["error"]
    with dealer(address) as socket:
        for parts in ([ping], [ping, ping], [b"x"] * 50):
            socket.send_multipart(parts)
        socket.send_multipart([b"hop", b"", ping])  # as a proxy would: the whole address comes back
        assert socket.recv_multipart()[:2] == [b"hop", b""]
