"""Every policy at the same bounds, by likelihood: the numbers of docs/policies.md, and a figure."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from fewlines.cache.policy import registry
from fewlines.config import BASE
from fewlines.files import read_json
from fewlines.report.adapting import ELSEWHERE
from fewlines.report.figures import STYLE, save
from fewlines.report.provenance import origin
from fewlines.report.readable import with_half_interval, with_interval
from fewlines.report.seeds import seed_numbers
from fewlines.report.tables import whole_images

RIVAL = "linear"
OTHERS = (RIVAL, f"{RIVAL}+fold", "oracle")
OURS = (
    "scheduled+fold",
    "scheduled+fold+budgets",
    "scheduled+fold+summaries",
    "corrected+fold",
    "corrected+fold+budgets",
)
ABLATIONS = "ablations.csv"
LARGER = {
    "carried": "A schedule carried from 14×14 to 28×28 tokens of another tokenizer",
    "larger": "A schedule carried from pictures of 64×64 pixels to 128×128, the tokenizer the same",
}
MARKS = {  # of curves of one colour: the policy alone, and split over heads
    "+budgets": "s--",
    "+summaries": "D:",
    "+mass": "^-.",
    "+ada": "v--",
    "+pyramid": "P--",
    "+headkv": "X--",
}
NEARLY = 1.2  # × the FID of the full cache: names of so many points would lie upon each other


def policy_numbers(reference: Path) -> str:
    """A row for every policy, a column for every budget, and which ranks are certain."""
    whole = pd.read_csv(reference / "cache.csv")
    table = whole[whole["model"] == BASE]
    limited = table[table["policy"] != "full"]
    full = table[table["policy"] == "full"].iloc[0]
    parts = [
        f"ΔNLL in nats/token ± half the 95% interval, paired over "
        f"{int(full['likelihood_images'])} held-out images; the full cache has "
        f"{full['nll']:.4f}. Best first, by the geometric mean over the budgets that most have.",
        _wide(limited).to_markdown(),
        *certainty(limited, pd.read_csv(reference / "ranks.csv")),
        *_fid(table),
        *_tasks(whole),
        *_curve(reference / "calibration.csv"),
        *[part for name, title in LARGER.items() for part in _carried(reference, name, title)],
        *_times(reference / "policy-times.csv"),
        *seed_numbers(reference),
    ]
    for name, title in ELSEWHERE.items():
        if (reference / name).exists():
            parts += _elsewhere(title, limited, reference / name)
    if (reference / ABLATIONS).exists():
        parts += _ablations(pd.read_csv(reference / ABLATIONS))
    return "\n\n".join(parts)


def _fid(table: pd.DataFrame) -> list[str]:
    """FID without any training, and whether likelihood predicts it."""
    drawn = table.dropna(subset="fid_mean")
    if len(drawn) < 3:
        return []
    rank = drawn["nll"].corr(drawn["fid_mean"], method="spearman")
    full = drawn[drawn["policy"] == "full"].iloc[0]
    text = [
        f"{mean:.2f} ± {sd:.2f} ({mean / full['fid_mean']:.2f}×)"
        for mean, sd in zip(drawn["fid_mean"], drawn["fid_sd"], strict=True)
    ]
    limited = drawn.assign(text=text).drop(index=full.name)
    wide = limited.pivot(index="policy", columns="budget", values="text").fillna("")
    means = limited.pivot(index="policy", columns="budget", values="fid_mean")
    order = means.rank().mean(axis=1).sort_values().index
    tokens = limited.groupby("budget")["capacity"].first().sort_values().index
    return [
        "### FID, and whether likelihood predicts it",
        f"{int(full['seeds'])} seeds of {int(full['samples']):,} images, mean ± sd, and the ratio "
        f"to the full cache's {full['fid_mean']:.2f} ± {full['fid_sd']:.2f}. Over these "
        f"{len(drawn)} caches of the base model Spearman's ρ of nats/token and FID is {rank:.2f}.",
        wide.loc[order, tokens].to_markdown(),
        "![FID against ΔNLL](../results/reference/likelihood-fid.png)",
    ]


def _tasks(table: pd.DataFrame) -> list[str]:
    """Models at other tasks than images of a class, where that was measured."""
    rows = table.drop(index=whole_images(table).index)
    if len(rows) == 0:
        return []
    columns = {"nll": "{:.4f}", "nll_delta": "{:+.4f}", "fid_mean": "{:.2f}", "fid_sd": "{:.2f}"}
    text = pd.DataFrame({name: rows[name].map(form.format) for name, form in columns.items()})
    return [
        "### Without a class, completing images, and with guidance",
        "*unconditional*: the model is not told the class; *completion*: the first lines are those "
        "of test images, they count against the cache as any token, and nats are of the others; "
        "*guided*: with classifier-free guidance, which FID alone knows of.",
        rows[["model", "policy", "budget"]].join(text).to_markdown(index=False),
    ]


def _times(path: Path) -> list[str]:
    """What deciding costs, where that was measured."""
    if not path.exists():
        return []
    table = pd.read_csv(path).sort_values("ratio")
    first = table.iloc[0]
    plain = first["against"]
    readable = pd.DataFrame(
        {
            "policy": table["policy"],
            f"× {plain}": [with_interval(row, "ratio", ".3f") for row in table.to_dict("records")],
        }
    )
    return [
        "### What deciding costs",
        f"Time of a step at {first['budget']}, {first['shape']}, {first['grid']} tokens, batch "
        f"{int(first['batch'])}, keys and values in {first['storage']}, on {first['processor']}: "
        f"ratio to `{plain}`, median and quartiles of {int(first['rounds'])} rounds, in each of "
        f"which a line of the one follows a line of the other. `{plain}` beside itself shows the "
        "noise. `scheduled` reads its slots from a table as `random` does, so `random` and "
        "`random+fold` stand for it; `corrected` asks for what `linear` asks for.",
        readable.to_markdown(index=False, disable_numparse=True),
    ]


def _elsewhere(title: str, table: pd.DataFrame, path: Path) -> list[str]:
    """The same caches of another base model or on other images, and what is known of the run."""
    other = pd.read_csv(path)
    full = other[(other["model"] == BASE) & (other["policy"] == "full")].iloc[0]
    limited = other[(other["model"] == BASE) & (other["policy"] != "full")]
    both = limited.merge(table, on=["policy", "budget"], suffixes=("", "_here"))
    rank = both["nll_delta"].corr(both["nll_delta_here"], method="spearman")
    return [
        f"### {title}",
        f"With a full cache {full['nll']:.4f} nats/token. Spearman's ρ of the ΔNLL of these "
        f"{len(both)} caches with those above is {rank:.2f}.",
        _wide(limited).to_markdown(),
        *certainty(limited, pd.DataFrame(columns=["budget"])),
        *_drawn(other),
        *[
            f"![The same classes and noise under each cache](../results/reference/{name})"
            for name in [f"{path.stem}-samples.png"]
            if path.with_name(name).exists()
        ],
        *[
            origin(read_json(record))
            for record in [path.with_name(f"{path.stem}-provenance.json")]
            if record.exists()
        ],
    ]


def _drawn(table: pd.DataFrame) -> list[str]:
    """FID of the models and caches that images were drawn under, in one sentence."""
    if "fid_mean" not in table or table["fid_mean"].isna().all():
        return []
    rows = table.dropna(subset="fid_mean").sort_values("fid_mean")
    each = [
        f"{row['model']} under {row['policy']}, {row['budget']} {row['fid_mean']:.1f} "
        f"± {row['fid_sd']:.1f}"
        for row in rows.to_dict("records")
    ]
    network = rows["extractor"].iloc[0].split()[0]
    return [
        f"FID in the features of {network}, {int(rows['seeds'].iloc[0])} seeds of "
        f"{int(rows['samples'].iloc[0])} images: {'; '.join(each)}."
    ]


def _ablations(table: pd.DataFrame) -> list[str]:
    """LineAR's policy under every choice of its options, best first."""
    sweep = table[table["policy"].str.startswith(RIVAL)]
    often = table["policy"].str.contains("every=1", regex=False)
    plain = (
        table["policy"].str.replace(r"every=1,?", "", regex=True).str.replace("()", "", regex=False)
    )
    return [
        "### LineAR's policy, every choice that its paper leaves open",
        "`anchor` first tokens and `recent` lines pinned, what is made of the attention it saw "
        "(`pool`), and how often it is asked (`every` so many tokens, instead of once per line); "
        "on held-out training images, so that test images choose nothing.",
        _wide(sweep).to_markdown(),
        "![ΔNLL for every choice of LineAR's options](../results/reference/ablations.png)",
        "### Asked at every token",
        "Scoring policies are asked once per line; with `every=1` at every token, as the papers of "
        "`h2o` and `tova` do. The same training images.",
        _wide(table[often | table["policy"].isin(plain[often])]).to_markdown(),
    ]


