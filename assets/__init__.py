"""Dagster assets of every recipe, made from the stages' declarations by `factory.py`. They call the library.

How they are run, on what schedule and with which resources stands in `pipelines/`.
"""
