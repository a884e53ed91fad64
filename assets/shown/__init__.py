"""Special pages of stages: checks, tables and schemas. A stage that is not named here shows the usual metadata only."""

from assets.shown import benchmark, convert, validate, value

SHOWN = {"convert": convert.SHOWN, "validate": validate.SHOWN, "benchmark": benchmark.SHOWN, "value": value.SHOWN}
