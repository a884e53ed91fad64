"""What the references' ZeroMQ servers were sent, sent to ours: the same forms, and ours lives where they die."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from prts_core.contract import Camera, Contract, Dimension, PolicyContract
from prts_core.io.errors import ServeError
from prts_core.policy.observation import STATE, TwoSteps
from prts_core.robot.groot import GrootClient
from prts_core.robot.groot_arrays import Dialect, ModalityConfig, decode, encode
from prts_core.serving.protocols.groot_modality import Modality
from prts_core.serving.server import PolicyServer
from prts_core.serving.service import GROOT, ServerConfig
from tests.fixtures.running_server import running
from tests.serving.golden_wire import dialect_of, names, transcript, wire_folder

SERVERS = [name for name in names("transcripts") if name.endswith("_server") and "openpi" not in name] or ["absent"]
KEY = "right-enough"
X = Contract("toy", 20.0, state=(Dimension("x"),), action=(Dimension("x"),), cameras=())
DUMMY = PolicyContract("toy", X, 16, "QUANTILE", "sha256:00")


class Dummy(TwoSteps):
    """The policy of the transcripts: state x, and x + 0, x + 1, ... x + 15 for an answer."""

    contract = DUMMY

    def act(self, observation, instruction, seeds) -> np.ndarray:
        return (observation[STATE][:, None, :] + np.arange(16, dtype=np.float32)[None, :, None]).astype(np.float32)

    def value(self, observation, actions, instruction) -> np.ndarray:
        return actions[:, 0, 0]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running(PolicyServer(Dummy(), ServerConfig(groot_port=0, protocols=(GROOT,)))) as address:
        yield address


@pytest.fixture(scope="module")
def keyed() -> Iterator[str]:
    config = ServerConfig(groot_port=0, protocols=(GROOT,), api_key=KEY)
    with running(PolicyServer(Dummy(), config)) as address:
        yield address


def exchange(address: str, parts: list[bytes]) -> list[bytes]:
    """The parts of the answer to one message."""
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 60_000)
        socket.connect(address)
        socket.send_multipart(parts)
        return socket.recv_multipart()


def sent(case: dict[str, Any]) -> list[bytes]:
    """The message of a case, changed in two things: where the dummy policy of the transcripts answered, which took no
    sentence, ours is given one; and a key is one of ours, which are longer."""
    parts = [base64.b64decode(part) for part in ([case["sent"]] if isinstance(case["sent"], str) else case["sent"])]
    answered = isinstance(case["reply"].get("value"), list)
    if not answered and case["name"] != "token_right":
        return parts
    request, dialect = decode(parts[0])
    if answered:
        request["data"]["observation"]["task"] = ["go"]
    if request.get("api_token") == case.get("server_token"):
        request |= {"api_token": KEY} if "api_token" in request else {}
    return [encode(request, dialect)]


@pytest.mark.parametrize("name", SERVERS)
def test_answers_have_the_form_of_the_references(name: str, server: str, keyed: str):
    dialect = dialect_of(name)
    cases = [case for case in transcript(name) if "sent" in case]
    assert len(cases) > 40
    for case in cases:
        address, key = (keyed, KEY) if case.get("server_token") else (server, None)
        answer = exchange(address, sent(case))
        with GrootClient(address, api_key=key) as other:
            other.ping()  # the server lives; some references do not
        assert len(answer) == 1, case["name"]
        theirs = base64.b64decode(case["reply"]["frame"]) if "frame" in case["reply"] else None
        try:
            check_form(case, answer[0], theirs, dialect)
        except AssertionError as err:
            raise AssertionError(case["name"]) from err


def check_form(case: dict[str, Any], answer: bytes, reply: bytes | None, dialect: Dialect) -> None:
    """`answer` is of the form of `reply`, the reference's; none where that died without one."""
    ours, shown = decode(answer)
    theirs = decode(reply)[0] if reply is not None else None
    if reply is None or case["name"] == "kill" or (isinstance(theirs, dict) and "error" in theirs):
        assert list(ours) == ["error"] and ours["error"]
        assert "Traceback" not in ours["error"] and ".py" not in ours["error"]
    elif isinstance(theirs, list):
        assert len(ours) == 2 and isinstance(ours[1], dict) and "error" not in ours[1]
        assert shown is dialect and ours[0].keys() == {"action.x"} and ours[0]["action.x"].dtype == np.float32
        if "action.x" in theirs[0]:
            np.testing.assert_array_equal(ours[0]["action.x"], theirs[0]["action.x"])
    elif any(isinstance(value, ModalityConfig) for value in theirs.values()):
        assert msgpack.unpackb(answer)["state"][dialect.value]  # what this dialect's clients look for
        assert theirs.items() <= ours.items()
    else:
        assert isinstance(ours, dict) and "error" not in ours
        assert "status" not in theirs or ours == theirs


