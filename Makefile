# Every target sets itself up first. Without make, the README has the plain lines that do the same.
PYTHON ?= python3
PROFILE ?=
CHAPTERS ?=
ROUNDS ?= 50
CHECKS ?= 1000
JOBS ?= 2
WHEELS ?=
UPGRADE ?=
BIN := .venv/bin
SETUP := $(PYTHON) course_utils/course/setup.py

.PHONY: help setup setup-extended lab test soak run book notebooks edition lock clean

help:
	@echo "make lab        open the course in JupyterLab"
	@echo "make test       the whole suite (PROFILE=fast runs the notebooks in fast)"
	@echo "make soak       ROUNDS=50 times its quick stages with other random draws, CHECKS=1000 times"
	@echo "                every exercise's solution, JOBS=2 processes at a time: before a release"
	@echo "make setup      the set-up alone (WHEELS=DIR: from what \`course class wheels\` filled, without"
	@echo "                a network); make setup-extended adds DeepSpeed, Model Optimizer, JupyterHub"
	@echo "make run        execute every chapter, write ledger and report to build/run"
	@echo "make book       the chapters, the atlas and Guess first as pages, into build/book"
	@echo "make notebooks  rebuild the learner editions (CHAPTERS='01 03' for some)"
	@echo "make edition    for maintainers, an hour alone on one machine: all notebooks, their ledger, README"
	@echo "make lock       for maintainers: resolve the pinned requirements again (needs uv;"
	@echo "                UPGRADE=1: the newest of everything)"

setup:
	@$(SETUP) $(if $(WHEELS),--wheels "$(WHEELS)")

setup-extended:
	@$(SETUP) --extended

lab: setup
	@$(BIN)/course lab

test: setup
	@$(BIN)/python tests/run_suite.py $(if $(PROFILE),--profile $(PROFILE))

soak: setup
	@$(BIN)/python tests/soak.py --rounds $(ROUNDS) --checks $(CHECKS) --jobs $(JOBS)

run: setup
	@$(BIN)/course run $(CHAPTERS) $(if $(PROFILE),--profile $(PROFILE)) --out build/run
	@$(BIN)/course report build/run/ledger.json --out build/run

book: setup
	@$(BIN)/python -m course_utils.course.book

notebooks: setup
	@$(BIN)/course build $(CHAPTERS)

edition: setup
	@$(BIN)/course selftest
	@$(BIN)/course build
	@$(BIN)/course contribute build/edition/ledger.json
	@$(BIN)/python -m course_utils.course.front

lock:
	@$(PYTHON) course_utils/course/lock.py $(if $(UPGRADE),--upgrade)

clean:
	rm -rf build
