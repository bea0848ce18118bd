rule data:
    input:
        config=ancient(RESOLVED),
    output:
        DATA,
    log:
        f"{RUN}/logs/data.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("data"),
    shell:
        "fewlines fetch-data --config {input.config} --output {output} 2>&1 | tee {log}"
