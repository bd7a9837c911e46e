# Two commands do all the set-up on a fresh machine with Python 3.11 or newer:
#   make demo   environment, install, demo; says where the report is
#   make test   environment, install, all tests
PYTHON ?= python3
VENV ?= .venv
# More flags for pip, such as --index-url for a CPU build of torch.
PIP_FLAGS ?=
DEMO_FLAGS ?=
TEST_FLAGS ?=

# Threads that wait must not spin: where another process holds a core, spinning makes a step on two cores many times
# slower. It has to be set before Python starts.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint wheel clean

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --editable '.[test,dev]'
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/fastvar demo $(DEMO_FLAGS)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(TEST_FLAGS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

wheel: $(VENV)/installed
	rm -rf build dist
	$(VENV)/bin/python -m build --wheel --outdir dist .
	$(VENV)/bin/python tests/inspect_wheel.py dist/*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info
