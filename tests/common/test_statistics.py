import pytest

from cpm_jax.common.statistics import holm


def test_holm_by_hand():
    # S. Holm (1979): the smallest p times m, the next times m - 1, and never less than the one before.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
