"""`snakemake` reproduces everything: images, training, samples, measurements, tables, report.

Another experiment: `snakemake --configfile experiments/quick.yaml`. Another cache size: one more
line under `caches` in config.yaml.
"""

from snakemake.utils import min_version

min_version("9.0")


configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/tokenizer.smk"
include: "workflow/rules/model.smk"
include: "workflow/rules/generate.smk"
include: "workflow/rules/measure.smk"
include: "workflow/rules/efficiency.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/architectures.smk"


# What needs images, or a tokenizer: not there where tokens stand in their place.
IMAGES_TOO = [
    *rules.tables.output,
    *rules.report.output,
    *(rules.efficiency.output if EFFICIENCY else []),
    *(rules.paper_table.output if EXPERIMENT.paper_caches else []),
    *(rules.watch.output if EXPERIMENT.paper_caches else []),
    *(rules.architectures.output if EXPERIMENT.architectures else []),
]


rule all:
    default_target: True
    input:
        rules.lines_table.output if CALIBRATED else [],
        rules.likelihood_table.output if EXPERIMENT.data.tokens else IMAGES_TOO,
