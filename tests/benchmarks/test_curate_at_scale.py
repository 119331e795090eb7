"""What curating a trillion tokens would cost, from known rates."""

import pytest

from benchmarks.curate_at_scale import Rates, plan
from cpm_jax.curation.dedup import DedupConfig


def test_the_plan_follows_from_the_rates():
    rates = Rates(filter_bytes=4.4e6, write_bytes=4.4e7, kept=0.5, staged=0.25, decide_seconds=1e-3, shuffled=500)
    costs = plan(rates, 690e6, DedupConfig())  # a million documents, 3.036 GB
    assert costs == pytest.approx(
        {
            "filter, core hours": 690 / 3600,
            "find duplicates, core hours": 500 / 3600,
            "write, core hours": 34.5 / 3600,
            "core hours": 1224.5 / 3600,
            "documents and scores between the stages, TB": 759e-6,
            "keys, TB": 500_000 * 8 * 20 / 1e12,
            "shuffles, TB": 250e-6,
        }
    )
