"""Read YAML at the border: pydantic checks it against the frozen dataclasses of `schema.py`, once.

Unknown keys, wrong types, absurd numbers and unset environment variables are one ConfigError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from prts_core.config.places import shared_folder
from prts_core.io.errors import ConfigError, suggest
from prts_core.io.plain_yaml import YamlError, parse

T = TypeVar("T")


def read_yaml(path: Path, what: str = "configuration file") -> dict[str, Any]:
    """A YAML mapping, or a ConfigError that names file and line. what: it is, for the error where it is missing."""
    try:
        if not path.is_file():
            raise FileNotFoundError
        raw = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        near = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ConfigError(
            f"No such {what}" + suggest(path.stem, near),
            file=path,
            expected=", ".join(near) or "a YAML file",
            cure=f"name one of these, or write {path}" if near else f"write {path}",
        ) from err
    except OSError as err:
        raise ConfigError(f"A {what} cannot be read", file=str(path)[:300], found=err.strerror) from err
    except (YamlError, UnicodeDecodeError) as err:
        raise ConfigError("A configuration file is not valid YAML", file=path, found=str(err)) from err
    if not isinstance(raw, dict):
        raise ConfigError("A configuration file must be a mapping", file=path, found=type(raw).__name__)
    return raw


CURE = "correct what is named above; `prts config show` prints a recipe with every default"


def check(kind: type[T], raw: Any, where: object, *, what: str = "configuration", cure: str = CURE) -> T:
    """Validate plain data against a frozen dataclass; every fault of the file in one error. what: the file is."""
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as err:
        faults, fields_, expected = [], [], None
        for fault in err.errors()[:8]:
            loc = ".".join(str(part)[:60] for part in fault["loc"])
            fields_.append(loc)
            if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                allowed = _allowed(kind, fault["loc"][:-1])
                faults.append(f"{loc}: unknown key{suggest(str(fault['loc'][-1]), allowed)}")
                where_ = loc.rpartition(".")[0] or kind.__name__
                expected = expected or f"the fields of {where_}: {', '.join(sorted(allowed))}"
            elif fault["type"] == "value_error":  # of a __post_init__, which names field and value itself
                faults.append(f"{loc}: ".lstrip(": ") + str(fault["ctx"]["error"]))
            elif fault["type"] == "union_tag_invalid":
                faults.append(f"{loc}.kind: {fault['ctx']['tag']!r:.40} is none of {fault['ctx']['expected_tags']}")
            else:
                choices = re.findall(r"'([^']+)'", fault["ctx"]["expected"]) if fault["type"] == "literal_error" else ()
                near = suggest(str(fault.get("input"))[:80], choices)
                faults.append(f"{loc}: {fault['msg']} (found {fault.get('input')!r:.80}{near})")
        raise ConfigError(
            f"A {what} does not fit",
            file=where,
            field=", ".join(fields_) or None,
            found="; ".join(faults),
            expected=expected,
            cure=cure,
        ) from err


def _allowed(kind: Any, loc: tuple) -> set[str]:
    """Names that may stand at `loc` inside dataclass `kind` (best effort: used for suggestions only)."""
    import typing

    tagged: dict[Any, list] = {}  # after a field whose class is chosen by `kind`, pydantic names the kind in the path
    for part in loc:
        if isinstance(part, int):  # an entry of a list, whose class is chosen already
            continue
        if not is_dataclass(kind):
            break
        hint = typing.get_type_hints(kind).get(str(part))
        options = [o for o in (hint, *typing.get_args(hint)) if is_dataclass(o)] or tagged.get(part, [])
        if not options:
            return set()
        kind, tagged = options[0], {tag: [o] for o in options for tag in _tags(o)}
    return {f.name for f in fields(kind)} if is_dataclass(kind) else set()


def _tags(option: Any) -> tuple:
    """The values of its field `kind` that choose `option` among others."""
    import typing

    own = getattr(option, "kind", None)
    return (own,) if own is not None else typing.get_args(typing.get_type_hints(option).get("kind"))


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` laid over `base`, mappings merged key by key."""
    out = dict(base)
    for key, value in change.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "c=x"]` -> {"a": {"b": 1}, "c": "x"}; values are YAML."""
    out: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise ConfigError(
                "--set takes key=value", field="--set", found=pair[:80], expected="for example sft.train.steps=200"
            )
        try:
            nested = parse(value)
        except YamlError as err:
            raise ConfigError(
                "A value of --set is not valid YAML",
                field=f"--set {key[:80]}",
                found=f"{value[:80]}: {err}",
                expected="for example sft.train.steps=200 or 'benchmark.tasks=[one, two]'",
            ) from err
        if key.count(".") > 20:
            raise ConfigError("--set names a field nested too deeply", field="--set", found=key[:80])
        for part in reversed(key.split(".")):
            nested = {part: nested}
        out = merge(out, nested)
    return out


VARIABLE = re.compile(r"\$\{(\w+)\}")


def expand(text: str, where: object) -> str:
    """Replace ${NAME} by the environment; PRTS_SHARED falls back to the folder `shared` beside the project."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name == "PRTS_SHARED":
            return str(shared_folder())
        if os.environ.get(name):
            return os.environ[name]
        raise ConfigError(
            "An environment variable is not set",
            file=where,
            field=name,
            found=text,
            cure=f"`export {name}=/path/to/the/folder`, with the path that it has on this machine",
        )

    return VARIABLE.sub(value, text)
