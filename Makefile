# Each target sets up what it needs in .venv (scripts/setup.sh; nothing to do when it stands) and needs no other step.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo repro test test-fast test-slow lint types conformance bench gpu ui

ifneq ($(wildcard .env),)
include .env
export $(shell sed -nE 's/^([A-Z_]+)=.*/\1/p' .env) PRTS_FROM_ENV_FILE
endif
OUTPUTS := $(or $(PRTS_OUTPUTS),outputs)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DAGSTER_HOME ?= $(abspath $(OUTPUTS))/dagster
export MUJOCO_GL ?= egl
export PYOPENGL_PLATFORM ?= egl
export DAGSTER_DISABLE_TELEMETRY ?= 1
export DVC_NO_ANALYTICS ?= 1
export MLFLOW_DISABLE_TELEMETRY ?= true
export DO_NOT_TRACK ?= true
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PYTHONWARNINGS ?= ignore::DeprecationWarning,ignore::FutureWarning
PYTEST = OMP_NUM_THREADS=1 python -m pytest
# A process a core; a module's fixtures are made once, and modules that may take longest begin first (tests/conftest.py).
BESIDE = -n auto --dist loadscope --no-loadscope-reorder

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## / /' | awk '{n=$$1; $$1=""; printf "make %-12s%s\n", n, $$0}'

setup:  ## .venv with the pinned packages, Debian's GL libraries where missing
	@scripts/setup.sh

demo: setup  ## the whole chain through Dagster, then outputs/demo/report.json; again: goes on, or does nothing
	@python -m pipelines

repro: setup  ## the chain from collect to package by DVC instead of Dagster
	@prts dvc --check && dvc repro "$$(prts dvc --path)"

test: setup  ## every test but conformance
	@$(PYTEST) $(BESIDE) -m "not conformance"

test-fast: setup  ## tests that take seconds
	@$(PYTEST) $(BESIDE) -m "not slow and not conformance"

test-slow: setup  ## tests that take minutes
	@$(PYTEST) $(BESIDE) -m "slow and not conformance" || [ $$? = 5 ]  # 5: there are none

lint: setup  ## ruff
	@ruff check . && ruff format --check .

types: setup  ## mypy
	@mypy

conformance: setup  ## the real lerobot, openpi-client, LIBERO and SimplerEnv, in venvs of their own under the user's cache
	@$(PYTEST) $(BESIDE) -m conformance $$(grep -rl "mark\.conformance" tests --include='*.py') || [ $$? = 5 ]

bench: setup  ## ours beside the peer's: make bench NAME=<name>
	@prts bench $(NAME)

# On a machine that has torch and a GPU: no .venv, which would bring another torch; WHEELS=<folder> installs what it lacks.
gpu:  ## one session on this machine's GPU: outputs/bench/gpu.json and gpu.txt (make gpu WHEELS=<folder of wheels>)
	@scripts/gpu_session.sh "$(OUTPUTS)" $(WHEELS)

ui: setup  ## Dagster on port 3000 and MLflow on port 5000, this machine only
	@python -m pipelines.ui
