"""Every policy at the same bounds, by likelihood: the numbers of docs/policies.md, and a figure."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from fewlines.report.figures import STYLE, save

RIVAL, OURS = "linear", "scheduled+fold"


def policy_numbers(reference: Path) -> str:
    """A row for every policy, a column for every budget, and which ranks are certain."""
    table = pd.read_csv(reference / "policies.csv")
    limited = table[table["policy"] != "full"]
    full = table[table["policy"] == "full"].iloc[0]
    return "\n\n".join(
        [
            f"ΔNLL in nats/token ± half the 95% interval, paired over "
            f"{int(full['likelihood_images'])} held-out images; the full cache has "
            f"{full['nll']:.4f}. Best first, by the mean over the budgets that all have.",
            _wide(limited).to_markdown(),
            *_sentences(limited),
            *_curve(reference / "calibration.csv"),
        ]
    )


def _curve(path: Path) -> list[str]:
    """How few images a schedule needs, where that was measured."""
    if not path.exists():
        return []
    table = pd.read_csv(path)
    half = (table["nll_delta_high"] - table["nll_delta_low"]) / 2
    text = [f"{d:+.4f} ± {r:.4f}" for d, r in zip(table["nll_delta"], half, strict=True)]
    named = table.assign(text=text, cache=table["policy"] + ", " + table["budget"])
    wide = named.pivot(index="calibrated_on", columns="cache", values="text")
    ordered = wide.loc[table["calibrated_on"].unique(), named["cache"].unique()]
    return ["### How few images a schedule needs", ordered.to_markdown()]


def _wide(table: pd.DataFrame) -> pd.DataFrame:
    half = (table["nll_delta_high"] - table["nll_delta_low"]) / 2
    text = [
        f"{delta:+.4f} ± {reach:.4f}" for delta, reach in zip(table["nll_delta"], half, strict=True)
    ]
    wide = table.assign(text=text).pivot(index="policy", columns="budget", values="text")
    values = table.pivot(index="policy", columns="budget", values="nll_delta")
    complete = values.dropna(axis=1)
    order = complete.mean(axis=1).sort_values().index
    tokens = table.groupby("budget")["capacity"].first().sort_values().index
    return wide.loc[order, tokens].fillna("")


def _sentences(table: pd.DataFrame) -> list[str]:
    """What is certain: ratios of ours to the rival and the oracle, and ranks within noise."""
    lines = []
    for budget, rows in table.groupby("budget", sort=False):
        rows = rows.sort_values("nll_delta")
        at = rows.set_index("policy")["nll_delta"]
        ratios = [
            f"{at[OURS] / at[other]:.2f}× {other}"
            for other in (RIVAL, f"{RIVAL}+fold", "oracle")
            if OURS in at and other in at
        ]
        meets = rows["nll_delta_high"].to_numpy()[:-1] >= rows["nll_delta_low"].to_numpy()[1:]
        names = rows["policy"].tolist()
        neighbours = zip(names, names[1:], meets, strict=False)
        close = [f"{better} and {worse}" for better, worse, meet in neighbours if meet]
        ours = f"{OURS} loses {', '.join(ratios)}. " if ratios else ""
        noise = f"Neighbours within each other's intervals: {'; '.join(close)}." if close else ""
        lines.append(f"**{budget}**: {ours}{noise}")
    return lines


@mpl.rc_context(STYLE)
def draw_policies(table: pd.DataFrame, path: Path) -> None:
    """ΔNLL of every policy against its budget, dropped and folded side by side; bars where there
    is one budget only."""
    limited = table[table["policy"] != "full"]
    if limited["budget"].nunique() == 1:
        _draw_bars(limited.sort_values("nll_delta", ascending=False), path)
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharey=True, layout="constrained")
    names = sorted({policy.split("+")[0] for policy in limited["policy"]})
    colours = {name: mpl.color_sequences["tab20"][i % 20] for i, name in enumerate(names)}
    for policy, rows in limited.groupby("policy"):
        rows = rows.sort_values("capacity")
        name = str(policy).split("+")[0]
        axes[int("+fold" in str(policy))].errorbar(
            rows["capacity"],
            rows["nll_delta"].clip(lower=1e-4),
            yerr=np.abs(rows[["nll_delta_low", "nll_delta_high"]].sub(rows["nll_delta"], axis=0)).T,
            fmt="o-" if "+" not in str(policy).removesuffix("+fold") else "s--",
            ms=3,
            lw=1,
            color=colours[name],
            label=str(policy),
        )
    for axis, title in zip(axes, ("victims dropped", "victims folded"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="capacity, entries", title=title)
        axis.legend(fontsize=6, ncols=2)
    axes[0].set_ylabel("ΔNLL against the full cache, nats/token")
    save(figure, path)


def _draw_bars(rows: pd.DataFrame, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 0.25 * len(rows) + 1), layout="constrained")
    ends = rows[["nll_delta_low", "nll_delta_high"]].sub(rows["nll_delta"], axis=0).abs().T
    folded = rows["policy"].str.contains("+fold", regex=False)
    colours = ["tab:orange" if fold else "tab:blue" for fold in folded]
    axis.barh(rows["policy"], rows["nll_delta"], xerr=ends.to_numpy(), color=colours, height=0.7)
    axis.set(xscale="log", xlabel=f"ΔNLL, nats/token, {rows['budget'].iloc[0]} (orange: folded)")
    axis.grid(axis="y", visible=False)
    save(figure, path)
