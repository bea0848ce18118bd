"""The figures: quality against memory and time, the same seeds side by side, memory over steps."""

from __future__ import annotations

from collections.abc import Hashable
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
from fewlines.report.tables import whole_images

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
TWENTY = mpl.color_sequences["tab20"]  # a dark and a light one of each
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
    table = whole_images(table).dropna(subset=["fid_mean", "speedup_lean"])
    joined = [_series(row) for row in table.to_dict("records")]
    table = table.assign(relative_time=1 / table["speedup_lean"], series=joined)
    table = table[table["series"] != ""]
    for delta in DELTAS:  # adapted models against a full cache that had as many steps
        after = table.get(f"steps{delta}", np.nan)
        table[delta.strip("_")] = table[f"nll{delta}"].where(table["model"] == BASE, after)
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col", layout="constrained")
    full = table[table["series"] == "full"].iloc[0]
    columns = (
        ("kv_bytes", 1e-3 / full["cost_batch"], "KV cache of an image, kB"),
        ("relative_time", 1, "decode time ÷ that of full, lean"),
    )
    for column, (cost, scale, label) in enumerate(columns):
        for axis, quality in zip(axes[:, column], ("fid_mean", "delta"), strict=True):
            axis.set_prop_cycle(color=[*TWENTY[::2], *TWENTY[1::2]])
            for name, group in table.groupby("series", sort=False):
                look: dict[str, Any] = {"marker": "o", "ms": 4, "lw": 1.2}
                if name == "full":
                    look = {"marker": "*", "ms": 11, "lw": 0}
                elif (group["model"] != BASE).all():
                    look |= {"marker": "s", "ls": ":"}
                ends = [group["fid_sd"]] * 2
                if quality == "delta":
                    low, high = group["delta_low"], group["delta_high"]
                    ends = [group["delta"] - low, high - group["delta"]]
                axis.errorbar(
                    group[cost] * scale,
                    group[quality],
                    yerr=ends,
                    elinewidth=1,
                    capsize=2,
                    label=str(name),
                    **look,
                )
        axes[1, column].set_xlabel(label)
        axes[0, column].set_yscale("log")
        axes[1, column].set_yscale("symlog", linthresh=2e-3)
        axes[1, column].set_ylim(bottom=min(-1e-3, table["delta_low"].min()))
        for floor, style in (("reconstruction", "--"), ("real", ":")):
            level = floors.set_index("floor").loc[floor, "fid_mean"]
            axes[0, column].axhline(level, color="grey", ls=style, lw=1, label=f"{floor} images")
    axes[0, 0].set_ylabel("FID (± sd over seeds)")
    axes[1, 0].set_ylabel("ΔNLL to full, nats/token (95%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=7.5)
    figure.suptitle("Quality against memory and time", size=10)
    shown = ["model", "policy", "budget", "series", "kv_bytes", "relative_time"]
    shown += ["fid_mean", "fid_sd", "delta", "delta_low", "delta_high"]
    save(figure, path, table[shown])


def _series(row: dict[Hashable, Any]) -> str:
    """What a row's points are joined with: those of a policy, or of models adapted alike; nothing
    for a cache that a model was not adapted to."""
    if row["model"] == BASE:
        return str(row["policy"])
    if row["trained_for"] == "other":
        return ""
    one = row["trained_for"] == "several"
    name = "adapted: one set of weights" if one else "adapted: weights for the budget"
    if row["model"].startswith(STEPS):
        name = "more steps, full cache"
    return f"{name}, distilled" if row["distil"] else name


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
    folded = ("scheduled+fold", "scheduled+fold+budgets", "scheduled+fold+summaries")
    drawn = ("lines", "streaming", "linear", "scheduled", *folded)
    for policy in drawn:
        _curve(axis, base[base["policy"] == policy], "nll_delta", label=policy)
    most = adapted[adapted["extra_steps"] == adapted["extra_steps"].max()]
    taught = _adapted(table, taught=True)
    for models, policy, trained_for, text, style in (
        (most, "scheduled+fold", "several", "one set of weights", "--"),
        (most, "scheduled+fold", "this", "weights for each budget", "-"),
        (most, "scheduled+fold+budgets", "this", "and for each head's share", ":"),
        (taught, "scheduled+fold+budgets", "this", "and taught by the base model", "-."),
    ):
        rows = models[(models["trained_for"] == trained_for) & (models["policy"] == policy)]
        label = f"scheduled+fold, adapted: {text}"
        _curve(axis, rows, "steps_delta", label=label, color="black", lw=2, ls=style)
    tokens = int(table["n_tokens"].iloc[0])
    axis.set(yscale="log", xscale="log", xlabel=f"cache entries a head, of {tokens + 1}")
    axis.set_xticks([], minor=True)  # the sizes themselves, not powers of ten
    sizes = table.loc[table["policy"].isin(drawn), "capacity"].unique()
    axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axis.set_ylabel("ΔNLL to the full cache, nats/token (95%)")
    axis.legend(fontsize=8, handlelength=4)
    for rows in stages:
        _draw_stages(axes[0, 1], rows, base)
    names = ["model", "policy", "budget", "capacity", "extra_steps", "trained_for"]
    names += [f"{delta}{end}" for delta in ("nll", "steps") for end in DELTAS]
    save(figure, path, pd.concat([base, adapted, taught]).reindex(columns=names))


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


def _adapted(table: pd.DataFrame, taught: bool = False) -> pd.DataFrame:
    """Rows of models that go on from the base model, trained as a whole, by likelihood alone or
    else `taught`."""
    if "steps_delta" not in table:
        return table.iloc[:0].assign(trained_for="", steps_delta=0.0, extra_steps=0)
    plain = (table["trained"] == "all") & ((table["distil"] > 0) == taught)
    plain &= table["registers"] == 0
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
    """KL(full ‖ cache) of every line of the image, of the base model: where a small cache hurts."""
    figure, axis = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    styles = ("-", "--", "-.", ":")
    drawn: dict[str, int] = {}  # how many lines each policy has so far
    found: dict[str, list[float]] = {}
    for model, slug in results.shown:
        cache = results.experiment.cache(slug)
        if cache.budget is None or model != BASE:
            continue
        policy = cache.policy_text
        nth = drawn[policy] = drawn.get(policy, -1) + 1
        colour = mpl.color_sequences["tab10"][list(drawn).index(policy) % 10]
        kl = found[slug] = results.likelihood(slug)["kl_by_line"]
        style = styles[nth % len(styles)]
        axis.plot(range(1, len(kl) + 1), kl, color=colour, ls=style, lw=1.3, label=slug)
    axis.set(xlabel="line of the image", yscale="log", ylim=(1e-4, None))
    axis.set_ylabel("KL(full ‖ cache), nats/token")
    figure.legend(loc="outside right upper", fontsize=7.5)
    save(figure, path, pd.DataFrame(found).rename_axis("line").reset_index())
