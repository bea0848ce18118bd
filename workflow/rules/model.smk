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
            family=EXPERIMENT.model.family,
            how=[
                f"--{name}={quote(str(value))}"
                for name, value in EXPERIMENT.model.checkpoint_options.items()
            ],
        shell:
            "fewlines import-model --checkpoint {input.checkpoint:q} --family {params.family:q} "
            "{params.how} --output {output.weights:q} --metrics {output.metrics:q} "
            "2>&1 | tee {log:q}"

else:

    rule model:
        input:
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
            settings=settings("train-model"),
            launched=LAUNCHED,
        shell:
            "{params.launched} train-model --threads {threads} "
            "--tokens {input.tokens:q} --output {output.weights:q} --metrics {output.metrics:q} "
            "2>&1 | tee {log:q}"


rule calibration:
    input:
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
        settings=settings("calibrate"),
    shell:
        "fewlines calibrate --threads {threads} "
        "--model {input.model:q} --tokens {input.tokens:q} --output {output:q} 2>&1 | tee {log:q}"


# For caches with `allocation: bands` alone.
rule bands:
    input:
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
        settings=settings("calibrate"),
    shell:
        "fewlines calibrate --threads {threads} "
        "--model {input.model:q} --tokens {input.tokens:q} --calibration {input.calibration:q} "
        "--output {output:q} 2>&1 | tee {log:q}"


# Weights that go on from the base model's, with attention limited as their caches limit it. Adapted
# models go by the base model's calibration, as they were trained.
rule adapt:
    input:
        model=rules.model.output.weights,
        tokens=TOKENS,
        calibration=lambda wildcards: calibration_for(
            EXPERIMENT.get_adapted(wildcards.adapted).caches
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
        settings=settings("adapt"),
        launched=LAUNCHED,
        calibration=calibration_option,
    shell:
        "{params.launched} adapt --threads {threads} --model {input.model:q} "
        "--tokens {input.tokens:q} {params.calibration} --name {wildcards.adapted:q} "
        "--output {output.weights:q} --metrics {output.metrics:q} 2>&1 | tee {log:q}"


# How few images are enough, and whether a schedule serves other models: experiments/default.yaml publishes
# it.
rule calibration_curve:
    input:
        model=rules.model.output.weights,
        adapted=[f"{RUN}/{adapted}/model.safetensors" for adapted in ADAPTED],
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
        settings=settings("calibration-curve"),
        adapted=lambda wildcards, input: (
            [f"--adapted {quote(each)}" for each in input.adapted]
        ),
    shell:
        "fewlines calibration-curve --threads {threads} "
        "--model {input.model:q} {params.adapted} --tokens {input.tokens:q} "
        "--output {output:q} 2>&1 | tee {log:q}"
