"""The extras of `setup.cfg`: how they are installed, and their libraries, imported where they are needed."""

import importlib
from typing import Any

from cpm_jax.common.config import InputError


def how_to_install(extra: str) -> str:
    """The command, for error messages; it is run in the folder of the repository, which no registry has.

    Args:
        extra: its name, or several with commas between them.
    """
    return f"pip install -e '.[{extra}]' -c constraints/py311.txt"


def import_extra(module: str, extra: str, error: type[InputError] = InputError) -> Any:
    """Imports a module of an extra.

    Args:
        module: its name.
        extra: the one that has it.
        error: to raise.

    Raises:
        InputError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise error(f"{module} is needed here: {how_to_install(extra)} ({missing})") from missing
