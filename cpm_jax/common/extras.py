"""How the extras of `setup.cfg` are installed."""


def how_to_install(extra: str) -> str:
    """The command, for error messages; it is run in the folder of the repository, which no registry has.

    Args:
        extra: its name, or several with commas between them.
    """
    return f"pip install -e '.[{extra}]' -c constraints/py311.txt"
