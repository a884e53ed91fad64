"""PRTS: robot demonstrations to a served vision-language-action policy that knows how close it is to its goal.

The library knows no Dagster: stages are plain functions (`prts_core.stages`) that the command line, the Dagster
assets and `dvc.yaml` call alike.
"""

__version__ = "0.1.0"
