"""One checkpoint, equal logits, in every runtime, in one table: `make parity`, or `python -m benchmarks.parity`.

Rows are checkpoints (`parity_checkpoints.py`), columns runtimes (`parity_runtimes.py`); `parity_cells.py` says how a
cell is judged. Every cell that is done stays in the folder of `--work`, and is not done again for the same commit and
checkpoint. The exit code is not 0 where a cell differs or fails and, with `--strict`, where a runtime is not installed.
"""

import argparse
import dataclasses
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import native_runtime
from benchmarks.parity_cells import RED, Cell, Judge, compare, judge_cell
from benchmarks.parity_checkpoints import (
    CHECKPOINTS,
    FULL,
    REDUCED,
    Scale,
    held_out_rows,
)
from benchmarks.parity_report import summary, write_report
from benchmarks.parity_runtimes import RUNTIMES, Exported, Format, Runtime, ask, write_format
from benchmarks.parity_worker import CHUNK, Job
from benchmarks.results import RESULTS_DIR
from cpm_jax.common import provenance
from cpm_jax.common.files import write_json
from export.checks import read_export

PROMPT, NEW = CHUNK, 256  # tokens
CAPACITY = PROMPT + NEW
# Each runtime, and each kind of attention and of weights, where no program is compiled a second time.
REDUCED_CELLS = {
    "MiniCPM, dense": (
        "jax", "transformers", "llama_cpp", "llama_cpp_packed", "stablehlo", "torch_runtime", "native",
    ),
    "MiniCPM, sparse": ("jax", "transformers", "llama_cpp", "torch_runtime", "native"),
    "MiniCPM, GPTQ": ("torch_runtime", "native"),
}  # fmt: skip


class Matrix:
    """The cells of some checkpoints and runtimes."""

    def __init__(self, scale: Scale, work: Path, wanted: Mapping[str, Sequence[str]]):
        """Makes or loads the checkpoints.

        Args:
            scale: of the small ones.
            work: for checkpoints, exports, and the cells that are done.
            wanted: runtimes of each checkpoint.
        """
        self._work, self._wanted = work, wanted
        self._checkpoints = {name: CHECKPOINTS[name](scale, work) for name in wanted}
        self._judges = {
            name: Judge(
                found.config,
                found.params,
                held_out_rows(found.tokenizer, scale, CAPACITY),
                PROMPT,
                (found.tokenizer.eos_id,),
            )
            for name, found in self._checkpoints.items()
        }
        self._exported: dict[tuple[str, Format], Exported | str] = {}
        self._keys: dict[str, dict[str, Any]] = {
            name: {"commit": provenance.git_revision(), "sha256": found.sha256, "scale": dataclasses.asdict(scale)}
            for name, found in self._checkpoints.items()
        }

    def run(self) -> Iterator[Cell]:
        """All cells, a runtime after the other; those that are done are read."""
        for name in RUNTIMES:
            rows = [row for row, runtimes in self._wanted.items() if name in runtimes]
            done = {row: cell for row in rows if (cell := self._load(row, name)) is not None}
            yield from done.values()
            todo = [row for row in rows if row not in done]
            if todo and (words := RUNTIMES[name].missing()):
                yield from (Cell(row, name, "gap", words) for row in todo)
            elif todo:
                for cell in self._column(name, todo):
                    write_json(self._file(cell.checkpoint, name), asdict(cell) | {"key": self._keys[cell.checkpoint]})
                    yield cell

    def _column(self, name: str, rows: Sequence[str]) -> Iterator[Cell]:
        """The cells of a runtime that are not done."""
        runtime, program = RUNTIMES[name], ""
        if runtime.worker == "native":
            try:
                program = str(native_runtime.build(self._work / "native"))
            except subprocess.CalledProcessError as error:
                yield from (self._refused(row, name, f"it does not build: {error}") for row in rows)
                return
        jobs: dict[str, Job] = {}
        exported: dict[str, Exported] = {}
        for row in rows:
            found = self._export(row, runtime)
            if isinstance(found, str):
                yield self._refused(row, name, found)
                continue
            exported[row] = found
            jobs[row] = Job(
                path=str(found.path) if runtime.format else "",
                out=str(self._work / f"{slug(row)}-{name}.npz"),
                program=program,
                rows=self._judges[row].rows.tolist(),
                prompt=PROMPT,
                new=NEW,
                capacity=CAPACITY,
            )
        for row, said in ask(runtime, jobs, self._checkpoints, self._work):
            if "refused" in said:
                yield self._refused(row, name, str(said["refused"]), exported[row].format)
            else:
                yield self._judged(row, name, said, exported[row])

    def _export(self, row: str, runtime: Runtime) -> Exported | str:
        """A checkpoint as a runtime gets it, written once for all that take it; or the words of a refusal."""
        checkpoint = self._checkpoints[row]
        if runtime.format is None:
            return Exported(Path(), f"as it is, {checkpoint.dtype}")
        chosen = runtime.format(checkpoint)
        if (row, chosen) not in self._exported:
            self._exported[row, chosen] = write_format(
                checkpoint, self._work / "exports" / slug(row) / slug("-".join(chosen)), chosen
            )
        found = self._exported[row, chosen]
        if isinstance(found, Exported) and checkpoint.config.sparse_config is not None and not runtime.sparse:
            return next((note for note in found.notes if note.startswith("sparse attention")), found)
        return found

    def _refused(self, row: str, name: str, words: str, described: str = "") -> Cell:
        """The cell of what did not run: only where that is known may it be so."""
        known = RUNTIMES[name].cannot(self._checkpoints[row])
        return Cell(row, name, "cannot" if known else "failed", words, described)

    def _judged(self, row: str, name: str, said: Mapping[str, Any], exported: Exported) -> Cell:
        runtime, checkpoint, judge = RUNTIMES[name], self._checkpoints[row], self._judges[row]
        unrounded = None
        if runtime.rounds:  # what it was given are not the checkpoint's values, but those in the file
            params = read_export(exported.path).params
            unrounded = Judge(checkpoint.config, params, judge.rows, PROMPT)
            judge = Judge(checkpoint.config, params, judge.rows, PROMPT, judge.ends, checkpoint.gguf_type)
        status, words, figures = judge_cell(judge, said, rounds=runtime.rounds, modules=runtime.modules)
        if runtime.cannot(checkpoint):
            status, words = "failed", "it was taken to be impossible, and runs: Runtime.cannot is out of date"
        if figures:  # none where it gave something else than was asked for
            if unrounded is not None:
                figures["unrounded_drift"] = compare(unrounded, said)["drift"]
            figures |= {name: float(said[name]) for name in ("load_seconds", "tokens_per_second")}
            figures["megabytes"] = (exported.bytes if runtime.format else checkpoint.bytes) / 1e6
        versions = str(said.get("versions", ""))
        return Cell(row, name, status, words, exported.format, versions, runtime.rounds, figures)

    def _file(self, row: str, name: str) -> Path:
        return self._work / "cells" / slug(row) / f"{name}.json"

    def _load(self, row: str, name: str) -> Cell | None:
        """A cell that was done at this commit, of these values; not one that failed, nor of a changed checkout."""
        file, key = self._file(row, name), self._keys[row]
        if not file.is_file() or str(key["commit"]).endswith("-dirty"):
            return None
        content = json.loads(file.read_text("utf-8"))
        return Cell(**content) if content.pop("key") == key and content["status"] != "failed" else None


