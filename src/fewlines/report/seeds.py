"""How much of a result is the seed's: measured again, every training begun from another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from fewlines.config import BASE

LIKELIHOOD, QUALITY = "seeds.csv", "seeds-fid.csv"
RIVALS = ["linear", "oracle"]
CACHE = ["policy", "budget"]


def seed_numbers(reference: Path) -> list[str]:
    """What each cache loses on models of other seeds, beside the tracked run; nothing where
    `make seeds` has not run."""
    if not (reference / LIKELIHOOD).exists():
        return []
    others = pd.read_csv(reference / LIKELIHOOD)
    first = _as_far(pd.read_csv(reference / "cache.csv"), others)
    table = pd.concat([first, others], ignore_index=True)
    base = table[table["model"] == BASE]
    full = base[base["policy"] == "full"]
    parts = [
        "### Models of other seeds",
        f"The tracked run and {others['run'].nunique()} more, each with a tokenizer, a classifier "
        "and a model of its own seed: ΔNLL in nats/token against the model's own full cache, which "
        f"has {', '.join(f'{nll:.4f}' for nll in full['nll'])}; × is the ratio to a policy that "
        "drops, at the same budget, from the smallest to the largest of the seeds.",
        _losses(base[base["policy"] != "full"]).to_markdown(disable_numparse=True),
    ]
    trained = table[(table["model"] != BASE) & (table["policy"] != "full")]
    if len(trained):
        parts += [
            "Trained further for its cache, against the full cache trained as long by the same "
            "loss, ± half the 95% interval:",
            _wide(trained, "model", _with_interval(trained)).to_markdown(disable_numparse=True),
        ]
    if (reference / QUALITY).exists():
        parts += _quality(reference, pd.read_csv(reference / QUALITY))
    return parts


def _as_far(tracked: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The rows of the tracked run that other seeds have as well."""
    keys = ["model", *CACHE]
    wanted = others[keys].drop_duplicates()
    return tracked.merge(wanted, on=keys).assign(run="tracked")


def _losses(limited: pd.DataFrame) -> pd.DataFrame:
    """A row for each cache, a column for each run, and the ratios to the rivals."""
    wide = _wide(limited, CACHE, limited["nll_delta"].map("{:.4f}".format))
    losses = limited.pivot(index=CACHE, columns="run", values="nll_delta")
    for rival in losses.index.unique("policy").intersection(RIVALS):
        ratio = losses / losses.xs(rival, level="policy").reindex(losses.index, level="budget")
        wide[f"× {rival}"] = [_span(row) for row in ratio.loc[wide.index].to_numpy()]
    wide.index = pd.Index([", ".join(cache) for cache in wide.index], name="cache")
    return wide


def _quality(reference: Path, others: pd.DataFrame) -> list[str]:
    """FID of each run, in the features of its own classifier, and the ratio to its full cache."""
    first = _as_far(pd.read_csv(reference / "cache.csv"), others)
    table = pd.concat([first, others], ignore_index=True)
    name = table[["model", *CACHE]].agg(", ".join, axis=1)
    taught = table["distil"].fillna(0)  # the loss of the full cache that a row is compared with
    full = table[table["policy"] == "full"].assign(loss=taught)
    fid = full.set_index(["run", "loss"])["fid_mean"]
    of_full = [fid.get(key, np.nan) for key in zip(table["run"], taught, strict=True)]
    ratio = table["fid_mean"] / of_full
    text = [
        f"{mean:.2f} ± {sd:.2f} ({times:.2f}×)"
        for mean, sd, times in zip(table["fid_mean"], table["fid_sd"], ratio, strict=True)
    ]
    wide = _wide(table.assign(row=name), "row", pd.Series(text, table.index))
    wide.index.name = "model, cache"
    return [
        f"FID, {int(table['seeds'].iloc[0])} sampling seeds of {int(table['samples'].iloc[0]):,} "
        "images, mean ± sd, and the ratio to the full cache of the model trained as long by the "
        "same loss:",
        wide.to_markdown(disable_numparse=True),
    ]


def _wide(rows: pd.DataFrame, index: str | list[str], text: pd.Series[str]) -> pd.DataFrame:
    """Text by `index` and run, in the order of the rows."""
    wide = rows.assign(text=text).pivot(index=index, columns="run", values="text")
    order = rows.drop_duplicates(index).set_index(index).index
    return wide.loc[order, rows["run"].unique()].rename_axis(columns=None)


def _with_interval(rows: pd.DataFrame) -> pd.Series[str]:
    half = (rows["steps_delta_high"] - rows["steps_delta_low"]) / 2
    text = [f"{d:+.4f} ± {h:.4f}" for d, h in zip(rows["steps_delta"], half, strict=True)]
    return pd.Series(text, rows.index)


def _span(ratios: np.ndarray[tuple[int], np.dtype[np.float64]]) -> str:
    if np.isnan(ratios).all() or (ratios == 1).all():
        return ""
    return f"{np.nanmin(ratios):.2f} … {np.nanmax(ratios):.2f}"
