# make train is all that a first run needs; `make env` is the rest of what a developer needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev,hf,s3,tensorboard
# Where the CPU build of PyTorch lies. Say TORCH_INDEX= for the build with CUDA.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
RUN ?=
TESTS ?=
# Every test starts processes that import all of this: they compile it once, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help env train test test-fast lint bench clean

help:  ## these words
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 20

env: $(STAMP)  ## the environment in .venv: PyTorch for CPU first, then everything at the pinned versions

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make env: Python must be at least 3.11; use PYTHON=")'
	$(BIN)/python -c 'import torch; assert torch.__version__.startswith("2.13.0")' 2>/dev/null \
	  || $(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0 $$( \
	       $(BIN)/python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/torch/", timeout=5)' "$(TORCH_INDEX)" \
	         >/dev/null 2>&1 && echo --index-url "$(TORCH_INDEX)" --extra-index-url https://pypi.org/simple)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@
	@($(BIN)/python -m parallel.recorder_build >$(VENV)/recorder.log 2>&1 &)  # beside all else: 40 s of one core, once

train: $(STAMP)  ## train the default model: RUN='model=20m ...' overrides anything
	$(BIN)/holdfast train $(RUN)

test: $(STAMP)  ## all tests, in two lanes (tests/conftest.py): TESTS=tests/parallel for some
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(TESTS)

test-fast: $(STAMP)  ## what to run after every edit: under a minute on two cores, starts no cluster
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not cluster" $(TESTS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy parallel fault_tolerance framework launch

bench: $(STAMP)  ## every benchmark, one after the other; each prints its table
	@for file in $$(grep -lE "python (-m )?benchmarks[./]" benchmarks/*.py); do echo "== $$file"; OMP_NUM_THREADS=1 $(BIN)/python $$file || exit 1; done

clean:  ## everything that was made, the environment included
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
