"""The libraries of the extra `sweep`, imported where they are needed."""

import importlib
from typing import Any

from cpm_jax.common.config import InputError
from cpm_jax.common.extras import how_to_install


def import_extra(module: str) -> Any:
    """Imports a module of the extra.

    Raises:
        InputError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{module} is needed here: {how_to_install('sweep')} ({error})") from error
