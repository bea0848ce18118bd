"""The figures: quality against memory and time, the same seeds side by side, memory over steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from fewlines.config import BASE, STEPS
from fewlines.files import read_tensors, replacing, write_text
from fewlines.measure.outcome import OK
from fewlines.models.tokenizer import Tokenizer
from fewlines.report.results import Results

mpl.use("Agg")
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "svg.hashsalt": "fewlines",
}
DELTAS = ("_delta", "_delta_low", "_delta_high")
PICTURES, FIRST = 10, 8  # of each cache in the grid of samples; codes that tell them apart


def row_name(model: str, cache: str) -> str:
    """Of a row: the base model goes without saying."""
    return cache if model == BASE else f"{model}: {cache}"


def save(figure: plt.Figure, path: Path, numbers: pd.DataFrame | None = None) -> None:
    """Write a picture and, under the same name, the numbers that it shows."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], metadata={"Software": None})
    plt.close(figure)
    if numbers is not None:
        write_text(path.with_suffix(".csv"), numbers.to_csv(index=False, float_format="%.6g"))


@mpl.rc_context(STYLE)
def draw_quality(table: pd.DataFrame, floors: pd.DataFrame, path: Path) -> None:
    """FID and ΔNLL of every cache against decode memory and time. Times are relative to the lean
    full cache's in the same interleaved run: absolute ones drift from run to run."""
    table = table.dropna(subset=["fid_mean", "speedup_lean"]).assign(
        relative_time=lambda rows: 1 / rows["speedup_lean"]
    )
    names = zip(table["model"], table["policy"], strict=True)
    table["label"] = [row_name(*row) for row in names]
    figure, axes = plt.subplots(2, 2, figsize=(8.5, 6), sharex="col", layout="constrained")
    full = table[table["label"] == "full"].iloc[0]
    columns = (
        ("kv_bytes", 1e-3 / full["cost_batch"], "KV cache of an image, kB"),
        ("relative_time", 1, "decode time ÷ that of full, lean"),
    )
    for column, (cost, scale, label) in enumerate(columns):
        for row, (quality, low, high) in enumerate(
            (("fid_mean", "fid_sd", "fid_sd"), ("nll_delta", "nll_delta_low", "nll_delta_high"))
        ):
            axis = axes[row, column]
            for policy, group in table[table["label"] != "full"].groupby("label", sort=False):
                x, y = group[cost] * scale, group[quality]
                spread = (
                    [group[low], group[high]]
                    if quality == "fid_mean"
                    else [y - group[low], group[high] - y]
                )
                axis.errorbar(
                    x, y, yerr=spread, marker="o", ms=4, lw=1.2, capsize=2, label=str(policy)
                )
                for px, py, budget in zip(x, y, group["budget"], strict=True):
                    text = str(budget).removeprefix("lines: ")
                    axis.annotate(text, (px, py), xytext=(4, 4), textcoords="offset points", size=7)
            axis.plot(
                full[cost] * scale,
                full[quality],
                marker="*",
                ms=11,
                ls="",
                color="black",
                label="full",
            )
        axes[1, column].set_xlabel(label)
        axes[0, column].set_ylim(bottom=0)
        for floor, style in (("reconstruction", "--"), ("real", ":")):
            level = floors.set_index("floor").loc[floor, "fid_mean"]
            axes[0, column].axhline(level, color="grey", ls=style, lw=1, label=f"{floor} images")
    axes[0, 0].set_ylabel("FID (± sd over seeds)")
    axes[1, 0].set_ylabel("ΔNLL to full, nats/token (95%)")
    axes[0, 0].legend(fontsize=7.5)
    figure.suptitle("Quality against memory and time; numbers are lines of cache", size=10)
    shown = ["model", "policy", "budget", "kv_bytes", "relative_time", "fid_mean", "fid_sd"]
    shown += ["nll_delta", "nll_delta_low", "nll_delta_high"]
    save(figure, path, table[shown])


