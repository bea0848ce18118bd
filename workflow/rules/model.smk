rule model:
    input:
        config=ancient(RESOLVED),
        tokens=rules.tokens.output,
    output:
        weights=f"{RUN}/model.safetensors",
        metrics=f"{RUN}/model.json",
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
        tokens=rules.tokens.output,
    output:
        f"{RUN}/calibration.safetensors",
    log:
        f"{RUN}/logs/calibration.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("calibration"),
    shell:
        "fewlines calibrate --config {input.config} --threads {threads} "
        "--model {input.model} --tokens {input.tokens} --output {output} 2>&1 | tee {log}"


# How few images are enough: `make policies` asks.
rule calibration_curve:
    input:
        config=ancient(RESOLVED),
        model=rules.model.output.weights,
        tokens=rules.tokens.output,
    output:
        f"{RUN}/tables/calibration.csv",
    log:
        f"{RUN}/logs/calibration-curve.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("calibration", "likelihood"),
    shell:
        "fewlines calibration-curve --config {input.config} --threads {threads} "
        "--model {input.model} --tokens {input.tokens} --output {output} 2>&1 | tee {log}"
