"""YAML as plain data: what is not plain is one error in words, and nothing small becomes large."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from prts_core.io.plain_yaml import YamlError, parse

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


def test_plain_values_come_back():
    text = "a: 1\nb: [1.5, yes, null, 'x']\nc: {d: 2024-13-45, e: 1.0e-3}\nf: 2024-01-02\n"
    assert parse(text) == {"a": 1, "b": [1.5, True, None, "x"], "c": {"d": "2024-13-45", "e": 0.001}, "f": "2024-01-02"}
    assert parse("") is None


def test_an_alias_means_what_it_names():
    assert parse("a: &n [1, 2]\nb: *n\n") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!int abc", "tag"),
        ("a: !!float abc", "tag"),
        ("a: !!timestamp foo", "tag"),
        ("a: !!bool maybe", "tag"),
        ("a: !!python/object:os.system x", "tag"),
        ("a: !!set {x}", "tag"),
        ("[a, b]: 1", "a key must be a word"),
        ("{a: b}: 1", "a key must be a word"),
        ("? [a]\n: 1", "a key must be a word"),
        ("1: x", "a key must be a word"),
        ("on: x", "a key must be a word"),
        ("a: " + "9" * 5000, "64 bits"),
        ("a: -9223372036854775809", "64 bits"),
        ("a: .nan", "finite"),
        ("a: -.inf", "finite"),
        ("a: 1.0e+999", "finite"),
        ("a: " + "[" * 3000 + "]" * 3000, "50 deep"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "50 deep"),
        ("- " * 3000 + "a", "50 deep"),
        ('a: "x\\0y"', "character"),
        ('a: "\\ud800"', "character"),
        ("a: x\0y", "special characters"),
        ("a: [", "line 1"),
        ("a: *unknown", "undefined alias"),
        ("a: &a [*a]", "inside what it names"),
        ("a: 1\nb: 2\na: 3", r"'a' stands twice \(line 3, column 1\)"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("\ta: 1", "line 1"),
        ("<<: {a: 1}\n<<: {b: 2}", "stands twice"),
    ],
)
def test_what_is_not_plain_is_one_line_of_words(text: str, said: str):
    with pytest.raises(YamlError, match=said) as caught:
        parse(text)
    assert "<unicode string>" not in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_bomb_of_aliases_costs_nothing():
    tracemalloc.start()
    begin = time.thread_time()  # what others on this machine take is no part of it
    try:
        with pytest.raises(YamlError, match="aliases"):
            parse(BOMB)
        assert time.thread_time() - begin < 2
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
