#!/bin/sh
# Runs inside the new environment, in the folder that Snakemake was started in.
set -eu
python -m pip install --constraint constraints.txt --editable .
