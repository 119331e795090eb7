import pytest

from cpm_jax.common.config import InputError
from cpm_jax.scaling.extra import import_extra


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(InputError, match=r"optuna is needed here: pip install -e '\.\[sweep\]'"):
        import_extra("optuna")
