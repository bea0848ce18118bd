"""The stages of an experiment. Each reads files, writes files, and knows nothing of Snakemake.

`fewlines <stage>` runs one; its arguments are the parameters of the function below. Outputs are
written under a temporary name and renamed, so a killed stage leaves nothing half-written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewlines import machine
from fewlines.config import Experiment
from fewlines.data import SOURCES, ImageData
from fewlines.errors import FewlinesError
from fewlines.files import read_tensors, write_json, write_tensors
from fewlines.generate.decode import generate as generate_codes
from fewlines.generate.sampler import Sampler
from fewlines.measure.cost import Configuration, Workload
from fewlines.measure.cost import measure_cost as measure_costs
from fewlines.measure.likelihood import Likelihood, paired_interval
from fewlines.measure.likelihood import measure_likelihood as likelihood_under
from fewlines.measure.memory import peak_method
from fewlines.measure.quality import measure_quality as quality_of
from fewlines.measure.quality import weights_hash
from fewlines.models.checkpoint import load_network, save_network
from fewlines.models.classifier import Classifier
from fewlines.models.tokenizer import Tokenizer
from fewlines.models.transformer import Transformer, TransformerShape
from fewlines.progress import progress
from fewlines.report.figures import draw_lines, draw_memory, draw_quality, draw_samples
from fewlines.report.page import CAPTIONS, write_page
from fewlines.report.provenance import provenance as describe_run
from fewlines.report.results import Results
from fewlines.report.tables import (
    cache_table,
    floor_table,
    network_table,
    paper_table,
    readable_table,
    write_table,
)
from fewlines.training.classifier import ClassifierTask, accuracy
from fewlines.training.loop import train
from fewlines.training.tokenizer import TokenizerTask, evaluate_tokenizer
from fewlines.training.transformer import TransformerTask, flops_per_image

EVALUATION_BATCH = 250


def fetch_data(config: Experiment, output: Path) -> None:
    """Find or fetch the images of `data.source`."""
    SOURCES[config.data.source](config.data.path).save(output)


def train_tokenizer(config: Experiment, images: Path, output: Path, metrics: Path) -> None:
    """Train the VQ tokenizer; its test error goes to `metrics`."""
    data = ImageData.load(images)
    task = TokenizerTask(config.tokenizer, data.train.images, config.seed)
    seconds = train(task, "tokenizer", _checkpoints(output), config.checkpoint_seconds)
    found = evaluate_tokenizer(task.network, data.test.images, EVALUATION_BATCH)
    write_json(metrics, {**found, "seconds_per_step": seconds})
    save_network(output, task.network)


def train_classifier(config: Experiment, images: Path, output: Path, metrics: Path) -> None:
    """Train the classifier whose features quality is measured in."""
    data = ImageData.load(images)
    train_set, test = data.train, data.test
    task = ClassifierTask(config.classifier, train_set.images, train_set.labels, config.seed)
    seconds = train(task, "classifier", _checkpoints(output), config.checkpoint_seconds)
    found = accuracy(task.network, test.images, test.labels, EVALUATION_BATCH)
    write_json(metrics, {"accuracy": found, "seconds_per_step": seconds})
    save_network(output, task.network)


def tokenize(images: Path, tokenizer: Path, output: Path) -> None:
    """Encode all images, training and test."""
    data = ImageData.load(images)
    network = load_network(tokenizer, Tokenizer)
    tensors, grid = {}, (0, 0)
    for name, split in (("train", data.train), ("test", data.test)):
        bar = progress(f"tokenize {name}", len(split), "images")
        parts = []
        for part in split.images.split(EVALUATION_BATCH):
            parts.append(network.encode(part).to(torch.int32))
            bar.update(len(part))
        bar.close()
        codes = torch.cat(parts)
        grid = (codes.shape[1], codes.shape[2])
        tensors[f"{name}_codes"] = codes.flatten(1)
        tensors[f"{name}_labels"] = split.labels
    header = {"grid": grid, "codes": network.shape.codes, "classes": len(data.classes)}
    write_tensors(output, tensors, header)


def train_model(config: Experiment, tokens: Path, output: Path, metrics: Path) -> None:
    """Train the autoregressive transformer; its likelihood on all test images goes to `metrics`."""
    tensors, header = _read_tokens(tokens)
    settings = config.model
    shape = TransformerShape(
        dim=settings.dim,
        layers=settings.layers,
        heads=settings.heads,
        kv_heads=settings.kv_heads or settings.heads,
        codes=header["codes"],
        classes=header["classes"],
        grid=tuple(header["grid"]),
    )
    dtype = machine.resolve_precision(config.precision)
    gemm_rate = machine.gemm_rate(dtype)
    task = TransformerTask(
        settings, shape, tensors["train_labels"], tensors["train_codes"], config.seed, dtype
    )
    seconds = train(task, "model", _checkpoints(output), config.checkpoint_seconds)
    rate = settings.batch * flops_per_image(shape) / seconds if seconds else None
    task.network.eval().requires_grad_(False)
    nll = _likelihood(config, task.network, tensors, "full", count=None).nll
    found = {
        "nll_test": nll.mean().item(),
        "test_images": len(nll),
        "parameters": sum(parameter.numel() for parameter in task.network.parameters()),
        "precision": str(dtype).removeprefix("torch."),
        "seconds_per_step": seconds,
        "training_flops_per_second": rate,
        "gemm_flops_per_second": gemm_rate,
        "gemm_share": rate / gemm_rate if rate else None,
    }
    write_json(metrics, found)
    save_network(output, task.network)


def generate(config: Experiment, model: Path, cache: str, shard: int, output: Path) -> None:
    """Draw one shard of the images of one cache, under every seed."""
    network = load_network(model, Transformer).to(machine.device())
    sampling = config.sampling
    edges = [sampling.samples * part // sampling.shards for part in range(sampling.shards + 1)]
    numbers = range(edges[shard], edges[shard + 1])
    labels = torch.tensor(numbers) % network.shape.classes
    bar = progress(f"generate {cache} {shard}", len(numbers) * len(sampling.seeds), "images")
    codes = {
        f"seed_{seed}": generate_codes(
            network,
            labels,
            config.cache(cache),
            seed,
            first=numbers.start,
            batch=sampling.batch,
            sampler=_sampler(config),
            dtype=machine.resolve_precision(config.precision),
            done=bar.update,
        ).to("cpu", torch.int32)
        for seed in sampling.seeds
    }
    bar.close()
    write_tensors(output, {**codes, "labels": labels}, {"grid": network.shape.grid})


def gather(shards: list[Path], output: Path) -> None:
    """Put the shards of a cache's images together again."""
    parts = [read_tensors(shard) for shard in shards]
    tensors = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    write_tensors(output, tensors, parts[0][1])