def _curve(path: Path) -> list[str]:
    """How few images a schedule needs, and whom else it serves, where that was measured."""
    if not path.exists():
        return []
    table = pd.read_csv(path)
    named = table.assign(cache=table["policy"] + ", " + table["budget"])
    return [
        "### How few images a schedule needs, and whom it serves",
        "ΔNLL of a model under a schedule that was calibrated on some training images, against its "
        "own full cache. *Without class* is the unconditional half of classifier-free guidance.",
        _by(named, ["model", "calibrated_on"], "cache"),
    ]


def _carried(reference: Path, name: str, title: str) -> list[str]:
    """The same of a model that went on on a larger grid, and what needs no calibration there."""
    files = [reference / f"{name}-{part}.csv" for part in ("likelihood", "calibration")]
    if not all(file.exists() for file in files):
        return []
    rows, curve = map(pd.read_csv, files)
    full = rows[rows["policy"] == "full"].iloc[0]
    others = rows[~rows["policy"].isin(["full", *curve["policy"]])]
    both = pd.concat([others.assign(calibrated_on="nothing"), curve[curve["model"] == BASE]])
    return [
        f"### {title}",
        f"ΔNLL by the schedule's calibration, on {int(full['likelihood_images'])} images; with a "
        f"full cache {full['nll']:.4f} nats/token.",
        _by(both, ["policy", "calibrated_on"], "budget"),
    ]


