"""How much of a result is chance: measured again, every network trained anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from fewlines.config import BASE
from fewlines.report.readable import with_half_interval

LIKELIHOOD, QUALITY = "seeds.csv", "seeds-fid.csv"
RIVALS = ["linear", "oracle"]
CACHE = ["policy", "budget"]
HEADLINES = ["scheduled+fold, lines: 3", "scheduled+fold+summaries, lines: 2"]


def seed_numbers(reference: Path) -> list[str]:
    """What each cache loses on models of other seeds, beside the tracked run; nothing where
    `make seeds` has not run."""
    if not (reference / LIKELIHOOD).exists():
        return []
    table = _with_tracked(reference, LIKELIHOOD)
    base = table[table["model"] == BASE]
    full = base[base["policy"] == "full"]
    parts = [
        "### Trained anew",
        f"The tracked run and {table['run'].nunique() - 1} more, each with a tokenizer, a "
        "classifier and a model trained anew: from another seed, or (`avx2`) with other "
        "instructions, which round sums otherwise. ΔNLL in nats/token against the model's own full "
        f"cache, which has {', '.join(f'{nll:.4f}' for nll in full['nll'])}; × is the ratio to a "
        "policy that drops, at the same budget, from the smallest to the largest of the runs.",
        _losses(base[base["policy"] != "full"]).to_markdown(disable_numparse=True),
    ]
    trained = table[(table["model"] != BASE) & (table["policy"] != "full")]
    if len(trained):
        after = [with_half_interval(row, "steps_delta") for row in trained.to_dict("records")]
        parts += [
            "Trained further for its cache, against the full cache trained as long by the same "
            "loss, ± half the 95% interval:",
            _by_model(trained, after).to_markdown(disable_numparse=True),
        ]
    if (reference / QUALITY).exists():
        parts += _quality(_with_tracked(reference, QUALITY))
    return parts


def seed_claim(reference: Path) -> list[str]:
    """The span over seeds of what ours lose against the rivals, in a sentence."""
    if not (reference / LIKELIHOOD).exists():
        return []
    table = _with_tracked(reference, LIKELIHOOD)
    limited = table[(table["model"] == BASE) & (table["policy"] != "full")]
    losses = _losses(limited)
    ratios = losses.filter(like="× ")
    spans = [
        f"`{name}` loses " + ", ".join(f"{span}{rival}" for rival, span in of_cache.items())
        for name, of_cache in ratios.loc[ratios.index.intersection(HEADLINES)].iterrows()
    ]
    return [
        f"Over {table['run'].nunique()} runs, every network trained anew ([docs/policies.md]"
        f"(docs/policies.md#trained-anew)): {'; '.join(spans)}."
    ]


def _with_tracked(reference: Path, name: str) -> pd.DataFrame:
    """The rows of other seeds, and above them those that the tracked run has as well."""
    others = pd.read_csv(reference / name)
    keys = ["model", *CACHE]
    wanted = others[keys].drop_duplicates()
    first = pd.read_csv(reference / "cache.csv").merge(wanted, on=keys).assign(run="tracked")
    return pd.concat([first, others], ignore_index=True)


def _losses(limited: pd.DataFrame) -> pd.DataFrame:
    """A row for each cache, a column for each run, and the ratios to the rivals."""
    wide = _wide(limited, CACHE, [f"{loss:.4f}" for loss in limited["nll_delta"]])
    losses = limited.pivot(index=CACHE, columns="run", values="nll_delta")
    for rival in losses.index.unique("policy").intersection(RIVALS):
        ratio = losses / losses.xs(rival, level="policy").reindex(losses.index, level="budget")
        wide[f"× {rival}"] = [_span(row) for row in ratio.loc[wide.index].to_numpy()]
    wide.index = pd.Index([", ".join(cache) for cache in wide.index], name="cache")
    return wide


def _quality(table: pd.DataFrame) -> list[str]:
    """FID of each run, in the features of its own classifier, and the ratio to its full cache."""
    taught = table["distil"].fillna(0)  # the loss of the full cache that a row is compared with
    full = table[table["policy"] == "full"].assign(loss=taught)
    fid = full.set_index(["run", "loss"])["fid_mean"]
    of_full = [fid.get(key, np.nan) for key in zip(table["run"], taught, strict=True)]
    ratio = table["fid_mean"] / of_full
    text = [
        f"{mean:.2f} ± {sd:.2f} ({times:.2f}×)"
        for mean, sd, times in zip(table["fid_mean"], table["fid_sd"], ratio, strict=True)
    ]
    return [
        f"FID, {int(table['seeds'].iloc[0])} sampling seeds of {int(table['samples'].iloc[0]):,} "
        "images, mean ± sd, and the ratio to the full cache of the model trained as long by the "
        "same loss:",
        _by_model(table, text).to_markdown(disable_numparse=True),
    ]


def _by_model(rows: pd.DataFrame, text: list[str]) -> pd.DataFrame:
    names = rows[["model", *CACHE]].agg(", ".join, axis=1)
    return _wide(rows.assign(**{"model, cache": names}), "model, cache", text)


def _wide(rows: pd.DataFrame, index: str | list[str], text: list[str]) -> pd.DataFrame:
    """Text by `index` and run, in the order of the rows."""
    wide = rows.assign(text=text).pivot(index=index, columns="run", values="text")
    order = rows.drop_duplicates(index).set_index(index).index
    return wide.loc[order, rows["run"].unique()].rename_axis(columns=None)


def _span(ratios: np.ndarray[tuple[int], np.dtype[np.float64]]) -> str:
    if np.isnan(ratios).all() or (ratios == 1).all():
        return ""
    return f"{np.nanmin(ratios):.2f} … {np.nanmax(ratios):.2f}"
