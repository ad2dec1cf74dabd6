# Every target sets itself up: a virtual environment in .venv, made once and reused.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: help demo test test-full lint tidy format wheel install bench clean

help:  ## What the targets do
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: install  ## Run the whole method once, thinly: video in, label out (minutes, once installed)
	$(BIN)/cascade demo

test: install  ## What CI runs: fast checks of everything
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not full" -n $(WORKERS) $(PYTEST_ARGS)

test-full: install  ## Everything, long kill loops, sanitizers and all architectures included
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --timeout 1800 --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

lint: $(VENV)/ready  ## Style, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.hpp' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp')
	mkdir -p build && rm -rf build/tree && mkdir build/tree && cp -rs $(CURDIR)/cascade_engine build/tree/
	cp -rs $(CURDIR)/cli $(CURDIR)/benchmarks build/tree/cascade_engine/
	$(BIN)/python -m mypy build/tree/cascade_engine
	cd build/tree && $(CURDIR)/$(BIN)/lint-imports --config $(CURDIR)/pyproject.toml --no-cache --no-logo 2>/dev/null

tidy: wheel  ## clang-tidy over the C++ sources; slower than lint
	$(BIN)/clang-tidy --quiet -p $$(ls -d build/cp*) $$(git ls-files 'csrc/core/*.cpp' 'csrc/cpu/*.cpp' 'csrc/python/cpu*.cpp' | grep -v neon)

format: $(VENV)/ready  ## Rewrite the sources in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.hpp' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp')

wheel: $(VENV)/ready  ## Build the wheel into dist/
	$(BIN)/pip wheel -q . --no-deps --no-build-isolation -w dist

install: wheel  ## Install the wheel just built into the virtual environment
	$(BIN)/pip install -q --no-deps --force-reinstall dist/cascade_engine-*.whl

bench: install  ## The mining benchmark that README quotes; `cascade bench` lists the others
	$(BIN)/cascade bench mining

clean:  ## Remove what the targets made, the virtual environment aside
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache

$(VENV)/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $$($(PYTHON) .ci/requirements.py dev)
	touch $@
