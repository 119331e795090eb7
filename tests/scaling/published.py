"""Published points, as `data/README.md` describes them."""

import csv
from pathlib import Path

import numpy as np

from cpm_jax.scaling.laws import Points, make_points

DATA = Path(__file__).parent / "data"


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a table."""
    with (DATA / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def columns(table: list[dict[str, str]], *names: str) -> list[np.ndarray]:
    """Columns as numbers."""
    return [np.array([float(row[name]) for row in table]) for name in names]


def gadre(dataset: str, chosen: str = "all") -> list[dict[str, str]]:
    """Models of one training set: "all", "small" (below 1B), "large", or the "five" that the paper fits."""
    found = [row for row in rows("gadre2024.csv") if row["dataset"] == dataset]
    if chosen == "all":
        return found
    large = [row for row in found if row["model"].startswith("open_lm")]
    small = [row for row in found if row not in large]
    five = [
        row
        for row in small
        if (row["multiplier"], row["model"][:4]) == ("16.0", "d=96") or float(row["multiplier"]) == 1
    ]
    return {"small": small, "large": large, "five": five}[chosen]


def gadre_points(table: list[dict[str, str]]) -> Points:
    """Their points."""
    return make_points(*columns(table, "num_params", "tokens", "c4_val_loss"))