@mpl.rc_context(STYLE)
def draw_budgets(table: pd.DataFrame, path: Path) -> None:
    """ΔNLL against the size of the cache: policies of the base model, and models adapted to their
    cache; beside it, where there are several, how many steps of adaptation take how much away."""
    base, adapted = table[table["model"] == BASE], _adapted(table)
    stages = [rows for _, rows in adapted.groupby(["policy", "budget"]) if _stages(rows) > 1]
    figure, axes = plt.subplots(
        1,
        1 + bool(stages),
        figsize=(6.5 + 4 * bool(stages), 4),
        layout="constrained",
        squeeze=False,
    )
    axis = axes[0, 0]
    for policy in ("lines", "streaming", "linear", "scheduled", "scheduled+fold"):
        _curve(axis, base[base["policy"] == policy], "nll_delta", label=policy)
    most = adapted[adapted["extra_steps"] == adapted["extra_steps"].max()]
    for policy, trained_for, text, style in (
        ("scheduled+fold", "several", "one set of weights", "--"),
        ("scheduled+fold", "this", "weights for each budget", "-"),
        ("scheduled+fold+budgets", "this", "and for each head's share", ":"),
    ):
        rows = most[(most["trained_for"] == trained_for) & (most["policy"] == policy)]
        label = f"scheduled+fold, adapted: {text}"
        _curve(axis, rows, "steps_delta", label=label, color="black", lw=2, ls=style)
    tokens = int(table["n_tokens"].iloc[0])
    axis.set(yscale="log", xscale="log", xlabel=f"cache entries a head, of {tokens + 1}")
    axis.set_ylabel("ΔNLL to the full cache, nats/token (95%)")
    axis.legend(fontsize=8)
    for rows in stages:
        _draw_stages(axes[0, 1], rows, base)
    names = ["model", "policy", "budget", "capacity", "extra_steps", "trained_for"]
    names += [f"{delta}{end}" for delta in ("nll", "steps") for end in DELTAS]
    save(figure, path, pd.concat([base, adapted]).reindex(columns=names))


def _stages(rows: pd.DataFrame) -> int:
    return int(rows.loc[rows["trained_for"] == "this", "extra_steps"].nunique())


def _draw_stages(axis: plt.Axes, rows: pd.DataFrame, base: pd.DataFrame) -> None:
    """ΔNLL of models adapted to one cache against their steps, from none on."""
    rows = rows[rows["trained_for"] == "this"].sort_values("extra_steps")
    policy, budget = rows[["policy", "budget"]].iloc[0]
    start = base[(base["policy"] == policy) & (base["budget"] == budget)].iloc[0]
    columns = ["{}", "{}_low", "{}_high"]
    before = start[[name.format("nll_delta") for name in columns]].to_numpy(float)
    after = rows[[name.format("steps_delta") for name in columns]].to_numpy(float)
    delta, low, high = np.vstack([before, after]).T
    reach = [delta - low, high - delta]
    steps = [0, *rows["extra_steps"]]
    axis.errorbar(
        steps, delta, yerr=reach, marker="o", ms=4, capsize=2, label=f"{policy}, {budget}"
    )
    axis.axhline(0, color="grey", lw=0.8)
    axis.set(xlabel="steps of adaptation", ylabel="ΔNLL to as many steps with a full cache")
    axis.legend(fontsize=8)


