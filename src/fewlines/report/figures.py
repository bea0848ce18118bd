"""The figures of a run: quality against memory and time, the same seeds side by side, likelihood
against the size of the cache, memory over steps. They know no names: what is in the tables is
drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from fewlines.bench.harness import OK
from fewlines.config import BASE, STEPS
from fewlines.files import read_tensors
from fewlines.models.base import AttentionModel
from fewlines.models.tokenizer import Tokenizer
from fewlines.report.results import Results
from fewlines.report.style import COLOURS, clear_axis, cycle_looks, draw_themes, name_lines, save
from fewlines.report.tables import add_delta, drop_tasks

PICTURES, FIRST, SCALE = 8, 8, 3  # of a row of samples; codes that tell them apart; magnification
SMALLEST = 1e-4  # nats/token: below it, differences are noise
INK = "text.color"


def name_row(model: str, cache: str) -> str:
    """Name a row: the base model goes without saying."""
    return cache if model == BASE else f"{model}\n{cache}"


def name_series(row: dict[Any, Any]) -> str:
    """Name what a row's points are joined with: those of a policy, or of models adapted alike."""
    if row["model"] == BASE:
        return str(row["policy"])
    if row["model"].startswith(STEPS):
        return "more steps" + (", distilled" if row["distil"] else "")
    one = ", one set of weights" if row["trained_for"] == "several" else ""
    if row["trained_for"] == "other":
        one = f", not to {row['policy']}"
    return "adapted" + (", distilled" if row["distil"] else "") + one


