# A thin wrapper: everything is done by ci/bootstrap.py, which also runs where there is no make.
PYTHON ?= python3
ARGS ?=
.DEFAULT_GOAL := help
.PHONY: help setup workbook test bench lab package lock

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  PYTHON=python3.12 picks the interpreter, ARGS='...' is passed on, FORCE=1 redoes what is done"

setup:  ## make .venv and install everything into it
	$(PYTHON) ci/bootstrap.py setup

workbook:  ## setup, then run every notebook at laptop scale; a rerun resumes
	$(PYTHON) ci/bootstrap.py workbook $(ARGS)

test:  ## setup, then lint, unit tests and notebooks
	$(PYTHON) ci/bootstrap.py test $(ARGS)

bench:  ## setup, then tnlib against its peers, hours; ARGS=--quick for minutes
	$(PYTHON) ci/bootstrap.py bench $(ARGS)

lab:  ## setup, then JupyterLab on the first notebook
	$(PYTHON) ci/bootstrap.py lab $(ARGS)

package:  ## setup, then wheel and sdist into dist/, tried in a clean environment
	$(PYTHON) ci/bootstrap.py package $(ARGS)

lock: setup  ## write constraints.txt anew; ARGS=--upgrade for the newest versions
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash ci/lock.sh $(ARGS)
