# Two commands do all set-up: `make demo` shows the agent at work, `make test` runs the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := rating_agent_hep.py setup.py scripts tests

.PHONY: demo run test chaos lint format docs clean

demo: $(VENV)/.runs
	@$(BIN)/python scripts/demo.py

run: $(VENV)/.runs
	@$(BIN)/python scripts/demo.py --stay

test: lint
	$(BIN)/python -m pytest --durations=5

# The kills and restarts of tests/test_crash.py, ten times as many: some ten minutes.
chaos: $(VENV)/.tests
	CHAOS=10 $(BIN)/python -m pytest -rP tests/test_crash.py

lint: $(VENV)/.tests
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy rating_agent_hep.py scripts

format: $(VENV)/.tests
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Writes the options table of README.md from the module.
docs: $(VENV)/.runs
	$(BIN)/python scripts/options_table.py README.md

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Debian and Ubuntu have venv in a package of its own.
$(BIN)/python:
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { \
	  rm -rf $(VENV); \
	  echo "python3-venv is missing, installing it"; \
	  if [ "$$(id -u)" = 0 ]; then SUDO=; else SUDO=sudo; fi; \
	  $$SUDO apt-get update -qq && $$SUDO apt-get install -qq -y python3-venv >/dev/null && \
	  $(PYTHON) -m venv $(VENV); }

$(VENV)/.runs: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[sandbox]'
	@touch $@

$(VENV)/.tests: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[sandbox,test]'
	@touch $@ $(VENV)/.runs
