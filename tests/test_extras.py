"""Each extra of pyproject.toml brings what it promises: its entry point runs where every other package is absent.

What pip would install is resolved from this environment's own metadata. A process is kept from all the rest, by the
names of modules and of distributions.
"""

from __future__ import annotations

import functools
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from prts_core.config.load import load_plan
from prts_core.delivery.register import REQUIREMENTS
from prts_core.io.errors import EXTRA_OF
from tests.data.conftest import convert_toy, write_raw
from tests.fixtures.tiny_policy import write_policy
from tests.test_structure import ROOT, imports, name_of, sources

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
SCRIPTS = {path.stem for path in (ROOT / "kernels" / "bench").glob("*.py")}  # they import each other
OURS = {"prts_core", "prts_kernels", "assets", "pipelines", *SCRIPTS}
# Of simulators' own environments, of a robot's ROS 2, of peers that a benchmark compares with, and what stands on a GPU
# machine alone.
ELSEWHERE = {
    "libero",
    "robosuite",
    "mani_skill",
    "cv2",
    "lerobot",
    "torchvision",
    "flash_attn",
    "flash_attn_interface",
    "ray",
    "rclpy",
    "sensor_msgs",
    "std_msgs",
}

ABSENT = """
import contextlib, io, re, sys
from importlib.machinery import PathFinder
from pathlib import Path

hidden, kept = set({hidden!r}), set({kept!r})

class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        found = super().find_distributions(*args, **kwargs)
        return [made for made in found if re.sub("[-_.]+", "-", made.metadata["Name"]).lower() in kept]

sys.meta_path = [Absent if finder is PathFinder else finder for finder in sys.meta_path
                 if "editable" not in str(finder).lower()]
sys.path[:0] = [{root!r}, {root!r} + "/kernels"]
begun, (work, dataset, policy) = set(sys.modules), sys.argv[1:]

from prts_core.cli.main import main
"""
KEPT_AWAY = """
there = hidden & {name.split(".")[0] for name in sys.modules.keys() - begun}
assert not there, there
"""
ASKED = """
import numpy as np
from prts_core.policy.policy import load_policy
loaded = load_policy(Path(policy))
contract = loaded.contract.contract
seen = {"observation.state": np.zeros(len(contract.state), np.float32)}
seen |= {camera.key: np.zeros((camera.height, camera.width, 3), np.uint8) for camera in contract.cameras}
shape = loaded.contract.chunk_length, len(contract.action)
"""
ENTRY_POINTS = {
    "base": """
from prts_core.cli.main import TOOLS
from prts_core.stages.declarations import STAGES
for words in ["--help"], *([name, "--help"] for name in (*STAGES, *TOOLS)):
    with contextlib.suppress(SystemExit):
        main(words)
assert main(["status", "--config", "configs/smoke.yaml", "--outputs", work + "/outputs"]) == 0
assert main(["config", "show", "--config", "configs/smoke.yaml"]) == 0
for words, extra in (["validate", dataset], "data"), (["serve", "--model", policy], "serve"):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(words) == 1
    assert f"`pip install -e '.[{extra}]'`" in said.getvalue(), said.getvalue()
""",
    "data": """
assert main(["validate", dataset]) == 0
assert main(["stats", dataset, "--out", work + "/stats"]) == 0
assert main(["convert", "--source", "lerobot_v21", "--format", "v3.0", "--from", dataset, "--to", work + "/v3"]) == 0
import prts_core.data.convert.aloha, prts_core.data.convert.hdf5
""",
    "inference": ASKED
    + """
from prts_core.data.images import resize
assert resize(np.zeros((1, 8, 8, 3), np.uint8), 16, 16).shape == (1, 16, 16, 3)
acted = loaded.act(seen, "open the faucet", 0)
assert acted.shape == shape and np.isfinite(acted).all() and np.isfinite(loaded.value(seen, acted, "open it")).all()
""",
    "serve": ASKED
    + """
import asyncio
import prts_core.cli.serve, prts_core.delivery.resolve
from prts_core.robot.openpi import PolicyClient
from prts_core.robot.groot import GrootClient
from prts_core.serving.server import PolicyServer, ServerConfig

def ask(port, groot_port):
    with GrootClient(f"tcp://127.0.0.1:{groot_port}") as client:
        assert len(client.get_modality_config()["action"].delta_indices) == loaded.contract.chunk_length
    with PolicyClient(f"ws://127.0.0.1:{port}", contract=loaded.contract) as client:
        named = {key.replace("observation.images.", "observation/"): value for key, value in seen.items()}
        named["observation/state"] = named.pop("observation.state")
        return client.infer(named | {"prompt": "open the faucet"})["actions"]

async def serve():
    stop, ports = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = ServerConfig(port=0, groot_port=0, protocols=("openpi", "groot"))
    running = asyncio.create_task(PolicyServer(loaded, config).run(stop, lambda *found: ports.set_result(found)))
    acted = await asyncio.to_thread(ask, *await ports)
    stop.set()
    await running
    return acted

assert asyncio.run(serve()).shape == shape
""",
    "otel": """
import os
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
from prts_core.serving.tracing import Tracing
Tracing.to_collector().close()
""",
    "train": """
words = ["--config", work + "/configs/toy.yaml", "--outputs", work + "/outputs"]
assert main(["chain", *words, "--until", "sft"]) == 0
import prts_core.io.hub, prts_core.training.engines.zero, deepspeed, huggingface_hub
""",
    "lora": "import peft, prts_core.training.trainer",
    "nf4": "import bitsandbytes, prts_core.training.adapters",
    "sim": """
import numpy as np
from prts_core.sim.suites.metaworld.environment import Scene
scene = Scene("faucet-open")
scene.reset(0, 0)
scene.step(np.zeros(4))
assert scene.picture("top", 32).any() and main(["sim", "check", "metaworld"]) == 0
import prts_core.sim.expert_recorder, prts_core.rollout.benchmark, prts_core.rollout.recording
""",
    "rlds": "import prts_core.data.convert.rlds, google.protobuf, google_crc32c",
    "mcap": "import prts_core.data.convert.mcap, mcap.reader, mcap_ros2.decoder, mcap_protobuf.decoder",
    "http": """
import functools, http.server, os, threading
os.environ["PRTS_CACHE"] = work + "/http"
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=dataset)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
from prts_core.data.lerobot_v21.reader import LeRobotDataset
assert len(LeRobotDataset.open(f"http://127.0.0.1:{server.server_address[1]}").actions(0))
""",
    "s3": "import s3fs\nfrom prts_core.io.object_storage import RemoteFolder\nRemoteFolder('s3://bucket/folder')",
    "pipeline": """
from pipelines.definitions import definitions
from prts_core.tracking.store import client
assert definitions().resolve_all_job_defs() and client(Path(work)).search_experiments()
import dvc.repo, assets.dvc, prts_core.delivery.register, prts_core.delivery.regression, prts_core.delivery.history
""",
}


