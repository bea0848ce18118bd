# One thread a shard: two shards on two cores draw more images than one shard on both.
rule generate:
    input:
        config=ancient(RESOLVED),
        model=weights,
        calibration=calibration,
        tokens=TOKENS,
    output:
        temp(f"{RUN}/{{model}}/samples/{{cache}}.{{scatteritem}}.safetensors"),
    log:
        f"{RUN}/logs/generate/{{model}}/{{cache}}.{{scatteritem}}.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("sampling", "precision", "storage"),
        calibration=calibration_option,
        task=task,
        shard=lambda wildcards: int(wildcards.scatteritem.split("-of-")[0]) - 1,
    shell:
        "fewlines generate --config {input.config} --threads {threads} --model {input.model} "
        "{params.calibration} --cache {wildcards.cache} --row {wildcards.model} "
        "--tokens {input.tokens} --shard {params.shard} "
        "--output {output} 2>&1 | tee {log}"


rule samples:
    input:
        gather.shard(
            f"{RUN}/{{{{model}}}}/samples/{{{{cache}}}}.{{scatteritem}}.safetensors"
        ),
    output:
        f"{RUN}/{{model}}/samples/{{cache}}.safetensors",
    log:
        f"{RUN}/logs/samples/{{model}}/{{cache}}.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        shards=lambda wildcards, input: [f"--shard {each}" for each in input],
    shell:
        "fewlines gather {params.shards} --output {output} 2>&1 | tee {log}"
