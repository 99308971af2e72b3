# The commands of the house. GNU make 3.81 and bash 3.2 are enough; every target makes .venv itself where there is none.
# PYTHON=python3.12 make ...  picks the interpreter; BACKEND=cpu (cuda12, cuda13) picks MLX's backend on Linux.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help quickstart test check book book-check book-serve lab stress bench clean

SETUP := @bash tools/setup.sh
RUN := @.venv/bin/python
TESTS := dev ref $(if $(TORCH),torch)
# Tests run at scale ci on every machine. Notebooks run side by side, so each gets one thread.
CI := @LLMFS_SCALE=ci PYTHONHASHSEED=0
ONE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

quickstart: ## set up, then data, tokenizer, training, evaluation, stories: one small model on the built-in corpus
	$(SETUP)
	@.venv/bin/llmfs quickstart

test: ## run every chapter, then the tests (TORCH=1: also those that compare with PyTorch)
	$(SETUP) $(TESTS)
	$(CI) $(ONE) .venv/bin/python -c "from nbdev.test import nbdev_test; nbdev_test()"
	$(CI) .venv/bin/python -m pytest -q tests

check: ## notebooks, modules and text copies agree; lint; house rules. Changes nothing
	$(SETUP) dev
	$(RUN) tools/check.py

book: ## render the book to book/_site/index.html (SOLUTIONS=0: without the solutions, for teaching)
	$(SETUP) book
	@LLMFS_SOLUTIONS=$(if $(filter 0 off no,$(SOLUTIONS)),off,on) .venv/bin/python -m sphinx -q -W --keep-going -b html -d .doctrees -c book nbs book/_site
	@echo "the book: book/_site/index.html"

book-check: book ## look at every page in a real browser: accessibility, speed, phone width, search (needs a Chromium)
	$(SETUP) browser
	$(RUN) tools/book_check.py $(PAGES)

book-serve: book ## render the book and serve it on http://localhost:8000
	$(RUN) -m http.server --bind 127.0.0.1 --directory book/_site 8000

lab: ## open the chapters in Jupyter
	$(SETUP) lab
	$(RUN) -m jupyterlab nbs

stress: ## the long proofs: many kills, many cases, many steps
	$(SETUP) $(TESTS)
	$(CI) .venv/bin/python -m pytest -q -m stress tests

bench: ## measure this machine; then the tokenizer beside others, and training beside nanoGPT's setting (TORCH=1)
	$(SETUP) $(TESTS)
	$(RUN) tools/bench.py
	$(RUN) tests/bench_tokenizer.py --processes 2
	$(RUN) tests/bench_shakespeare.py

clean: ## remove what can be made again (not .venv, data, checkpoints)
	@rm -rf book/_site book/_shots .doctrees build dist .pytest_cache .ruff_cache
	@find llmfs nbs tests tools book -name __pycache__ -type d -prune -exec rm -rf {} +
	@find nbs -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +
