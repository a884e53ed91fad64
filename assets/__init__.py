"""Dagster assets, one module a stage in the order of the chain. They call the library and know nothing of how it works.

Order: collect, convert, validate, stats, pretrain, sft, subtask, benchmark, value, package, register. How they are run,
on what schedule and with which resources stands in `pipelines/`.
"""
