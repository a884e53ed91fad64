"""Record in MLflow what stages do, and find it again: runs, registered models, lineage.

Read `runs.py` first. What a stage is stands in `prts_core.store`; what becomes of a package is decided in
`prts_core.delivery`.
"""
