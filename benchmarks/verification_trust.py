"""Whether efficient verification can be trusted: candidates of known quality, ranked by it and by whole trainings.

    python -m benchmarks.verification_trust [--gin_file FILE] [--gin.NAME=VALUE …] [--workdir DIR] [--seconds N]

The size of the study is a gin file: `papers/minicpm4/verification_trust.gin` (half an hour of two idle cores),
`…_3h.gin` and `…_gpu.gin`. Cells are kept in the workdir, so that it may run in pieces of `--seconds`; the last writes
`results/<name of the gin file>.json`. `--prepare` only writes the workdir's `recipe.json` and `corpora.npz`, which are
all that a machine without the packages needs, and without gin: there, give the workdir alone.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import Benchmark
from benchmarks.verification_trust_report import add_rows, analyse
from benchmarks.verification_trust_study import Recipe, Study, prepare
from cpm_jax.common.config import ConfigError, config_differences, config_from_dict, config_to_dict
from cpm_jax.common.files import write_json

GIN_FILE = "papers/minicpm4/verification_trust.gin"


class Sized(NamedTuple):
    """A study of some size.

    Attributes:
        name: of its results.
        recipe: the size.
    """

    name: str
    recipe: Recipe


def read_recipe(gin_file: str, flags: Sequence[str]) -> Sized:
    """What a gin file and flags ask for."""
    from cpm_jax.common.gin_utils import Settings

    return Sized(Path(gin_file).stem, Settings([gin_file], flags, Recipe).build())


def claim(workdir: Path, asked: Sized | None) -> Sized:
    """Takes a workdir for a study, or finds the one that it was taken for.

    Args:
        workdir: of the cells.
        asked: the study; None takes the workdir's.

    Raises:
        ConfigError: it was taken for another study, or for none where none is asked for.
    """
    path = workdir / "recipe.json"
    if not path.exists():
        if asked is None:
            raise ConfigError(f"{workdir} holds no recipe.json: give a --gin_file")
        write_json(path, {"name": asked.name, "recipe": config_to_dict(asked.recipe)})
        return asked
    saved = json.loads(path.read_text("utf-8"))
    found = Sized(saved["name"], config_from_dict(Recipe, saved["recipe"]))
    if asked and asked != found:
        changed = config_differences(saved["recipe"], config_to_dict(asked.recipe))
        said = "; ".join(f"{name}: {was!r} there, now {now!r}" for name, (was, now) in changed.items())
        raise ConfigError(f"{workdir} holds the study {found.name}: {said or asked.name}; take another --workdir")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is left of the study, for as long as is allowed, and writes its results when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", help=f"the size; {GIN_FILE} if neither this nor a workdir is given")
    parser.add_argument("--corpora", type=Path, default=Path("runs/corpora"), help="where packages are unpacked")
    parser.add_argument("--workdir", type=Path, help="of the cells; else runs/<name of the gin file>")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell after this time")
    parser.add_argument("--prepare", action="store_true", help="only make recipe.json and corpora.npz")
    args, flags = parser.parse_known_args(argv)
    if unknown := [flag for flag in flags if not flag.startswith("--gin.")]:
        parser.error(f"unknown: {' '.join(unknown)}")
    deadline = time.monotonic() + args.seconds
    gin_file = args.gin_file or (None if args.workdir and not flags else GIN_FILE)
    asked = read_recipe(gin_file, flags) if gin_file else None
    workdir = args.workdir or Path("runs") / Path(gin_file or GIN_FILE).stem
    name, recipe = claim(workdir, asked)
    if not (workdir / "corpora.npz").exists():
        prepare(recipe, args.corpora, workdir / "corpora.npz")
    if args.prepare:
        return
    study = Study(recipe, workdir)
    if not study.run(deadline):
        left = sum(not study.path(*cell).exists() for cell in study.cells())
        print(f"{left} of {len(study.cells())} cells are left; the same command goes on")
        return
    result = analyse(study)
    write_json(workdir / "analysis.json", result)
    print(json.dumps(result, indent=1))
    bench = Benchmark(name, f"python -m benchmarks.verification_trust --gin_file=papers/minicpm4/{name}.gin")
    add_rows(bench, result)
    bench.write()


if __name__ == "__main__":
    main()
