# Two commands do everything on a machine with Python, make and git:
#   make demo   sets up, compares guarded with unguarded models on the data in the package, says where the report is
#   make test   sets up, runs the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2  # processes that share the tests; a file of tests stays in one

.PHONY: demo demo-fashion-mnist demo-adult test slow lint types wheel clean help

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Lightning Guard needs Python 3.11 or later; say which with make PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: demo-fashion-mnist demo-adult  ## compare guarded with unguarded models, under 5 minutes on two cores
	@echo; echo "The reports: demo/fashion-mnist/report.html and demo/adult/report.html"

demo-fashion-mnist: $(READY)  ## robustness and size on Fashion-MNIST 7k
	$(BIN)/lightning-guard compare --config demo/fashion-mnist --out demo/fashion-mnist --seeds 2 --workers 2 \
	  --title "Fashion-MNIST 7k: robust and small" --guards.adversarial_training.steps 3 \
	  --arm none --arm adversarial-training --arm pruning --arm robust-and-small

demo-adult: $(READY)  ## fairness and size on Adult
	$(BIN)/lightning-guard compare --config demo/adult --out demo/adult --seeds 3 --workers 2 \
	  --title "Adult: fair and small" \
	  --arm none --arm fairness --arm pruning --arm fair-and-small

test: $(READY)  ## the tests and every example in the documentation
	$(BIN)/python -m pytest -m 'not slow' -q -n $(strip $(WORKERS)) --dist loadfile

slow: $(READY)  ## the longer proofs
	$(BIN)/python -m pytest -m slow -q

lint: $(READY)  ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)  ## mypy
	$(BIN)/mypy

wheel: $(READY)  ## build the wheel and use it from another folder in a new environment
	VENV=$(VENV) bash tests/wheel.sh

clean:  ## remove what the above made
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
