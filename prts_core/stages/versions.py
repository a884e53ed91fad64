"""Behaviour versions of the stages: raise one when the same inputs give another output.

A version is part of every key below it, Dagster's code version, and what `dvc.yaml` watches instead of the code.
tests/stages/test_behaviour.py holds outputs and versions together.
"""

VERSIONS = {
    "collect": 1,
    "convert": 1,
    "validate": 1,
    "stats": 1,
    "pretrain": 3,
    "sft": 2,
    "subtask": 2,
    "benchmark": 1,
    "value": 1,
    "package": 2,
}