def _compare(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of whole images with their series and their ΔNLL."""
    table = add_delta(drop_tasks(table))
    return table.assign(series=[name_series(row) for row in table.to_dict("records")])


@draw_themes
def draw_curves(table: pd.DataFrame, path: Path) -> None:
    """Draw ΔNLL against the size of the cache, with 95% intervals."""
    table = _compare(table)
    rows = table[(table["delta"] > 0) & table["capacity"].notna()]
    several = [(name, group.sort_values("capacity")) for name, group in rows.groupby("series")]
    several.sort(key=lambda each: each[1]["delta"].iloc[-1])
    height = max(4.4, 0.16 * len(several))
    figure, axis = plt.subplots(figsize=(4.2, height), layout="constrained")
    ends = []
    for (name, group), look in zip(several, cycle_looks(), strict=False):
        ends_of = group[["delta_low", "delta_high"]].clip(lower=SMALLEST / 10)
        reach = ends_of.sub(group["delta"], axis=0).abs().T.to_numpy()
        axis.errorbar(
            group["capacity"], group["delta"], reach, marker="o", ms=3.5, lw=1.3, capsize=2, **look
        )
        last = group.iloc[-1]
        ends.append((last["capacity"], last["delta"], str(name), look["color"]))
    total = int(table["n_tokens"].iloc[0])
    axis.set(yscale="log", xscale="log", xlabel=f"cache entries of a head (an image has {total})")
    axis.set_ylabel("ΔNLL against the full cache, nats/token")
    sizes = sorted(rows["capacity"].unique())
    axis.set_xticks([], minor=True)  # the sizes themselves, not powers of ten
    axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    if ends:
        name_lines(axis, ends)
    names = ["model", "policy", "budget", "series", "capacity", "delta", "delta_low", "delta_high"]
    save(figure, path, table[names])


@draw_themes
def draw_quality(table: pd.DataFrame, reference: pd.DataFrame, path: Path) -> None:
    """Draw FID and ΔNLL of every cache against memory and time. Times are relative to the lean full
    cache's in the same interleaved run: absolute ones drift from run to run."""
    table = _compare(table).dropna(subset="fid_mean")
    table["kilobytes"] = table["kv_bytes"] / table["cost_batch"].max() * 1e-3
    table["relative_time"] = 1 / table["speedup_lean"]
    costs = {
        "kilobytes": "keys and values of an image, kB",
        "relative_time": "decode time ÷ that of the length-exact full cache",
    }
    figure, axes = plt.subplots(2, 2, figsize=(8.5, 6), sharex="col", layout="constrained")
    for (cost, label), column in zip(costs.items(), axes.T, strict=True):
        for axis, quality in zip(column, ("fid_mean", "delta"), strict=True):
            for (name, group), look in zip(table.groupby("series"), cycle_looks(), strict=False):
                marker = {"-": "o", "--": "s", "-.": "^", ":": "D"}[look["ls"]]
                ends = group[["fid_sd", "fid_sd"]].T.to_numpy()
                if quality == "delta":
                    reach = group[["delta_low", "delta_high"]].sub(group["delta"], axis=0)
                    ends = reach.abs().T.to_numpy()
                point = {"marker": marker, "color": look["color"], "ms": 5, "ls": ""}
                axis.errorbar(group[cost], group[quality], ends, capsize=2, label=name, **point)
        column[0].set_yscale("log")
        column[1].set_yscale("symlog", linthresh=2e-3)
        column[1].margins(y=0.1)
        column[1].set_xlabel(label)
        for images, score in reference.set_index("reference")["fid_mean"].items():
            style = "--" if images == "reconstruction" else ":"
            column[0].axhline(score, color="grey", ls=style, lw=1, label=str(images))
    axes[0, 0].set_ylabel("FID (± sd over seeds)")
    axes[1, 0].set_ylabel("ΔNLL, nats/token (95%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=7.5)
    names = ["model", "policy", "budget", "series", "kilobytes", "relative_time"]
    save(figure, path, table[[*names, "fid_mean", "fid_sd", "delta", "delta_low", "delta_high"]])


@draw_themes
def draw_samples(
    results: Results, shown: Sequence[tuple[str, str]], tokenizer: Tokenizer, path: Path
) -> None:
    """Draw the same seeds and classes, a row for each model and cache, beside what a head of the
    middle layer holds when three quarters of the image are drawn."""
    drawn = []
    figure, axes = plt.subplots(
        len(shown),
        2,
        figsize=(8.6, 1.02 * len(shown)),
        layout="constrained",
        squeeze=False,
        width_ratios=[1, PICTURES],
    )
    for (model, slug), (held, axis) in zip(shown, axes, strict=True):
        tensors, header = read_tensors(results.find_samples(slug, model))
        codes = tensors[f"seed_{results.experiment.sampling.seeds[0]}"][:PICTURES]
        drawn.append([" ".join(map(str, image[:FIRST].tolist())) for image in codes])
        images = tokenizer.decode(codes.unflatten(1, header["grid"]))
        axis.imshow(join_images(images), cmap="gray_r" if images.shape[1] == 1 else None)
        _draw_held(held, results, model, slug)
        held.set_ylabel(name_row(model, slug), rotation=0, ha="right", va="center", size=11)
        for each in (held, axis):
            clear_axis(each)
    axes[0, 0].set_title("held", size=11)
    axes[0, 1].set_title("the same classes and noise", size=11)
    named = pd.DataFrame(shown, columns=["model", "cache"])
    count = len(drawn[0])
    beginnings = pd.DataFrame(drawn, columns=[f"first_codes_of_{n}" for n in range(count)])
    save(figure, path, named.join(beginnings))


def join_images(images: Tensor) -> np.ndarray:
    """Put images `(n, C, H, W)` side by side, magnified: `(H, n·(W+2))`, or with channels."""
    padded = torch.nn.functional.pad(images, (1, 1))
    strip = torch.cat(list(padded), dim=-1).permute(1, 2, 0).numpy()
    strip = strip.repeat(SCALE, 0).repeat(SCALE, 1)
    return strip.squeeze(-1) if strip.shape[-1] == 1 else strip


def _draw_held(axis: plt.Axes, results: Results, model: str, slug: str) -> None:
    """Which tokens a head of the middle layer holds, where the evictions are known beforehand."""
    network = results.load_network(model)
    step, token = network.spec.n_tokens * 3 // 4, np.arange(network.spec.n_tokens)
    state = np.full(len(token), np.nan)
    said = "a state"  # of another family
    if isinstance(network, AttentionModel):
        plan = results.get_cache(slug).plan(network.geometry)
        said = "by\nscore" if plan.victims is None else ""
        if plan.victims is not None:
            evicted = plan.evicted_at[network.geometry.layers // 2, 0]
            state = np.where(token > step, 0.0, np.where(evicted > step, 2.0, 1.0))
    axis.text(0.5, 0.5, said, ha="center", va="center", size=10, transform=axis.transAxes)
    colours = mpl.colors.ListedColormap(["#b8b8b8", "#e3e3e3", COLOURS[0]])
    axis.imshow(state.reshape(network.spec.grid), cmap=colours, vmin=0, vmax=2)


@draw_themes
def draw_memory(results: Results, path: Path) -> None:
    """Draw resident memory above the weights over the steps of one decode."""
    cost = results.paper
    figure, axis = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
    names = {"full": "full, length-exact", "stock": "full, preallocated"}
    measured = [row for row in cost["rows"] if row["outcome"] == OK]
    ends = []
    for row, look in zip(measured, cycle_looks(), strict=False):
        megabytes = np.array(row["timeline"]) / 1e6
        axis.plot(megabytes, **look)
        axis.axhline(row["kv_bytes"] / 1e6, color=look["color"], ls=":", lw=0.8)
        name = names.get(row["name"], row["name"])
        ends.append((len(megabytes) - 1, megabytes[-1], name, look["color"]))
    axis.set(xlabel="image token", ylabel="memory above the weights, MB", ylim=(0, None))
    axis.set_title(f"{cost['batch']} images at once; dotted: bytes of keys and values", size=9)
    name_lines(axis, ends)
    timelines = pd.DataFrame({row["name"]: row["timeline"] for row in measured})
    save(figure, path, timelines.add_suffix("_bytes").rename_axis("token").reset_index())


@draw_themes
def draw_lines(results: Results, path: Path) -> None:
    """Draw KL(full ‖ cache) of every line of the image: where a small cache hurts."""
    slugs = [slug for model, slug in results.experiment.rows if model == BASE and slug != "full"]
    found = {slug: results.read_likelihood(slug)["kl_by_line"] for slug in slugs}
    found = dict(sorted(found.items(), key=lambda each: each[1][-1]))
    figure, axis = plt.subplots(figsize=(5.4, max(3.2, 0.16 * len(found))), layout="constrained")
    ends = []
    for (slug, kl), look in zip(found.items(), cycle_looks(), strict=False):
        axis.plot(range(1, len(kl) + 1), kl, lw=1.3, **look)
        ends.append((len(kl), max(kl[-1], SMALLEST), slug, look["color"]))
    axis.set(xlabel="line of the image", yscale="log", ylim=(SMALLEST, None))
    axis.set_ylabel("KL(full ‖ cache), nats/token")
    if ends:
        name_lines(axis, ends)
    save(figure, path, pd.DataFrame(found).rename_axis("line").reset_index())
