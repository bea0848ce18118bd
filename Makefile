# Two commands matter: `make reproduce` and `make test`. Nothing but Python >= 3.11, git and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: reproduce quick reference bench policies test lint clean

reproduce: $(READY)  ## the default experiment: data, training, samples, measurements, tables, report
	$(BIN)/snakemake
	$(MAKE) --no-print-directory results/fashion-mnist/snakemake.html

quick: $(READY)  ## the same chain in minutes, with few steps and few samples
	$(BIN)/snakemake --configfile experiments/quick.yaml
	$(MAKE) --no-print-directory results/quick/snakemake.html CONFIG="--configfile experiments/quick.yaml"

results/%/snakemake.html: results/%/report.html  # Snakemake's own report, with provenance of every file
	$(BIN)/snakemake --report $@ $(CONFIG)

reference: reproduce  ## make the default experiment's results the ones that the README quotes
	$(BIN)/fewlines publish --run results/fashion-mnist --reference results/reference --readme README.md

bench: $(READY)  ## what decoding costs at published shapes, into docs/engine.md; the better part of an hour
	$(BIN)/snakemake efficiency choices --configfile experiments/efficiency.yaml
	$(BIN)/fewlines publish-efficiency --run results/efficiency --reference results/reference --document docs/engine.md --readme README.md

policies: $(READY)  ## every policy at the same bounds, by likelihood, into docs/policies.md; after `make reproduce`
	$(BIN)/snakemake calibration_curve
	$(BIN)/snakemake likelihood_table --configfile experiments/policies.yaml --rerun-triggers mtime
	$(BIN)/fewlines publish-policies --run results/fashion-mnist --reference results/reference --document docs/policies.md

test: lint  ## the whole suite
	$(BIN)/pytest

lint: $(READY)  ## style, types, layers, workflow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

clean:  ## everything a run wrote; the reference run, the data and the environment stay
	find results -mindepth 1 -maxdepth 1 ! -name reference ! -name data -exec rm -rf {} +
	rm -rf .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fewlines needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
