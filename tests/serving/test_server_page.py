"""The page for a person: its data, who may read them, and what a browser makes of it while real clients ask."""

from __future__ import annotations

import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from prts_core.io.errors import ServeError
from prts_core.robot.groot import GrootClient
from prts_core.robot.openpi import PolicyClient
from prts_core.serving import watch
from prts_core.serving.server import PolicyServer
from prts_core.serving.service import GROOT, OPENPI, ServerConfig
from prts_core.serving.versions import Version
from prts_core.value.alarm import Alarm, Course, Scores
from tests.fixtures.browser import browser
from tests.fixtures.running_server import addresses, running
from tests.serving.fake_policy import CONTRACT, FakePolicy, groot_observation, observation

KEY = "long-enough"


def get(url: str, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    request = urllib.request.Request(url.replace("ws:", "http:") + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode(), dict(reply.headers)
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode(), dict(err.headers)


def state(url: str, **headers: str) -> dict:
    status, text, _ = get(url, "/state.json", **headers)
    assert status == 200, text
    return json.loads(text)


@pytest.fixture(autouse=True)
def _always_fresh(monkeypatch):
    monkeypatch.setattr("prts_core.serving.web.FRESH_S", 0.0)


# ---- the data ------------------------------------------------------------------------------------------------------
def test_the_state_tells_of_sessions_times_versions_and_errors():
    config = ServerConfig(
        port=0, groot_port=0, protocols=(OPENPI, GROOT), budget_ms=50.0, about={"model": "models:/m@champion"}
    )
    with addresses(PolicyServer(FakePolicy(), config)) as found, PolicyClient(found[OPENPI]) as robot:
        url = found[OPENPI]
        chunks = [robot.infer(observation(), step=step, value=True)["actions"] for step in (0, 3)]
        with GrootClient(found[GROOT]) as client:
            client.get_action(groot_observation())
            with pytest.raises(ServeError):
                client.get_action({"state": {}})
        told = state(url)
    assert (told["model"], told["embodiment"], told["action"]) == ("models:/m@champion", "toy", ["x", "y"])
    assert (told["clients"], told["open_sessions"], told["unwell"], told["recording"]) == (1, 2, None, None)
    first = next(session for session in told["sessions"] if session["step"] == 3)
    np.testing.assert_allclose(first["executed"], chunks[0][:3], rtol=1e-3)
    np.testing.assert_allclose(first["chunk"], chunks[1], rtol=1e-3)
    assert first["looks"] == len(first["values"]) == 2 and first["alarm"] is None and first["prompt"]
    assert all(one.startswith("data:image/jpeg;base64,") for one in first["pictures"].values())
    assert {one["phase"] for one in told["latency"]} == set(watch.PHASES)
    assert told["versions"][0]["role"] == "serving" and told["versions"][0]["sessions"] == 2
    assert "lacks a key" in told["errors"][0]["what"] and told["errors"][0]["who"].startswith("groot@")


def test_sessions_that_are_over_are_forgotten_and_no_more_than_sixteen_are_held(monkeypatch):
    monkeypatch.setattr(watch, "MOST_SHOWN", 2)
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0))) as url:
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(PolicyClient(url)).infer(observation())
            told = state(url)
            assert len(told["sessions"]) == 2 and told["open_sessions"] == 3
        until = time.monotonic() + 60
        while state(url)["sessions"] and time.monotonic() < until:
            time.sleep(0.05)
        assert state(url)["sessions"] == [] and state(url)["open_sessions"] == 0
    large = np.zeros((720, 1280, 3), np.uint8)
    assert max(watch.smaller(large).shape) <= watch.SIDE


# ---- who may read them ---------------------------------------------------------------------------------------------
def test_the_page_is_anybodys_and_its_data_need_the_key():
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0, api_key=KEY))) as url:
        for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
            status, _, headers = get(url, path)
            assert status == 200 and headers["Content-Type"].startswith(kind)
            assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert get(url, "/state.json")[0] == 401
        assert get(url, "/state.json?key=" + KEY)[0] == 401
        assert state(url, Authorization=f"Api-Key {KEY}")["embodiment"] == "toy"
        assert get(url, "/page.html")[0] == get(url, "/../keys.py")[0] == 401
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0))) as url:
        assert state(url)
        assert get(url, "/state.json", Host="evil.example:8000")[0] == 421
        assert get(url, "/state.json", Host="localhost:8000")[0] == get(url, "/state.json", Host="[::1]:1")[0] == 200


def test_the_page_reaches_for_nothing_outside_and_writes_no_markup():
    page = files("prts_core.serving").joinpath("page")
    text = {name: page.joinpath(name).read_text() for name in ("page.html", "page.css", "page.js")}
    for name, content in text.items():
        outside = re.findall(r"https?://[^\s\"']+", content)
        assert set(outside) <= {"http://www.w3.org/2000/svg"}, (name, outside)
        assert "innerHTML" not in content and "@import" not in content and "url(" not in content
    assert "localStorage" not in text["page.js"] and "document.cookie" not in text["page.js"]


