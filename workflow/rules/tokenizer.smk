rule tokenizer:
    input:
        config=ancient(RESOLVED),
        images=DATA,
        weights=EXPERIMENT.tokenizer.weights or [],
    output:
        weights=f"{RUN}/tokenizer.safetensors",
        metrics=f"{RUN}/tokenizer.json",
    log:
        f"{RUN}/logs/tokenizer.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("tokenizer", "seed"),
    shell:
        "fewlines train-tokenizer --config {input.config} --threads {threads} "
        "--images {input.images} --output {output.weights} --metrics {output.metrics} "
        "2>&1 | tee {log}"


rule classifier:
    input:
        config=ancient(RESOLVED),
        images=DATA,
    output:
        weights=f"{RUN}/classifier.safetensors",
        metrics=f"{RUN}/classifier.json",
    log:
        f"{RUN}/logs/classifier.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("classifier", "seed"),
    shell:
        "fewlines train-classifier --config {input.config} --threads {threads} "
        "--images {input.images} --output {output.weights} --metrics {output.metrics} "
        "2>&1 | tee {log}"


rule tokens:
    input:
        images=DATA,
        tokenizer=rules.tokenizer.output.weights,
    output:
        f"{RUN}/tokens.safetensors",
    log:
        f"{RUN}/logs/tokens.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    shell:
        "fewlines tokenize --threads {threads} --images {input.images} "
        "--tokenizer {input.tokenizer} --output {output} 2>&1 | tee {log}"
