# Every target sets up what it needs: a virtual environment in .venv, made with venv and pip alone.
# Stamp files in .venv remember what was installed, so a second call starts at once.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
DATASET ?= digits
PRESET ?= cpu
# processes that test side by side
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20
	@echo "PYTHON=python3.12 picks the interpreter (3.10 to 3.13); DATASET=cifar10 PRESET=paper is the paper at its size."

replicate: $(VENV)/.installed-run ## train, sample and score the three systems, one seed: runs/digits-cpu, four minutes at most
	$(BIN)/robust-jem replicate --dataset $(DATASET) --preset $(PRESET)

record: $(VENV)/.installed-run ## the committed record in figures/: three seeds, the full suite, the study of chains; half an hour
	$(BIN)/robust-jem replicate --seeds 0 1 2 --suite full --chains --runs runs/record --figures figures \
	  --systems robust_classifier jempp robust_jem glow residual_flow

# The rows of JEM's tables, then the flows, GANs and score models in their other forms. SEEDS="0 1 2" is the committed record.
SEEDS ?= 0
HYBRIDS := wide_resnet jem jem_factored igebm residual_flow_hybrid glow_hybrid sngan ddls ncsn ncsn_conditional glow residual_flow \
  glow_conditional
hybrids: $(VENV)/.installed-run ## JEM's tables and DDLS's mixture on digits, every row measured: figures/jem, figures/ddls
	$(BIN)/robust-jem replicate --table jem --systems $(HYBRIDS) --seeds $(SEEDS) --suite claims --runs runs/digits-jem --figures figures/jem
	$(BIN)/papermill nbs/replication/ddls_mixture.ipynb runs/digits-jem/notebooks/ddls_mixture.ipynb -p figures figures/ddls -k python3

# Executed copies land in the record that `make docs` shows; results in figures/.
explore: $(VENV)/.installed-run ## what the site's interactive page shows: figures/explore, six minutes of a core; needs CIFAR-10
	mkdir -p runs/explore
	$(BIN)/papermill nbs/replication/explore.ipynb runs/explore/explore.ipynb -k python3

benchmark: $(VENV)/.installed-run ## speed against the reference's arithmetic: figures/benchmark*, a quarter of an hour
	mkdir -p runs/digits-cpu/notebooks
	$(BIN)/papermill nbs/replication/benchmark.ipynb runs/digits-cpu/notebooks/benchmark.ipynb -k python3

precision: replicate ## float32 and bfloat16 side by side over seeds: figures/precision*, a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/papermill nbs/replication/precision.ipynb runs/digits-cpu/notebooks/precision.ipynb -k python3

# One thread a worker: two at a time share the machine instead of fighting over it. Bytecode is kept, whatever the
# environment says: dozens of processes import the package.
test: $(VENV)/.installed-test ## every notebook from top to bottom, and tests/: five and a half minutes on two cores
	PYTHONDONTWRITEBYTECODE= MPLBACKEND=Agg OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal tests $(PYTEST_FLAGS)

faults: $(VENV)/.installed-test ## what takes longer: 30 kills, every write that can fail, all bad inputs, whole networks
	MPLBACKEND=Agg OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal -m long tests $(PYTEST_FLAGS)
	MPLBACKEND=Agg $(BIN)/python tests/faults.py --jobs $(WORKERS)

docs: $(VENV)/.installed-docs replicate ## the site, in _docs/
	$(BIN)/python docs/build.py

site: $(VENV)/.installed-docs ## check the built site: links, anchors, pictures' texts, sizes, axe-core in Chromium
	$(BIN)/python docs/check_site.py

counts: $(VENV)/.installed-test ## how readable the exported code is, in numbers: lines, widths, complexity, imports
	$(BIN)/python docs/counts.py

prepare: $(VENV)/.installed-test ## export nbs/ to robust_jem/, strip outputs, make README.md
	$(BIN)/nbdev_export
	$(BIN)/jupyter nbconvert --log-level WARN --clear-output --inplace nbs/*.ipynb nbs/*/*.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/python docs/results.py
	$(BIN)/python docs/readme.py

clean: ## remove what was built; runs/, data/ and figures/ stay
	rm -rf $(VENV) _build _proc _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "robust-jem needs Python 3.10 to 3.13, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true): try 'make PYTHON=python3.12'" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' can't make virtual environments: install its venv package (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet -e

$(VENV)/.installed-run: settings.ini setup.py | $(BIN)/pip
	$(INSTALL) .
	@touch $@
$(VENV)/.installed-test: settings.ini setup.py | $(BIN)/pip
	$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.installed-run
$(VENV)/.installed-docs: settings.ini setup.py | $(BIN)/pip
	$(INSTALL) '.[dev,docs]'
	@touch $@ $(VENV)/.installed-run $(VENV)/.installed-test


.PHONY: help replicate record hybrids explore benchmark precision test faults docs site counts prepare clean
.NOTPARALLEL:
