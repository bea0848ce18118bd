EFFICIENCY = (
    list(make_settings(EXPERIMENT.efficiency, workflow.cores))
    if EXPERIMENT.family.published
    else []
)


# Times are taken on an otherwise idle machine: the rule claims every core.
rule efficiency_setting:
    input:
        config=ancient(RESOLVED),
    output:
        f"{RUN}/efficiency/{{setting}}.json",
    log:
        f"{RUN}/logs/efficiency/{{setting}}.log",
    priority: ALONE
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("efficiency"),
    shell:
        "fewlines measure-efficiency --config {input.config} --threads {threads} "
        "--setting {wildcards.setting} --output {output} 2>&1 | tee {log}"


rule policy_times:
    input:
        config=ancient(RESOLVED),
    output:
        f"{RUN}/tables/policy-times.csv",
    log:
        f"{RUN}/logs/policy-times.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("efficiency"),
    shell:
        "fewlines measure-policy-times --config {input.config} --threads {threads} "
        "--output {output} 2>&1 | tee {log}"


rule training_cost:
    input:
        config=ancient(RESOLVED),
    output:
        f"{RUN}/tables/training-cost.csv",
    log:
        f"{RUN}/logs/training-cost.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("training_cost", "model"),
    shell:
        "fewlines measure-training-cost --config {input.config} --threads {threads} "
        "--output {output} 2>&1 | tee {log}"


# Published shapes alone: `snakemake efficiency --configfile experiments/efficiency.yaml`.
rule efficiency:
    input:
        expand(f"{RUN}/efficiency/{{setting}}.json", setting=EFFICIENCY),
        config=ancient(RESOLVED),
    output:
        expand(
            f"{RUN}/tables/{{table}}.{{form}}",
            table=("efficiency", "scaling"),
            form=("md", "tex", "csv"),
        ),
        report(
            f"{RUN}/figures/efficiency.png",
            caption="../report/efficiency.rst",
            category="Figures",
            labels={"figure": "Time and memory at published shapes"},
        ),
    log:
        f"{RUN}/logs/efficiency.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("name", "efficiency"),
        run=run_folder,
    shell:
        "fewlines efficiency --config {input.config} --threads {threads} "
        "--run {params.run} 2>&1 | tee {log}"
