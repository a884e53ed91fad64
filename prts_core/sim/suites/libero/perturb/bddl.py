"""LIBERO's task descriptions (bddl) as trees that can be changed and written again.

A tree is a list of words and trees. LIBERO reads them in lower case, and so does this.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prts_core.io.errors import DataError

Tree = list[Any]
MAX_CHARACTERS = 200_000  # LIBERO's have 5,000
MAX_DEPTH = 50


class Problem:
    """One task description. DataError where the text is none.

    objects, fixtures: {name: category}, in order. init, goal: clauses [predicate, name, ...].
    """

    def __init__(self, text: str, file: Path | None = None) -> None:
        self.tree = _parse(text, file)
        self.file = file
        if not self.tree or self.tree[0] != "define":
            raise self._damaged("does not begin with (define")

    @classmethod
    def read(cls, path: Path) -> Problem:
        try:
            return cls(path.read_text(), path)
        except (OSError, UnicodeDecodeError) as err:
            raise DataError("A task description cannot be read", file=path, found=str(err)) from err

    def _damaged(self, found: str) -> DataError:
        return DataError("A task description is damaged", file=self.file, found=found, expected="LIBERO's bddl")

    def section(self, name: str) -> Tree:
        """The tree that begins with `name`, itself (not a copy)."""
        for part in self.tree[1:]:
            if isinstance(part, list) and part and part[0] == name:
                return part
        raise self._damaged(f"no section {name}")

    def _typed(self, name: str) -> dict[str, str]:
        found: dict[str, str] = {}
        waiting: list[str] = []
        words = iter(self.section(name)[1:])
        for word in words:
            if word == "-":
                category = next(words, None)
                if not isinstance(category, str):
                    raise self._damaged(f"{name} has a '-' without a category")
                found |= dict.fromkeys(waiting, category)
                waiting = []
            elif not isinstance(word, str):
                raise self._damaged(f"{name} holds a list")
            else:
                waiting.append(word)
        return found

    @property
    def objects(self) -> dict[str, str]:
        return self._typed(":objects")

    @property
    def fixtures(self) -> dict[str, str]:
        return self._typed(":fixtures")

    @property
    def init(self) -> list[list[str]]:
        return self._clauses(":init", self.section(":init")[1:])

    @property
    def goal(self) -> list[list[str]]:
        formula = self.section(":goal")[1:]
        conjunction = len(formula) == 1 and formula[0][:1] == ["and"]
        return self._clauses(":goal", formula[0][1:] if conjunction else formula)

    def _clauses(self, name: str, clauses: Tree) -> list[list[str]]:
        for clause in clauses:
            if not isinstance(clause, list) or not clause or not all(isinstance(word, str) for word in clause):
                raise self._damaged(f"{name} holds what is no clause")
        return [list(clause) for clause in clauses]

    def set_goal(self, clauses: list[list[str]]) -> None:
        self.section(":goal")[1:] = [["and", *clauses]]

    def workspace(self) -> str:
        """The fixture that objects lie on: table or floor, the first that LIBERO's descriptions name."""
        if not self.fixtures:
            raise self._damaged("no fixture")
        return next(iter(self.fixtures))

    def lying(self) -> dict[str, str]:
        """{object: region} of the objects that begin right on the workspace, not on or in something."""
        top = self.workspace() + "_"
        return {
            clause[1]: clause[2]
            for clause in self.init
            if len(clause) == 3 and clause[0] == "on" and clause[2].startswith(top) and clause[1] in self.objects
        }

    def text(self) -> str:
        return _written(self.tree) + "\n"


def _parse(text: str, file: Path | None) -> Tree:
    if len(text) > MAX_CHARACTERS:
        raise DataError("A task description is too long", file=file, expected=f"{MAX_CHARACTERS} characters")
    open_trees: list[Tree] = [[]]
    for token in re.findall(r"[()]|[^\s()]+", re.sub(r";[^\n]*", "", text).lower()):
        if token == "(":
            open_trees.append([])
        elif token == ")":
            closed = open_trees.pop()
            if not open_trees:
                raise DataError("A task description is damaged", file=file, found="a ')' too many")
            open_trees[-1].append(closed)
        else:
            open_trees[-1].append(token)
        if len(open_trees) > MAX_DEPTH:
            raise DataError("A task description is nested too deeply", file=file, expected=f"{MAX_DEPTH} levels")
    if len(open_trees) != 1 or len(open_trees[0]) != 1 or not isinstance(open_trees[0][0], list):
        raise DataError("A task description is damaged", file=file, found="brackets that do not match")
    return open_trees[0][0]


def _written(tree: Any) -> str:
    return tree if isinstance(tree, str) else "(" + " ".join(map(_written, tree)) + ")"
