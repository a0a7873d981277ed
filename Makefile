# Everything from a bare clone: `make demo` runs the main job, `make test` the tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types docs examples pictures package bench bench-small zoo fuzz check clean

demo: $(READY)
	$(BIN)/python examples/quickstart.py

test: $(READY)
	$(BIN)/python -m pytest -q -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# The site, with every example run at small size.
docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

# Those that the gallery cannot start; `make docs` runs all others at the same size, and fails if one of them does.
examples: $(READY)
	$(BIN)/torchrun --nproc-per-node 2 examples/distributed.py --small

# The pictures that are committed, of the README and of pages: ten minutes.
pictures: $(READY)
	$(BIN)/python docs/draw.py

# What would be uploaded, checked, and the wheel tried in an environment that has nothing else.
package: $(READY)
	rm -rf dist .wheel
	$(BIN)/python -m build -q --no-isolation
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv .wheel
	.wheel/bin/python -m pip install -q -c constraints.txt dist/*.whl
	.wheel/bin/python -I .ci/first_lines.py README.md

bench: $(READY)
	$(BIN)/python benchmarks/run.py

bench-small: $(READY)
	$(BIN)/python benchmarks/run.py --small

# What torchvision's models cost in every verb, in an environment that has torchvision.
ZOO ?= $(BIN)/python
zoo:
	PYTHONPATH=. $(ZOO) benchmarks/zoo.py

# Random nets against plain loops, for that many minutes; the smallest failing cases become scripts in .fuzz.
MINUTES ?= 10
SEED ?= 1000
fuzz: $(READY)
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES) --seed $(SEED) --out .fuzz

# What guards the main branch.
check:
	bash .ci/run

# Done again only when the project's requirements change.
$(READY): pyproject.toml constraints.txt tests/peers.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps -r tests/peers.txt
	touch $(READY)

clean:
	rm -rf $(VENV) .bench .fuzz .wheel build dist *.egg-info docs/_build docs/_generated docs/gallery examples/output
