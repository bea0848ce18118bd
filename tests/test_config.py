from pathlib import Path

import pytest
import yaml

from fewlines.bench.efficiency import make_settings
from fewlines.cache.spec import parse_cache
from fewlines.config import dump_experiment, load_experiment, validate_experiment
from fewlines.errors import FewlinesError
from fewlines.models.base import TokenSpec

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def test_a_dumped_experiment_reads_back_as_itself():
    caches = [
        {"policy": "full"},
        {"policy": "lines", "budget": {"fraction": "1/6"}},
        {"policy": "streaming", "budget": {"lines": 3}, "options": {"sinks": 8}, "merge": True},
        {"policy": "streaming", "budget": {"lines": 3}},
    ]
    experiment = validate_experiment({"caches": caches, "paper": {"caches": ["streaming-3lines"]}})
    assert validate_experiment(yaml.safe_load(dump_experiment(experiment))) == experiment
    assert list(experiment.cache_by_slug)[:4] == [
        "full", "lines-1of6", "streaming-sinks8+merge-3lines", "streaming-3lines",
    ]  # fmt: skip


def test_later_files_override_key_by_key(tmp_path):
    for name, text in (("a", "model: {dim: 64, layers: 2, heads: 2}"), ("b", "model: {layers: 3}")):
        (tmp_path / name).write_text(text)
    model = load_experiment([tmp_path / "a", tmp_path / "b"]).model
    assert (model.dim, model.layers) == (64, 3)


def test_another_family_takes_no_keys_from_the_one_before(tmp_path):
    (tmp_path / "a").write_text("model: {family: pixelcnn, steps: 7}")
    (tmp_path / "b").write_text("model: {layers: 2}")
    default = EXPERIMENTS.parent / "config.yaml"
    alone = load_experiment([tmp_path / "a"]).model
    assert load_experiment([default, tmp_path / "a"]).model == alone
    assert (alone.layers, alone.steps) == (12, 7)
    assert load_experiment([default, tmp_path / "a", tmp_path / "b"]).model.layers == 2
    given = load_experiment([default], {"model": {"family": "pixelcnn"}, "seed": 3})
    assert (given.model.layers, given.seed) == (12, 3)
    (tmp_path / "c").write_text("model: {family: llamagen, heads: 2}")
    assert load_experiment([tmp_path / "b", tmp_path / "c"]).model.layers == 2  # the same one


def test_models_of_an_earlier_file_are_left_out_one_by_one_or_together(tmp_path):
    (tmp_path / "a").write_text(
        "adaptation: {models: {base+steps: {caches: [full]}, adapted: null}}"
    )
    (tmp_path / "b").write_text("adaptation: {models: null}")
    assert list(load_experiment([tmp_path / "a"]).adaptation.models) == ["base+steps"]
    assert load_experiment([tmp_path / "a", tmp_path / "b"]).adaptation.models == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("- 1", "must hold keys"), (None, "not exist")],
)
def test_an_unreadable_file_is_named(tmp_path, text, message):
    path = tmp_path / "experiment.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FewlinesError, match=message):
        load_experiment([path])


def test_config_yaml_says_what_the_schema_says():
    """One source of defaults."""
    written, default = (
        load_experiment([EXPERIMENTS.parent / "config.yaml"]),
        validate_experiment({}),
    )
    assert written.model_dump(mode="json") == default.model_dump(mode="json")


def test_lists_multiply_and_a_later_line_replaces_an_earlier_one():
    lines = [
        {"policy": ["lines", "streaming"], "budget": {"lines": [3, 2]}, "measure": "likelihood"},
        {"policy": "line_ar", "budget": [{"lines": 2}, {"tokens": 7}], "merge": [False, True]},
        {"policy": "streaming", "budget": {"lines": 2}, "options": {"sinks": [4, 8]}},
    ]
    experiment = validate_experiment({"caches": lines, "adaptation": {"models": None}})
    assert list(experiment.cache_by_slug) == [
        "full", "lines-3lines", "lines-2lines", "streaming-3lines", "streaming-2lines",
        "line_ar-2lines", "line_ar-7tokens", "line_ar+merge-2lines", "line_ar+merge-7tokens",
        "streaming-sinks8-2lines", "scheduled+merge-3lines",
    ]  # fmt: skip
    assert experiment.is_shown("streaming-2lines")  # the last line
    assert not experiment.is_drawn("lines-2lines")


