"""Run a policy on a suite of tasks: plan, runner, controls, recordings, report.

What becomes of a result (gate, promotion, regression) is decided in `prts_core.delivery`.
"""
