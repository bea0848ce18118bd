rule quality:
    input:
        config=ancient(RESOLVED),
        samples=rules.samples.output,
        images=DATA,
        tokenizer=rules.tokenizer.output.weights,
        classifier=CLASSIFIER,
    output:
        f"{RUN}/{{model}}/quality/{{cache}}.json",
    log:
        f"{RUN}/logs/quality/{{model}}/{{cache}}.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("quality", "sampling"),
        classifier=classifier_option,
    shell:
        "fewlines measure-quality --config {input.config} --threads {threads} "
        "--samples {input.samples} --images {input.images} --tokenizer {input.tokenizer} "
        "{params.classifier} --output {output} 2>&1 | tee {log}"


rule reference_scores:
    input:
        config=ancient(RESOLVED),
        images=DATA,
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
        settings=settings("quality", "sampling"),
        classifier=classifier_option,
    shell:
        "fewlines measure-reference --config {input.config} --threads {threads} "
        "--images {input.images} --tokenizer {input.tokenizer} {params.classifier} "
        "--real {output.real} --rebuilt {output.rebuilt} 2>&1 | tee {log}"


rule model_test:
    input:
        config=ancient(RESOLVED),
        model=rules.model.output.weights,
        tokens=TOKENS,
    output:
        f"{RUN}/{BASE}/model-test.json",
    log:
        f"{RUN}/logs/model-test.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("likelihood"),
    shell:
        "fewlines measure-model --config {input.config} --threads {threads} "
        "--model {input.model} --tokens {input.tokens} --output {output} 2>&1 | tee {log}"


rule likelihood:
    input:
        config=ancient(RESOLVED),
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
        settings=settings("likelihood"),
        task=task,
        calibration=calibration_option,
    shell:
        "fewlines measure-likelihood --config {input.config} --threads {threads} "
        "--model {input.model} {params.calibration} --tokens {input.tokens} "
        "--cache {wildcards.cache} --row {wildcards.model} "
        "--output {output} 2>&1 | tee {log}"


rule storage:
    input:
        config=ancient(RESOLVED),
        model=rules.model.output.weights,
        tokens=TOKENS,
    output:
        f"{RUN}/storage.json",
    log:
        f"{RUN}/logs/storage.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("likelihood"),
    shell:
        "fewlines measure-storage --config {input.config} --threads {threads} "
        "--model {input.model} --tokens {input.tokens} --output {output} 2>&1 | tee {log}"


# Times are taken on an otherwise idle machine: these rules claim every core.
rule cost:
    input:
        config=ancient(RESOLVED),
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
        settings=settings("cost", "precision", "storage", "sampling"),
        calibration=calibration_option,
    shell:
        "fewlines measure-cost --config {input.config} --threads {threads} "
        "--model {input.model} {params.calibration} --cache {wildcards.cache} --output {output} 2>&1 | tee {log}"


rule paper_cost:
    input:
        config=ancient(RESOLVED),
        model=rules.model.output.weights,
        calibration=calibration,
    output:
        f"{RUN}/paper.json",
    log:
        f"{RUN}/logs/paper.log",
    priority: ALONE
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("paper", "precision", "storage", "sampling"),
        cache=EXPERIMENT.paper_cache,
        calibration=calibration_option,
    shell:
        "fewlines measure-cost --paper --config {input.config} --threads {threads} "
        "--model {input.model} {params.calibration} --cache {params.cache} --output {output} 2>&1 | tee {log}"
