MEASURED = [
    *of(ROWS, "{model}/likelihood/{cache}.json"),
    *of(DRAWN, "{model}/quality/{cache}.json"),
    *of(
        [(BASE, cache) for cache in CACHES if EXPERIMENT.is_shown(cache)],
        "cost/{cache}.json",
    ),
    *rules.reference_scores.output,
    *(rules.storage.output if HAS_KV else []),
    *(
        [*rules.paper_cost.output, *rules.efficiency.input[:-1]]
        if EXPERIMENT.paper_cache
        else []
    ),
    rules.model.output.weights,
]
# What a family cannot do, and what an experiment does not ask for, is not in its plan.
TABLES = ["cache", "reference-scores"]
FIGURES = {
    "quality": "Quality against memory and time",
    "samples": "Samples",
}
if HAS_KV:
    TABLES += ["storage", "ranks"]
    FIGURES["lines"] = "Where a small cache hurts"
    FIGURES["curves"] = "What each cache size costs"
    if any(cache.requires for cache in EXPERIMENT.cache_by_slug.values()):
        FIGURES["heads"] = "Where heads look, and what a schedule keeps"
if EXPERIMENT.paper_cache:
    TABLES.append("paper")
    FIGURES["memory"] = "Memory while decoding"


rule tables:
    input:
        MEASURED,
        config=ancient(RESOLVED),
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
        settings=settings("name", "caches", "paper", "adaptation", "tasks"),
        run=run_folder,
    shell:
        "fewlines tables --config {input.config} --run {params.run} 2>&1 | tee {log}"


# Likelihood alone ranks policies in a fraction of the time that samples take:
# `snakemake likelihood_table --configfile experiments/policies.yaml`.
rule likelihood_table:
    input:
        of(ROWS, "{model}/likelihood/{cache}.json"),
        config=ancient(RESOLVED),
        model=rules.model.output.weights,
    output:
        expand(f"{RUN}/tables/likelihood.{{form}}", form=("csv", "md", "tex")),
    log:
        f"{RUN}/logs/likelihood-table.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("name", "caches", "adaptation", "tasks"),
        run=run_folder,
    shell:
        "fewlines likelihood-table --config {input.config} --run {params.run} 2>&1 | tee {log}"


# Samples without times: `snakemake quality_table --configfile experiments/ten-thousand.yaml`.
rule quality_table:
    input:
        of(DRAWN, "{model}/likelihood/{cache}.json"),
        of(DRAWN, "{model}/quality/{cache}.json"),
        config=ancient(RESOLVED),
        model=rules.model.output.weights,
    output:
        expand(f"{RUN}/tables/quality.{{form}}", form=("csv", "md", "tex")),
    log:
        f"{RUN}/logs/quality-table.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("name", "caches", "adaptation", "tasks"),
        run=run_folder,
    shell:
        "fewlines quality-table --config {input.config} --run {params.run} 2>&1 | tee {log}"


rule figures:
    input:
        MEASURED,
        calibration_for(CACHES),
        of(SHOWN, "{model}/samples/{cache}.safetensors"),
        config=ancient(RESOLVED),
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
        settings=settings("name", "caches", "paper", "adaptation", "tasks"),
        run=run_folder,
    shell:
        "fewlines figures --config {input.config} --run {params.run} 2>&1 | tee {log}"


rule watch:
    input:
        config=ancient(RESOLVED),
        model=rules.model.output.weights,
        tokenizer=rules.tokenizer.output.weights,
        calibration=calibration,
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
        settings=settings("paper", "sampling"),
        cache=EXPERIMENT.paper_cache,
        calibration=calibration_option,
    shell:
        "fewlines watch --config {input.config} --threads {threads} --model {input.model} "
        "--tokenizer {input.tokenizer} --cache {params.cache} {params.calibration} "
        "--output {output.animation} --page {output.page} 2>&1 | tee {log}"


rule report:
    input:
        MEASURED,
        rules.figures.output,
        rules.tokenizer.output.metrics,
        CLASSIFIER and rules.classifier.output.metrics,
        rules.model.output.metrics,
        rules.model_test.output,
        config=ancient(RESOLVED),
    output:
        page=f"{RUN}/report.html",
        provenance=f"{RUN}/provenance.json",
    log:
        f"{RUN}/logs/report.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("name", "caches", "paper", "adaptation", "tasks"),
        run=run_folder,
    shell:
        "fewlines report --config {input.config} --run {params.run} "
        "--output {output.page} --provenance {output.provenance} 2>&1 | tee {log}"


# `make study NAME=…`: what the experiment publishes becomes what the documents quote.
rule publish:
    input:
        [f"{RUN}/{path}" for path in EXPERIMENT.publish.values()],
        config=ancient(RESOLVED),
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
        "fewlines publish --config {input.config} --run {params.run} "
        "--reference results/reference 2>&1 | tee {log}"
