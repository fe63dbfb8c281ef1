# make setup | quickstart | test | test-fast | test-faults | check | bench
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: setup quickstart test test-fast test-faults check format bench clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one or name it: make PYTHON=/path/to/python"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

quickstart: setup
	$(BIN)/python jobs/train_ddmi.py

# Two at a time, each with one thread; then, one at a time, those that start a cluster or have seconds to be done in.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not alone and not faults"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "(ray or alone) and not faults"

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not slow and not gpu and not faults"

test-faults: setup
	$(BIN)/python -m pytest -m faults -s

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf .venv build *.egg-info
