"""Parse and write placements: "resources[:processes]", several of them separated by commas.

    part       = resources [":" processes]
    resources  = "all" | range
    processes  = range
    range      = number | number "-" number          both ends included

`all` stands alone, as the resources of an only part. RLinf's grammar (its documentation on placement), with every text
that it leaves open refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prts_core.io.errors import ConfigError

ALL = "all"
EXPECTED = 'resources[:processes], such as "all", "0-3", "0-1:0-3" or "0-1:0-3,3-5,7-10:7-14"'
MAX_RANK = 65_535
SEXAGESIMAL = 60  # from here on a number may be what YAML makes of "1:0"
RANGE = re.compile(r"([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?")


@dataclass(frozen=True)
class Range:
    """Numbers from `first` to `last`, both included."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def numbers(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class Part:
    """resources: none for all. processes: none where they continue the count, one process per resource."""

    resources: Range | None
    processes: Range | None = None

    def __str__(self) -> str:
        resources = ALL if self.resources is None else str(self.resources)
        return resources if self.processes is None else f"{resources}:{self.processes}"


def parse_placement(value: str | int, field: str = "placement") -> tuple[Part, ...]:
    """The parts of a placement; ConfigError, naming `field`, for what is none. A number stands for one resource."""
    if isinstance(value, int) and not 0 <= value < SEXAGESIMAL:
        raise ConfigError(
            "A placement is ambiguous as a number",
            field=field,
            found=value,
            expected=EXPECTED,
            cure="write it in quotes: YAML reads 1:0 as the number 60",
        )
    parts = tuple(_part(text.strip(), field, value) for text in str(value).split(","))
    if len(parts) > 1 and any(part.resources is None for part in parts):
        raise _refused("`all` leaves no resource for other parts", field, value)
    return parts


def format_placement(parts: tuple[Part, ...]) -> str:
    """The shortest text of `parts`: no spaces, neighbours that continue each other as one range.

    `format_placement(parse_placement(text))` is the canonical form of `text`, and its own.
    """
    merged: list[Part] = []
    for part in parts:
        before = merged[-1] if merged else None
        if (
            before is not None
            and before.processes is None
            and part.processes is None
            and before.resources is not None
            and part.resources is not None
            and before.resources.last + 1 == part.resources.first
        ):
            merged[-1] = Part(Range(before.resources.first, part.resources.last))
        else:
            merged.append(part)
    return ",".join(map(str, merged))


def _part(text: str, field: str, value: object) -> Part:
    resources, colon, processes = (piece.strip() for piece in text.partition(":"))
    if colon and processes == ALL:
        raise _refused(
            "Process ranks cannot be `all`", field, value, f"leave `:{ALL}` out for one process on each resource"
        )
    return Part(
        None if resources == ALL else _range(resources, field, value),
        _range(processes, field, value) if colon else None,
    )


def _range(text: str, field: str, value: object) -> Range:
    match = RANGE.fullmatch(text)
    if match is None:
        raise _refused(f"{text!r:.40} is no range of ranks" if text else "A range of ranks is missing", field, value)
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if last < first:
        raise _refused(f"The range {text} runs backwards", field, value, f"write {last}-{first}")
    if last > MAX_RANK:
        raise _refused(f"A rank is larger than any that is allowed ({MAX_RANK})", field, value)
    return Range(first, last)


def _refused(problem: str, field: str, value: object, cure: str | None = None) -> ConfigError:
    return ConfigError(problem, field=field, found=f"{value!r:.120}", expected=EXPECTED, cure=cure)
