"""What `<verb> --help` prints: the macros of a verb and the gin files that set them, read as text."""

from cpm_jax.common.gin_files import GIN_ROOT, LAYERS, REQUIRED, GinFile, list_gin_files, read_gin_file


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
            macros = sorted(set().union(*(_set(f) for f in layers[layer])))
            lines += ["", f"{layer}/ (sets {', '.join(macros)})"]
            lines += [f"  {f.name:<28}{_title(f)}" for f in layers[layer]]
    others = [read_gin_file(p) for folder in ("runs", "papers") for p in list_gin_files(folder)]
    lines += ["", "run files"]
    lines += [f"  {f.name:<28}{_title(f)}" for f in others]
    return "\n".join(lines)


def _macro_table(file: GinFile) -> list[str]:
    rows = []
    for setting in file.settings:
        if setting.is_macro:
            value = "REQUIRED" if setting.value == REQUIRED else repr(setting.value)
            rows.append((value != "REQUIRED", f"  {setting.name:<20}{value:<24}{setting.comment}".rstrip()))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


def _title(file: GinFile) -> str:
    return file.header.partition("\n")[0]


def _set(file: GinFile) -> set[str]:
    return {s.name for s in file.settings if s.is_macro and s.value != REQUIRED}


def _used(file: GinFile) -> set[str]:
    return {r.name for s in file.settings for r in s.references if r.is_macro and r != REQUIRED}
