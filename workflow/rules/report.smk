MEASURED = [
    *likelihoods(ROWS),
    *of(DRAWN, "{model}/quality/{cache}.json"),
    *of(
        [(BASE, cache) for cache in CACHES if EXPERIMENT.is_shown(cache)],
        "cost/{cache}.json",
    ),
    *rules.reference_scores.output,
    *(rules.storage.output if HAS_KV else []),
    *(rules.paper_cost.output if EXPERIMENT.paper_caches else []),
    *models_of(ROWS),
    *calibration_for(CACHES),
]
# What a family cannot do, and what an experiment does not ask for, is not in its plan.
TABLES = ["cache", "correlations", "reference-scores"]
TITLES = {
    "quality": "Quality against memory and time",
    "samples": "Samples",
    "lines": "Where a small cache hurts",
    "curves": "What each cache size costs",
    "heads": "Where heads look, and what a schedule keeps",
    "memory": "Memory while decoding",
}
FIGURES = {name: TITLES[name] for name in EXPERIMENT.figures}
if HAS_KV:
    TABLES += ["storage", "ranks"]


rule tables:
    input:
        MEASURED,
    output:
        expand(f"{RUN}/tables/{{table}}.{{form}}", table=TABLES, form=("md", "tex")),
        [
            report(
                f"{RUN}/tables/{table}.csv",
                caption=f"../report/{table}.rst",
                category="Tables",
                labels={"table": table},
            )
            for table in TABLES
        ],
    log:
        f"{RUN}/logs/tables.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("tables"),
        run=run_folder,
    shell:
        "fewlines tables --run {params.run:q} 2>&1 | tee {log:q}"


# Likelihood alone ranks policies in a fraction of the time that samples take:
# `snakemake likelihood_table --configfile experiments/ranking.yaml`.
rule likelihood_table:
    input:
        likelihoods(ROWS),
        models=models_of(ROWS),
    output:
        expand(f"{RUN}/tables/likelihood.{{form}}", form=("csv", "md", "tex")),
    log:
        f"{RUN}/logs/likelihood-table.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("likelihood-table"),
        run=run_folder,
    shell:
        "fewlines likelihood-table --run {params.run:q} 2>&1 | tee {log:q}"


# Of families that can be calibrated: where a small cache hurts, and what is looked at there.
rule lines_table:
    input:
        likelihoods(ROWS),
        models=models_of(ROWS),
        calibration=rules.calibration.output,
    output:
        expand(
            f"{RUN}/tables/{{table}}.{{form}}",
            table=("lines", "regions"),
            form=("md", "tex"),
        ),
        [
            report(
                f"{RUN}/tables/{table}.csv",
                caption=f"../report/{table}.rst",
                category="Tables",
                labels={"table": table},
            )
            for table in ("lines", "regions")
        ],
    log:
        f"{RUN}/logs/lines-table.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("lines-table"),
        run=run_folder,
    shell:
        "fewlines lines-table --run {params.run:q} 2>&1 | tee {log:q}"


# Samples without times: `snakemake quality_table --configfile experiments/ten-thousand.yaml`.
rule quality_table:
    input:
        likelihoods(DRAWN),
        of(DRAWN, "{model}/quality/{cache}.json"),
        models=models_of(DRAWN),
    output:
        expand(f"{RUN}/tables/quality.{{form}}", form=("csv", "md", "tex")),
    log:
        f"{RUN}/logs/quality-table.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("quality-table"),
        run=run_folder,
    shell:
        "fewlines quality-table --run {params.run:q} 2>&1 | tee {log:q}"


