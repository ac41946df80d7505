# make train   set up, train the built-in sample, export it, answer held-out questions
# make test    set up, run the fast tests            make test-all   the slow ones
# make setup   set up only (in .venv)                make lint       ruff and mypy
# make bench   compare speed and memory with other tools: about 10 minutes; writes the table in tests/benchmarks/README.md

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Parallel test processes. Many tests start two ranks, so more processes than cores slow each other down.
TEST_WORKERS ?= 2
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
# The stamp is written last, and its name holds a hash of the requirements, so a broken or outdated environment has none.
STAMP := $(VENV)/complete-$(shell cat constraints.txt setup.cfg | sha256sum | cut -c 1-16)
EXTRAS := $(subst complete,extras,$(STAMP))
BENCH := $(subst complete,bench,$(STAMP))
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup train test test-all lint bench

help:
	@sed -n 's/^# //p' Makefile | head -4

setup: $(STAMP)

# No prerequisites: a checkout that changes only file times must not trigger a new installation.
$(STAMP):
	@sh launcher/check_machine.sh "$(PYTHON)"
	"$(PYTHON)" -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@
	@echo "set-up is complete in $(VENV)"

train: setup
	deepspeed train.py --deepspeed_config ds_configs/zero3.json
	lfm export runs/sample --out runs/sample/export
	lfm evaluate runs/sample/export --questions sample --show 3
	@echo
	@echo "The run is in runs/sample, its TensorBoard logs in runs/sample/tensorboard, the model in runs/sample/export."
	@echo "Next:  .venv/bin/lfm generate runs/sample/export \"What is the capital of Peru?\""
	@echo "       .venv/bin/tensorboard --logdir runs/sample/tensorboard"

test: setup
	python -m pytest --numprocesses $(TEST_WORKERS) -m "not slow and not cluster and not extra and not gpu and not bench" $(PYTEST_OPTIONS)

test-all: $(EXTRAS)
	python -m pytest --numprocesses $(TEST_WORKERS) -m "slow or cluster or extra" $(PYTEST_OPTIONS)

$(EXTRAS): $(STAMP)
	python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[test,mpi,tools]'
	@touch $@

lint: setup
	ruff check .
	ruff format --check .
	mypy

bench: $(BENCH)
	python -m tests.benchmarks $(BENCH_OPTIONS)

# The second command uses --no-deps, since these packages declare older versions of numpy, transformers and dateutil,
# torchvision, and cloud clients. The `bench` extra has what they import.
$(BENCH): $(STAMP)
	python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[test,bench]'
	python -m pip install --disable-pip-version-check --constraint constraints.txt --no-deps \
		litdata mosaicml-streaming boto3 botocore s3transfer
	@touch $@
