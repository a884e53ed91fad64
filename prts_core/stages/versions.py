"""Behaviour versions of the stages: raise one when the same inputs give another output.

A version is part of every key below it, Dagster's code version, and what `dvc.yaml` watches instead of the code.
tests/stages/test_behaviour.py holds outputs and versions together.
"""

VERSIONS = {
    "collect": 2,
    "convert": 2,
    "validate": 1,
    "stats": 2,
    "pretrain": 4,
    "sft": 4,
    "subtask": 4,
    "rl": 2,
    "benchmark": 2,
    "value": 4,
    "package": 4,
}
