"""Keep results: immutable, found by the key of the work that makes them, shared by recipes.

A result lies in `outputs/store/<stage>/<key>/`; `outputs/runs/<recipe>/<stage>[/<dataset>]` shows what a recipe's plan
means now. Read `run_stage.py` first. What a stage computes is no matter of this room; who tracks a run is a callback.
"""