def measure_quality(
    config: Experiment, samples: Path, images: Path, tokenizer: Path, classifier: Path, output: Path
) -> None:
    """FID, KID, IS, precision and recall of one cache's images, against all test images."""
    network = load_network(tokenizer, Tokenizer)
    tensors, header = read_tensors(samples)
    sets = [
        decode_images(network, tensors[f"seed_{seed}"], tuple(header["grid"]))
        for seed in config.sampling.seeds
    ]
    _write_quality(config, sets, images, classifier, output)


def measure_floors(
    config: Experiment, images: Path, tokenizer: Path, classifier: Path, real: Path, rebuilt: Path
) -> None:
    """What a perfect model would reach: training images, and their reconstructions, as many of
    them as there are samples, against all test images."""
    network = load_network(tokenizer, Tokenizer)
    train_images = ImageData.load(images).train.images
    count = config.sampling.samples
    sets = [
        train_images[part * count : (part + 1) * count]
        for part in range(len(config.sampling.seeds))
    ]
    if len(sets[-1]) < count:
        raise FewlinesError(f"sampling: fewer than {len(sets) * count} training images for floors")
    _write_quality(config, sets, images, classifier, real)
    reconstructions = [network.decode(network.encode(part)) for part in sets]
    _write_quality(config, reconstructions, images, classifier, rebuilt)


def measure_likelihood(
    config: Experiment, model: Path, tokens: Path, cache: str, output: Path
) -> None:
    """Nats per token under a cache, against the full cache on the same held-out images."""
    network = load_network(model, Transformer)
    tensors, _ = _read_tokens(tokens)
    found = _likelihood(config, network, tensors, cache, config.likelihood.images)
    delta, low, high = paired_interval(found.nll - found.nll_full)
    lines = found.kl.unflatten(1, network.shape.grid)  # (n, h, w)
    summary = {
        "images": len(found.nll),
        "nll": found.nll.mean().item(),
        "nll_delta": delta,
        "nll_delta_low": low,
        "nll_delta_high": high,
        "kl": found.kl.double().mean().item(),
        "kl_by_line": lines.double().mean((0, 2)).tolist(),
    }
    write_json(output, summary)


