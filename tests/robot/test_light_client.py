"""prts-client: what a robot installs is light, whole, and drives a real server from an environment that has no more."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import numpy as np
import pytest

import prts_core
from prts_core.config.load import load_plan
from prts_core.policy.policy import load_policy
from prts_core.robot.openpi import OpenpiPolicy
from prts_core.serving.server import PolicyServer, ServerConfig
from tests.fixtures.running_server import running
from tests.fixtures.tiny_policy import write_policy

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "prts_core" / "robot"
PROJECT = tomllib.loads((FOLDER / "pyproject.toml").read_text())
HEAVY = ("torch", "pydantic", "polars", "transformers", "prts_core", "yaml", "rich", "zmq", "rclpy")

ASK = """
import sys, threading
from pathlib import Path
import numpy as np
from prts_client.robot.action_queue import ActionQueue
from prts_client.robot.openpi import OpenpiPolicy

policy = OpenpiPolicy(sys.argv[1])
contract = policy.contract.contract
seen = {"observation/state": np.zeros(len(contract.state), np.float32), "prompt": "open the faucet"}
seen |= {camera.key: np.zeros((camera.height, camera.width, 3), np.uint8) for camera in contract.cameras}
done, stop = [], threading.Event()

def act(action):
    done.append(action)
    if queue.cadence.looks >= 2 and len(done) >= policy.contract.chunk_length:
        stop.set()

with ActionQueue(policy, contract.control_hz, when_starved="hold") as queue:
    print(queue.run(lambda: seen, act, stop=stop))
assert np.isfinite(done).all() and np.shape(done)[1] == len(contract.action)
if len(sys.argv) > 2:
    from prts_client.robot.groot import GrootPolicy
    groot = GrootPolicy(sys.argv[2])
    state = {d.name: np.zeros((1, 1, 1), np.float32) for d in contract.state}
    video = {c.key: np.zeros((1, 1, c.height, c.width, 3), np.uint8) for c in contract.cameras}
    told = {"video": video, "state": state, "language": {"task": [["open the faucet"]]}}
    chunk = groot.chunk(told, step=0, delay=None, reset=True)
    assert chunk.shape == (policy.contract.chunk_length, len(contract.action))
    groot.close()
heavy = sorted({name.partition(".")[0] for name in sys.modules} & set(%r))
assert not heavy, heavy
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the package as the wheel has it, of links."""
    for source, target in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        place = tmp_path / "site" / target
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to((FOLDER / source).resolve(strict=True))
    return tmp_path / "site"


def test_every_module_imports_where_nothing_heavy_is(installed: Path):
    modules = sorted(
        ".".join(path.relative_to(installed).with_suffix("").parts).removesuffix(".__init__")
        for path in installed.rglob("*.py")
        if path.stem not in ("ros2_node", "groot")  # rclpy; pyzmq is an extra
    )
    assert "prts_client.robot.action_queue" in modules
    code = f"""
import importlib, sys
from importlib.machinery import PathFinder
class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {HEAVY!r} else super().find_spec(name, path, target)
sys.meta_path = [Absent if finder is PathFinder else finder for finder in sys.meta_path
                 if "editable" not in str(finder).lower()]
for name in {modules!r}:
    importlib.import_module(name)
print(sorted(set(sys.modules) & set({HEAVY!r})))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


def test_its_metadata_are_those_of_the_project():
    assert PROJECT["project"]["version"] == prts_core.__version__
    own = {re.match(r"[\w-]+", text)[0]: text for text in PROJECT["project"]["dependencies"]}
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    serve = {re.match(r"[\w-]+", text)[0]: text for text in ours["optional-dependencies"]["serve"]}
    assert own.keys() == {"numpy", "msgpack", "websockets"}
    assert all(own[name] == serve[name] for name in ("msgpack", "websockets"))
    assert PROJECT["project"]["optional-dependencies"]["groot"] == [serve["pyzmq"]]


def test_the_readme_names_what_there_is():
    text = (FOLDER / "README.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("prts_client"):
                module = importlib.import_module(node.module.replace("prts_client", "prts_core"))
                assert all(hasattr(module, alias.name) for alias in node.names)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (FOLDER / link).exists(), link


def serve_command(policy: Path):
    """`prts serve` on both protocols: the process and its two addresses."""
    command = [sys.executable, "-u", "-m", "prts_core.cli.main", "serve", "--model", str(policy), "--protocol", "both"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--port", "0", "--groot-port", "0"], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    found: list[str] = []
    for line in process.stdout:
        found += re.findall(r"serving on ((?:ws|tcp)://\S+)", line)
        if len(found) == 2:
            return process, found
    raise AssertionError(f"the server ended with {process.wait()}")


@pytest.mark.slow
def test_an_empty_environment_installs_it_and_drives_a_real_server(tmp_path: Path):
    policy = write_policy(tmp_path / "policy", load_plan(ROOT / "configs" / "smoke.yaml").model)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{FOLDER}[groot]"]
    made = subprocess.run(install, env=environment, capture_output=True, text=True)
    if made.returncode and re.search(r"ConnectionError|Temporary failure|timed out", made.stderr):
        pytest.skip("no package index here")
    assert made.returncode == 0, made.stderr[-2000:]
    listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout
    there = {line.partition("==")[0].lower() for line in listed.splitlines()} - {"pip", "setuptools"}
    assert there == {"prts-client", "numpy", "msgpack", "websockets", "pyzmq"}
    process, addresses = serve_command(policy)
    try:
        heavy = tuple(name for name in HEAVY if name != "zmq")
        asked = subprocess.run(
            [python, "-c", ASK % (heavy,), *addresses], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert asked.returncode == 0, asked.stderr[-3000:]
        assert "looks that took" in asked.stdout
    finally:
        process.terminate()
        process.wait(60)
    assert not (FOLDER / "build").exists() and not list(FOLDER.glob("*.egg-info")), "an installation leaves nothing"


def test_the_same_script_drives_a_server_in_the_project_itself(tmp_path: Path):
    """As the one above, by a policy in this process and the project's own name: quick, and no package index."""
    policy = load_policy(write_policy(tmp_path / "policy", load_plan(ROOT / "configs" / "smoke.yaml").model))
    contract = policy.contract.contract
    seen = {"observation/state": np.zeros(len(contract.state), np.float32), "prompt": "open the faucet"}
    seen |= {camera.key: np.zeros((camera.height, camera.width, 3), np.uint8) for camera in contract.cameras}
    with running(PolicyServer(policy, ServerConfig(port=0))) as url:
        code = (ASK % ((),)).replace("prts_client", "prts_core")
        asked = subprocess.run([sys.executable, "-c", code, url], cwd=ROOT, capture_output=True, text=True)
        assert asked.returncode == 0, asked.stderr[-3000:]
        served = OpenpiPolicy(url)
        before = served.chunk(seen, step=0, delay=None, reset=False)
        after = served.chunk(seen, step=2, delay=2, reset=False)
        np.testing.assert_array_equal(after[:2], before[2:4], "the rows that are executed meanwhile are kept")
        served.close()
