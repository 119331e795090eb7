"""What `sparse_quality` measures of a row, and how it is kept on disk."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from benchmarks.block_rules import Rule

Weights = Literal["published", "trained_dense", "trained_sparse"]


class Cell(NamedTuple):
    """What is measured of each row.

    Attributes:
        weights: as published, or after training.
        rule: how blocks are chosen.
        blocks: how many of 64 keys a query sees; 0 of "dense".
        length: tokens of the row.
        rope: "plain", or "yarn" where the rotary embedding is stretched to the length.
    """

    weights: Weights
    rule: Rule
    blocks: int
    length: int
    rope: Literal["plain", "yarn"]


class Measured(NamedTuple):
    """A row as one cell ran it.

    Attributes:
        losses: of each token but the first, in nats.
        origin: commit, date and machine, as `benchmarks.results.origin` gives them.
        shares: of dense attention, by layer, rule, number of blocks, head and query; None where not asked for.
    """

    losses: Float[np.ndarray, " T"]
    origin: Mapping[str, Any]
    shares: Float[np.ndarray, "L rules budgets N R"] | None = None

    @staticmethod
    def path(work: Path, cell: Cell, row: str) -> Path:
        """Where it is kept."""
        return work / "cells" / f"{'-'.join(map(str, cell))}-{row}.npz"

    def save(self, work: Path, cell: Cell, row: str) -> None:
        """Keeps it, whole or not at all."""
        path = self.path(work, cell, row)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"losses": self.losses, "origin": np.array(json.dumps(self.origin))}
        if self.shares is not None:
            arrays["shares"] = self.shares
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(path.with_suffix(".tmp"), path)

    @classmethod
    def load(cls, work: Path, cell: Cell, row: str) -> "Measured":
        """Reads it back."""
        with np.load(cls.path(work, cell, row)) as file:
            origin = json.loads(str(file["origin"]))
            return cls(file["losses"], origin, file.get("shares"))
