# One thread a shard: two shards on two cores draw more images than one shard on both.
rule generate:
    input:
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
        settings=settings("generate"),
        calibration=calibration_option,
        shard=lambda wildcards: int(wildcards.scatteritem.split("-of-")[0]) - 1,
    shell:
        "fewlines generate --threads {threads} --model {input.model:q} "
        "{params.calibration} --cache {wildcards.cache:q} --row {wildcards.model:q} "
        "--tokens {input.tokens:q} --shard {params.shard:q} "
        "--output {output:q} 2>&1 | tee {log:q}"


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
        shards=lambda wildcards, input: [f"--shard {quote(each)}" for each in input],
    shell:
        "fewlines gather {params.shards} --output {output:q} 2>&1 | tee {log:q}"
