"""What is installed for a sidecar, by which commands; that a dry run says all of it and does none; how guard starts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prts_core.cli.main import main
from prts_core.io.errors import ConfigError, UnavailableError
from prts_core.io.locks import locked
from prts_core.robot.groot import GrootClient
from prts_core.serving.sidecar import guard
from prts_core.serving.sidecar.child import open_server
from prts_core.serving.sidecar.families import BITSANDBYTES, GROOT, RLDX, Server
from prts_core.serving.sidecar.home import Home, install, install_commands
from prts_core.serving.sidecar.plan import ask_weights
from prts_core.sim import installer

# Stands for git, uv and the Python that uv makes: notes what it was asked and with which environment.
TOOL = """#!{python}
import json, os, sys
from pathlib import Path
with open({log!r}, "a") as file:
    print(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:], dict(os.environ)]), file=file)
if os.environ.get("FAILS") in sys.argv:
    sys.exit("no route to host")
if sys.argv[1] == "sync":
    python = Path(os.environ["UV_PROJECT_ENVIRONMENT"]) / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(Path(__file__).read_text())
    python.chmod(0o755)
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """git and uv that only take notes, and what they noted."""
    folder, log = tmp_path / "bin", tmp_path / "tools.log"
    folder.mkdir()
    for name in ("git", "uv"):
        (folder / name).write_text(TOOL.format(python=sys.executable, log=str(log)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_installing_runs_exactly_the_commands_that_are_shown(tools, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "ours")
    server, home = Server.of("rldx", quantization="nf4"), Home("rldx")
    record = install(server, home)
    ran = [[name, *words[:-1]] for name, *words in tools()]
    shown = [list(command.words) for command in install_commands(server, home)]
    assert ran == [[Path(words[0]).name, *words[1:]] for words in shown]
    assert ["git", "-C", str(home.source), "checkout", "--detach", RLDX.revision] in ran
    assert ["uv", "pip", "install", "--python", str(home.python), BITSANDBYTES] in ran
    assert all("PYTHONPATH" not in words[-1] for words in tools())
    assert tools()[2][-1]["UV_PROJECT_ENVIRONMENT"] == str(home.path / "venv")
    assert record["revision"] == RLDX.revision and record["self_check"] == {"imports": "rldx"}
    assert install(server, home) == record and len(tools()) == len(shown), "what is there is not installed again"
    assert install(Server.of("rldx"), home) == record, "what quantises does not stand in the way of what does not"


def test_what_quantises_is_added_to_what_is_installed(tools):
    home = Home("rldx")
    install(Server.of("rldx"), home)
    before = len(tools())
    home.source.mkdir()  # a server may be running from it
    install(Server.of("rldx", quantization="int8"), home)
    assert [words[0] for words in tools()[before:]] == ["uv", "python"] and home.source.is_dir()


def test_an_installation_that_fails_says_what_the_tool_said(tools, monkeypatch):
    monkeypatch.setenv("FAILS", "sync")
    with pytest.raises(UnavailableError, match="cannot be installed") as caught:
        install(Server.of("rldx"), Home("rldx"))
    assert "no route to host" in caught.value.found and "uv sync" in caught.value.field
    assert "--sidecar-python" in caught.value.cure and Home("rldx").installed() is None
    monkeypatch.delenv("FAILS")
    assert install(Server.of("rldx"), Home("rldx"))["revision"] == RLDX.revision


def test_a_tool_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="without git"):
        install(Server.of("rldx"), Home("rldx"))


def test_weights_that_are_not_commercial_pass_the_gate_of_skills(monkeypatch):
    monkeypatch.delenv("OPENRAL_ALLOW_NONCOMMERCIAL", raising=False)
    with pytest.raises(ConfigError, match="OPENRAL_ALLOW_NONCOMMERCIAL=1"):
        ask_weights(Server.of("rldx"))
    assert ask_weights(Server.of("gr00t", "a/b")).commercial
    monkeypatch.setenv("OPENRAL_ALLOW_NONCOMMERCIAL", "1")
    assert not ask_weights(Server.of("rldx")).commercial


# ---- the dry run ---------------------------------------------------------------------------------------------------
def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def test_a_dry_run_says_everything_and_does_nothing(tmp_path, monkeypatch, capsys, tools):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PRTS_API_KEY", "secret-of-ours")
    monkeypatch.setenv("VIRTUAL_ENV", "/ours")
    monkeypatch.delenv("OPENRAL_ALLOW_NONCOMMERCIAL", raising=False)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert main(["serve", "--sidecar", "rldx", "--dry-run", "--quantization", "nf4", "--sidecar-port", "23456"]) == 0
    assert tree(tmp_path) == before and not tools()
    said, home = capsys.readouterr().out, Home("rldx")
    server = Server.of("rldx", quantization="nf4", port=23456)
    for command in install_commands(server, home):
        assert f" {command}\n" in said
    for told in (
        "gate shut: The licence of 'RLWRLD/RLDX-1-FT-LIBERO'",
        RLDX.licence_note,
        f"{home.path / 'venv'} (Python 3.10)",
        "127.0.0.1:23456",
        str(home.path.parent / "run" / "port-23456.json"),
        str(home.path.parent / "run" / "port-23456.log"),
        '"model": "RLWRLD/RLDX-1-FT-LIBERO"',
        "TORCH_COMPILE_DISABLE=1",
        "--parent PID --quantization nf4 --keep action_model",
        shlex.join([str(home.source / RLDX.script), *server.flags()]),
    ):
        assert told in said
    without = re.search(r"without: (.*); and with", said)[1].split(", ")
    assert {"PRTS_API_KEY", "VIRTUAL_ENV"} <= set(without) and "secret-of-ours" not in said
    monkeypatch.setenv("OPENRAL_ALLOW_NONCOMMERCIAL", "1")
    install(server, home)
    assert main(["serve", "--sidecar", "rldx", "--dry-run", "--quantization", "nf4"]) == 0
    said = capsys.readouterr().out
    assert "nothing: it is installed" in said and "gate open" in said


def test_a_dry_run_of_gr00t_and_of_what_the_user_installed(capsys, launch):
    named = ["--sidecar-python", sys.executable, "--sidecar-script", str(launch.script)]
    assert main(["serve", "--sidecar", "gr00t", "--model", "a/b", "--dry-run", *named]) == 0
    said = capsys.readouterr().out
    assert "nothing: --sidecar-python" in said and "gate open" in said and GROOT.title in said
    assert f"{launch.script} --model-path a/b --embodiment-tag NEW_EMBODIMENT --host 127.0.0.1 --port " in said


# ---- another Python ------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_server_in_a_venv_of_its_own(launch, notes):
    """With the packages that it names and none of ours: not even PRTS."""
    home = Home("standin")
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in ("pyzmq", "msgpack", "numpy")]
    with locked(home.path / ".lock") as lock:
        installer.packages(home, pins, lock, title="the stand-in")
    absent = subprocess.run([home.python, "-c", "import torch"], capture_output=True, text=True, env={}, check=False)
    assert "No module named" in absent.stderr
    running = open_server(replace(launch, python=home.python))
    try:
        with GrootClient(launch.address) as client:
            configs = client.get_modality_config()
            asked = {
                "video": {key: np.zeros((1, 1, 8, 8, 3), np.uint8) for key in configs["video"].modality_keys},
                "state": {"position": np.ones((1, 1, 2), np.float32), "gripper": np.ones((1, 1, 1), np.float32)},
                "language": {configs["language"].modality_keys[0]: [["go"]]},
            }
            actions, _ = client.get_action(asked)
        assert actions["move"][0].tolist() == [[3, 13], [4, 14], [5, 15], [6, 16]]
        assert notes("python") == [str(home.path / "venv")]
    finally:
        running.close()


QUANTIZED = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
print({name: type(part).__name__ for name, part in model.named_modules() if "dense" in name or "query" in name})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "keep"), [("nf4", "pooler"), ("nf4", "encoder"), ("int8", "pooler")])
def test_guard_holds_weights_in_few_bits_but_for_the_head(tmp_path, kind, keep):
    pytest.importorskip("bitsandbytes")
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=32, **size)).save_pretrained(tmp_path / "model")
    (tmp_path / "server.py").write_text(QUANTIZED)
    command = [sys.executable, guard.__file__, "--parent", str(os.getpid()), "--quantization", kind, "--keep", keep]
    done = subprocess.run(
        [*command, str(tmp_path / "server.py"), str(tmp_path / "model")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(rf"guard: [1-9]\d* weights are held in {kind}", done.stdout)
    kinds = dict(re.findall(r"'([\w.]+)': '(\w+)'", done.stdout))
    assert len(kinds) > 2
    small = "Linear4bit" if kind == "nf4" else "Linear8bitLt"
    for name, found in kinds.items():
        assert found == ("Linear" if name.startswith(keep) else small), name
