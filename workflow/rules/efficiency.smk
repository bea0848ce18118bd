EFFICIENCY = (
    list(make_settings(EXPERIMENT.efficiency, workflow.cores))
    if EXPERIMENT.family.published
    else []
)


# Times are taken on an otherwise idle machine: the rule claims every core.
rule efficiency_setting:
    output:
        f"{RUN}/efficiency/{{setting}}.json",
    log:
        f"{RUN}/logs/efficiency/{{setting}}.log",
    priority: ALONE
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("measure-efficiency"),
    shell:
        "fewlines measure-efficiency --threads {threads} "
        "--setting {wildcards.setting:q} --output {output:q} 2>&1 | tee {log:q}"


rule policy_times:
    output:
        f"{RUN}/tables/policy-times.csv",
    log:
        f"{RUN}/logs/policy-times.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("measure-policy-times"),
    shell:
        "fewlines measure-policy-times --threads {threads} "
        "--output {output:q} 2>&1 | tee {log:q}"


rule training_cost:
    output:
        f"{RUN}/tables/training-cost.csv",
    log:
        f"{RUN}/logs/training-cost.log",
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("measure-training-cost"),
    shell:
        "fewlines measure-training-cost --threads {threads} "
        "--output {output:q} 2>&1 | tee {log:q}"


# Published shapes alone: `snakemake efficiency --configfile experiments/efficiency.yaml`.
rule efficiency:
    input:
        expand(f"{RUN}/efficiency/{{setting}}.json", setting=EFFICIENCY),
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
        settings=settings("efficiency"),
        run=run_folder,
    shell:
        "fewlines efficiency --threads {threads} "
        "--run {params.run:q} 2>&1 | tee {log:q}"
