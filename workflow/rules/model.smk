if EXPERIMENT.model.checkpoint:

    rule model:
        input:
            checkpoint=EXPERIMENT.model.checkpoint,
        output:
            weights=f"{RUN}/{BASE}/model.safetensors",
            metrics=f"{RUN}/{BASE}/model.json",
        log:
            f"{RUN}/logs/model.log",
        conda:
            "../envs/fewlines.yaml"
        params:
            shape=EXPERIMENT.model.shape,
            side=EXPERIMENT.model.side,
        shell:
            "fewlines import-model --checkpoint {input.checkpoint} --shape {params.shape} "
            "--grid {params.side} --output {output.weights} --metrics {output.metrics} "
            "2>&1 | tee {log}"

else:

    rule model:
        input:
            config=ancient(RESOLVED),
            tokens=TOKENS,
            start=EXPERIMENT.model.start or [],
        output:
            weights=f"{RUN}/{BASE}/model.safetensors",
            metrics=f"{RUN}/{BASE}/model.json",
        log:
            f"{RUN}/logs/model.log",
        conda:
            "../envs/fewlines.yaml"
        threads: workflow.cores
        params:
            settings=settings("model", "seed", "precision"),
        shell:
            "fewlines train-model --config {input.config} --threads {threads} "
            "--tokens {input.tokens} --output {output.weights} --metrics {output.metrics} "
            "2>&1 | tee {log}"


rule calibration:
    input:
        config=ancient(RESOLVED),
        model=rules.model.output.weights,
        tokens=TOKENS,
    output:
        f"{RUN}/{BASE}/calibration.safetensors",
    log:
        f"{RUN}/logs/calibration.log",
    priority: ALONE
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("calibration"),
    shell:
        "fewlines calibrate --config {input.config} --threads {threads} "
        "--model {input.model} --tokens {input.tokens} --output {output} 2>&1 | tee {log}"


# For caches with `allocation: bands` alone.
rule bands:
    input:
        config=ancient(RESOLVED),
        model=rules.model.output.weights,
        tokens=TOKENS,
        calibration=rules.calibration.output,
    output:
        f"{RUN}/{BASE}/bands.safetensors",
    log:
        f"{RUN}/logs/bands.log",
    priority: ALONE
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("calibration"),
    shell:
        "fewlines calibrate --config {input.config} --threads {threads} "
        "--model {input.model} --tokens {input.tokens} --calibration {input.calibration} "
        "--output {output} 2>&1 | tee {log}"


# Weights that go on from the base model's, with attention limited as their caches limit it. Adapted
# models go by the base model's calibration, as they were trained.
rule adapt:
    input:
        config=ancient(RESOLVED),
        model=rules.model.output.weights,
        tokens=TOKENS,
        calibration=lambda wildcards: (
            calibration_for(EXPERIMENT.get_adapted(wildcards.adapted).caches)
            or rules.calibration.output
        ),
    output:
        weights=f"{RUN}/{{adapted}}/model.safetensors",
        metrics=f"{RUN}/{{adapted}}/model.json",
    log:
        f"{RUN}/logs/adapt/{{adapted}}.log",
    priority: ALONE
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=adaptation,
    shell:
        "fewlines adapt --config {input.config} --threads {threads} --model {input.model} "
        "--tokens {input.tokens} --calibration {input.calibration} --name {wildcards.adapted} "
        "--output {output.weights} --metrics {output.metrics} 2>&1 | tee {log}"


# What choices are made on: experiments/ablations.yaml publishes it.
rule training_table:
    input:
        config=ancient(RESOLVED),
        model=rules.model.output.weights,
        tokens=TOKENS,
        calibration=calibration_for(EXPERIMENT.cache_by_slug)
        or rules.calibration.output,
    output:
        f"{RUN}/tables/training.csv",
    log:
        f"{RUN}/logs/training-table.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("caches", "calibration", "likelihood"),
    shell:
        "fewlines measure-on-training --config {input.config} --threads {threads} "
        "--model {input.model} --tokens {input.tokens} --calibration {input.calibration} "
        "--output {output} 2>&1 | tee {log}"


# How few images are enough, and whether a schedule serves other models: experiments/policies.yaml publishes
# it.
rule calibration_curve:
    input:
        config=ancient(RESOLVED),
        model=rules.model.output.weights,
        adapted=expand(rules.adapt.output.weights, adapted=ADAPTED),
        tokens=TOKENS,
        transferred=EXPERIMENT.calibration.transferred or [],
    output:
        f"{RUN}/tables/calibration.csv",
    log:
        f"{RUN}/logs/calibration-curve.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("calibration", "likelihood"),
        adapted=lambda wildcards, input: (
            [f"--adapted {each}" for each in input.adapted]
        ),
    shell:
        "fewlines calibration-curve --config {input.config} --threads {threads} "
        "--model {input.model} {params.adapted} --tokens {input.tokens} "
        "--output {output} 2>&1 | tee {log}"
