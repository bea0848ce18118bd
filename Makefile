# Two commands matter: `make reproduce` and `make test`. Nothing but Python >= 3.11, git and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: reproduce quick bench gpu policies ablations variants below-a-line longer finer carried ten-thousand clipart test seeds kills lint types style clean

reproduce: $(READY)  ## the default experiment: data, training, samples, measurements, tables, report
	$(BIN)/snakemake
	$(MAKE) --no-print-directory results/fashion-mnist/snakemake.html

quick: $(READY)  ## the same chain in minutes, with few steps and few samples
	$(BIN)/snakemake --configfile experiments/quick.yaml
	$(MAKE) --no-print-directory results/quick/snakemake.html CONFIG="--configfile experiments/quick.yaml"

results/%/snakemake.html: results/%/report.html  # Snakemake's own report, with provenance of every file
	$(BIN)/snakemake --report $@ $(CONFIG)

bench: $(READY)  ## what decoding costs at published shapes, into docs/engine.md; the better part of an hour
	$(BIN)/snakemake efficiency choices --configfile experiments/efficiency.yaml
	$(BIN)/snakemake policy_times --configfile experiments/policy-times.yaml
	$(BIN)/fewlines publish-table --table results/policy-times/tables/policy-times.csv --name policy-times --reference results/reference --documents docs
	$(BIN)/snakemake training_cost --configfile experiments/training-cost.yaml
	$(BIN)/fewlines publish-table --table results/training-cost/tables/training-cost.csv --name training-cost --reference results/reference --documents docs
	$(BIN)/fewlines publish-efficiency --run results/efficiency --reference results/reference --document docs/engine.md --readme README.md

gpu: $(READY)  ## the same on a GPU; four minutes
	$(BIN)/fewlines bench --config experiments/gpu.yaml --run results/gpu
	$(BIN)/fewlines publish-table --table results/gpu/tables/efficiency.csv --name gpu --reference results/reference --documents docs --readme README.md

policies: $(READY)  ## every policy and every adapted model; becomes what README and docs quote; 3 hours from nothing
	$(BIN)/snakemake --configfile experiments/policies.yaml
	$(BIN)/snakemake calibration_curve
	$(BIN)/fewlines publish --run results/fashion-mnist --reference results/reference --readme README.md --documents docs

ablations: $(READY)  ## LineAR's options, on training images; after `make policies`
	$(BIN)/snakemake training_table --configfile experiments/ablations.yaml
	$(BIN)/fewlines publish-table --table results/fashion-mnist/tables/training.csv --name ablations --reference results/reference --documents docs

variants: $(READY)  ## adaptation taken apart, after `make policies`; half an hour
	$(BIN)/snakemake likelihood_table --configfile experiments/variants.yaml
	$(BIN)/fewlines publish-table --table results/fashion-mnist/tables/likelihood.csv --name variants --reference results/reference --documents docs

below-a-line: $(READY)  ## adaptation to ever less, until it breaks, after `make reproduce`; half an hour
	$(BIN)/snakemake likelihood_table --configfile experiments/below-a-line.yaml
	$(BIN)/fewlines publish-table --table results/fashion-mnist/tables/likelihood.csv --name below-a-line --reference results/reference --documents docs

longer: $(READY)  ## the same from a base trained four times as long; three and a quarter hours from nothing
	$(BIN)/snakemake likelihood_table --configfile experiments/longer.yaml
	$(BIN)/fewlines publish-table --table results/fashion-mnist-longer/tables/likelihood.csv --name longer --reference results/reference --documents docs

finer: $(READY)  ## the same images on a 28×28 grid; the better part of an hour
	$(BIN)/snakemake likelihood_table --configfile experiments/finer.yaml
	$(BIN)/fewlines publish-table --table results/fashion-mnist-28x28/tables/likelihood.csv --name finer --reference results/reference --documents docs

carried: $(READY)  ## is a schedule carried to a larger grid? after `make finer` and `make clipart`; 45 minutes
	$(BIN)/snakemake calibration_curve likelihood_table --configfile experiments/carried.yaml
	$(BIN)/snakemake calibration_curve likelihood_table --configfile experiments/larger.yaml
	for table in calibration likelihood; do \
	  $(BIN)/fewlines publish-table --table results/fashion-mnist-carried/tables/$$table.csv --name carried-$$table --reference results/reference --documents docs && \
	  $(BIN)/fewlines publish-table --table results/clipart-128/tables/$$table.csv --name larger-$$table --reference results/reference --documents docs || exit 1; \
	done

seeds: $(READY)  ## the headlines, every network trained anew: two more seeds, and other instructions; two hours
	for seed in 1 2; do \
	  $(BIN)/snakemake likelihood_table quality_table --configfile experiments/seeds.yaml --config seed=$$seed name=fashion-mnist-seed-$$seed || exit 1; \
	done
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 NUMBA_CPU_NAME=haswell \
	  $(BIN)/snakemake likelihood_table quality_table --configfile experiments/seeds.yaml --config name=fashion-mnist-seed-0-avx2
	$(BIN)/fewlines publish-table --table results/fashion-mnist-seed-*/tables/likelihood.csv --name seeds --reference results/reference --documents docs
	$(BIN)/fewlines publish-table --table results/fashion-mnist-seed-*/tables/quality.csv --name seeds-fid --reference results/reference --documents docs

ten-thousand: $(READY)  ## FID with ten thousand images of a seed; an hour and three quarters from nothing
	$(BIN)/snakemake quality_table --configfile experiments/ten-thousand.yaml
	$(BIN)/fewlines publish-table --table results/fashion-mnist-10000/tables/quality.csv --name ten-thousand --reference results/reference --documents docs

clipart: $(READY)  ## the whole chain on colour clip art; the better part of an hour
	$(BIN)/snakemake --configfile experiments/clipart.yaml
	$(BIN)/fewlines publish-table --table results/clipart/tables/cache.csv --name clipart --reference results/reference --documents docs

test: lint  ## the whole suite, two files at a time, and how much of the code it runs
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --cov --cov-report term

kills: $(READY)  ## `make quick` undisturbed and killed at random: the same tables; a quarter of an hour
	$(BIN)/python tests/killed_quick.py

lint: $(READY)  ## style, types, layers, workflow
	$(MAKE) --no-print-directory --jobs 2 types style

types: $(READY)
	$(BIN)/mypy

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

clean:  ## everything a run wrote; the reference run, the data and the environment stay
	find results -mindepth 1 -maxdepth 1 ! -name reference ! -name data -exec rm -rf {} +
	rm -rf .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fewlines needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 2 $(VENV)/lib || true  # pip would with one core; a few files are of other versions
	touch $@
