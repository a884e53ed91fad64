"""`prts value` as a tool on a real (random, tiny) policy and a dataset on disk: pictures, numbers, resume, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from prts_core.cli import value as tool
from prts_core.cli.main import main
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import ConfigError, ContractError, DataError
from prts_core.io.files import read_json, write_json
from prts_core.policy.observation import STATE
from prts_core.policy.policy import load_policy, save_policy
from prts_core.training.batch import chunk_windows
from tests.fixtures.reaching import CAMERA, reaching_processor, write_reaching
from tests.fixtures.tiny_network import SENTENCES


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDataset:
    return write_reaching(tmp_path_factory.mktemp("reaching"), per_goal=3, heldout=4)


@pytest.fixture
def policy(tmp_path, model, tiny, tokenizer, fast) -> Path:
    processor = reaching_processor(tmp_path, tiny, tokenizer, fast)
    save_policy(tmp_path / "policy", model.state_dict(), tiny, processor)
    return tmp_path / "policy"


@pytest.fixture
def asked(policy, data, tmp_path) -> list[str]:
    return ["value", "--policy", str(policy), "--data", str(data.root), "--out", str(tmp_path / "out" / "v.png")]


def test_any_episode_under_any_sentence(asked, policy, data, tmp_path, capsys):
    words = ["--episode", "3", "--episode", "7", "--instruction", "open the faucet", "--instruction", "wave"]
    assert main([*asked, *words]) == 0
    with Image.open(tmp_path / "out" / "v.png") as picture:
        assert picture.width > 800
    report = read_json(tmp_path / "out" / "v.json")
    assert [curve["episode"] for curve in report["curves"]] == [3, 7]
    curve = report["curves"][0]
    assert curve["own"] == SENTENCES[0] and list(curve["values"]) == ["open the faucet", "wave"]
    assert curve["rows"] == list(range(data.length(3)))
    loaded, row = load_policy(policy), 5
    seen = {STATE: data.states(3)[row], CAMERA: data.frames(3, CAMERA, [row])[0]}
    chunk = chunk_windows(data.actions(3), 4)[0][row]
    assert loaded.value(seen, chunk, "wave") == pytest.approx(curve["values"]["wave"][row], abs=2e-4)
    assert "Spearman" in capsys.readouterr().out


def test_without_names_a_few_heldout_episodes_under_the_datasets_sentences(asked, tmp_path):
    assert main(asked) == 0
    curves = read_json(tmp_path / "out" / "v.json")["curves"]
    assert [curve["episode"] for curve in curves] == [5, 6, 7, 8][: len(curves)] and len(curves) >= 3
    assert set(curves[0]["values"]) == set(SENTENCES)


def test_ranking_covers_every_episode_and_draws_the_worst(asked, data, tmp_path, capsys):
    assert main([*asked, "--rank"]) == 0
    ranking = read_json(tmp_path / "out" / "v.json")
    assert sorted(verdict["episode"] for verdict in ranking["verdicts"]) == data.episodes()
    assert len(ranking["measured"]) == len(data.rows)
    assert (tmp_path / "out" / "v.png").stat().st_size > 10_000
    assert f"of {len(data.rows)} demonstrations are flagged" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.partial*"))


def test_an_interrupted_ranking_goes_on_where_it_was(asked, policy, data, tmp_path, monkeypatch, capsys):
    from prts_core.value import ranking

    measure, seen = ranking.measure, []

    def interrupted(policy, dataset, episode, *rest):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(episode)
        return measure(policy, dataset, episode, *rest)

    monkeypatch.setattr(ranking, "measure", interrupted)
    assert main([*asked, "--rank"]) == 130
    [partial] = (tmp_path / "out").glob("v.*.partial.jsonl")
    with partial.open("a") as file:
        file.write('{"episode": 4, "instr')  # cut by a kill
    assert seen == [0, 1, 2, 3]
    seen.clear()
    monkeypatch.setattr(
        ranking, "measure", lambda p, d, episode, *rest: (seen.append(episode), measure(p, d, episode, *rest))[1]
    )
    assert main([*asked, "--rank"]) == 0
    assert seen == [4, 5, 6, 7, 8]
    resumed = {one["episode"]: one["own"] for one in read_json(tmp_path / "out" / "v.json")["measured"]}
    anew = tool.measure_all(load_policy(policy), data, data.episodes(), SENTENCES, partial, "another key")
    assert resumed == {one.episode: pytest.approx(one.own, abs=2e-4) for one in anew}


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"--episode": "99"}, DataError, r"No such episode.*Found: 99.*0 to 8"),
        ({"--camera": "observation.images.tap"}, DataError, r"did you mean 'observation\.images\.top'"),
        ({"--out": "v.jpg"}, ConfigError, r"picture is a PNG.*v\.png"),
        ({"--instruction": " "}, ConfigError, "instruction is empty"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_suggestion(asked, changes, kind, said):
    words = [*asked, *(word for pair in changes.items() for word in pair)]
    from prts_core.cli.main import build_parser

    with pytest.raises(kind, match=said):
        tool.main(build_parser("value").parse_args(words))


def test_half_a_question_is_refused(policy, capsys):
    assert main(["value", "--policy", str(policy)]) == 1
    assert "needs a policy and a dataset" in capsys.readouterr().err


def test_a_dataset_of_another_contract_is_refused_and_one_without_is_told(asked, data, tmp_path, capsys):
    from prts_core.cli.main import build_parser

    copy = tmp_path / "copy"
    shutil.copytree(data.root, copy)
    words = [*asked, "--data", str(copy), "--episode", "0"]
    raw = read_json(copy / "meta" / "contract.json")
    write_json(copy / "meta" / "contract.json", raw | {"control_hz": 30.0})
    with pytest.raises(ContractError, match=r"control_hz: 30\.0 in dataset"):
        tool.main(build_parser("value").parse_args(words))
    (copy / "meta" / "contract.json").unlink()
    assert main(words) == 0
    assert "has no meta/contract.json" in capsys.readouterr().out


def test_the_stage_is_the_command_without_these_words():
    from prts_core.cli.main import asks_for_tool, build_parser

    parser = build_parser("value")
    assert not asks_for_tool(parser.parse_args(["value", "--config", "configs/quickstart.yaml", "--set", "seed=3"]))
    assert asks_for_tool(parser.parse_args(["value", "--rank"]))
