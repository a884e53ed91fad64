"""Read `train_subtask`: whether a sample is shown its episode's instruction or the subtask of the moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prts_core.io.errors import ConfigError

FORMS = 'false, true, "mixture:W" with W from 0 to 1 ("mix:W" is the same), or "cumulate"'


@dataclass(frozen=True)
class SubtaskMode:
    """A checked `train_subtask`. weight: probability that a sample of "mixture" shows its subtask."""

    kind: Literal["off", "replace", "mixture", "cumulate"] = "off"
    weight: float = 1.0

    @staticmethod
    def parse(value: bool | str | None, where: object = None) -> SubtaskMode:
        """false | true | "mixture:W" | "cumulate"; ConfigError for anything else.

        "mix:W" is an alias: the public schema's comment writes it, the public code accepts "mixture" only.
        """
        text = str(value).strip().lower() if value is not None else "false"
        if text in ("false", "true"):
            return SubtaskMode("replace" if text == "true" else "off")
        if text == "cumulate":
            return SubtaskMode("cumulate")
        name, colon, weight = text.partition(":")
        if name in ("mixture", "mix") and colon:
            try:
                share = float(weight)
            except ValueError:
                share = float("nan")
            if 0.0 <= share <= 1.0:
                return SubtaskMode("mixture", share)
        raise ConfigError(
            "A value of train_subtask is not understood", file=where, field="train_subtask", found=value, expected=FORMS
        )
