# Commands of this repository. `make` lists them. The first call makes .venv; later calls reuse it until
# pyproject.toml or the constraints change.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONSTRAINTS ?= constraints-cpu.txt
# Tests at once, of which each may start ranks; 0 for one after the other.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help train test test-all test-clusters test-gpu docs format clean

help:  ## List the commands.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(READY)  ## Train the demo model: make train ARGS="parallel=tp2_pp2 trainer.max_steps=100"
	$(BIN)/python train.py $(ARGS)

test: $(READY)  ## Lint, check types and run the fast tests: make test ARGS="tests/test_layout.py"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-all: test  ## Everything in `make test`, then the long matrices.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(ARGS)

test-clusters: $(READY)  ## The commands of docs/clusters.md: torchrun, SLURM, Kubernetes; and two hosts, where root runs it.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" tests/test_clusters.py $(ARGS)

test-gpu: $(READY)  ## What needs a GPU; one is enough. With a torch for it: make test-gpu CONSTRAINTS=
	LIGHTNING_PAR_TEST_DEVICE=cuda OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu $(ARGS)

docs: $(READY)  ## Make the documentation's site in site/; its first page is site/index.html.
	$(BIN)/python -m mkdocs build --strict

format: $(READY)  ## Rewrite the sources in the house format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment, caches and training outputs.
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist site outputs multirun

# DS_BUILD_OPS=0: DeepSpeed compiles the kernels that it needs at first use, never at install, whatever the environment says.
$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[dev]"
	touch $@
