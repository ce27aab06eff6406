# Thin targets: the work is done by the command lora-edu (see `.venv/bin/lora-edu --help`), which also runs without make.
PYTHON ?= python3
# Extra arguments for pip, e.g. an index that carries the CPU-only or another CUDA build of torch (see README).
PIP_ARGS ?=
# Extra arguments for JupyterLab, e.g. --no-browser --ip 0.0.0.0 --allow-root on a remote machine.
LAB_ARGS ?=
BIN := .venv/bin
READY := .venv/.lora-edu-ready

.DEFAULT_GOAL := help
.PHONY: help setup lab course test book bench

help:
	@echo "make setup    install everything into .venv and fetch the base models (the others call it when needed)"
	@echo "make course   run all lessons on the CPU and build the book"
	@echo "make test     lint, tests, parity, graders, every lesson compared with its stored outputs, the book"
	@echo "make lab      open JupyterLab on your own copy of the lessons, in work/"
	@echo "make book     build the book from the stored outputs, without running the lessons"
	@echo "make bench    run the benchmarks"

setup: $(READY)

# The stamp says that this was done for these versions: later targets then never touch the network.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"lora-edu needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}; try: make setup PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -e ".[course,book,dev]" -c constraints.txt
	$(BIN)/lora-edu bases fetch
	@touch $@

lab: $(READY)
	$(BIN)/lora-edu lab $(LAB_ARGS)

course: $(READY)
	$(BIN)/lora-edu course

test: $(READY)
	$(BIN)/lora-edu test

book: $(READY)
	$(BIN)/lora-edu book

bench: $(READY)
	@ls benchmarks/*.py >/dev/null 2>&1 || { echo "there are no benchmarks yet"; exit 1; }
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python $$script || exit 1; done
