rule quality:
    input:
        samples=rules.samples.output,
        images=find_images,
        reference=EXPERIMENT.quality.reference or [],
        tokenizer=rules.tokenizer.output.weights,
        classifier=CLASSIFIER,
    output:
        f"{RUN}/{{model}}/quality/{{cache}}.json",
    log:
        f"{RUN}/logs/quality/{{model}}/{{cache}}.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("measure-quality"),
        classifier=classifier_option,
    shell:
        "fewlines measure-quality --threads {threads} "
        "--samples {input.samples:q} --images {input.images:q} --tokenizer {input.tokenizer:q} "
        "{params.classifier} --row {wildcards.model:q} --output {output:q} 2>&1 | tee {log:q}"


rule reference_scores:
    input:
        images=find_images,
        reference=EXPERIMENT.quality.reference or [],
        tokenizer=rules.tokenizer.output.weights,
        classifier=CLASSIFIER,
    output:
        real=f"{RUN}/reference/real.json",
        rebuilt=f"{RUN}/reference/reconstruction.json",
    log:
        f"{RUN}/logs/reference-scores.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("measure-reference"),
        classifier=classifier_option,
    shell:
        "fewlines measure-reference --threads {threads} "
        "--images {input.images:q} --tokenizer {input.tokenizer:q} {params.classifier} "
        "--real {output.real:q} --rebuilt {output.rebuilt:q} 2>&1 | tee {log:q}"


# Drawn or remembered: `snakemake neighbours --configfile experiments/emoji.yaml`.
rule neighbours:
    input:
        samples=f"{RUN}/{BASE}/samples/full.safetensors",
        images=find_images,
        tokenizer=rules.tokenizer.output.weights,
        classifier=CLASSIFIER,
    output:
        expand(f"{RUN}/tables/neighbours.{{form}}", form=("csv", "md", "tex")),
        expand(f"{RUN}/figures/neighbours{{form}}", form=(".png", "-dark.png", ".csv")),
    log:
        f"{RUN}/logs/neighbours.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("find-nearest"),
        classifier=classifier_option,
        run=run_folder,
    shell:
        "fewlines find-nearest --threads {threads} "
        "--samples {input.samples:q} --images {input.images:q} --tokenizer {input.tokenizer:q} "
        "{params.classifier} --run {params.run:q} 2>&1 | tee {log:q}"


rule model_test:
    input:
        model=rules.model.output.weights,
        tokens=TOKENS,
    output:
        f"{RUN}/{BASE}/model-test.json",
    log:
        f"{RUN}/logs/model-test.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("measure-model"),
    shell:
        "fewlines measure-model --threads {threads} "
        "--model {input.model:q} --tokens {input.tokens:q} --output {output:q} 2>&1 | tee {log:q}"


rule likelihood:
    input:
        model=weights,
        calibration=calibration,
        tokens=TOKENS,
    output:
        f"{RUN}/{{model}}/likelihood/{{cache}}.json",
    log:
        f"{RUN}/logs/likelihood/{{model}}/{{cache}}.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("measure-likelihood"),
        calibration=calibration_option,
    shell:
        "fewlines measure-likelihood --threads {threads} "
        "--model {input.model:q} {params.calibration} --tokens {input.tokens:q} "
        "--cache {wildcards.cache:q} --row {wildcards.model:q} "
        "--output {output:q} 2>&1 | tee {log:q}"


# One thread a search: they run side by side.
rule search:
    input:
        model=rules.model.output.weights,
        tokens=TOKENS,
        calibration=lambda wildcards: calibration_needed(
            EXPERIMENT.search.caches[wildcards.searched][0].requires
        ),
    output:
        f"{RUN}/search/{{searched}}.json",
    log:
        f"{RUN}/logs/search/{{searched}}.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("search-options"),
        calibration=calibration_option,
    shell:
        "fewlines search-options --threads {threads} "
        "--model {input.model:q} {params.calibration} --tokens {input.tokens:q} "
        "--cache {wildcards.searched:q} --output {output:q} 2>&1 | tee {log:q}"


# Every policy at its best, on training images: experiments/baselines.yaml publishes it.
rule baselines:
    input:
        [f"{RUN}/search/{slug}.json" for slug in EXPERIMENT.search.caches],
    output:
        expand(f"{RUN}/tables/baselines.{{form}}", form=("csv", "md", "tex")),
    log:
        f"{RUN}/logs/baselines.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("baselines"),
        run=run_folder,
    shell:
        "fewlines baselines --run {params.run:q} 2>&1 | tee {log:q}"


rule storage:
    input:
        model=rules.model.output.weights,
        tokens=TOKENS,
    output:
        f"{RUN}/storage.json",
    log:
        f"{RUN}/logs/storage.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("measure-storage"),
    shell:
        "fewlines measure-storage --threads {threads} "
        "--model {input.model:q} --tokens {input.tokens:q} --output {output:q} 2>&1 | tee {log:q}"


# Times are taken on an otherwise idle machine: these rules claim every core.
rule cost:
    input:
        model=rules.model.output.weights,
        calibration=calibration,
    output:
        f"{RUN}/cost/{{cache}}.json",
    log:
        f"{RUN}/logs/cost/{{cache}}.log",
    priority: ALONE
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("measure-cost"),
        calibration=calibration_option,
    shell:
        "fewlines measure-cost --threads {threads} "
        "--model {input.model:q} {params.calibration} --cache {wildcards.cache:q} --output {output:q} 2>&1 | tee {log:q}"


rule paper_cost:
    input:
        model=rules.model.output.weights,
        calibration=calibration_for(EXPERIMENT.paper_caches),
    output:
        f"{RUN}/paper.json",
    log:
        f"{RUN}/logs/paper.log",
    priority: ALONE
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("measure-paper"),
        calibration=calibration_option,
    shell:
        "fewlines measure-paper --threads {threads} "
        "--model {input.model:q} {params.calibration} --output {output:q} 2>&1 | tee {log:q}"
