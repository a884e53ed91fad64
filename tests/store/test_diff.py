"""`prts diff`: why two results differ, down to the first cause; what one can call a result."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest

from prts_core.cli import diff as command
from prts_core.io.errors import StageError
from prts_core.store.diff import Comparison, Results, compare
from prts_core.store.stage import StageResult
from tests.store.toy_chain import Chain, Config


@pytest.fixture
def other(chain: Chain) -> Chain:
    """The same chain under another recipe, of which `first` has another text; both are finished."""
    chain.work = lambda context: StageResult({"loss": 0.5, "n": 1.0})
    other = replace(
        chain, recipe="s", config=Config("other"), runs=[], work=lambda context: StageResult({"loss": 0.25})
    )
    for one in (chain, other):
        one.run("first")
        one.run("second")
    return other


def comparison(chain: Chain, left: str, right: str) -> Comparison:
    results = Results(chain.outputs)
    return compare(results, results.find(left), results.find(right))


def test_the_first_cause_is_found_behind_the_parents(chain: Chain, other: Chain):
    found = comparison(chain, "r:second:d", "s:second:d")
    assert found.causes == ('first [d]: config text: "hello" -> "other"',)
    assert found.difference is not None and found.difference.lines == ()
    assert [parent.name for parent in found.difference.parents] == ["first [d]"]
    assert found.metrics == {"loss": (0.5, 0.25), "n": (1.0, None)}
    assert (found.left["recipe"], found.right["recipe"]) == ("r", "s") and not found.same_content


def test_one_result_has_no_difference(chain: Chain, other: Chain):
    found = comparison(chain, "r:second", "r:second:d")
    assert found.difference is None and found.causes == () and found.same_content


def test_every_own_input_is_told(chain: Chain, other: Chain):
    third = replace(chain, recipe="t", seed=9, version=2, config=Config("third"), runs=[])
    third.run("first")
    found = comparison(chain, "r:first", "t:first")
    assert found.causes == (
        "first [d]: behaviour version 1 -> 2",
        "first [d]: seed 7 -> 9",
        'first [d]: config text: "hello" -> "third"',
    )


def test_other_content_of_equal_inputs_is_told(chain: Chain, other: Chain):
    results = Results(chain.outputs)
    before = results.find("r:first")
    chain.work = lambda context: StageResult({"loss": 0.75})
    chain.damage("first")
    chain.run("first")
    found = compare(Results(chain.outputs), before, Results(chain.outputs).find("r:first"))
    assert found.causes == ("first [d]: equal inputs, other content",) and found.same_content


def test_a_result_goes_by_many_names(chain: Chain, other: Chain):
    made = chain.find("second")
    assert made is not None
    for name in (
        made.key,
        made.key[:10],
        f"second/{made.key[:4]}",
        "r:second:d",
        "r:second",
        str(chain.view("second")),
        str(chain.view("second") / "output"),
        str(chain.folder("second")),
        str(chain.view("second") / "manifest.json"),
    ):
        assert Results(chain.outputs).find(name)["key"] == made.key, name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("r:secnd:d", ["did you mean 'r:second:d'"]),
        ("q:second", ["r:first:d, r:second:d"]),
        ("secon/0000", ["No result is called", "recipe:stage[:dataset]", "prts status --all"]),
        ("", ["4 results begin with ''", "give more digits"]),
    ],
)
def test_what_is_no_name_is_told(chain: Chain, other: Chain, name: str, words: list[str]):
    with pytest.raises(StageError) as caught:
        Results(chain.outputs).find(name)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_two_stages_cannot_be_compared(chain: Chain, other: Chain):
    with pytest.raises(StageError, match="first and second"):
        comparison(chain, "r:first", "r:second")


def test_a_view_that_the_store_has_not_taken_is_compared(chain: Chain, other: Chain):
    import shutil

    shutil.rmtree(chain.outputs / "store")
    found = comparison(chain, "r:second", "s:second")
    assert found.causes == ('first [d]: config text: "hello" -> "other"',)


def run(chain: Chain, *words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args(["--outputs", str(chain.outputs), *words]))


def test_the_command(chain: Chain, other: Chain, capsys: pytest.CaptureFixture[str]):
    assert run(chain, "r:second", "s:second") == 0
    text = capsys.readouterr().out
    assert 'first [d]: config text: "hello" -> "other"' in text and "-0.25" in text and "why they differ" in text
    assert run(chain, "r:second", "s:second", "--json") == 0
    assert json.loads(capsys.readouterr().out)["causes"] == ['first [d]: config text: "hello" -> "other"']
    assert run(chain, "r:second", "r:second") == 0
    assert "one and the same result" in capsys.readouterr().out


def test_a_registered_model_is_its_package(chain: Chain, other: Chain, monkeypatch: pytest.MonkeyPatch):
    from prts_core.tracking.store import client

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store, made = client(chain.outputs), chain.find("second")
    assert made is not None
    store.create_registered_model("m")
    store.create_model_version("m", "file:///nowhere", tags={"prts.key": made.key})
    store.set_registered_model_alias("m", "champion", "1")
    assert command.find(Results(chain.outputs), "models:/m@champion", chain.outputs)["key"] == made.key
    store.create_model_version("m", "file:///nowhere", tags={"prts.key": "0" * 20})
    with pytest.raises(StageError, match="The package of models:/m/2 is not in this store"):
        command.find(Results(chain.outputs), "models:/m/2", chain.outputs)
