"""Offer the recipe's fields as run configuration on Dagster's launchpad, typed, and read them as `--set` texts.

    resources: {plan_quickstart: {config: {sft: {train: {steps: 30}}}}}

What is left out, or left as it is shown, keeps the recipe's value. A run with changed values has results of its own:
the recipe's view and DVC stay as they are.
"""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import dagster as dg
import yaml

from assets.recipes import RecipePage
from prts_core.config.load import RunPlan, load_plan
from prts_core.config.schema import Recipe

FIXED = ("name", "datasets", "deploy", "policy")  # the page's keys, partitions and edges come from them
SCALARS: dict[Any, Any] = {int: dg.Int, float: dg.Float, str: dg.String, bool: dg.Bool}


@dataclass(frozen=True)
class Chosen:
    """What a run is about: the recipe, the values that were changed for it, the folder of all outputs."""

    path: Path
    outputs: Path
    overrides: tuple[str, ...] = ()

    def load(self) -> RunPlan:
        """The plan; a ConfigError says what is wrong with a changed value."""
        return load_plan(self.path, self.overrides)


def plan_resource(page: RecipePage, outputs: Path, overrides: Sequence[str] = ()) -> dg.ResourceDefinition:
    """The recipe's plan as a resource whose configuration changes its values. overrides: changed for every run."""
    present = json.loads(json.dumps(asdict(page.plan.recipe)))

    def choose(context: dg.InitResourceContext) -> Chosen:
        return Chosen(page.plan.path, outputs, (*overrides, *set_texts(context.resource_config or {}, present)))

    said = f"The values of {page.plan.path}; what is changed here holds for this run, checked like `prts --set`."
    return dg.ResourceDefinition(choose, config_schema=_shape(Recipe, present), description=said)


def set_texts(config: dict[str, Any], present: Any = None, prefix: str = "") -> list[str]:
    """{"sft": {"train": {"steps": 30}}} -> ["sft.train.steps=30"]. Values that are as in `present` are left out."""
    texts = []
    for name, value in config.items():
        now = present.get(name, MISSING) if isinstance(present, dict) else MISSING
        if isinstance(value, dict) and value:
            texts += set_texts(value, now, f"{prefix}{name}.")
        elif value != now:
            written = yaml.safe_dump(value, default_flow_style=True, width=2**20).removesuffix("...\n").strip()
            texts.append(f"{prefix}{name}={written}")
    return texts


def _shape(kind: type, present: Any) -> dg.Shape:
    """A dataclass as optional fields. present: its values as plain data, which the launchpad shows as defaults."""
    hints = get_type_hints(kind)
    made = {}
    for field in fields(kind):
        if kind is Recipe and field.name in FIXED:
            continue
        value = present.get(field.name, MISSING) if isinstance(present, dict) else MISSING
        given = {} if value is MISSING else {"default_value": value}
        made[field.name] = dg.Field(_type(hints[field.name], value), is_required=False, **given)
    return dg.Shape(made)


def _type(hint: Any, value: Any) -> Any:
    """Dagster's configuration type for an annotation; where it has none, Any: load_plan checks it all the same."""
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _shape(hint, value)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        options = [option for option in args if option is not type(None)]
        inner = _type(options[0], value) if len(options) == 1 else dg.Any
        return inner if inner is dg.Any or len(options) == len(args) else dg.Noneable(inner)
    if origin is Literal and all(isinstance(option, str) for option in args):
        return _choice(args)
    if origin in (tuple, list):
        return dg.Array(_type(args[0], None)) if len(set(args) - {Ellipsis}) == 1 else dg.Array(dg.Any)
    if origin is dict:
        return dg.Permissive()
    return SCALARS.get(hint, dg.Any)


@cache
def _choice(options: tuple[str, ...]) -> dg.Enum:
    """One type a set of options: Dagster wants equal names to be one object."""
    return dg.Enum("_or_".join(options), [dg.EnumValue(option) for option in options])
