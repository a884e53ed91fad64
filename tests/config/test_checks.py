"""Ranges and names: what is outside is named with its value, and what a range says is readable."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from prts_core.config.checks import check_names, check_numbers


@dataclass(frozen=True)
class Row:
    count: int | None = 1
    rates: tuple[float, ...] = (0.5,)
    shares: dict[str, float] = field(default_factory=dict)
    name: str | None = "a"
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self, {"[1, 9]": "count", "(0, 1)": "rates", "(0, inf)": "shares"})
        check_names(self, "name names")


def test_what_is_inside_passes():
    row = Row(count=None, rates=(), shares={"a": 1e300}, name=None, names=("a.b-c_1", "0"))
    assert row == Row(None, (), {"a": 1e300}, None, ("a.b-c_1", "0")), "a check changes nothing"
    assert Row(count=9, name="a" * 100).count == 9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 0}, "count: 0 is not at least 1 and at most 9"),
        ({"rates": (0.5, 1.0)}, "rates: 1.0 is not above 0 and below 1"),
        ({"rates": (float("nan"),)}, "rates: nan is not"),
        ({"shares": {"a": float("inf")}}, "shares: inf is not above 0"),
        ({"count": 10, "shares": {"a": 0}}, "count: 10 .*; shares: 0"),
        *(
            ({"name": bad}, "is no name")
            for bad in (
                "",
                ".",
                "..",
                "a..b",
                "../x",
                "/etc/passwd",
                "a/b",
                "a\0b",
                "a b",
                "a" * 101,
                "-a",
                "é",
                "a\n",
                "a'b",
                "a@b",
            )
        ),
        ({"names": ("a", "../b")}, r"names: '\.\./b'"),
    ],
)
def test_what_is_outside_is_named(change: dict, said: str):
    with pytest.raises(ValueError, match=said) as caught:
        Row(**change)
    assert len(str(caught.value)) < 250
