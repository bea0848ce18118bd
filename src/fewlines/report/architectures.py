"""`architectures.csv`: the transformer under its caches, and what never needed a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from fewlines import machine
from fewlines.bench.cost import pair_ratios
from fewlines.config import BASE
from fewlines.metrics.likelihood import name_interval
from fewlines.report.results import Results
from fewlines.report.style import COLOURS, cycle_looks, draw_themes, save

MARKERS = "s^vP*Xhd<>"


def make_architecture_table(results: Results) -> pd.DataFrame:
    """Make one row for each cache of the base model, of those adapted to one or trained with it
    from their first step, and for each model of another family: all of the same tokens, so that
    nats per token, FID, bytes and time stand on the same axes.

    Steps and minutes are of all training, the base model's counted where one goes on from it.
    Bytes are of one image, resident at its end and read by a token, the mean. `naive` is drawing
    that keeps nothing and runs the whole image at every step; its `speedup` is paired over
    interleaved repeats.
    """
    rows = results.experiment.architecture_rows
    return pd.DataFrame([_row(results, model, slug) for model, slug in rows])


def _row(results: Results, model: str, slug: str) -> dict[str, Any]:
    cache, network = results.get_cache(slug), results.load_network(model)
    experiment, training = results.experiment, [results.read_metrics(f"{model}/model")]
    if model in experiment.adapted_models and experiment.get_adapted(model).start == "base":
        training.append(results.read_metrics(f"{BASE}/model"))
    found = results.read_likelihood(slug, model)
    full = results.read_likelihood("full")
    paired = torch.tensor(found["nll_of_images"]) - torch.tensor(full["nll_of_images"])
    fid = results.read_sets(slug, model)["fid"]
    storage = machine.DTYPES[experiment.storage]
    seconds = [each["steps"] * (each.get("seconds_per_step") or np.nan) for each in training]
    return {
        "model": model,
        "family": network.name,
        "policy": cache.policy_text,
        "budget": cache.budget_text,
        "parameters": training[0]["parameters"],
        "steps": sum(each["steps"] for each in training),
        "minutes": sum(seconds) / 60,
        "nll": found["nll"],
        **name_interval("nll_delta", paired),
        "fid_mean": fid.mean(),
        "fid_sd": fid.std(),
        "resident_bytes": network.count_bytes(cache, 1, storage),
        "read_bytes": network.count_read_bytes(cache, 1, storage),
        **_cost(results, model, slug),
    }


def _cost(results: Results, model: str, slug: str) -> dict[str, Any]:
    """Seconds of an image; nothing where no time was taken."""
    other = model in results.experiment.architectures
    if not other and not results.experiment.is_shown(slug, model):
        return {}
    cost = results.read_cost(slug, model if other else None)
    seconds = {row["name"]: row["seconds"] for row in cost["rows"]}
    found = {
        "cost_batch": cost["batch"],
        "seconds_per_image": float(np.median(seconds[slug])) / cost["batch"],
    }
    if "naive" in seconds:
        found["naive_seconds_per_image"] = float(np.median(seconds["naive"])) / cost["batch"]
        found["speedup_naive"] = pair_ratios(seconds["naive"], seconds[slug])[0]
    return found


@draw_themes
def draw_architectures(table: pd.DataFrame, path: Path) -> None:
    """Draw nats per token against the bytes that an image keeps resident: the transformer's caches
    as curves, every other family as a point. Caches that lose more than any family run out of the
    picture."""
    kept = table[table["resident_bytes"].notna()].assign(kilobytes=table["resident_bytes"] / 1e3)
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    caches, others = kept[kept["model"] == BASE], kept[kept["model"] != BASE]
    full = caches[caches["policy"] == "full"]
    looks = cycle_looks()
    for (policy, group), look in zip(caches.groupby("policy", sort=False), looks, strict=False):
        if policy != "full":
            curve = pd.concat([group, full]).sort_values("kilobytes")
            axis.plot(
                curve["kilobytes"], curve["nll"], marker="o", ms=3, lw=1.2, label=policy, **look
            )
    axis.plot(full["kilobytes"], full["nll"], "D", color=COLOURS[-1], label="full cache")
    for number, (_, row) in enumerate(others.sort_values("kilobytes").iterrows()):
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        place = (row["kilobytes"], row["nll"])
        axis.plot(*place, marker, color=colour, ms=7)
        away, side = ((4, -14), "right") if number % 2 else ((-4, 7), "left")
        how = {"xytext": away, "textcoords": "offset points", "ha": side, "fontsize": 7}
        axis.annotate(row["model"], place, **how)
    shown = pd.concat([others, full])["nll"]
    margin = 0.1 * (shown.max() - shown.min() + 0.01)
    axis.set_ylim(shown.min() - margin, shown.max() + margin)
    axis.set(xscale="log", xlabel="resident bytes of an image, kB", ylabel="nats/token, held out")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(fontsize=7, title="the transformer's caches", title_fontsize=7)
    save(figure, path, kept[["model", "policy", "budget", "resident_bytes", "read_bytes", "nll"]])
