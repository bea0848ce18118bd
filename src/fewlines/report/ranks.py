"""Which ranks are certain, in sentences."""

from __future__ import annotations

import pandas as pd


def describe_ranks(ranks: pd.DataFrame) -> list[str]:
    """Describe, of each budget, the best policy and the neighbours that paired intervals do not
    tell apart.

    Args:
        ranks: the table of ranks.
    """
    sentences = []
    for budget, rows in ranks.groupby("budget", sort=False):
        best = rows.iloc[0]
        names, unsure = rows["policy"].tolist(), (rows["behind_low"] <= 0).tolist()
        pairs = zip(names, names[1:], unsure[1:], strict=False)
        close = [f"{better} and {worse}" for better, worse, meet in pairs if meet]
        told = f"; not told apart: {', '.join(close)}" if close else ""
        lost = f"{best['nll_delta']:+.4f} nats/token"
        sentences.append(f"{budget}: best of {len(rows)} is {best['policy']} ({lost}){told}.")
    return sentences
