# Two commands do all the set-up on a fresh machine with Python 3.11 or newer:
#   make demo   environment, install, demo; says where the report is (MODEL=infinity for a small Infinity)
#   make test   environment, install, all tests
PYTHON ?= python3
VENV ?= .venv
# More flags for pip, such as --index-url for a CPU build of torch.
PIP_FLAGS ?=
DEMO_FLAGS ?=
# Of the demo: var, or infinity.
MODEL ?= var
TEST_FLAGS ?=

# Threads that wait spin only briefly. By default they spin for long, which makes a step on two cores several times
# slower where another process holds one of them; not at all costs half as much again where none does. The command
# line sets it too (fastvar/threads.py); pytest, which may import torch first, has it from here.
export GOMP_SPINCOUNT ?= 2000

.PHONY: demo test lint wheel docs clean

$(VENV)/installed: pyproject.toml setup.py
	@echo "Installing about 6 GB into $(VENV); pip says nothing for some minutes."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --editable '.[test,dev]'
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/fastvar demo --model $(MODEL) $(DEMO_FLAGS)

# The C++ and CUDA libraries, as far as there are compilers; without, the tests say so and do without.
test: $(VENV)/installed
	-$(VENV)/bin/fastvar build
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal $(TEST_FLAGS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

wheel: $(VENV)/installed
	rm -rf build dist
	$(VENV)/bin/python -m build --wheel --outdir dist .
	$(VENV)/bin/python tests/inspect_wheel.py dist/*.whl

# The site, in site/, without a network; a link that leads nowhere is an error, unless --quiet hides it from --strict.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info fastvar/_*.abi3.so fastvar/_build.json
