PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-all lint files format clean

demo: $(INSTALLED)
	$(BIN)/expertier demo

# one thread per worker: the tests' matrices are too small for more
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto -m "slow or not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

files: $(INSTALLED)
	$(BIN)/python docs/file_map.py > docs/files.md
	$(BIN)/python docs/file_map.py --rooms

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,jax,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