# ---- in a browser --------------------------------------------------------------------------------------------------
def scene(size: int, t: float, hand: float) -> np.ndarray:
    """A picture with something that moves."""
    y, x = np.mgrid[:size, :size] / size
    blob = np.exp(-((x - 0.5 - 0.3 * np.cos(t + hand)) ** 2 + (y - 0.55) ** 2) * 90)
    base = np.stack([0.55 + 0.2 * y, 0.53 + 0.15 * y, 0.5 + 0.1 * x], 2) * (y > 0.35)[..., None] + 0.18
    return (np.clip(base * (1 - blob[..., None]) + blob[..., None] * [0.85, 0.3, 0.2], 0, 1) * 255).astype(np.uint8)


class Moving(FakePolicy):
    """Smooth chunks and a value that rises."""

    def act(self, seen, instruction, seeds) -> np.ndarray:
        t = seen["observation.state"][:, :1] + np.arange(self.contract.chunk_length) / 10
        return np.stack([np.sin(t * (1 + i / 3) + i) for i in range(len(self.contract.contract.action))], 2).astype(
            "f4"
        )

    def value(self, seen, actions, instruction) -> np.ndarray:
        return -6 + seen["observation.state"][:, 0] / 2 + 0.2 * np.sin(5 * seen["observation.state"][:, 0])


def served() -> tuple[PolicyServer, list[str]]:
    own = CONTRACT.contract
    cameras = tuple(replace(camera, height=96, width=96) for camera in own.cameras)
    contract = replace(CONTRACT, chunk_length=16, contract=replace(own, cameras=cameras))
    config = ServerConfig(
        port=0, api_key=KEY, max_clients=16, budget_ms=80.0, about={"model": "models:/prts-quickstart@champion"}
    )
    course = Course((0.0,) * 100, (1.0,) * 100, steps=100.0)
    alarm = Alarm({"": course}, failing=Scores(2.0, math.inf), unsure=Scores(0.6, math.inf))
    version = Version("7", Moving(contract), "sha256:3f1c", alarm=alarm)
    return PolicyServer(version, config), ["open the faucet", "close the window", "press the walled button"]


def test_a_person_sees_what_real_clients_do(tmp_path: Path):
    server, sentences = served()
    with running(server) as url, browser(tmp_path / "profile") as tab, ExitStack() as stack:
        tab.open(url.replace("ws:", "http:") + "/")
        tab.until("document.getElementById('ask').hidden === false")
        tab.js("document.getElementById('key').value = 'wrong-key'; document.querySelector('form button').click()")
        tab.until("document.getElementById('wrong').textContent.includes('not a key')")
        tab.js(f"document.getElementById('key').value = '{KEY}'; document.querySelector('form button').click()")
        tab.until("document.getElementById('all').hidden === false")
        assert tab.js("document.getElementById('none').hidden") is False
        robots = [stack.enter_context(PolicyClient(url, api_key=KEY)) for _ in range(16)]
        for look in range(20):
            for number, robot in enumerate(robots[: 3 if look else 16]):
                t = look / 4 + number
                asked = {
                    "observation/state": np.array([t, 0, 0], np.float32),
                    "observation/top": scene(96, t, 0),
                    "observation/wrist": scene(96, t, 1.5),
                    "prompt": sentences[number % 3],
                }
                robot.infer(asked, step=4 * look, value=True)
        for number, x in enumerate((-5, -1.2)):  # far below, and somewhat below where they began
            state = np.array([x, 0, 0], np.float32)
            for step in (80, 84, 88):  # a value is judged over three looks
                robots[number].infer(asked | {"observation/state": state, "prompt": sentences[number]}, step=step)
        with pytest.raises(ServeError):
            robots[15].infer(asked | {"observation/top": np.zeros((4, 4, 3), np.uint8)})
        tab.until("document.querySelectorAll('.session').length === 15")
        for state, kind in (("failing", "alarm"), ("unsure", "unsure")):
            tab.until(f"document.querySelectorAll('.session.{kind}').length === 1")
            assert state in tab.js(f"document.querySelector('.session.{kind} .state').textContent")
        tab.until("document.querySelectorAll('#errors li').length === 1")
        assert tab.js("[...document.images].every(one => one.complete && one.naturalWidth === 96)")
        assert tab.js("document.querySelectorAll('svg.chunk').length") == 15
        for width in (1280, 390):
            picture = tab.looks_like(width, 800, dark=width == 390, whole=True)
            assert picture.startswith(b"\x89PNG")
            assert tab.js("document.documentElement.scrollWidth <= innerWidth"), f"wider than {width} pixels"
            if folder := os.environ.get("PRTS_SCREENSHOTS"):
                (Path(folder) / f"page_{width}.png").write_bytes(picture)
        assert tab.js("location.href").endswith("/") and KEY not in tab.js("document.documentElement.outerHTML")
        assert tab.js("sessionStorage.length") == 1 and tab.js("localStorage.length") == 0
        expected = "401 (Unauthorized)"  # before the key was given, and of the wrong one
        assert [one for one in tab.errors if expected not in one] == []
