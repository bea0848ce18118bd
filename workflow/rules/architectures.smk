# Models of other families on the same tokens: experiments/architectures.yaml.


rule architecture:
    input:
        tokens=TOKENS,
    output:
        weights=f"{RUN}/{{architecture}}/model.safetensors",
        metrics=f"{RUN}/{{architecture}}/model.json",
    log:
        f"{RUN}/logs/architecture/{{architecture}}.log",
    priority: ALONE
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("train-architecture"),
        launched=LAUNCHED,
    shell:
        "{params.launched} train-architecture --threads {threads} "
        "--tokens {input.tokens:q} --name {wildcards.architecture:q} "
        "--output {output.weights:q} --metrics {output.metrics:q} 2>&1 | tee {log:q}"


rule architecture_cost:
    input:
        model=rules.architecture.output.weights,
    output:
        f"{RUN}/{{architecture}}/cost.json",
    log:
        f"{RUN}/logs/architecture-cost/{{architecture}}.log",
    priority: ALONE
    conda:
        "../envs/fewlines.yaml"
    threads: workflow.cores
    params:
        settings=settings("measure-architecture"),
    shell:
        "fewlines measure-architecture --threads {threads} "
        "--model {input.model:q} --output {output:q} 2>&1 | tee {log:q}"


COMPARED = EXPERIMENT.architecture_rows
DRAWN_OF_COMPARED = [row for row in COMPARED if EXPERIMENT.is_drawn(row[1], row[0])]


# The transformer's caches beside them.
rule architectures:
    input:
        likelihoods(COMPARED),
        of(DRAWN_OF_COMPARED, "{model}/quality/{cache}.json"),
        of(DRAWN_OF_COMPARED, "{model}/samples/{cache}.safetensors"),
        of(filter(SHOWN.__contains__, COMPARED), "cost/{cache}.json"),
        of(OTHERS, "{model}/cost.json"),
        of(OTHERS, "{model}/model.json"),
        models_of(COMPARED),
        calibration_for(CACHES),
        rules.tokenizer.output.weights,
    output:
        expand(f"{RUN}/tables/architectures.{{form}}", form=("md", "tex")),
        f"{RUN}/figures/architectures-dark.png",
        f"{RUN}/figures/architectures-samples-dark.png",
        samples=report(
            f"{RUN}/figures/architectures-samples.png",
            caption="../report/architectures.rst",
            category="Figures",
            labels={"figure": "Samples of architectures"},
        ),
        table=report(
            f"{RUN}/tables/architectures.csv",
            caption="../report/architectures.rst",
            category="Tables",
            labels={"table": "architectures"},
        ),
        figure=report(
            f"{RUN}/figures/architectures.png",
            caption="../report/architectures.rst",
            category="Figures",
            labels={"figure": "Architectures"},
        ),
    log:
        f"{RUN}/logs/architectures.log",
    conda:
        "../envs/fewlines.yaml"
    params:
        settings=settings("architectures-table"),
        run=run_folder,
    shell:
        "fewlines architectures-table --run {params.run:q} 2>&1 | tee {log:q}"
