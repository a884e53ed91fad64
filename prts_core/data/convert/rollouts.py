"""Read our own rollouts back as recordings: what `benchmark.record` keeps of evaluation, in the robomimic layout.

Keys and splits are those of `robomimic`; beyond them every episode says under which condition it was rolled out and
whether it succeeded, and the mapping's options choose by that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prts_core.config.checks import Strict
from prts_core.data.convert import robomimic
from prts_core.io.errors import DataError


@dataclass(frozen=True)
class Options(Strict):
    """outcomes: which episodes become part of the dataset. conditions: of the benchmark (none: all recorded)."""

    outcomes: Literal["success", "failure", "all"] = "success"
    conditions: tuple[str, ...] | None = None


class Source(robomimic.Source):
    """See prts_core.data.convert.source.Source."""

    options_type = Options

    def chosen(self, file: Any, data: Any, path: Path) -> list[str]:
        return [name for name in robomimic.demo_names(data, path) if self._wanted(_outcome(data[name], path))]

    def extra(self, demo: Any, path: Path, file: str, name: str) -> dict[str, Any]:
        return robomimic.demo_extra(demo, path, file, name) | _outcome(demo, path)

    def _wanted(self, facts: dict[str, Any]) -> bool:
        options = self.options
        if options.conditions is not None and facts["condition"] not in options.conditions:
            return False
        return options.outcomes == "all" or facts["success"] == (options.outcomes == "success")


def _outcome(demo: Any, path: Path) -> dict[str, Any]:
    lacking = [name for name in ("condition", "success") if name not in demo.attrs]
    if lacking:
        raise DataError(
            "A rollout does not say how it came about",
            file=path,
            field=f"{demo.name}.{lacking[0]}",
            found=", ".join(demo.attrs) or "no attributes",
            expected="condition, success",
            cure="roll out again with benchmark.record, or convert with --source robomimic",
        )
    return {"condition": str(demo.attrs["condition"]), "success": bool(demo.attrs["success"])}