def measure_cost(config: Experiment, model: Path, cache: str, output: Path) -> None:
    """Time and memory of one cache beside both full caches, interleaved in one run."""
    _write_cost(config, model, cache, config.cost.batch, config.cost.repeats, output)


def measure_paper(config: Experiment, model: Path, output: Path) -> None:
    """The paper's comparison, at a batch where the cache is what fills memory."""
    slug = config.paper.cache.build().slug
    _write_cost(config, model, slug, config.paper.batch, config.paper.repeats, output)


def tables(config: Experiment, run: Path) -> None:
    """Write the tables of a run's folder as CSV, Markdown and LaTeX."""
    results, output = Results(config, run), run / "tables"
    write_table(cache_table(results), output, "cache")
    write_table(paper_table(results), output, "paper")
    write_table(floor_table(results), output, "floors")


def figures(config: Experiment, run: Path) -> None:
    """Draw the figures of a run's folder."""
    results, output = Results(config, run), run / "figures"
    tokenizer = load_network(run / "tokenizer.safetensors", Tokenizer)
    draw_quality(cache_table(results), floor_table(results), output / "quality.png")
    draw_samples(results, tokenizer, output / "samples.png")
    draw_memory(results, output / "memory.png")
    draw_lines(results, output / "lines.png")


def report(config: Experiment, run: Path, output: Path, provenance: Path) -> None:
    """Write the report, one HTML file, and where its numbers come from."""
    results = Results(config, run)
    facts = describe_run(config, Path.cwd())
    write_json(provenance, facts)
    readable = {
        "cache": readable_table(cache_table(results)),
        "paper": readable_table(paper_table(results)),
        "floors": readable_table(floor_table(results)),
        "networks": network_table(results),
    }
    pictures = {name: run / f"figures/{name}.png" for name in CAPTIONS}
    write_page(output, readable, pictures, facts)


def decode_images(tokenizer: Tokenizer, codes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Codes `(n, N)` → images `(n, C, H, W)` uint8."""
    parts = codes.long().unflatten(1, grid).split(EVALUATION_BATCH)
    return torch.cat([tokenizer.decode(part) for part in parts])


def _checkpoints(output: Path) -> Path:
    return output.with_suffix(".checkpoints")


def _sampler(config: Experiment) -> Sampler:
    sampling = config.sampling
    return Sampler(sampling.temperature, sampling.top_k, sampling.top_p, sampling.guidance)


def _read_tokens(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, header = read_tensors(path)
    if not {"grid", "codes", "classes"} <= set(header):
        raise FewlinesError(f"{path} is not a file of tokens; 'fewlines tokenize' writes one")
    return tensors, header


def _likelihood(
    config: Experiment,
    network: Transformer,
    tensors: dict[str, Tensor],
    cache: str,
    count: int | None,
) -> Likelihood:
    labels, codes = tensors["test_labels"][:count], tensors["test_codes"][:count]
    bar = progress(f"likelihood {cache}", len(codes), "images")
    found = likelihood_under(
        network, labels, codes, config.cache(cache), config.likelihood.batch, bar.update
    )
    bar.close()
    return found


def _write_quality(
    config: Experiment, sets: list[Tensor], images: Path, classifier: Path, output: Path
) -> None:
    network = load_network(classifier, Classifier)
    reference = ImageData.load(images).test.images
    results = quality_of(sets, reference, network, config.quality)
    extractor = f"classifier {weights_hash(network)}"
    write_json(output, {"extractor": extractor, "samples": len(sets[0]), "sets": results})


def _write_cost(
    config: Experiment, model: Path, slug: str, batch: int, repeats: int, output: Path
) -> None:
    full = config.cache("full")
    configurations = [Configuration("full", full, "lean"), Configuration("stock", full, "stock")]
    if slug != "full":
        configurations.append(Configuration(slug, config.cache(slug), "lean"))
    dtype = machine.resolve_precision(config.precision)
    workload = Workload(model, batch, _sampler(config), dtype, torch.get_num_threads())
    rows = measure_costs(configurations, workload, repeats)
    content = {
        "cache": slug,
        "batch": batch,
        "precision": str(dtype).removeprefix("torch."),
        "peak_method": peak_method(),
        "threads": workload.threads,
        "rows": rows,
    }
    write_json(output, content)
