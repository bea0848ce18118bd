# Shared by all experiments: nothing here may depend on one of them.
rule data:
    output:
        DATA,
    log:
        f"results/data/logs/{EXPERIMENT.data.slug}.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        source=EXPERIMENT.data.source,
        # A function: in a string, Snakemake takes braces for wildcards.
        path=lambda wildcards: (
            f"--path {quote(str(EXPERIMENT.data.path))}"
            if EXPERIMENT.data.path
            else ""
        ),
        content=digest_folder(EXPERIMENT.data.path) if EXPERIMENT.data.path else "",
        side=f"--side {EXPERIMENT.data.side}" if EXPERIMENT.data.side else "",
    shell:
        "fewlines fetch-data --threads {threads} --source {params.source:q} {params.path} {params.side} --output {output:q} "
        "2>&1 | tee {log:q}"