def test_a_dealer_with_an_empty_delimiter_is_served(server: str):
    parts = transcript("gr00t_npy_server")
    (case,) = [case for case in parts if case["name"] == "dealer_with_empty_delimiter"]
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 60_000)
        socket.connect(server)
        socket.send_multipart([encode({"endpoint": "ping"})])  # no delimiter: no answer
        socket.send_multipart([b"", encode({"endpoint": "ping"})])
        assert socket.recv_multipart() == [base64.b64decode(part) for part in case["reply_parts"]]


# ---- strict checks -------------------------------------------------------------------------------------------------
WIDTHS = {"x": 1, "gripper": 2}
SIZE = 8
STRICT = PolicyContract(
    "toy",
    Contract(
        "toy",
        20.0,
        state=tuple(Dimension(name) for name in ("x", "finger_left", "finger_right")),
        action=(Dimension("x"), Dimension("gripper")),
        cameras=tuple(Camera(f"observation.images.{name}", name, SIZE, SIZE) for name in ("image", "wrist_image")),
    ),
    16,
    "QUANTILE",
    "sha256:00",
)
MODALITY = Modality.of(STRICT, {"state.gripper": ["finger_left", "finger_right"]})


def strict_cases() -> list[Any]:
    if not (wire_folder() / "transcripts").exists():
        return [pytest.param(None, id="absent")]
    cases = transcript("gr00t_strict_checks")["cases"]
    passed = [case["given"] for case in cases if case["accepted"]]
    kept = [case for case in cases if case["accepted"] or case["given"] not in passed]  # a tuple that JSON cannot hold
    return [pytest.param(case, id=f"{case['check'].split('.')[0]}: {case['name']}") for case in kept]


def arrays(given: Any) -> Any:
    if isinstance(given, dict) and given.keys() == {"dtype", "shape"}:
        return np.zeros(given["shape"], given["dtype"])
    return {key: arrays(value) for key, value in given.items()} if isinstance(given, dict) else given


def leaves(given: dict[str, Any]) -> dict[str, Any]:
    """ "video.image", "state.x" ... -> what was given, of a nested or a flat observation."""
    flat = {}
    for key, value in given.items():
        inner = value if isinstance(value, dict) and value.keys() != {"dtype", "shape"} else None
        flat |= {key: value} if inner is None else {f"{key}.{name}": leaf for name, leaf in inner.items()}
    return flat


def why_ours_refuses(given: dict[str, Any]) -> str | None:
    """What a policy cannot compute though the reference's check lets it pass: other sizes, parts of other batches."""
    flat, batches = leaves(given), set()
    for key, value in flat.items():
        kind, _, name = key.partition(".")
        if kind == "state" and name in WIDTHS and value["shape"][2] != WIDTHS[name]:
            return "another width"
        if kind == "video" and value["shape"][2:4] != [SIZE, SIZE]:
            return "another shape"
        if kind == "video" or (kind == "state" and name in WIDTHS):
            batches.add(value["shape"][0])
        if isinstance(value, list):
            batches.add(len(value))
    return "disagree on the batch" if len(batches) > 1 else None


@pytest.mark.parametrize("case", strict_cases())
def test_observations_are_checked_as_strictly(case: dict[str, Any] | None):
    if case is None:
        pytest.skip("golden transcripts are absent: set PRTS_SHARED to a folder that has golden/wire/transcripts")
    if case["check"].endswith("check_action"):
        actions = MODALITY.answer(np.zeros((1, 16, 2), np.float32), nested=True)
        ours = {key: {"dtype": str(array.dtype), "shape": list(array.shape)} for key, array in actions.items()}
        assert case["accepted"] or ours != case["given"]
        assert case["name"] != "ok" or ours == case["given"]
        return
    observation = arrays(case["given"])
    nested_to_flat = case["check"].startswith("Gr00tSim") and "video" in observation  # ours reads both forms
    told = why_ours_refuses(case["given"]) if case["accepted"] else "Field"
    if nested_to_flat or told is None:
        samples, nested, _ = MODALITY.read(observation)
        assert nested is ("video" in observation)
        assert all(sample.state.shape == (3,) and len(sample.images) == 2 for sample in samples)
        return
    with pytest.raises(ServeError, match=told) as refused:
        MODALITY.read(observation)
    named = re.findall(r"'([\w.]+)' key|key '([\w.]+)'", case.get("message", ""))
    assert all(any(word in str(refused.value) for word in pair if word) for pair in named), str(refused.value)


def test_the_dialects_are_served_side_by_side(server: str):
    """One server, one observation, both forms of arrays: each client is answered in its own."""
    for dialect in Dialect:
        request = {"state.x": np.full((2, 1, 1), 3, np.float32), "task": ["go", "go"]}
        message = encode({"endpoint": "get_action", "data": {"observation": request}}, dialect)
        answer = exchange(server, [message])[0]
        (actions, _), found = decode(answer)
        assert found is dialect
        np.testing.assert_array_equal(actions["action.x"], np.broadcast_to(np.arange(3, 19)[None, :, None], (2, 16, 1)))
