"""`prts replay` on a real (random, tiny) policy and a dataset on disk: figures, what it keeps, resume, refusals."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

from prts_core.cli.main import main
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.files import read_json, write_json
from prts_core.io.msgpack import pack, unpack
from prts_core.policy.observation import STATE
from prts_core.policy.policy import load_policy, save_policy
from prts_core.rollout import replay as replaying
from prts_core.serving.server import PolicyServer, ServerConfig
from prts_core.training.batch import chunk_windows
from tests.fixtures.reaching import CAMERA, reaching_processor, write_reaching
from tests.fixtures.running_server import running
from tests.fixtures.smoke_run import RECIPE


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDataset:
    return write_reaching(tmp_path_factory.mktemp("reaching"), per_goal=3, heldout=4)


@pytest.fixture
def policy(tmp_path, model, tiny, tokenizer, fast) -> Path:
    save_policy(tmp_path / "policy", model.state_dict(), tiny, reaching_processor(tmp_path, tiny, tokenizer, fast))
    return tmp_path / "policy"


@pytest.fixture
def asked(policy, data, tmp_path) -> list[str]:
    return ["replay", str(data.root), "--policy", str(policy), "--outputs", str(tmp_path / "outputs")]


def report_of(tmp_path: Path) -> dict:
    (folder,) = (tmp_path / "outputs" / "replay").iterdir()
    return read_json(folder / "report.json")


def test_the_error_is_that_of_the_policys_own_actions(asked, policy, data, tmp_path, capsys):
    assert main([*asked, "--episode", "3", "--episode", "7", "--every", "2"]) == 0
    report, loaded = report_of(tmp_path), load_policy(policy)
    errors, known = [], []
    for episode in (3, 7):
        windows, clamped = chunk_windows(data.actions(episode), loaded.contract.chunk_length)
        for row in range(0, data.length(episode), 2):
            seen = {STATE: data.states(episode)[row], CAMERA: data.frames(episode, CAMERA, [row])[0]}
            seed = replaying.look_seed(0, episode, row)
            errors.append(np.abs(loaded.act(seen, data.instruction(episode), seed) - windows[row]))
            known.append(~clamped[row])
    errors, known = np.array(errors), np.array(known)
    assert report["looks"] == len(errors) and not known.all(), "the last chunks reach beyond the episode"
    for at, one in enumerate(report["dimensions"]):
        meant = loaded.contract.contract.action[at]
        assert (one["name"], one["unit"]) == (meant.name, meant.unit)
        assert one["mean"] == pytest.approx(errors[known][:, at].mean(), rel=1e-4)
        assert one["rmse"] == pytest.approx(np.sqrt((errors[known][:, at] ** 2).mean()), rel=1e-4)
        assert one["largest"] == pytest.approx(errors[known][:, at].max(), rel=1e-4)
        rows = [errors[known[:, row], row, at].mean() for row in range(errors.shape[1])]
        np.testing.assert_allclose(one["by_row"], rows, rtol=1e-4)
    assert report["rows"][1]["seconds"] == pytest.approx(1 / data.fps)
    assert [one["episode"] for one in report["episodes"]] == [3, 7]
    told = capsys.readouterr().out
    assert f"{len(errors)} chunks compared" in told and loaded.contract.contract.action[0].name in told
    page = next((tmp_path / "outputs" / "replay").rglob("page.html")).read_text()
    assert "data:image/png;base64," in page and "Episodes, worst first" in page and "http" not in page


def test_the_heldout_episodes_unless_others_are_named_and_json_for_machines(asked, data, capsys):
    assert main([*asked, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["episode"] for one in report["episodes"]] == data.episodes("heldout")
    assert main([*asked, "--json", "--split", "train", "--every", "50"]) == 0
    assert len(json.loads(capsys.readouterr().out)["episodes"]) == len(data.episodes("train"))


def test_a_second_run_asks_nothing_and_another_option_is_another_report(asked, tmp_path, monkeypatch, capsys):
    words = [*asked, "--episode", "3"]
    assert main(words) == 0
    first = report_of(tmp_path)

    def never(*args, **kwargs):
        raise AssertionError("the policy was loaded")

    with monkeypatch.context() as patch:
        patch.setattr("prts_core.policy.policy.load_policy", never)
        assert main(words) == 0
        assert "found finished" in capsys.readouterr().err and report_of(tmp_path) == first
        for other in (["--every", "1"], ["--seed", "1"], ["--batch", "2"]):
            with pytest.raises(AssertionError, match="was loaded"):
                main([*words, *other])


def test_changed_data_and_changed_weights_are_measured_again(asked, policy, data, tmp_path):
    copied = shutil.copytree(data.root, tmp_path / "copy")
    words = ["replay", str(copied), *asked[2:], "--episode", "3"]
    for _ in range(2):
        assert main(words) == 0
    folders = tmp_path / "outputs" / "replay"
    assert len(list(folders.iterdir())) == 1
    config = read_json(policy / "config.json")
    write_json(policy / "config.json", config | {"expert": config["expert"] | {"noise_scale": 0.5}})
    assert main(words) == 0 and len(list(folders.iterdir())) == 2
    table = copied / data.info.data_file(3)
    frame = pl.read_parquet(table)
    frame.with_columns(pl.Series("action", (data.actions(3) + 1).tolist(), frame.schema["action"])).write_parquet(table)
    assert main(words) == 0 and len(list(folders.iterdir())) == 3


def test_an_interrupted_replay_goes_on(asked, tmp_path, monkeypatch, capsys):
    measure, seen = replaying._episode, []

    def interrupted(policy, reader, episode, header):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(episode)
        return measure(policy, reader, episode, header)

    monkeypatch.setattr(replaying, "_episode", interrupted)
    assert main(asked) == 130
    monkeypatch.setattr(replaying, "_episode", lambda *args: seen.append(args[2]) or measure(*args))
    assert main(asked) == 0
    assert len(seen) == len(set(seen)), "no episode twice"
    assert [one["episode"] for one in report_of(tmp_path)["episodes"]] == sorted(seen)


def test_a_served_policy_gives_the_same_errors(asked, policy, tmp_path, capsys):
    assert main([*asked, "--json", "--episode", "3"]) == 0
    here = json.loads(capsys.readouterr().out)
    with running(PolicyServer(load_policy(policy), ServerConfig(port=0, about={"package_digest": "sha256:p"}))) as url:
        words = [*asked[:2], "--policy", url, *asked[4:], "--json", "--episode", "3"]
        assert main(words) == 0
        there = json.loads(capsys.readouterr().out)
        assert main(words) == 0 and "found finished" in capsys.readouterr().err
    assert there["header"]["policy"]["package_digest"] == "sha256:p"
    for ours, theirs in zip(here["dimensions"], there["dimensions"], strict=True):
        np.testing.assert_allclose(theirs["by_row"], ours["by_row"], rtol=1e-4)


def test_a_server_that_does_not_say_who_it_is_is_asked_again(asked, policy, data, tmp_path, capsys):
    """Of openpi's own servers nobody knows whether they still serve the same."""
    loaded, seen = load_policy(policy), []

    def serve_one(connection) -> None:
        connection.send(pack({}))
        with contextlib.suppress(ConnectionClosed):
            while True:
                seen.append(unpack(connection.recv()))
                connection.send(pack({"actions": np.zeros((loaded.contract.chunk_length, 3), np.float32)}))

    with serve(serve_one, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        words = ["replay", str(data.root), "--policy", url, *asked[4:], "--episode", "3"]
        assert main(words) == 1 and "--contract" in capsys.readouterr().err
        for _ in range(2):
            before = len(seen)
            assert main([*words, "--contract", "dataset"]) == 0
            assert len(seen) - before > 2 and "found finished" not in capsys.readouterr().err
        server.shutdown()
        thread.join(60)
    assert set(seen[-1]) == {"observation/state", "observation/top", "prompt"}
    report = report_of(tmp_path)
    assert "unverified" in report["header"]["policy"] and report["dimensions"][0]["mean"] > 0


@pytest.mark.parametrize(
    "words, told",
    [
        (["--policy", "P"], "Either recorded episodes"),
        (["D", "--policy", "P", "--shadow", "ws://a:1"], "Found: both"),
        (["D", "--policy", "P", "--episode", "99"], "No such episode"),
        (["D", "--policy", "P", "--episode", "1", "--split", "train"], "named twice"),
        (["D", "--policy", "P", "--split", "nightly"], "has no split 'nightly'"),
        (["D", "--policy", "P", "--every", "0"], "nothing to replay"),
        (["D", "--policy", "ws://127.0.0.1:9", "--dtype", "bf16"], "its own precision"),
        (["D", "--policy", "ws://127.0.0.1:9"], "No.* the policy server|Nobody listens"),
        (["nowhere/at/all", "--policy", "P"], "no such folder"),
        (["another_name", "--policy", "P"], "another_name"),
        (["metaworld", "--policy", "P"], "convert"),
        (["--policy", "P", "--shadow", "http://a:1"], r"ws://host:port"),
    ],
)
def test_faults_are_told_with_the_cure(words, told, data, policy, tmp_path, capsys):
    places = {"D": str(data.root), "P": str(policy)}
    assert main(["replay", *(places.get(word, word) for word in words), "--outputs", str(tmp_path / "o")]) == 1
    said = capsys.readouterr().err
    assert re.search(told, said), said


def test_a_dataset_of_other_numbers_is_refused(asked, data, policy, tmp_path, capsys):
    copied = shutil.copytree(data.root, tmp_path / "copy")
    contract = read_json(copied / "meta" / "contract.json")
    write_json(copied / "meta" / "contract.json", contract | {"control_hz": 3.0})
    assert main(["replay", str(copied), *asked[2:]]) == 1
    assert "control_hz: 3.0" in capsys.readouterr().err
    (copied / "meta" / "contract.json").unlink()
    raw = read_json(policy / "policy_contract.json")
    raw.pop("fingerprint")
    raw["contract"]["action"] = raw["contract"]["action"][:1]
    write_json(policy / "policy_contract.json", raw)
    assert main(["replay", str(copied), *asked[2:]]) == 1
    assert "not those of the policy" in capsys.readouterr().err
    shutil.rmtree(copied / "data")
    assert main(["replay", str(copied), *asked[2:]]) == 1
    assert "parquet" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dataset_of_the_recipe_by_its_name(smoke_outputs, tmp_path, capsys):
    """The converted dataset that the recipe means now; its own policy fits it."""
    config = ["--config", str(RECIPE), "--outputs", str(smoke_outputs), "--output", str(tmp_path / "kept")]
    fine_tuned = next((smoke_outputs / "runs" / "smoke" / "sft").glob("*/output"))
    assert main(["replay", "metaworld_smoke", "--policy", str(fine_tuned), *config, "--split", "train"]) == 0
    report = read_json(tmp_path / "kept" / "report.json")
    assert report["looks"] > 0 and [one["unit"] for one in report["dimensions"]]
    assert main(["replay", "metaworld_smoke", "--policy", str(fine_tuned), *config, "--seed", "1"]) == 1
    assert "choose another --output" in capsys.readouterr().err