def _by(table: pd.DataFrame, keys: list[str], across: str) -> str:
    """ΔNLL ± half its interval, a row for every value of `keys`, in the table's order."""
    wide = table.assign(text=_deltas(table)).pivot(index=keys, columns=across, values="text")
    order = pd.MultiIndex.from_frame(table[keys].drop_duplicates())
    ordered = wide.loc[order, table[across].unique()].reset_index()
    return ordered.to_markdown(index=False)


def _deltas(table: pd.DataFrame) -> list[str]:
    return [with_half_interval(row, "nll_delta") for row in table.to_dict("records")]


def _wide(table: pd.DataFrame) -> pd.DataFrame:
    wide = table.assign(text=_deltas(table)).pivot(index="policy", columns="budget", values="text")
    values = table.pivot(index="policy", columns="budget", values="nll_delta")
    # By the budgets that most have; a policy that lacks one is ranked by its others.
    common = values.columns[values.notna().sum() > len(values) / 2]
    order = np.log(values[common].clip(lower=1e-6)).mean(axis=1).sort_values().index
    tokens = table.groupby("budget")["capacity"].first().sort_values().index
    return wide.loc[order, tokens].fillna("")


def certainty(table: pd.DataFrame, ranks: pd.DataFrame) -> list[str]:
    """Of each budget: ratios of ours to the rival and the oracle, and which neighbours are within
    noise, as `ranks` has them."""
    lines = []
    tokens = table.groupby("budget")["capacity"].first().sort_values().index
    for budget in tokens:
        at = table[table["budget"] == budget].set_index("policy")["nll_delta"]
        ratios = [
            f"{name} loses "
            + ", ".join(f"{at[name] / at[other]:.2f}× {other}" for other in OTHERS if other in at)
            for name in OURS
            if name in at and any(other in at for other in OTHERS)
        ]
        noise = _within_noise(ranks[ranks["budget"] == budget])
        if ratios or noise:
            lines.append(f"**{budget}**: {'; '.join(ratios)}{'. ' if ratios else ''}{noise}")
    return lines


