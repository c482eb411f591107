# Two commands do everything: `make demo` and `make test`. Both make the virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo-run

.PHONY: demo test lint types unit clean

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true # pip has one core do it; some files are templates
	touch $@

demo: $(VENV)/installed
	$(BIN)/hpo tune --study finetune --trials 2 --storage sqlite:///$(DEMO).db --runs $(DEMO)
	$(BIN)/hpo search-lengths --trials 500 --max-drop 0.01 --storage sqlite:///$(DEMO).db --runs $(DEMO)

test: lint types unit

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

unit: $(VENV)/installed # as in a user's shell: with bytecode, which hundreds of processes share, and with buffers
	env -u PYTHONDONTWRITEBYTECODE -u PYTHONUNBUFFERED $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) $(DEMO) $(DEMO).db $(DEMO).db-shm $(DEMO).db-wal
