# Both `make demo` and `make test` set up their own virtual environment on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo docs test test-wheel test-versions lint clean

$(VENV)/.installed: pyproject.toml setup.py scripts/setup.sh $(wildcard hf_blockprune/_cpu/*.cpp hf_blockprune/_cpu/*.h)
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/setup.sh
	touch $@

demo: $(VENV)/.installed
	$(BIN)/blockprune demo --quiet

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Builds a wheel, installs it in an empty environment, and runs the kernels' tests against it.
test-wheel:
	PYTHON="$(PYTHON)" sh scripts/test-wheel.sh

# Runs part of the tests with the oldest and the newest versions of what the package needs, each in a new environment.
test-versions:
	"$(PYTHON)" scripts/test_versions.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, in site/.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build site *.egg-info
