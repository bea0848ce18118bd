"""How a cache must grow with the grid."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fewlines.cli import main
from fewlines.report.grids import fit_growth, predict_capacities, read_grids


def make_table(width, growth, model="base", policy="streaming"):
    """Caches of two to four lines that lose as much as they should, and one that loses nothing."""
    rows = []
    for lines in (4, 3, 2, width):
        capacity = lines * width
        delta = (capacity / width**growth) ** -2.0 if lines < width else 0.0
        delta *= 1 + 1e-4 * (-1) ** lines  # no fit is exact
        ends = {"": delta, "_low": delta * 0.9, "_high": delta * 1.1}
        row = {"model": model, "policy": policy, "budget": f"lines: {lines}", "task": np.nan}
        row |= {"capacity": capacity, "grid": f"{width}x{width}", "n_tokens": width**2}
        for name in ("nll_delta", "steps_delta"):
            row |= {name + end: value for end, value in ends.items()}
        rows.append(row | ({"nll_delta": 5.0} if model != "base" else {}))
    return pd.DataFrame(rows)


def write(folder, *tables):
    paths = [folder / f"{number}.csv" for number in range(len(tables))]
    for table, path in zip(tables, paths, strict=True):
        table.to_csv(path, index=False)
    return paths


@pytest.mark.parametrize("growth", [0, 1, 1.4, 2])
def test_the_exponent_of_made_losses_is_found(growth, tmp_path):
    paths = write(tmp_path, *(make_table(width, growth) for width in (8, 16, 32)))
    (row,) = fit_growth(read_grids(paths)).to_dict("records")
    assert row["growth"] == pytest.approx(growth, abs=1e-2)
    assert row["growth_low"] <= row["growth"] <= row["growth_high"]
    assert row["slope"] == pytest.approx(2, abs=1e-2)
    assert (row["grids"], row["points"]) == ("8x8, 16x16, 32x32", 9)


@pytest.mark.parametrize("growth", [0, 1, 1.4, 2])
def test_what_a_cache_must_hold_on_another_grid_is_what_it_was_made_with(growth, tmp_path):
    paths = write(tmp_path, *(make_table(width, growth) for width in (8, 16, 32)))
    fits = fit_growth(read_grids(paths))
    (row,) = predict_capacities(fits, 64, 0.25).to_dict("records")
    assert row["capacity"] == pytest.approx(min(2 * 64**growth, 4096), rel=0.05, abs=1)
    assert row["lines"] == row["capacity"] / 64
    (whole,) = predict_capacities(fits, 64, 1e-9).to_dict("records")
    assert (whole["capacity"], whole["share"]) == (4096, 1.0)


def test_plan_says_what_another_grid_needs(tmp_path, capsys):
    paths = write(tmp_path, make_table(8, 1), make_table(16, 1))
    assert main(["grids-table", *(f"--table={each}" for each in paths), f"--run={tmp_path}"]) == 0
    fits = tmp_path / "tables/grids.csv"
    assert main(["plan", f"--growth={fits}", "--grid=64", "--loss=0.25"]) == 0
    assert "streaming" in (said := capsys.readouterr().out)
    assert "8x8, 16x16" in said
    assert main(["plan", f"--growth={fits}"]) == 2
    assert "--grid" in capsys.readouterr().err
    assert main(["plan", f"--growth={paths[0]}", "--grid=64"]) == 2
    assert "a grids.csv has it" in capsys.readouterr().err


def test_adapted_models_are_compared_with_as_many_steps_and_one_grid_is_no_growth(tmp_path):
    of_two = [make_table(width, 1, "adapted", "scheduled+merge") for width in (8, 16)]
    paths = write(tmp_path, pd.concat([of_two[0], make_table(8, 1)]), of_two[1])
    (row,) = fit_growth(read_grids(paths)).to_dict("records")
    assert (row["model"], row["policy"]) == ("adapted", "scheduled+merge")
    assert row["growth"] == pytest.approx(1, abs=1e-2)


def test_the_table_and_the_figure_are_written_and_another_table_is_refused(tmp_path, capsys):
    paths = write(tmp_path, make_table(8, 1), make_table(16, 1))
    given = [f"--table={path}" for path in paths]
    assert main(["grids-table", *given, f"--run={tmp_path}"]) == 0
    assert len(pd.read_csv(tmp_path / "tables/grids.csv")) == 1
    assert len(pd.read_csv(tmp_path / "figures/grids.csv")) == 6
    assert (tmp_path / "figures/grids-dark.png").read_bytes().startswith(b"\x89PNG")
    make_table(8, 1).drop(columns="grid").to_csv(paths[0])
    assert main(["grids-table", *given, f"--run={tmp_path}"]) == 2
    assert "lacks the column grid" in capsys.readouterr().err
    assert main(["grids-table", f"--table={tmp_path / 'none.csv'}", f"--run={tmp_path}"]) == 2
    assert "none.csv" in capsys.readouterr().err
