rule tokenizer:
    input:
        images=find_images,
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
        settings=settings("train-tokenizer"),
        launched=LAUNCHED,
    shell:
        "{params.launched} train-tokenizer --threads {threads} "
        "--images {input.images:q} --output {output.weights:q} --metrics {output.metrics:q} "
        "2>&1 | tee {log:q}"


rule classifier:
    input:
        images=find_images,
    output:
        weights=f"{RUN}/classifier.safetensors",
        metrics=f"{RUN}/classifier.json",
    log:
        f"{RUN}/logs/classifier.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("train-classifier"),
    shell:
        "fewlines train-classifier --threads {threads} "
        "--images {input.images:q} --output {output.weights:q} --metrics {output.metrics:q} "
        "2>&1 | tee {log:q}"


if EXPERIMENT.data.shards == 1:

    rule tokens:
        input:
            images=find_images,
            tokenizer=rules.tokenizer.output.weights,
        output:
            f"{RUN}/tokens.safetensors",
        log:
            f"{RUN}/logs/tokens.log",
        conda:
            "../envs/fewlines.yaml"
        threads: workflow.cores
        shell:
            "fewlines tokenize --threads {threads} --images {input.images:q} "
            "--tokenizer {input.tokenizer:q} --output {output:q} 2>&1 | tee {log:q}"

else:

    rule tokenize:
        input:
            images=find_images,
            tokenizer=rules.tokenizer.output.weights,
        output:
            temp(f"{RUN}/tokens.{{scatteritem}}.safetensors"),
        log:
            f"{RUN}/logs/tokens.{{scatteritem}}.log",
        conda:
            "../envs/fewlines.yaml"
        params:
            shard=lambda wildcards: int(wildcards.scatteritem.split("-of-")[0]) - 1,
            shards=EXPERIMENT.data.shards,
        shell:
            "fewlines tokenize --threads {threads} --images {input.images:q} "
            "--tokenizer {input.tokenizer:q} --shard {params.shard} --shards {params.shards} "
            "--output {output:q} 2>&1 | tee {log:q}"

    rule tokens:
        input:
            gather.tokens(f"{RUN}/tokens.{{scatteritem}}.safetensors"),
        output:
            f"{RUN}/tokens.safetensors",
        log:
            f"{RUN}/logs/tokens.log",
        conda:
            "../envs/fewlines.yaml"
        params:
            shards=lambda wildcards, input: [f"--shard {quote(each)}" for each in input],
        shell:
            "fewlines gather {params.shards} --output {output:q} 2>&1 | tee {log:q}"