def listed(extra: str) -> list[str]:
    return PROJECT["dependencies"] + ([] if extra == "base" else EXTRAS[extra])


@functools.cache
def brought_by(extra: str) -> frozenset[str]:
    """Names of the distributions that pip installs for our dependencies and one extra, here."""
    todo, seen = [(Requirement(text), "") for text in listed(extra)], set()
    while todo:
        wanted, of = todo.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": of}):
            continue
        name = canonicalize_name(wanted.name)
        for part in ("", *wanted.extras):
            if (name, part) in seen:
                continue
            seen.add((name, part))
            if name == PROJECT["name"]:
                more = listed(part or "base")
            else:
                try:
                    more = importlib.metadata.requires(name) or []
                except importlib.metadata.PackageNotFoundError:
                    more = []
            todo += [(Requirement(text), part) for text in more]
    return frozenset(name for name, _ in seen)


@functools.cache
def distributions_of() -> dict[str, set[str]]:
    """Module name -> the distributions here that have it; without our own."""
    found = importlib.metadata.packages_distributions().items()
    return {module: {canonicalize_name(name) for name in names} for module, names in found if module not in OURS}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A folder with a recipe, a dataset and a policy folder."""
    work = tmp_path_factory.mktemp("extras")
    dataset = convert_toy(work / "toy", write_raw(work / "raw")).root
    policy = write_policy(work / "policy", load_plan(ROOT / "configs" / "smoke.yaml").model)
    configs = shutil.copytree(ROOT / "configs", work / "configs")
    (configs / "toy.yaml").write_text((configs / "smoke.yaml").read_text().replace("metaworld_smoke", "toy"))
    (configs / "datasets" / "toy.yaml").write_text(f"name: toy\nsource: {{kind: lerobot, root: {dataset}}}\n")
    return [str(work), str(dataset), str(policy)]


@pytest.mark.parametrize("extra", ENTRY_POINTS)
def test_what_an_extra_promises_runs_with_its_packages_alone(extra: str, given: list[str]):
    kept = brought_by(extra)
    hidden = sorted(module for module, names in distributions_of().items() if not names & kept)
    script = ABSENT.format(hidden=hidden, kept=sorted(kept), root=str(ROOT)) + ENTRY_POINTS[extra] + KEPT_AWAY
    done = subprocess.run([sys.executable, "-c", script, *given], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_every_extra_is_tried():
    # gcsfs: no server of its kind runs here. tensorboard, Ray: tests/tracking/test_tensorboard.py and
    # tests/rl/processes/test_ray_*
    # run where they are.
    on_a_gpu_alone, ours, not_here = {"gpu", "hopper"}, {"dev"}, {"gcs", "tensorboard", "ray"}
    assert set(ENTRY_POINTS) == {"base", *EXTRAS} - on_a_gpu_alone - ours - not_here


def test_every_package_that_we_import_is_brought_by_an_extra():
    """At any depth of the code; and the cure for a package that is not there names an extra that brings it."""
    wrong = []
    for path in sources():
        for name in {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - OURS - ELSEWHERE:
            extra = EXTRA_OF.get(name, "base")
            if not distributions_of().get(name, set()) & brought_by(extra):
                wrong.append(f"{name_of(path)} imports {name}, which {extra} does not bring")
    assert not wrong, "\n".join(wrong)


def test_a_registered_model_names_what_loading_it_needs():
    needed = [Requirement(text).name for text in listed("inference")]
    assert sorted(REQUIREMENTS) == sorted(["mlflow", *needed])
