"""Read YAML into plain data: mappings with words as keys, lists, texts, numbers, true, false and null; nothing else.

Every fault is one YamlError in words of one line. Tags (`!!python/...`) are refused, dates stay texts, numbers are
finite and fit 64 bits, a key stands once, and neither nesting nor aliases (`*name`) can blow a small file up.
"""

from __future__ import annotations

import math
from typing import Any

import yaml
from yaml.resolver import BaseResolver

MAX_DEPTH = 50
MAX_VALUES = 10_000  # of a text with aliases, each written out


class YamlError(ValueError):
    """What is wrong with a text and where, in one line."""


def parse(text: str) -> Any:
    """The data that `text` holds; none for an empty text."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as err:
        said = ", ".join(part for part in (err.context, err.problem) if part)
        raise YamlError(said + _place(err.problem_mark)) from err
    except yaml.YAMLError as err:  # a character that no text holds
        raise YamlError(" ".join(str(err).replace("<unicode string>", "the text").split())) from err
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in choices if not tag.endswith((":timestamp", ":merge", ":value"))]
        for first, choices in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth, self._aliases = 0, False
        self._sizes: dict[int, int] = {}  # of finished nodes, by id: values with every alias written out

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            raise _fault(f"the tag {event.tag!r:.60} is refused: values are plain", event.start_mark)
        if self._depth >= MAX_DEPTH:
            raise _fault(f"nested more than {MAX_DEPTH} deep", event.start_mark)
        self._aliases |= isinstance(event, yaml.AliasEvent)
        self._depth += 1
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if id(node) not in self._sizes:
            if isinstance(event, yaml.AliasEvent):  # of a node that is still open
                raise _fault(f"the alias *{event.anchor} stands inside what it names", event.start_mark)
            self._sizes[id(node)] = 1 + sum(self._sizes[id(inner)] for inner in _inner(node))
        if self._aliases and self._sizes[id(node)] > MAX_VALUES:
            raise _fault(f"aliases make this more than {MAX_VALUES:,} values", event.start_mark)
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """A whole number of at most 64 bits."""
        value = self.construct_yaml_int(node) if len(node.value) <= 100 else None
        if value is None or not -(2**63) <= value < 2**63:
            raise _fault("a whole number does not fit 64 bits", node.start_mark)
        return int(value)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """A finite number."""
        value = float(self.construct_yaml_float(node))
        if not math.isfinite(value):
            raise _fault(f"{node.value:.40} is no finite number", node.start_mark)
        return value

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """Characters that can stand in a file name and a UTF-8 file."""
        if "\0" in node.value or any("\ud800" <= letter <= "\udfff" for letter in node.value):
            raise _fault("a text holds a character that no text file holds", node.start_mark)
        return str(node.value)

    def construct_words(self, node: yaml.MappingNode) -> dict[str, Any]:
        """A mapping whose keys are words, each once."""
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _fault("a key must be a word (in quotes where YAML reads something else)", key_node.start_mark)
            if key in out:
                raise _fault(f"key {key!r} stands twice", key_node.start_mark)
            out[key] = self.construct_object(value_node, deep=True)
        return out

    def construct_list(self, node: yaml.SequenceNode) -> list[Any]:
        return [self.construct_object(inner, deep=True) for inner in node.value]


for _name, _construct in (
    (BaseResolver.DEFAULT_MAPPING_TAG, _Loader.construct_words),
    (BaseResolver.DEFAULT_SEQUENCE_TAG, _Loader.construct_list),
    (BaseResolver.DEFAULT_SCALAR_TAG, _Loader.construct_text),
    ("tag:yaml.org,2002:int", _Loader.construct_int),
    ("tag:yaml.org,2002:float", _Loader.construct_number),
):
    _Loader.add_constructor(_name, _construct)


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _fault(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def _place(mark: Any) -> str:
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
