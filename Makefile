PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# dozens of tests start Python: without its cache, each start compiles this package, and each run every test file
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all gpu lint files format clean

demo: $(INSTALLED)
	$(BIN)/expertier demo

# One thread per worker: the tests' matrices are too small for more. A worker takes whole stretches of the files, so that
# what the tests of a file share is made once, and takes from the other's stretch when its own is done.
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist worksteal
test: $(INSTALLED)
	$(TEST)

test-all: $(INSTALLED)
	$(TEST) -m "slow or not slow"

# on a machine with an NVIDIA GPU; OUT=folder says where logs and records go. Without a GPU: exit code 3 of the program
gpu:
	$(PYTHON) -m experiments.gpu_session $(if $(OUT),--out $(OUT))

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
	rm -rf .venv .venv-gpu build *.egg-info