def _within_noise(ranks: pd.DataFrame) -> str:
    """Which neighbours paired intervals do not tell apart."""
    names = ranks["policy"].tolist() if len(ranks) else []
    unsure = (ranks["behind_low"].iloc[1:] <= 0).tolist() if len(ranks) else []
    pairs = zip(names, names[1:], unsure, strict=False)
    close = [f"{better} and {worse}" for better, worse, meet in pairs if meet]
    if not close:
        return ""
    return f"Neighbours that paired intervals do not tell apart: {'; '.join(close)}."


@mpl.rc_context(STYLE)
def draw_policies(table: pd.DataFrame, path: Path) -> None:
    """ΔNLL of every policy against its budget, dropped and folded side by side; bars where there
    is one budget only."""
    limited = table[(table["policy"] != "full") & (table["model"] == BASE)]
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
            fmt=next((mark for split, mark in MARKS.items() if split in str(policy)), "o-"),
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


@mpl.rc_context(STYLE)
def draw_agreement(table: pd.DataFrame, path: Path) -> None:
    """FID against ΔNLL, every cache of the base model that images were drawn under; those are named
    that are not as good as the full cache."""
    rows = table[(table["model"] == BASE) & table["fid_mean"].notna()]
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    limited = rows[rows["policy"] != "full"]
    x = limited["nll_delta"].clip(lower=1e-4)
    axis.errorbar(x, limited["fid_mean"], yerr=limited["fid_sd"], fmt="o", ms=4, lw=1, capsize=2)
    full = rows[rows["policy"] == "full"]
    worse = limited["fid_mean"] > NEARLY * full["fid_mean"].max()
    for at, (_, row) in zip(x[worse], limited[worse].iterrows(), strict=True):
        name = f"{row['policy']}, {str(row['budget']).removeprefix('lines: ')}"
        axis.annotate(
            name, (at, row["fid_mean"]), xytext=(4, 3), textcoords="offset points", size=6
        )
    for _, row in full.iterrows():
        axis.axhline(row["fid_mean"], color="black", ls="--", lw=1, label="full cache")
    axis.set(xscale="log", yscale="log", xlabel="ΔNLL against the full cache, nats/token")
    axis.set_ylabel("FID (± sd over seeds)")
    axis.legend(fontsize=8)
    save(figure, path)


@mpl.rc_context(STYLE)
def draw_ablations(table: pd.DataFrame, path: Path) -> None:
    """ΔNLL of the rival's policy for every choice of its options but how often it is asked, a map
    for each budget."""
    once = ~table["policy"].str.contains("every=", regex=False)
    sweep = table[table["policy"].str.startswith(RIVAL) & once]
    defaults = {name: str(value) for name, value in vars(registry()[RIVAL]()).items()}
    options = pd.DataFrame(
        [{**defaults, **dict(re.findall(r"(\w+)=([\w.]+)", text))} for text in sweep["policy"]],
        index=sweep.index,
    )
    decayed = options["pool"] == "decayed"
    options["pool"] += ("\n" + options["decay"]).where(decayed, "")
    sweep = sweep.join(options)
    budgets = list(sweep["budget"].unique())
    figure, axes = plt.subplots(
        1, len(budgets), figsize=(4.2 * len(budgets), 4), layout="constrained", squeeze=False
    )
    for axis, budget in zip(axes[0], budgets, strict=True):
        wide = sweep[sweep["budget"] == budget].pivot(
            index=["anchor", "recent"], columns="pool", values="nll_delta"
        )
        shades = np.log(wide.clip(lower=1e-6)).to_numpy()
        axis.imshow(shades, cmap="viridis_r", aspect="auto")
        for (row, column), value in np.ndenumerate(wide.to_numpy()):
            text = "" if np.isnan(value) else f"{value:.4f}"
            dark = shades[row, column] > np.nanmean(shades)
            colour = "white" if dark else "black"
            axis.text(column, row, text, ha="center", va="center", size=7, color=colour)
        axis.set_xticks(range(wide.shape[1]), wide.columns)
        axis.set_yticks(range(len(wide)), [f"anchor {a}, recent {r}" for a, r in wide.index])
        axis.grid(False)
        axis.set_title(f"ΔNLL, nats/token, {budget}", size=9)
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
