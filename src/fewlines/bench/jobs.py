"""What every job of an experiment will take on a device: time, memory and disk, before any runs.

Operations and bytes are counted from the settings and divided by what the device reaches; nothing
is timed. On processors that is good to a factor of two: enough to tell an afternoon from a month.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fewlines import machine
from fewlines.bench.efficiency import make_settings
from fewlines.bench.passes import (
    FLOAT,
    Pass,
    count_model,
    count_pass,
    count_weights,
    make_network,
    place_nowhere,
)
from fewlines.cache.spec import Cache, stand_in
from fewlines.calibration.losses import BANDS, list_capacities
from fewlines.config import BASE, Experiment
from fewlines.config.checks import DataFacts
from fewlines.devices import Device
from fewlines.models.base import AttentionModel, Model, ModelSettings
from fewlines.models.classifier import Classifier, ClassifierShape
from fewlines.models.tokenizer import Tokenizer

PYTHON = 0.8e9  # bytes of a process that has imported torch
START = 8.0  # seconds until it has
PICTURES = 150  # of a file, opened and resized by one core in a second
PASSES = 6  # over what a layer keeps for its gradients: written and read, forward and backward
SMALL = 60.0  # seconds of a job that reads results and writes tables
# Of the networks that images are compared by: operations of an image, numbers of a feature.
COMPARED = {"efficientnet-lite0": (0.8e9, 1280), "inception": (11.4e9, 2048)}
# Rules of an experiment that begins with tokens: nothing is decoded or judged.
OF_TOKENS = ("model", "calibration", "bands", "adapt", "likelihood", "lines_table")


# Jobs of a level wait for those of the levels before.
DATA, NETWORKS, CODES, TOKENS, MODELS, CALIBRATED, BANDS_KNOWN, ADAPTED = range(8)
MEASURED, GATHERED, JUDGED, WRITTEN = range(8, 12)


@dataclass(frozen=True)
class Jobs:
    """The jobs of a rule.

    Attributes:
        rule: as Snakemake lists it.
        level: one of those above.
        seconds: of each job.
        host: bytes of memory of the largest.
        device: bytes on the device, where that has a memory of its own.
        written: bytes that stay on disk, of all.
        gpus: of each job, where it uses any; its bytes on the device are of one.
    """

    rule: str
    level: int
    seconds: Sequence[float]
    host: float = PYTHON
    device: float = 0.0
    written: float = 0.0
    gpus: int = 1

    @property
    def total(self) -> float:
        """Seconds of a device, of all of them."""
        return sum(self.seconds) * self.gpus

    def last(self, devices: int) -> float:
        """Bound the seconds from the first to the last of them on so many devices."""
        return max(self.total / devices, max(self.seconds))


@dataclass(frozen=True)
class Work:
    """An experiment, and what has to be known of its data and models to count what it does.

    Attributes:
        experiment: that is planned.
        facts: of its data.
        channels: of an image.
        classes: of its images.
        network: the base model, its weights on no device.
        tokenizer: likewise; None where the data is tokens.
        device: that each job has to itself.
        precision: of the products.
        cores: of the processor beside a device, or of the processor.
    """

    experiment: Experiment
    facts: DataFacts
    channels: int
    classes: int
    network: Model
    tokenizer: Tokenizer | None
    device: Device
    precision: torch.dtype
    cores: int

    def list_jobs(self) -> list[Jobs]:
        """List what `snakemake` without a target runs, in the order in which it can."""
        if self.tokenizer is None:  # tokens in place of images: likelihood alone
            every = [*self._list_models(), *self._list_scores(), *self._list_tables()]
            jobs = [each for each in every if each.rule in OF_TOKENS]
            jobs.append(Jobs("likelihood_table", WRITTEN, [SMALL]))
        else:
            jobs = [*self._list_data(), *self._list_models(), *self._list_samples()]
            jobs += [*self._list_scores(), *self._list_costs(), *self._list_tables()]
        if not self.device.has_memory:
            jobs = [replace(each, host=each.host + each.device, device=0) for each in jobs]
        return sorted((each for each in jobs if each.seconds), key=lambda each: each.level)

    def _list_data(self) -> Iterator[Jobs]:
        """List the jobs of images: data, tokenizer, classifier, tokens."""
        assert self.tokenizer is not None
        settings, images = self.experiment.tokenizer, self._images
        held = images * self._pixels
        opened = images / PICTURES / self.cores if self.experiment.data.path else 0
        yield Jobs("data", DATA, [opened + START], PYTHON, 0, held)
        encoded, weights = self._encode, FLOAT * count_weights(self.tokenizer)
        seconds = START + self.facts.test * (self._run(encoded) + self._run(self._decode))
        device = self.tokenizer.batch * self._decode.kept
        if settings.trained:
            step = self._step(settings.batch, encoded, self._decode)
            seconds += settings.steps * step / self._gpus
            device = 4 * weights + settings.batch * (encoded.kept + self._decode.kept)
        yield Jobs("tokenizer", NETWORKS, [seconds], PYTHON, device, weights, gpus=self._gpus)
        if self.experiment.quality.features == "classifier":
            of = self.experiment.classifier
            looked = self._look
            seconds = of.steps * self._step(of.batch, looked)
            yield Jobs("classifier", NETWORKS, [seconds], PYTHON, of.batch * looked.kept)
        tokens, shards = images * 4 * self.network.spec.n_tokens, self.experiment.data.shards
        each = START + images / shards * self._run(encoded)
        host, device = PYTHON + tokens / shards, self.tokenizer.batch * encoded.kept
        if shards == 1:
            yield Jobs("tokens", CODES, [each], host, device, tokens)
        else:
            yield Jobs("tokenize", CODES, [each] * shards, host, device)
            yield Jobs("tokens", TOKENS, [START + tokens / 1e9], PYTHON + tokens, 0, tokens)

    def _list_models(self) -> Iterator[Jobs]:
        """List the jobs of weights: the base model, calibration, adapted models, other families."""
        experiment, weights = self.experiment, FLOAT * count_weights(self.network)
        tokens = PYTHON + self._images * 4 * self.network.spec.n_tokens
        settings = experiment.model
        if settings.checkpoint:
            yield Jobs(
                "model", MODELS, [START + 2 * weights / 1e9], PYTHON + 3 * weights, 0, weights
            )
        else:
            seconds, device = self._train(settings, self.network)
            yield Jobs("model", MODELS, [seconds], tokens, device, weights, gpus=self._gpus)
        yield Jobs(
            "model_test",
            MEASURED,
            [self._forward(experiment.likelihood.test_images or self.facts.test)],
        )
        if isinstance(self.network, AttentionModel):
            yield from self._list_calibrations(self.network, tokens)
        adapted = [experiment.get_adapted(name) for name in experiment.adapted_models]
        trained = [self._train(experiment.get_training(each), self.network) for each in adapted]
        with_teacher = [
            seconds * (4 / 3 if each.distil else 1)
            for each, (seconds, _) in zip(adapted, trained, strict=True)
        ]
        device = max((device for _, device in trained), default=0) + weights
        written = weights * len(adapted)
        yield Jobs("adapt", ADAPTED, with_teacher, tokens, device, written, gpus=self._gpus)
        others = [self._train(each, network) for each, network in self._architectures.values()]
        yield Jobs(
            "architecture",
            MODELS,
            [seconds for seconds, _ in others],
            tokens,
            max((device for _, device in others), default=0),
            FLOAT * sum(count_weights(network) for _, network in self._architectures.values()),
            gpus=self._gpus,
        )

    def _list_calibrations(self, network: AttentionModel, tokens: float) -> Iterator[Jobs]:
        """List the jobs of calibration: each head alone under each capacity, on the layers from its
        own upwards."""
        experiment, geometry = self.experiment, network.geometry
        settings = experiment.calibration
        needs = {cache.requires for cache in experiment.cache_by_slug.values()} - {None, ""}
        if not needs:
            return
        at_once = settings.curve_images / 2 * geometry.heads * (geometry.layers + 1)
        curve = self._forward(int(at_once * (len(list_capacities(geometry)) - 1)))
        positions = geometry.prefix + geometry.n_tokens - 1
        seen = settings.batch * geometry.heads * positions**2 * FLOAT * 2
        logits = 3 * settings.curve_images * geometry.n_tokens * network.spec.codes * FLOAT
        device = FLOAT * count_weights(network) + max(seen, logits)
        yield Jobs(
            "calibration", CALIBRATED, [self._forward(settings.images) + curve], tokens, device
        )
        if "band losses" in needs:
            yield Jobs("bands", BANDS_KNOWN, [curve * len(BANDS)], tokens, device)

    def _list_samples(self) -> Iterator[Jobs]:
        """List the jobs of samples: drawn in shards, gathered, judged."""
        experiment, spec = self.experiment, self.network.spec
        sampling, quality = experiment.sampling, experiment.quality
        drawn, shards = self._drawn, sampling.shards
        images = sampling.samples * len(sampling.seeds)
        seconds, device = [], 0.0
        for model, slug in drawn:
            how = experiment.get_sampling(model)
            rows = how.batch * (1 + (how.guidance != 1))
            each, held = self._draw(self._get_network(model), slug, rows)
            batches = -(-sampling.samples // shards // how.batch) * len(sampling.seeds)
            seconds += [START + batches * each] * shards
            device = max(device, held)
        codes = images * spec.n_tokens * 4
        yield Jobs("generate", MEASURED, seconds, PYTHON + 2 * codes / shards, device)
        yield Jobs(
            "samples", GATHERED, [START / 4] * len(drawn), PYTHON + 3 * codes, 0, codes * len(drawn)
        )
        assert self.tokenizer is not None
        looked = self._run(self._look)
        compared = (images + self.facts.test) * looked
        _, numbers = COMPARED.get(quality.features, (0, experiment.classifier.features))
        compared += 6 * sampling.samples * images * numbers / self.device.flops  # all pairs
        host = PYTHON + 3 * FLOAT * numbers * (sampling.samples + self.facts.test)
        device = max(self._decode.kept * self.tokenizer.batch, 64 * self._look.kept)
        judged = START + images * self._run(self._decode) + compared
        yield Jobs("quality", JUDGED, [judged] * len(drawn), host, device)
        rebuilt = images * (self._run(self._encode) + self._run(self._decode))
        yield Jobs("reference_scores", MEASURED, [START + rebuilt + 2 * compared], host, device)

    def _list_scores(self) -> Iterator[Jobs]:
        """List the jobs of likelihood: a forward with the full cache, and one under the cache."""
        experiment, settings = self.experiment, self.experiment.likelihood
        rows = {(experiment.get_scored(model), slug) for model, slug in self._rows}
        n, codes = self.network.spec.n_tokens, self.network.spec.codes
        device = FLOAT * count_weights(self.network) + 4 * FLOAT * settings.batch * n * codes
        seconds = [
            self._forward(2 * settings.images, self._get_network(model)) for model, _ in rows
        ]
        yield Jobs("likelihood", MEASURED, seconds, PYTHON, device)
        if self.network.has_kv_cache:
            yield Jobs("storage", MEASURED, [self._forward(3 * settings.images)], PYTHON, device)

    def _list_costs(self) -> Iterator[Jobs]:
        """List the jobs of time and memory: decodes, beside both full caches."""
        experiment = self.experiment
        shown = [slug for model, slug in experiment.rows if model == BASE]
        shown = [slug for slug in shown if experiment.is_shown(slug)]
        rule, double = experiment.cost, 1 + (experiment.sampling.guidance != 1)
        for name, settings, sets in (
            ("cost", rule, [[slug] for slug in shown]),
            ("paper_cost", experiment.paper, [list(experiment.paper_caches)]),
        ):
            sets = [slugs for slugs in sets if slugs]
            timed = [["full", "full", *slugs] for slugs in sets]
            each = {
                slug: self._draw(self.network, slug, settings.batch * double)
                for slugs in timed
                for slug in slugs
            }
            seconds = [
                (settings.repeats + 1) * sum(each[slug][0] for slug in slugs) + len(slugs) * START
                for slugs in timed
            ]
            held = max((sum(each[slug][1] for slug in slugs) for slugs in timed), default=0)
            yield Jobs(name, MEASURED, seconds, PYTHON * 4, held)
        seconds = [
            (rule.repeats + 1) * self._draw(network, "full", rule.batch * double)[0] + 2 * START
            for _, network in self._architectures.values()
        ]
        yield Jobs("architecture_cost", MEASURED, seconds, PYTHON * 3)
        if experiment.family.published:
            efficiency, runs = experiment.efficiency, make_settings(experiment.efficiency, 1)
            most = efficiency.repeats * efficiency.limit_seconds
            rows = [len(setting.rows) for setting in runs.values()]
            yield Jobs("efficiency_setting", MEASURED, [most * count for count in rows], PYTHON * 3)

    def _list_tables(self) -> Iterator[Jobs]:
        """List what is left: small jobs, each of one rule."""
        experiment = self.experiment
        names = ["tables", "figures", "report"]
        if any(cache.requires for cache in experiment.cache_by_slug.values()):
            names.append("lines_table")
        if experiment.paper_caches:
            names += ["paper_table", "watch"]
        if make_settings(experiment.efficiency, 1) and experiment.family.published:
            names.append("efficiency")
        names += ["architectures"] if experiment.architectures else []
        for name in names:
            yield Jobs(name, WRITTEN, [SMALL])

    @property
    def _gpus(self) -> int:
        """How many GPUs a training takes."""
        return self.experiment.training.gpus

    @cached_property
    def _images(self) -> int:
        return self.facts.train + self.facts.test

    @property
    def _pixels(self) -> int:
        """Bytes of an image."""
        height, width = self.facts.side or (0, 0)
        return self.channels * height * width

    @cached_property
    def _architectures(self) -> dict[str, tuple[ModelSettings, Model]]:
        """Settings and networks of other families; none where there are no images to compare."""
        named = self.experiment.architectures if self.tokenizer else {}
        return {name: (each, make_network(each, self.network.spec)) for name, each in named.items()}

    @property
    def _rows(self) -> list[tuple[str, str]]:
        return [*self.experiment.rows, *((name, "full") for name in self._architectures)]

    @property
    def _drawn(self) -> list[tuple[str, str]]:
        return [row for row in self._rows if self.experiment.is_drawn(row[1], row[0])]

    def _get_network(self, model: str) -> Model:
        found = self._architectures.get(model)
        return found[1] if found else self.network

    @cached_property
    def _encode(self) -> Pass:
        assert self.tokenizer is not None
        images = torch.zeros(1, self.channels, *(self.facts.side or (1, 1)), device="meta")
        return count_pass(self.tokenizer.find_codes, images)

    @cached_property
    def _decode(self) -> Pass:
        assert self.tokenizer is not None
        codes = torch.zeros(1, *self.network.spec.grid, dtype=torch.long, device="meta")
        return count_pass(self.tokenizer.draw_images, codes)

    @cached_property
    def _look(self) -> Pass:
        """At one image, by the network that images are compared by."""
        features, of = self.experiment.quality.features, self.experiment.classifier
        if features in COMPARED:
            flops, _ = COMPARED[features]
            return Pass(flops, flops / 100)
        side = self.experiment.quality.side
        size = (side, side) if side else self.facts.side or (1, 1)
        shape = ClassifierShape(self.channels, of.widths, of.features, self.classes)
        images = torch.zeros(1, self.channels, *size, dtype=torch.uint8, device="meta")
        return count_pass(place_nowhere(Classifier, shape), images)

    def _run(self, of: Pass) -> float:
        """Seconds of a pass over an image, among many."""
        return of.flops / self.device.flops + 2 * of.kept / self.device.bandwidth

    def _step(self, batch: int, *passes: Pass) -> float:
        """Seconds of a step of training."""
        flops, kept = sum(each.flops for each in passes), sum(each.kept for each in passes)
        return batch * (3 * flops / self.device.flops + PASSES * kept / self.device.bandwidth)

    def _forward(self, images: int, network: Model | None = None) -> float:
        """Seconds of predicting all tokens of so many images."""
        return START + images * self._run(count_model(network or self.network))

    def _train(self, settings: ModelSettings, network: Model) -> tuple[float, float]:
        """Seconds of a training, and bytes: weights, gradients, two moments, what is kept."""
        one, batch = count_model(network), settings.batch
        logits = 3 * FLOAT * network.spec.n_tokens * network.spec.codes
        held = 4 * FLOAT * count_weights(network) + batch / self._gpus * (one.kept + logits)
        return START + settings.steps * self._step(batch, one) / self._gpus, held

    def _draw(self, network: Model, slug: str, rows: int) -> tuple[float, float]:
        """Seconds and bytes of drawing a batch."""
        cache: Cache = stand_in(self.experiment.get_cache(slug))
        if network.Cost is not None:
            storage = machine.DTYPES[self.experiment.storage]
            cost = network.Cost(network.shape, rows, cache, self.precision, storage)
            return cost.predict(self.device), cost.process_bytes
        weights, n = count_weights(network) * self.precision.itemsize, network.spec.n_tokens
        flops = rows * count_model(network).flops
        held = weights + rows * network.spec.codes * FLOAT * 4
        return n * weights / self.device.bandwidth + flops / self.device.flops, held
