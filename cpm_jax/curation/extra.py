"""The libraries of the extra `curate`, imported where they are needed."""

import importlib
from typing import Any

from cpm_jax.common.extras import how_to_install
from cpm_jax.data.errors import DataError


def import_extra(module: str) -> Any:
    """Imports a module of the extra.

    Raises:
        DataError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{module} is needed here: {how_to_install('curate')} ({error})") from error
