# make test   lint, types, build, tests          make demo   the main job
# make bench  the benchmarks that fit this machine
# Each sets itself up: a virtual environment in .venv, with the torch that PYTHON has if that will
# do, else torch 2.13.0, and in it no more than the command needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
NATIVE := fadiag_fast/_native/build_info.json
# Beside the torch that is there, and never another one.
INSTALL := $(BIN)/pip install --quiet --no-build-isolation -c $(VENV)/torch.txt

.PHONY: test demo bench lint format native clean

# A process for each core, with one thread each: more threads would only wait for each other.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

test: lint native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

demo: $(VENV)/.installed native
	$(BIN)/fadiag demo

bench: $(VENV)/.dev native
	$(BIN)/python -m benchmarks

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

native: $(NATIVE)

# Compiles csrc and puts the libraries beside the package; nothing else changes on a rebuild.
$(NATIVE): $(VENV)/.torch setup.py $(CSRC)
	$(INSTALL) --no-deps -e .
	@touch $@

# What runs the command line.
$(VENV)/.installed: $(VENV)/.torch
	$(INSTALL) -e '.[all]'
	@touch $@ $(NATIVE)

# What checks it; that includes what runs it.
$(VENV)/.dev: $(VENV)/.torch
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed $(NATIVE)

# The environment, torch, and what builds.
$(VENV)/.torch: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "PYTHON: expected Python 3.10 or later, got " + sys.version.split()[0])'
	@if $(PYTHON) -c 'import torch; v = torch.__version__.split("."); assert (int(v[0]), int(v[1])) >= (2, 10)' 2>/dev/null; \
	  then echo "using the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	  else echo "installing $(TORCH)"; $(PYTHON) -m venv $(VENV); fi
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja numpy
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	@$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > $(VENV)/torch.txt
	@touch $@

clean:
	rm -rf build dist $(VENV) fadiag_fast/_native *.egg-info