# What a cache must hold as the grid grows: of this run, and of those that `grids` names.
rule grids:
    input:
        tables=[*map(str, EXPERIMENT.grids), f"{RUN}/tables/likelihood.csv"],
    output:
        expand(f"{RUN}/tables/grids.{{form}}", form=("csv", "md", "tex")),
        expand(f"{RUN}/figures/grids{{form}}", form=(".png", "-dark.png", ".csv")),
    log:
        f"{RUN}/logs/grids.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        tables=lambda wildcards, input: " ".join(
            f"--table {quote(table)}" for table in input.tables
        ),
        run=run_folder,
    shell:
        "fewlines grids-table {params.tables} --run {params.run:q} 2>&1 | tee {log:q}"


# The paper's comparison alone: `snakemake paper_table --configfile experiments/paper.yaml`.
rule paper_table:
    input:
        of(EXPERIMENT.paper_rows, "{model}/quality/{cache}.json"),
        rules.paper_cost.output,
        models=models_of(EXPERIMENT.paper_rows),
    output:
        expand(f"{RUN}/tables/paper.{{form}}", form=("md", "tex")),
        report(
            f"{RUN}/tables/paper.csv",
            caption="../report/paper.rst",
            category="Tables",
            labels={"table": "paper"},
        ),
    log:
        f"{RUN}/logs/paper-table.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("paper-table"),
        run=run_folder,
    shell:
        "fewlines paper-table --run {params.run:q} 2>&1 | tee {log:q}"


rule figures:
    input:
        MEASURED,
        calibration_for(CACHES),
        of(EXPERIMENT.pictured_rows, "{model}/samples/{cache}.safetensors"),
        tokenizer=rules.tokenizer.output.weights,
    output:
        expand(f"{RUN}/figures/{{name}}.csv", name=FIGURES),
        expand(f"{RUN}/figures/{{name}}-dark.png", name=FIGURES),
        [
            report(
                f"{RUN}/figures/{name}.png",
                caption=f"../report/{name}.rst",
                category="Figures",
                labels={"figure": title},
            )
            for name, title in FIGURES.items()
        ],
    log:
        f"{RUN}/logs/figures.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("figures"),
        run=run_folder,
    shell:
        "fewlines figures --run {params.run:q} 2>&1 | tee {log:q}"


rule watch:
    input:
        model=rules.model.output.weights,
        tokenizer=rules.tokenizer.output.weights,
        calibration=calibration_for(EXPERIMENT.paper_caches[:1]),
    output:
        animation=report(
            f"{RUN}/figures/watch.gif",
            caption="../report/watch.rst",
            category="Figures",
            labels={"figure": "An image as it is drawn"},
        ),
        page=f"{RUN}/watch.html",
    log:
        f"{RUN}/logs/watch.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("watch"),
        cache=next(iter(EXPERIMENT.paper_caches), "full"),
        calibration=calibration_option,
    shell:
        "fewlines watch --threads {threads} --model {input.model:q} "
        "--tokenizer {input.tokenizer:q} --cache {params.cache:q} {params.calibration} "
        "--output {output.animation:q} --page {output.page:q} 2>&1 | tee {log:q}"


rule report:
    input:
        MEASURED,
        rules.figures.output,
        rules.tokenizer.output.metrics,
        CLASSIFIER and rules.classifier.output.metrics,
        rules.model.output.metrics,
        rules.model_test.output,
        tokens=TOKENS,
    output:
        page=f"{RUN}/report.html",
        provenance=f"{RUN}/provenance.json",
    log:
        f"{RUN}/logs/report.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("report"),
        run=run_folder,
    shell:
        "fewlines report --run {params.run:q} --tokens {input.tokens:q} "
        "--output {output.page:q} --provenance {output.provenance:q} 2>&1 | tee {log:q}"


# `make study NAME=…`: what the experiment publishes becomes what the documents quote.
rule publish:
    input:
        [f"{RUN}/{path}" for path in EXPERIMENT.publish.values()],
    output:
        touch(f"{RUN}/published"),
    log:
        f"{RUN}/logs/publish.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("publish"),
        run=run_folder,
    shell:
        "fewlines publish --run {params.run:q} "
        "--reference results/reference 2>&1 | tee {log:q}"