def _adapted(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of models that go on from the base model, trained as a whole, by likelihood alone."""
    if "steps_delta" not in table:
        return table.iloc[:0].assign(trained_for="", steps_delta=0.0, extra_steps=0)
    plain = (table["trained"] == "all") & (table["distil"] == 0) & (table["registers"] == 0)
    plain &= (table["lora_rank"] == 0) & (table["start"] == "base")
    adapted: pd.DataFrame = table[plain & ~table["model"].str.startswith(STEPS)]
    return adapted


def _curve(axis: plt.Axes, rows: pd.DataFrame, column: str, **style: Any) -> None:
    """A line of ΔNLL over capacities, with 95% intervals; nothing if there are no rows."""
    rows = rows[rows[column] > 0].sort_values("capacity")
    if len(rows) == 0:
        return
    ends = rows[[f"{column}_low", f"{column}_high"]].clip(lower=1e-5)
    reach = ends.sub(rows[column], axis=0).abs().T.to_numpy()
    axis.errorbar(rows["capacity"], rows[column], yerr=reach, marker="o", ms=4, capsize=2, **style)


@mpl.rc_context(STYLE)
def draw_samples(results: Results, tokenizer: Tokenizer, path: Path) -> None:
    """The same seeds and classes under every cache, a row each."""
    rows, drawn = [], []
    for model, slug in results.shown:
        tensors, header = read_tensors(results.samples(slug, model))
        codes = tensors[f"seed_{results.experiment.sampling.seeds[0]}"][:PICTURES]
        drawn.append([" ".join(map(str, image[:FIRST].tolist())) for image in codes])
        rows.append(tokenizer.decode(codes.unflatten(1, header["grid"])))
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(8, 0.8 * len(rows)), layout="constrained", squeeze=False
    )
    for axis, images, row in zip(axes[:, 0], rows, results.shown, strict=True):
        axis.imshow(_strip(images), cmap="gray_r" if images.shape[1] == 1 else None)
        axis.set_yticks([]), axis.set_xticks([])
        axis.grid(False)
        axis.set_ylabel(row_name(*row), rotation=0, ha="right", va="center", size=8)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.suptitle("The same classes and noise under each cache", size=10)
    named = pd.DataFrame(results.shown, columns=["model", "cache"])
    beginnings = pd.DataFrame(drawn, columns=[f"first_codes_of_{n}" for n in range(PICTURES)])
    save(figure, path, named.join(beginnings))


def _strip(images: Tensor) -> np.ndarray:
    """Images `(n, C, H, W)` side by side: `(H, n·(W+2))`, or with three channels."""
    padded = torch.nn.functional.pad(images, (1, 1))
    strip = torch.cat(list(padded), dim=-1).permute(1, 2, 0).numpy()
    return strip.squeeze(-1) if strip.shape[-1] == 1 else strip


@mpl.rc_context(STYLE)
def draw_memory(results: Results, path: Path) -> None:
    """Resident memory above the weights over the steps of one decode."""
    cost = results.paper
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    names = {"full": "full, lean", "stock": "full, stock"}
    measured = [row for row in cost["rows"] if row["outcome"] == OK]
    for row in measured:
        megabytes = np.array(row["timeline"]) / 1e6
        (line,) = axis.plot(megabytes, label=names.get(row["name"], row["name"]))
        axis.axhline(row["kv_bytes"] / 1e6, color=line.get_color(), ls=":", lw=0.8)
    axis.set_xlabel("image token")
    axis.set_ylabel("memory above the weights, MB")
    axis.set_ylim(bottom=0)
    axis.set_title(f"{cost['batch']} images at once; dotted: bytes of the cache's buffers", size=9)
    axis.legend(fontsize=8)
    timelines = {row["name"]: row["timeline"] for row in measured}
    save(
        figure,
        path,
        pd.DataFrame(timelines).add_suffix("_bytes").rename_axis("token").reset_index(),
    )


@mpl.rc_context(STYLE)
def draw_lines(results: Results, path: Path) -> None:
    """KL(full ‖ cache) of every line of the image: where a small cache hurts."""
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    styles = ("-", "--", "-.", ":")
    drawn: dict[str, int] = {}  # how many lines each policy has so far
    found: dict[str, list[float]] = {}
    for model, slug in results.shown:
        cache = results.experiment.cache(slug)
        if cache.budget is None:
            continue
        policy = row_name(model, cache.policy_text)
        nth = drawn[policy] = drawn.get(policy, -1) + 1
        colour = mpl.color_sequences["tab10"][list(drawn).index(policy) % 10]
        kl = results.likelihood(slug, model)["kl_by_line"]
        found[row_name(model, slug)] = kl
        name, style = row_name(model, slug), styles[nth % len(styles)]
        axis.plot(range(1, len(kl) + 1), kl, color=colour, ls=style, lw=1.3, label=name)
    axis.set_xlabel("line of the image")
    axis.set_ylabel("KL(full ‖ cache), nats/token")
    axis.legend(fontsize=6.5, ncols=2)
    save(figure, path, pd.DataFrame(found).rename_axis("line").reset_index())
