"""Models adapted to their cache: the numbers of docs/adapting.md."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pandas as pd

from fewlines.config import BASE, STEPS
from fewlines.report.readable import with_half_interval, with_interval
from fewlines.report.tables import whole_images

ELSEWHERE = {  # other experiments of the same kind, and what they are
    "longer.csv": "From a base trained four times as long",
    "finer.csv": "On a grid of 28×28 tokens",
    "clipart.csv": "On colour clip art, 64×64 pixels",
}
APART = {  # adaptation taken apart, from the same base model
    "below-a-line.csv": "Below a line",
    "variants.csv": "Steps, parameters, loss, start, sinks",
}


def adapting_numbers(reference: Path) -> str:
    """What each adapted model loses against the full cache of `base+steps`, beside what the base
    model loses under the same cache."""
    parts = _section(pd.read_csv(reference / "cache.csv"))
    for name, title in (ELSEWHERE | APART).items():
        if (reference / name).exists():
            table = pd.read_csv(reference / name)
            if (table["model"] == STEPS).any():
                parts += [f"### {title}", *_section(table)]
    many = reference / "ten-thousand.csv"
    if many.exists():
        parts += ["### FID with ten thousand images of a seed", *_many_images(pd.read_csv(many))]
    cost = reference / "training-cost.csv"
    if cost.exists():
        parts += ["### What a step of training costs", *_training_cost(pd.read_csv(cost))]
    return "\n\n".join(parts)


def _section(table: pd.DataFrame) -> list[str]:
    rows = whole_images(table).to_dict("records")
    base = {(row["policy"], row["budget"]): row for row in rows if row["model"] == BASE}
    full = base["full", "all"]
    steps = next(row for row in rows if row["model"] == STEPS)
    made = []
    for row in rows:
        if row["model"].split(":")[0] == BASE:
            continue
        before = base[row["policy"], row["budget"]]
        made.append(
            {
                "model": row["model"],
                "trained for": row["trained_for"],
                "steps": int(row["extra_steps"]),
                "parameters": _how(row),
                "cache": row["policy"],
                "budget": row["budget"],
                "entries": int(row["capacity"]),
                "NLL": f"{row['nll']:.4f}",
                "ΔNLL before": f"{before['nll_delta']:+.4f}",
                "ΔNLL after": with_half_interval(row, "steps_delta"),
                "FID before": _fid(before),
                "FID after": _fid(row),
            }
        )
    readable = pd.DataFrame(made)
    if (readable[["FID before", "FID after"]] == "").all(axis=None):
        readable = readable.drop(columns=["FID before", "FID after"])
    return [
        f"Nats/token on {int(full['likelihood_images'])} held-out images: the base model "
        f"{full['nll']:.4f}, `base+steps`, trained for {int(steps['extra_steps'])} more steps with "
        f"a full cache, {steps['nll']:.4f}. *Before* is the base model under the cache against its "
        "own full cache; *after* is the adapted model under the cache against the full cache of "
        "`base+steps` after as many steps by the same loss, paired over images, with half the 95% "
        "interval.",
        readable.to_markdown(index=False, disable_numparse=True),
    ]


def _many_images(table: pd.DataFrame) -> list[str]:
    """Each row beside the full cache of the model that was trained as long by the same loss."""
    rows = table.to_dict("records")
    full = {_loss(row): row for row in rows if row["policy"] == "full"}
    readable = pd.DataFrame(
        {
            "model": row["model"],
            "cache": row["policy"],
            "budget": row["budget"],
            "NLL": f"{row['nll']:.4f}",
            "FID": _fid(row),
            "× full": f"{row['fid_mean'] / full[_loss(row)]['fid_mean']:.3f}",
            "KID": f"{row['kid_mean']:.2f}",
            "precision": f"{row['precision']:.3f}",
            "recall": f"{row['recall']:.3f}",
        }
        for row in rows
    )
    return [
        f"{int(rows[0]['samples'])} images of each of {int(rows[0]['seeds'])} seeds, ± their "
        "standard deviation. *× full* is against the full cache of the model trained as long by "
        "the same loss.",
        readable.to_markdown(index=False, disable_numparse=True),
    ]


def _loss(row: dict[Hashable, Any]) -> float | None:
    """Of the extra steps; None where there are none."""
    return None if row["model"] == BASE else row["distil"]


def _training_cost(table: pd.DataFrame) -> list[str]:
    readable = pd.DataFrame(
        {
            "grid": table["grid"].str.replace("x", "×"),
            "images of a step": table["images"],
            "cache": table["policy"],
            "budget": table["budget"],
            "seconds of a step": table["seconds_per_step"].map("{:.3f}".format),
            "speed-up": [with_interval(row, "speedup", ".2f") for row in table.to_dict("records")],
        }
    )
    first = table.iloc[0]
    return [
        "Forward, backward and optimisers of the default model on larger grids, with random codes, "
        "against full attention (torch's fused causal kernel): median and quartiles of "
        f"{int(first['repeats'])} steps, interleaved, {first['processor']}, float32.",
        readable.to_markdown(index=False, disable_numparse=True),
    ]


def _how(row: dict[Hashable, Any]) -> str:
    """What was trained: which parameters, by what loss, with what beside the published ones."""
    taught = f", {row['distil']:g} KL" if row["distil"] else ""
    rank, registers = (_count(row, name) for name in ("lora_rank", "registers"))
    low = f", rank {rank}" if rank else ""
    scratch = ", from scratch" if row.get("start") == "scratch" else ""
    kept = f", {registers} registers" if registers else ""
    return f"{row['trained']}{low}{scratch}{taught}{kept}"


def _count(row: dict[Hashable, Any], column: str) -> int:
    """A number that tables of older runs lack."""
    value = row.get(column)
    return 0 if value is None or pd.isna(value) else int(value)


def _fid(row: dict[Hashable, Any]) -> str:
    if pd.isna(row.get("fid_mean")):
        return ""
    return f"{row['fid_mean']:.2f} ± {row['fid_sd']:.2f}"