def slug(name: str) -> str:
    """A name as one of a file."""
    return re.sub(r"[^\w.-]+", "-", name)


def main(argv: Sequence[str] | None = None) -> int:
    """Fills the matrix; returns an exit code."""
    parser = argparse.ArgumentParser(description="One checkpoint, equal logits, in every runtime.")
    parser.add_argument("--work", type=Path, default=Path("runs/parity"), help="where what is done stays")
    parser.add_argument("--reduced", action="store_true", help="few, smaller checkpoints: a minute")
    parser.add_argument("--strict", action="store_true", help="a runtime that is not installed is a failure")
    parser.add_argument("--checkpoints", nargs="*", choices=CHECKPOINTS, help="rows; default: all")
    parser.add_argument("--runtimes", nargs="*", choices=RUNTIMES, help="columns; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS_DIR, help="where the page and the figures go")
    args = parser.parse_args(argv)
    everything = REDUCED_CELLS if args.reduced else dict.fromkeys(CHECKPOINTS, tuple(RUNTIMES))
    wanted = {
        row: [name for name in runtimes if name in (args.runtimes or RUNTIMES)]
        for row, runtimes in everything.items()
        if row in (args.checkpoints or CHECKPOINTS)
    }
    began = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    matrix = Matrix(REDUCED if args.reduced else FULL, args.work, wanted)
    cells = []
    for cell in matrix.run():
        print(f"{cell.checkpoint}, {RUNTIMES[cell.runtime].title}: {summary(cell)}", flush=True)
        cells.append(cell)
    words = ["python", "-m", "benchmarks.parity", *(["--reduced"] if args.reduced else [])]
    for option in ("checkpoints", "runtimes"):
        words += [f"--{option}", *found] if (found := getattr(args, option)) else []
    command = shlex.join(words)
    titles = {name: runtime.title for name, runtime in RUNTIMES.items() if any(name in row for row in wanted.values())}
    write_report(cells, list(wanted), titles, args.results, command)
    print(f"{len(cells)} cells in {(time.monotonic() - began) / 60:.1f} minutes")
    bad = (*RED, "gap") if args.strict else RED
    return int(any(cell.status in bad for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
