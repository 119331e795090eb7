"""The study of whether efficient verification can be trusted: its size, its texts as tokens, and its cells.

One model is trained on the default mix to the end of its stable phase. Each candidate is then verified as the verb does
it (30% candidate, 70% default mix, decaying rate, several seeds), and trained on from scratch, alone, for a whole run.
Both are measured on the same held-out passages. Disjoint random parts of the clean set are verified too: among them
there is no difference to find.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveFloat, PositiveInt

from benchmarks.verification_corpora import QUALITY, read_corpora
from cpm_jax.checkpoints.manager import CheckpointConfig, restore_params, restore_state
from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.common.files import write_json
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.curation.verification import BITS_PER_BYTE, Scores
from cpm_jax.data.packing import ConcatThenSplit, TokenizedDocuments
from cpm_jax.data.records import PackedRecord, to_rows
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training.loop import TrainConfig, TrainData, train
from cpm_jax.training.losses import LossConfig
from cpm_jax.training.optimizer import OptimizerConfig
from cpm_jax.training.schedules import Phase, ScheduleConfig, wsd
from cpm_jax.training.train_step import make_eval_step

SHARE = 0.3
_EVAL_ROWS = 64


@config_dataclass
class Recipe:
    """The size of a study.

    Attributes:
        model: the model.
        peak_lr: of the stable phase.
        seq_len: tokens of a row.
        batch_size: rows of a step.
        stable_steps: of the run that all annealings start from, 10% of them warm-up.
        decay_steps: of an annealing.
        verify_seeds: annealings of each candidate.
        scratch_seeds: trainings from scratch of each.
        characters: of a candidate.
        parts: of the clean set, for the null case.
        passages: held out of each domain.
        passage: characters of each.
    """

    model: ModelConfig
    peak_lr: PositiveFloat
    seq_len: PositiveInt
    batch_size: PositiveInt
    stable_steps: PositiveInt
    decay_steps: PositiveInt
    verify_seeds: PositiveInt
    scratch_seeds: PositiveInt
    characters: PositiveInt
    parts: PositiveInt
    passages: PositiveInt
    passage: PositiveInt

    def __post_init__(self) -> None:
        if self.batch_size % 10:
            raise ConfigError(
                f"Recipe.batch_size = {self.batch_size}: must be divisible by 10, so that {SHARE:.0%} of it are rows",
                field="Recipe.batch_size",
            )

    @property
    def scratch_steps(self) -> int:
        """Of a training from scratch: as many as the annealed model has seen in all."""
        return self.stable_steps + self.decay_steps


def small_model(vocab: int, layers: int, width: int, heads: int, positions: int) -> ModelConfig:
    """A decoder with MiniCPM's multipliers, for studies of data."""
    return ModelConfig(
        vocab_size=vocab,
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=1,
        d_ff=3 * width,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        scale_emb=12.0,
        scale_depth=1.4,
        dim_model_base=256,
        initializer_range=0.1,
        dtype="float32",
        scan_layers=False,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows of one set, addressed by position: each epoch has an order of its own."""

    records: list[PackedRecord]
    name: int

    def take(self, seed: int, first: int, count: int) -> list[PackedRecord]:
        """The records at `count` positions of the endless order."""
        found = []
        for position in range(first, first + count):
            epoch, index = divmod(position, len(self.records))
            order = np.random.default_rng([seed, self.name, epoch]).permutation(len(self.records))
            found.append(self.records[order[index]])
        return found


class Batches:
    """Batches of a step and later ones: every batch has the same number of rows of each set."""

    def __init__(self, sets: Sequence[tuple[Rows, int]], seed: int, step: int, seq_len: int):
        """Takes sets with their rows in a batch."""
        self._sets, self._seed, self._step, self._seq_len = sets, seed, step, seq_len

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        records = [r for rows, count in self._sets for r in rows.take(self._seed, self._step * count, count)]
        self._step += 1
        sources = np.repeat(np.arange(len(self._sets)), [count for _, count in self._sets])
        return to_rows(records, self._seq_len) | {"source_ids": sources.astype(np.int32)}

    def close(self) -> None:
        """Nothing is held open."""


def prepare(recipe: Recipe, corpora: Path, path: Path) -> None:
    """Tokenises all texts into one file, with a tokenizer of the default mix and the clean set."""
    from cpm_jax.data.tokenizer import Tokenizer

    texts = read_corpora(
        corpora, characters=recipe.characters, parts=recipe.parts, passages=recipe.passages, passage=recipe.passage
    )
    tokenizer = Tokenizer.train([*texts.default, *texts.candidates["clean"]], recipe.model.vocab_size)
    sets = {"default": texts.default, **texts.candidates}
    sets |= {f"part{i}": part for i, part in enumerate(texts.parts)}
    bos, eos = tokenizer.bos_id or 0, tokenizer.eos_id or 0  # it was trained here, and has both
    arrays: dict[str, Any] = {}
    for name, documents in sets.items():
        encoded = [[bos, *tokens, eos] for tokens in tokenizer.encode_batch(documents)]
        arrays[f"set/{name}/tokens"] = np.concatenate(encoded).astype(np.uint16)
        arrays[f"set/{name}/lengths"] = np.array([len(tokens) for tokens in encoded], np.uint32)
    for name, passages in texts.held_out.items():
        # A passage that does not fit into a row loses its end, and the bytes of it.
        encoded = [[bos, *tokens][: recipe.seq_len + 1] for tokens in tokenizer.encode_batch(passages)]
        arrays[f"held_out/{name}/tokens"] = np.concatenate(encoded).astype(np.uint16)
        arrays[f"held_out/{name}/lengths"] = np.array([len(tokens) for tokens in encoded], np.uint32)
        sizes = [len(tokenizer.decode(tokens[1:]).encode()) for tokens in encoded]
        arrays[f"held_out/{name}/bytes"] = np.array(sizes, np.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


class Study:
    """The cells of a study, each trained and measured once."""

    def __init__(self, recipe: Recipe, workdir: Path):
        """Reads `corpora.npz`."""
        self.recipe, self.workdir, self.mesh = recipe, workdir, make_mesh(MeshConfig())
        arrays = dict(np.load(workdir / "corpora.npz"))
        names = sorted({key.split("/")[1] for key in arrays if key.startswith("set/")})
        self.sets = {
            name: Rows(
                _pack(arrays[f"set/{name}/tokens"], arrays[f"set/{name}/lengths"], recipe.seq_len),
                0 if name == "default" else 1,  # all candidates in the same order, as in the verb
            )
            for name in names
        }
        held_out = sorted({key.split("/")[1] for key in arrays if key.startswith("held_out/")})
        self.held_out = {
            name: _passages(arrays[f"held_out/{name}/tokens"], arrays[f"held_out/{name}/lengths"]) for name in held_out
        }
        self.bytes = {name: arrays[f"held_out/{name}/bytes"] for name in held_out}
        self._eval_step = make_eval_step(recipe.model, num_sources=_EVAL_ROWS)

    def cells(self) -> list[tuple[str, str, int]]:
        """All cells as (kind, set, seed), in an order in which early ones are useful first."""
        found = [("verify", "default", s) for s in range(1, self.recipe.verify_seeds + 1)]
        for seed in range(1, max(self.recipe.verify_seeds, self.recipe.scratch_seeds) + 1):
            for name in QUALITY:
                found += [("verify", name, seed)] if seed <= self.recipe.verify_seeds else []
                found += [("scratch", name, seed)] if seed <= self.recipe.scratch_seeds else []
        parts = [name for name in self.sets if name.startswith("part")]
        return found + [("verify", n, s) for s in range(1, self.recipe.verify_seeds + 1) for n in parts]

    def path(self, kind: str, name: str, seed: int) -> Path:
        """The file of a cell's items."""
        return self.workdir / "cells" / f"{kind}-{name}-{seed}.json"

    def run(self, deadline: float) -> bool:
        """Runs cells until all are done or the time is over; whether all are done."""
        base = self.workdir / "base"
        self._train(base, "default", 0, self.recipe.stable_steps, self._stable_schedule())
        for kind, name, seed in self.cells():
            path = self.path(kind, name, seed)
            if path.exists():
                continue
            if time.monotonic() > deadline:
                return False
            begin, folder = time.monotonic(), self.workdir / "training"
            shutil.rmtree(folder, ignore_errors=True)
            if kind == "verify":
                steps = self.recipe.stable_steps + self.recipe.decay_steps
                self._train(folder, name, seed, steps, self._decay_schedule(), init_from=base)
            else:
                self._train(folder, name, seed, self.recipe.scratch_steps, self._scratch_schedule(), alone=True)
            bits = self._bits(restore_params(folder)[0])
            write_json(path, {"seconds": time.monotonic() - begin, "bits": bits})
            print(f"{kind} {name} seed {seed}: {time.monotonic() - begin:.1f} s", flush=True)
        shutil.rmtree(self.workdir / "training", ignore_errors=True)
        return True

    def _stable_schedule(self) -> ScheduleConfig:
        return wsd(self.recipe.peak_lr, self.recipe.scratch_steps, self.recipe.stable_steps // 10, 0)

    def _decay_schedule(self) -> ScheduleConfig:
        decay = Phase(self.recipe.decay_steps, 0.1 * self.recipe.peak_lr, "exponential", self.recipe.peak_lr)
        return ScheduleConfig((decay,), first_step=self.recipe.stable_steps)

    def _scratch_schedule(self) -> ScheduleConfig:
        steps = self.recipe.scratch_steps
        return wsd(self.recipe.peak_lr, steps, self.recipe.stable_steps // 10, self.recipe.decay_steps)

    def _train(
        self,
        folder: Path,
        name: str,
        seed: int,
        steps: int,
        schedule: ScheduleConfig,
        *,
        init_from: Path | None = None,
        alone: bool = False,
    ) -> None:
        recipe = self.recipe
        share = round(SHARE * recipe.batch_size)
        sets = [(self.sets["default"], recipe.batch_size - share), (self.sets[name], share)]
        if alone or name == "default":
            sets = [(self.sets[name], recipe.batch_size)]
        train(
            TrainConfig(steps, recipe.batch_size, seed=seed, log_every=steps),
            model=recipe.model,
            optimizer=OptimizerConfig(),
            schedule=schedule,
            loss=LossConfig(),
            checkpoint=CheckpointConfig(every=steps, asynchronous=False),
            data=TrainData(
                lambda step: Batches(sets, seed, step, recipe.seq_len),
                None,
                tuple(f"set{i}" for i in range(len(sets))),
                recipe.seq_len,
            ),
            mesh=self.mesh,
            workdir=folder,
            fixed={"set": name, "seed": seed},
            initial_state=(lambda abstract: restore_state(init_from, abstract)) if init_from else None,
        )

    def _bits(self, params: Any) -> dict[str, list[float]]:
        """Bits of each held-out passage."""
        found = {}
        for name, records in self.held_out.items():
            bits: list[float] = []
            for first in range(0, len(records), _EVAL_ROWS):
                rows = records[first : first + _EVAL_ROWS]
                rows += rows[:1] * (_EVAL_ROWS - len(rows))
                batch = to_rows(rows, self.recipe.seq_len) | {"source_ids": np.arange(_EVAL_ROWS, dtype=np.int32)}
                bits += (np.asarray(self._eval_step(params, batch).source_nll) / np.log(2)).tolist()
            found[name] = bits[: len(records)]
        return found

    def scores(self, kind: str, names: Sequence[str]) -> Scores:
        """What was measured of some sets in one way."""
        seeds = self.recipe.verify_seeds if kind == "verify" else self.recipe.scratch_seeds
        cells = {n: [json.loads(self.path(kind, n, s).read_text()) for s in range(1, seeds + 1)] for n in names}
        values = {
            name: {task: np.array([cell["bits"][task] for cell in found]) for task in self.bytes}
            for name, found in cells.items()
        }
        return Scores(BITS_PER_BYTE, self.bytes, values)

    def seconds(self, kind: str) -> float:
        """Mean seconds of a cell."""
        return float(np.mean([json.loads(p.read_text())["seconds"] for p in self.workdir.glob(f"cells/{kind}-*.json")]))


def _pack(tokens: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[PackedRecord]:
    packer = ConcatThenSplit(seq_len)
    return list(packer.add(TokenizedDocuments(tokens.astype(np.uint32), lengths)))


def _passages(tokens: np.ndarray, lengths: np.ndarray) -> list[PackedRecord]:
    pieces = np.split(tokens.astype(np.uint32), np.cumsum(lengths)[:-1])
    return [PackedRecord(p, np.zeros(1, np.uint32), np.ones(len(p), np.bool_)) for p in pieces]
