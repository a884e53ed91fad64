"""Benchmarks as commands: `prts bench <name>` runs a peer and ours side by side and prints the ratio.

One module a benchmark, each with `run(console) -> list[Row]`; report.py prints and writes what they return.
"""
