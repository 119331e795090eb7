"""What `<verb> --help` prints: the macros of a verb and the gin files that set them, read as text."""

import re
import textwrap
from collections.abc import Sequence

from cpm_jax.common.gin_files import GIN_ROOT, LAYERS, REQUIRED, GinFile, list_gin_files, read_gin_file

_WIDTH = 118


def verb_help(verb: str, summary: str) -> str:
    """Describes a verb.

    Args:
        verb: name of the verb; its run file is `gin_configs/runs/<verb>.gin`.
        summary: one line about it.

    Returns:
        The run file's own words, its macros, and the files of every layer that sets a macro it still needs.
    """
    run_file = read_gin_file(GIN_ROOT / "runs" / f"{verb}.gin")
    lines = [f"{verb}: {summary}", "", run_file.header, "", "macros of runs/" + run_file.path.name + ":"]
    lines += _macro_table(run_file)
    missing = _used(run_file) - _set(run_file)
    layers = {layer: [read_gin_file(path) for path in list_gin_files(layer)] for layer in LAYERS}
    needed: set[str] = set()
    for _ in LAYERS:  # arch needs size, and so on: until nothing is added
        for layer, files in layers.items():
            if layer not in needed and any(_set(f) & missing for f in files):
                needed.add(layer)
                missing |= set().union(*(_used(f) for f in files))
    for layer in LAYERS:
        if layer in needed:
            elsewhere = set().union(*(_set(f) for other in needed - {layer} for f in layers[other]))
            asked = {s.name: s.comment for f in layers[layer] for s in f.settings if s.value == REQUIRED}
            sets = "sets " + ", ".join(sorted(set().union(*(_set(f) for f in layers[layer]))))
            lines += ["", f"{layer}/", *textwrap.wrap(sets, _WIDTH, initial_indent="  ", subsequent_indent="  ")]
            lines += [f"  asks for {name}: {about}" for name, about in asked.items() if name not in elsewhere]
            lines += _file_table(layers[layer])
    others = [read_gin_file(path) for folder in ("runs", "papers") for path in list_gin_files(folder)]
    lines += ["", f"run files of {verb}", *_file_table([f for f in others if f"experiments.run {verb} " in f.header])]
    return "\n".join(lines)


def _file_table(files: Sequence[GinFile]) -> list[str]:
    width = max(len(f.name) for f in files) + 2
    return [f"  {f.name:<{width}}{textwrap.shorten(_title(f), _WIDTH - width, placeholder=' …')}" for f in files]


def _macro_table(file: GinFile) -> list[str]:
    rows = []
    for setting in file.settings:
        if setting.is_macro:
            value = "REQUIRED" if setting.value == REQUIRED else repr(setting.value)
            row = f"  {setting.name:<22}{value:<11} {setting.comment}".rstrip()
            rows.append((value != "REQUIRED", textwrap.wrap(row, _WIDTH, subsequent_indent=" " * 24)))
    return [line for _, lines in sorted(rows, key=lambda row: row[0]) for line in lines]


def _title(file: GinFile) -> str:
    """The first sentence of the header."""
    return re.split(r"(?<=[^ ]{3})\.(?: |$)", file.header.replace("\n", " "), maxsplit=1)[0]


def _set(file: GinFile) -> set[str]:
    return {s.name for s in file.settings if s.is_macro and s.value != REQUIRED}


def _used(file: GinFile) -> set[str]:
    return {r.name for s in file.settings for r in s.references if r.is_macro and r != REQUIRED}
