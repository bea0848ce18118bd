# Two commands matter: `make reproduce` and `make test`. Nothing but Python >= 3.11, git and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SPREAD = --numprocesses 3 --dist loadfile --no-loadscope-reorder
unexport PYTHONDONTWRITEBYTECODE  # what is imported is compiled once, not all that is installed
STUDY = --configfile experiments/$(NAME).yaml $(if $(SET),--config $(SET))

.PHONY: reproduce quick study fuzz test test-cluster lint clean

reproduce: $(READY)  ## the default experiment: data, training, samples, measurements, tables, report
	$(BIN)/python workflow/scripts/unlock.py
	$(BIN)/snakemake
	$(BIN)/snakemake --report results/fashion-mnist/snakemake.html

quick: $(READY)  ## the same chain in minutes, with few steps and few samples
	$(BIN)/python workflow/scripts/unlock.py
	$(BIN)/snakemake --configfile experiments/quick.yaml

study: $(READY)  ## one of experiments/, as NAME=…, into results/reference and the documents
	$(BIN)/python workflow/scripts/unlock.py
	$(BIN)/snakemake publish $(STUDY)
	$(BIN)/fewlines fill-blocks $(patsubst %,--document %,README.md $(wildcard docs/*.md)) --reference results/reference

fuzz: $(READY)  ## thousands of configurations, damaged files and arguments; some ten minutes
	$(BIN)/pytest tests/test_fuzz.py --numprocesses 2 --hypothesis-profile fuzz --hypothesis-show-statistics

test: lint  ## the whole suite, three files at a time
	$(BIN)/pytest $(SPREAD)

test-cluster: $(READY)  ## from S3, and on a Slurm of three nodes, made here: Debian, as root; some forty minutes
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[cluster,cloud]' 'moto[server]'
	$(BIN)/python tests/cluster/check_storage.py
	$(BIN)/python tests/cluster/check_slurm.py

lint: $(READY)  ## style, types, layers, workflow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint
	$(BIN)/mypy

clean:  ## everything a run wrote; the reference run, the data and the environment stay
	find results -mindepth 1 -maxdepth 1 ! -name reference ! -name data -exec rm -rf {} +
	rm -rf .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fewlines needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@