def test_a_cache_that_a_model_or_a_task_names_need_not_be_listed():
    models = {"adapted": {"caches": ["scheduled+merge+bands-1.5lines"], "compared": ["h2o-1of6"]}}
    tasks = {"guided": {"guidance": 2.0, "caches": ["streaming+merge-2lines"]}}
    given = {"adaptation": {"models": models}, "tasks": tasks, "caches": [{"policy": "full"}]}
    experiment = validate_experiment(given | {"paper": {"caches": []}})
    assert list(experiment.cache_by_slug) == [
        "full", "scheduled+merge+bands-1.5lines", "h2o-1of6", "streaming+merge-2lines",
    ]  # fmt: skip
    for slug, cache in experiment.cache_by_slug.items():
        assert parse_cache(slug) == cache
    assert not experiment.is_drawn("h2o-1of6")
    assert experiment.is_drawn("streaming+merge-2lines")  # of which a task draws images


def test_a_task_may_change_how_images_are_drawn_and_whose_likelihood_it_has():
    tasks = {
        "hot": {"temperature": 1.2, "caches": ["full"]},
        "guided": {"guidance": 2.0, "caches": ["full"]},
        "blind": {"labelled": False, "caches": ["full"]},
        "begun": {"prompt_lines": 2, "caches": ["full"]},
    }
    experiment = validate_experiment({"tasks": tasks})
    asked = {name: experiment.get_sampling(f"base:{name}") for name in tasks}
    assert {name: (each.temperature, each.guidance) for name, each in asked.items()} == {
        "hot": (1.2, 1.0), "guided": (0.9, 2.0), "blind": (0.9, 1.0), "begun": (0.9, 1.0),
    }  # fmt: skip
    scored = [experiment.get_scored(f"base:{name}") for name in tasks]
    assert scored == ["base", "base", "base:blind", "base:begun"]


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_is_valid_and_every_model_has_its_baseline(path):
    experiment = load_experiment([EXPERIMENTS.parent / "config.yaml", path])
    settings = make_settings(experiment.efficiency, threads=2)
    assert bool(settings) == bool(experiment.efficiency.runs)
    for name in experiment.adaptation.models:
        baseline = experiment.find_baseline(name)
        assert baseline is not None
        assert (baseline, "full") in experiment.rows


@pytest.mark.parametrize(
    "asked",
    [
        {"sampling": {"guidance": 2.0}},
        {"tasks": {"unconditional": {"labelled": False, "caches": ["full"]}}},
        {"tasks": {"guided": {"guidance": 2.0, "caches": ["full"]}}},
    ],
)
def test_what_never_learned_to_draw_without_a_class_is_not_asked_to(asked):
    never = {"model": {"class_dropout": 0}}
    with pytest.raises(FewlinesError, match=r"write model\.class_dropout"):
        validate_experiment({**asked, **never})
    assert validate_experiment(asked)
    spec = TokenSpec((2, 2), 3, 2)
    for model, learned in (({}, True), (never["model"], False)):
        shape = validate_experiment({"model": model}).model.make_shape(spec)
        assert shape.has_null_class == learned


@pytest.mark.parametrize(
    ("cache", "known"),
    [
        ({"policy": "scheduled", "merge": True}, True),
        ({"policy": "streaming", "allocation": "headkv"}, True),
        ({"policy": "corrected", "merge": True}, False),
        ({"policy": "snapkv", "allocation": "ada"}, False),
        ({"policy": "streaming"}, False),
    ],
)
def test_a_schedule_is_drawn_where_there_is_one(cache, known):
    content = {"caches": [{**cache, "budget": {"lines": 3}}], "paper": {"caches": []}}
    content["adaptation"] = {"models": None}
    assert validate_experiment(content).has_schedule == known


@pytest.mark.parametrize("name", ["scheduled+merge:3lines", "scheduled+merge-3.0lines"])
def test_a_cache_may_be_named_as_the_command_line_names_it(name):
    found = validate_experiment({"paper": {"caches": [name]}})
    assert found.paper_caches == ("scheduled+merge-3lines",)
    assert found.is_drawn("scheduled+merge-3lines")


def test_an_efficiency_run_measures_something():
    with pytest.raises(FewlinesError, match="run 1 has neither batches nor caps"):
        validate_experiment({"efficiency": {"runs": [{"shape": "llamagen-b"}]}})
