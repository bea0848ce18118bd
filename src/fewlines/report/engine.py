"""The numbers of docs/engine.md, from the tracked tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from fewlines.cache.placement import cache as make_cache
from fewlines.measure.operators import DEVICES, Decode
from fewlines.models.shapes import published_shape
from fewlines.report.efficiency import caps_table
from fewlines.report.readable import readable_table

PAPER_TIME, PAPER_MEMORY = 3.17, 3.28
PLANNED = (
    ("llamagen-b", (64, 64), 32, {"lines": 4}),
    ("llamagen-b", (96, 96), 32, {"lines": 4}),
    ("llamagen-xl", (24, 24), 512, {"fraction": "1/6"}),
    ("llamagen-xl", (64, 64), 64, {"lines": 4}),
)


def engine_numbers(reference: Path) -> str:
    """Everything measured, and what the cost model makes of it."""
    table = pd.read_csv(reference / "efficiency.csv")
    choices = pd.read_csv(reference / "choices.csv")
    scaling = pd.read_csv(reference / "scaling.csv")
    facts = table.iloc[0]
    return "\n\n".join(
        [
            f"Measured on {facts['processor']} ({facts['instructions']}) with {facts['cores']} "
            f"cores, torch {facts['torch']}.",
            "### Attention: GB/s of keys and values, read from memory",
            _rates(choices, "attention", ["rows", "entries"], 1e-9),
            "### Linear layers of a LlamaGen-B step: GFLOP/s",
            _rates(choices, "linear", ["rows"], 1e-9),
            "### Decoding",
            "Seconds per image, decode peak above the weights; `allowed` is the speed-up over "
            "lean full that the roofline of this machine permits; × is full ÷ this row.",
            _decoding(table),
            "### Where a step's time goes",
            _shares(table),
            "### Exponents in the number of tokens",
            readable_table(scaling).to_markdown(index=False),
            "### What follows",
            *_findings(table),
            "### Under a memory cap (LlamaGen-B, 64×64)",
            _caps(table),
            "### Other devices, by the cost model (bf16, 85% of the bandwidth, 60% of the rate)",
            _planned(),
            *_on_gpu(reference / "gpu.csv"),
        ]
    )


def _on_gpu(path: Path) -> list[str]:
    """What `make gpu` measured, where it has."""
    if not path.exists():
        return []
    table = pd.read_csv(path)
    facts, whole = table.iloc[0], table["integration_error"].abs()
    # A probe of a GPU may find its clock low: what reading takes is by the best of the run.
    best = table["bandwidth"].max()
    bound = table["linear_seconds"] + table["read_seconds"] * table["bandwidth"] / best
    setting = [table[name] for name in ("shape", "grid", "batch")]
    full = bound.groupby(setting).transform("first")  # lean full comes first
    shown = readable_table(table.assign(memory_saving=table["memory_saving_lean"]))
    shown["ms/image"] = (1e3 * table["seconds_per_image"]).map("{:.2f}".format)
    shown["decode peak GB"] = (1e-9 * table["peak_bytes"]).map("{:.2f}".format)
    shown["roofline"] = (bound / table["seconds_per_image"]).map("{:.2f}".format)
    shown["allowed"] = (full / bound).map("{:.2f}".format)
    names = [
        "shape", "grid", "batch", "engine", "policy", "budget", "ms/image", "decode peak GB",
        "roofline", "× time vs lean", "allowed", "× time vs stock", "× memory",
    ]  # fmt: skip
    return [
        f"### On a GPU: {facts['gpu']}, {facts['dtype']}",
        f"torch {facts['torch']}; one run, each row a process of its own. `roofline` and `allowed` "
        "as above, by the linear layers at that batch, replayed by a CUDA graph, and the best "
        f"bandwidth that the run measured, {1e-12 * best:.1f} TB/s; whole images took what their "
        f"steps add up to within {whole.max():.0%}.",
        shown[names].to_markdown(index=False),
        gpu_gain(table),
    ]


def gpu_gain(table: pd.DataFrame) -> str:
    """Where a few lines gain most on a GPU, in a sentence."""
    most = table[table["policy"] != "full"].sort_values("speedup_lean").iloc[-1]
    same = table[
        (table[["shape", "grid", "policy"]] == most[["shape", "grid", "policy"]]).all(axis=1)
    ]
    least = same.sort_values("speedup_lean").iloc[0]
    return (
        f"On {most['gpu']} in {most['dtype']}, {most['shape']} with random weights at "
        f"{most['grid']} tokens and batch {most['batch']}: `{most['policy']}`, {most['budget']}, "
        f"draws an image in {1e3 * most['seconds_per_image']:.0f} ms, "
        f"1/{most['speedup_lean']:.1f} of the time of lean full and "
        f"1/{most['speedup_stock']:.1f} of stock, in {1e-9 * most['peak_bytes']:.1f} GB, "
        f"1/{most['memory_saving_lean']:.0f} of the memory. At batch {least['batch']} it takes "
        f"1/{least['speedup_lean']:.1f} of the time of lean full and "
        f"1/{least['speedup_stock']:.1f} of stock."
    )


def _rates(choices: pd.DataFrame, what: str, index: list[str], scale: float) -> str:
    rates = choices[choices["what"] == what].assign(rate=lambda found: found["rate"] * scale)
    wide = rates.pivot_table(index=index, columns=["how", "dtype"], values="rate", sort=False)
    wide.columns = pd.Index([", ".join(map(str, names)) for names in wide.columns.to_list()])
    numbers = wide.reset_index()
    numbers[index] = numbers[index].astype(int).astype(str)
    return numbers.to_markdown(index=False, floatfmt=".1f")


def _decoding(table: pd.DataFrame) -> str:
    shown = readable_table(table.assign(memory_saving=table["memory_saving_lean"]))
    shown["s/image"] = [
        "" if pd.isna(value) else f"{value:.3f}" for value in table["seconds_per_image"]
    ]
    shown["precision"] = [
        dtype if dtype == storage else f"{dtype}, kept in {storage}"
        for dtype, storage in zip(table["dtype"], table["storage"], strict=True)
    ]
    names = [
        "shape", "grid", "batch", "precision", "engine", "policy", "budget", "outcome", "s/image",
        "decode peak MB", "roofline", "× time vs lean", "allowed", "× time vs stock", "× memory",
    ]  # fmt: skip
    return shown[names].to_markdown(index=False)


def _shares(table: pd.DataFrame) -> str:
    names = [str(name) for name in table if str(name).startswith("share_")]
    rows = table[(table["grid"] == "64x64") & table["memory_cap"].isna()].dropna(subset=names)
    keys = ["shape", "batch", "dtype", "storage", "engine", "policy", "budget"]
    shown = rows[keys].copy()
    for name in names:
        shown[name.removeprefix("share_")] = rows[name].map("{:.0%}".format)
    return shown.to_markdown(index=False)


def _findings(table: pd.DataFrame) -> list[str]:
    measured = table[table["outcome"] == "ok"]
    ours = measured[~measured["engine"].str.startswith("hf")]
    seconds = (ours["predicted_seconds"] / ours["seconds_per_image"] - 1).abs().median()
    peaks = (ours["predicted_peak_bytes"] / ours["peak_bytes"] - 1).abs().median()
    error = ours["integration_error"].abs()
    found = [
        f"The cost model's median error over {len(ours)} rows is {seconds:.0%} in time and "
        f"{peaks:.0%} in memory. Whole images took what their steps add up to, within "
        f"{error.median():.1%} (median) and {error.max():.1%} (worst of {error.count()})."
    ]
    few = measured[(measured["policy"] != "full") & (measured["shape"] == "llamagen-b")]
    for engine in ("lean", "stock"):
        holds = few[
            (few[f"speedup_{engine}"] >= PAPER_TIME)
            & (few[f"memory_saving_{engine}"] >= PAPER_MEMORY)
        ].sort_values(["n_tokens", "batch"])
        if len(holds):
            first = holds.iloc[0]
            where = (
                f"from {first['grid']} tokens and batch {first['batch']} on "
                f"(kept in {first['storage']}; policy {first['policy']})"
            )
        else:
            where = "nowhere in this table"
        found.append(
            f"The paper's {PAPER_TIME}× in time and {PAPER_MEMORY}× in memory hold against "
            f"{engine} full {where}."
        )
    return found


def _caps(table: pd.DataFrame) -> str:
    caps = caps_table(table)
    shown = caps.assign(
        **{
            name: ["" if pd.isna(speed) else f"{speed:.3f}" for speed in caps[name]]
            for name in ("images/s, predicted", "images/s, measured")
        }
    )
    return shown.to_markdown(index=False)


def _planned() -> str:
    rows = []
    for shape, grid, batch, budget in PLANNED:
        few = Decode(
            published_shape(shape).on(grid), batch, make_cache("streaming", **budget), 2, 2
        )
        full = replace(few, cache=make_cache("full"))
        for name in ("h200", "a100"):
            device = DEVICES[name]
            rows.append(
                {
                    "device": name,
                    "shape": shape,
                    "grid": "{}x{}".format(*grid),
                    "rows": batch,
                    "budget": few.cache.budget_text,
                    "full GB": f"{full.process_bytes / 1e9:.1f}",
                    "few lines GB": f"{few.process_bytes / 1e9:.1f}",
                    "full s/row": f"{full.seconds(device) / batch:.4f}",
                    "few lines s/row": f"{few.seconds(device) / batch:.4f}",
                    "× time": f"{full.seconds(device) / few.seconds(device):.2f}",
                    "× memory": f"{full.process_bytes / few.process_bytes:.2f}",
                }
            )
    return pd.DataFrame(rows).to_markdown(index=False)
