# make demo   the small model inside the package speaks: WAV files and a picture under build/demo
# make test   lint, types and the tests (nothing that needs a GPU, the weights, or minutes)
# make lint   ruff and pyright
# make bench  speed on this machine, full size
# Each installs what it lacks into .venv, with the versions of constraints.txt.

PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Two workers, a file to each at a time, the long ones first.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
# Bytecode is compiled when a module is first imported, not for all of torch at once.
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
INPUTS := pyproject.toml constraints.txt Makefile

.PHONY: demo test lint bench clean
.DEFAULT_GOAL := demo

$(VENV)/.stamp-base: $(INPUTS)
	@test -n "$(PYTHON)" || { echo "csm_jax needs Python 3.11 or newer on PATH" >&2; exit 1; }
	@echo "installing into $(VENV) (about 0.7 GB; a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools
	$(PIP) --no-build-isolation -e '.[eval]'
	@touch $@

# What the tests compare with. torch first and by its exact version, so that nothing below picks another
# build. moshi and silentcipher without their dependencies: their ranges exclude this torch and this
# numpy, with which they run; pyproject.toml's extra `torch` lists what they really import. torchtune and
# torchao likewise without theirs: torchtune also lists what only its recipes use.
$(VENV)/.stamp-test: $(VENV)/.stamp-base
	$(PIP) torch==2.13.0
	$(PIP) --no-deps moshi silentcipher torchtune torchao
	$(PIP) --no-build-isolation -e '.[parity,dev]'
	@touch $@

demo: $(VENV)/.stamp-base
	@$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: $(VENV)/.stamp-test
	$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

clean:
	rm -rf build $(VENV)
