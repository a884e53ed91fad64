"""The command line: what each exit status means, where defaults come from, and faults told before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prts_core.cli import main as prts
from prts_core.io.errors import Skipped, StageError, Stopped, UnavailableError
from prts_core.stages import chain, declarations

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch):
    """Makes every stage end in the given exception; returns what was asked for."""
    monkeypatch.setenv("PRTS_RECIPE", QUICKSTART)
    asked: list[tuple] = []

    def use(fault: BaseException, only: str | None = None) -> list[tuple]:
        def run(name, plan, partition=None, outputs=Path("outputs"), caller=None, **_):
            asked.append((name, partition, outputs))
            if only in (None, partition):
                raise fault
            return type("M", (), {"digest": "sha256:" + "0" * 64})()

        monkeypatch.setattr(chain, "run", run)
        return asked

    return use


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        (Skipped("Dataset 'a' is not on this machine", cure="`export X=/path`"), 3, "skipped: Dataset 'a' is not"),
        (UnavailableError("The simulator is not installed"), 1, "error: The simulator"),
        (StageError("Broken"), 1, "error: Broken"),
        (Stopped("Training stopped after step 7"), 75, "stopped: Training stopped"),
        (KeyboardInterrupt(), 130, "the same command goes on"),
    ],
)
def test_exit_statuses(raising, capsys: pytest.CaptureFixture[str], fault, status: int, said: str):
    raising(fault)
    assert prts.main(["stats"]) == status
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""


def test_the_environment_gives_recipe_and_outputs(raising, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PRTS_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("PRTS_RECIPE", str(ROOT / "configs" / "smoke.yaml"))
    asked = raising(StageError("Broken"))
    prts.main(["collect"])
    assert asked == [("collect", None, tmp_path)]
    for command in (["bench"], ["history", "m"], ["lineage", "m"], ["serve", "--model", "m"], ["config"], ["chain"]):
        args = prts.build_parser(command[0]).parse_args(command)
        assert args.outputs == tmp_path
        assert not hasattr(args, "config") or args.config.name == "smoke.yaml"


@pytest.mark.parametrize("stage", list(declarations.STAGES))
def test_every_stage_shows_commands_to_copy(stage: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        prts.main([stage, "--help"])
    said = capsys.readouterr().out
    assert f"prts {stage} --config configs/my_recipe.yaml" in said
    assert f"prts config {stage}" in said
    for line in said.split("\nexamples\n")[1].splitlines():
        words = line.split()
        if words[:3] == ["prts", stage, "--set"]:
            from prts_core.config.load import load_plan

            load_plan(Path(QUICKSTART), words[3:4]).read_all()


def test_nothing_starts_with_an_absurd_number(raising, capsys: pytest.CaptureFixture[str]):
    asked = raising(StageError("Broken"))
    assert prts.main(["sft", "--set", "sft.train.steps=-5"]) == 1
    assert "steps: -5 is not at least 1" in capsys.readouterr().err and not asked


def test_an_unknown_dataset_says_where_datasets_are_named(raising, capsys: pytest.CaptureFixture[str]):
    asked = raising(StageError("Broken"))
    assert prts.main(["convert", "--dataset", "g1_botle"]) == 1
    said = capsys.readouterr().err
    assert "did you mean 'g1_bottle'" in said and f"`datasets:` of {QUICKSTART}" in said and not asked


# ---- prts config ---------------------------------------------------------------------------------------------------
def recipe(folder: Path, **files: str) -> list[str]:
    texts = {
        "r.yaml": "name: r\ndatasets: [a]\ndeploy: a\nmodel: m\n",
        "datasets/a.yaml": "name: a\nembodiment_tag: t\nsource: {kind: lerobot, root: /x}\n",
        "robots/t.yaml": "embodiment_tag: t\n",
        "models/m.yaml": "name: m\n",
    }
    for name, text in (texts | {key.replace("__", "/") + ".yaml": text for key, text in files.items()}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return ["--config", str(folder / "r.yaml")]


def test_show_prints_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert prts.main(["config", "show", *recipe(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["sft"]["train"]["steps"] == 400


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"datasets__a": "name: a\nsource: {kind: metaworld, tasks: [{name: x, instruction: y, max_steps: []}]}\n"},
            "max_steps",
        ),
        ({"datasets__a": "name: a\nsource: {kind: lerobt, root: x}\n"}, "source.kind: 'lerobt' is none of"),
        ({"datasets__a": "name: ../a\nsource: {kind: lerobot, root: x}\n"}, "is no name"),
        ({"robots__t": "embodiment_tag: t\ncamera: {}\n"}, "did you mean 'cameras'"),
        ({"models__m": "name: m\nchunk_length: 0\n"}, "chunk_length: 0"),
        ({"models__m": "name: m\nexpert: {kind: mot, noise_scale: -1.0e+30}\n"}, "noise_scale"),
    ],
)
def test_show_checks_the_files_that_the_recipe_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], said: str
):
    assert prts.main(["config", "show", *recipe(tmp_path, **change)]) == 1
    assert said in capsys.readouterr().err


# ---- whatever a YAML or --set holds is one paragraph ---------------------------------------------------------------
ABSURD = [
    "seed: !!int abc",
    "seed: !!float abc",
    "seed: 2024-13-45",
    "seed: !!timestamp foo",
    "seed: !!bool maybe",
    "[a, b]: 1",
    "{a: b}: 1",
    "seed: " + "9" * 5000,
    "pretrain: " + "[" * 2000,
    "pretrain: " + "{a: " * 2000,
    "sft: " + "[" * 2000 + "]" * 2000,
    "seed: -1",
    "seed: .nan",
    "1: 2",
    "sft: [1]",
    "sft: {train: 3}",
    "sft: {train: {steps: 0}}",
    "sft: {train: {workers: 100000000}}",
    "sft: {train: {threads: -3}}",
    "sft: {train: {gamma: 1.0}}",
    "sft: {train: {learning_rate: 0}}",
    "sft: {train: {learning_rate: inf}}",
    "sft: {train: {weights: {contrastive: .inf}}}",
    "sft: {train: {weights: {contrastive: inf}}}",
    "pretrain: {mixture: {a: nan}}",
    "pretrain: {mixture: {a: 0}}",
    "benchmark: {episodes: 0}",
    "benchmark: {workers: 100000000}",
    "register: {floor: 7}",
    "register: {margin: -5}",
    "value: {episodes: 0}",
    "package: {name: ../../x}",
    "register: {model_name: a@b}",
    "benchmark: {perturbation: {a: .nan}}",
]
NAMES = ["../../../escaped", "..", "/etc/passwd", '"a\\0b"', "x" * 300, "''", "a/b"]


@pytest.mark.parametrize(
    "line",
    [*ABSURD, *(f"name: {n}" for n in NAMES), *(f"model: {n}" for n in NAMES), *(f"datasets: [{n}]" for n in NAMES)],
    ids=lambda line: line[:40],
)
def test_any_recipe_is_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str):
    key = line.partition(":")[0]
    base = [row for row in ("name: r", "datasets: [a]", "deploy: a", "model: m") if not row.startswith(key + ":")]
    where = recipe(tmp_path, r="\n".join([*base, line]) + "\n")
    assert prts.main(["config", "show", *where]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said) < 1500 and "<unicode string>" not in said
    assert "Traceback" not in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "typed",
    [
        "a=[",
        "a=*a",
        "seed=!!python/object:os.x",
        "seed=" + "9" * 5000,
        "seed=2024-13-45",
        "x=? [a]",
        "seed",
        "sft.train.steps=-5",
        "name=../../../x",
        "name='a\\0b'",
        'name="a\\0b"',
        "a" + ".a" * 5000 + "=1",
        "sft=1",
        "=1",
        ".=1",
        "seed={a: " * 400,
    ],
    ids=lambda line: line[:40],
)
def test_any_override_is_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: str):
    assert prts.main(["config", "show", *recipe(tmp_path), "--set", typed]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said) < 1500 and "<unicode string>" not in said


@pytest.mark.parametrize("path", ["nowhere.yaml", "x" * 300 + ".yaml", ".", "pipe"])
def test_a_recipe_that_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str):
    import os

    os.mkfifo(tmp_path / "pipe")
    assert prts.main(["config", "show", "--config", str(tmp_path / path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
