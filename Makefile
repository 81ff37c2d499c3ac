# make test   lint, types, build, tests          make demo   the main job
# make bench  the benchmarks that fit this machine
# Each sets itself up: a virtual environment in .venv, with the torch that PYTHON has if that will
# do, else torch 2.13.0.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A torchvision belongs to one torch.
TORCH ?= torch==2.13.0
VISION ?= torchvision==0.28.0
CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
NATIVE := fadiag_fast/_native/build_info.json

.PHONY: test demo bench lint format native clean

test: lint native
	$(BIN)/python -m pytest

demo: native
	$(BIN)/fadiag demo

bench: native
	$(BIN)/python -m benchmarks

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

native: $(NATIVE)

# Compiles csrc and puts the libraries beside the package; nothing else changes on a rebuild.
$(NATIVE): $(VENV)/.installed setup.py $(CSRC)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.installed: pyproject.toml
	@if $(PYTHON) -c 'import torch; v = torch.__version__.split("."); assert (int(v[0]), int(v[1])) >= (2, 10)' 2>/dev/null; \
	  then echo "using the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	  else echo "installing $(TORCH)"; $(PYTHON) -m venv $(VENV); fi
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet $(TORCH) $(VISION)
# What needs torchvision gets the one that fits, never another torch.
	@$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > $(VENV)/torch.txt
	$(BIN)/pip install --quiet --no-build-isolation -c $(VENV)/torch.txt -e '.[dev]'
	@touch $@ $(NATIVE)

clean:
	rm -rf build dist $(VENV) fadiag_fast/_native *.egg-info
