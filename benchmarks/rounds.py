"""Two rounds on real texts, English and Chinese: is what they keep better than the raw documents, and than by chance?

`python -m benchmarks.rounds [--recipe cpu] [--corpora DIR] [--workdir DIR]`: the workdir is kept, so that a call that
was interrupted goes on. A heap of good and bad documents is filtered twice, by classifiers whose seeds were verified
and by those whose seeds were random documents of the same pools; models annealed on what both keep are compared.
English: essays, a handbook and a glossary among spam mails and filled-in templates; Chinese: a manual and quotations
among the same with their characters in another order.
"""

import argparse
import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import classify
from benchmarks.results import Benchmark
from benchmarks.verification_corpora import read_corpora
from benchmarks.verification_trust import small_model
from cpm_jax.checkpoints.manager import CheckpointConfig
from cpm_jax.common.files import write_text
from cpm_jax.curation.classifier import ClassifierConfig
from cpm_jax.curation.fasttext_classifier import FastTextConfig
from cpm_jax.curation.rounds import KEPT, RAW
from cpm_jax.data.mixture import from_folders
from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.training.loop import TrainConfig
from cpm_jax.training.schedules import wsd
from experiments import pretrain, rounds
from experiments.rounds import RoundsConfig
from experiments.verify import VerifyConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The size of a run.

    Attributes:
        width: of the model, which has two layers.
        seq_len: tokens of a row.
        stable_steps: of the run that all annealings start from.
        decay_steps: of an annealing.
        seeds: annealings of each pool.
        characters: of the good English documents.
        passages: held out of each domain.
    """

    width: int
    seq_len: int
    stable_steps: int
    decay_steps: int
    seeds: int
    characters: int
    passages: int


RECIPES = {
    # Minutes: to see that a machine has everything.
    "smoke": Recipe(32, 64, 40, 10, 2, 1_500_000, 20),
    # At most half an hour of two idle cores.
    "cpu": Recipe(64, 128, 400, 40, 3, 1_500_000, 100),
}
_BATCH, _VOCAB, _LR, _PASSAGE = 10, 2048, 0.01, 300


@dataclasses.dataclass(frozen=True)
class Texts:
    """The documents of a language by role.

    Attributes:
        default: of the default mix.
        positive: candidate pools, a good and a bad one.
        good: the raw documents that are worth keeping.
        bad: the others.
        held_out: passages of each domain.
    """

    default: Sequence[str]
    positive: Mapping[str, Sequence[str]]
    good: Sequence[str]
    bad: Sequence[str]
    held_out: Mapping[str, Sequence[str]]


def english(recipe: Recipe, folder: Path) -> Texts:
    """Real text among spam and templates."""
    found = read_corpora(folder, characters=recipe.characters, parts=2, passages=recipe.passages, passage=_PASSAGE)
    clean = found.candidates["clean"]
    spam = found.candidates["spam_mixed"][1::2]
    third, half = len(clean) // 3, len(spam) // 2
    return Texts(
        found.default,
        {"texts": clean[:third], "mails": spam[:half]},
        clean[third : 2 * third],
        [*spam[half:], *found.candidates["templated"][2 * third :]],
        found.held_out,
    )


def chinese(recipe: Recipe, folder: Path) -> Texts:
    """Real text among the same kind of text with its characters in another order."""
    rng = random.Random(0)
    domains = dict(zip(("manual", "quotations"), classify.chinese(folder), strict=True))
    held_out = {}
    for name, pieces in domains.items():
        rng.shuffle(pieces)
        count = min(recipe.passages, len(pieces) // 6)
        held_out[name] = [piece[:_PASSAGE] for piece in pieces[:count]]
        domains[name] = pieces[count:]
    real = [piece for pieces in domains.values() for piece in pieces]
    rng.shuffle(real)
    parts = [real[i::5] for i in range(5)]
    broken = [["".join(rng.sample(piece, len(piece))) for piece in part] for part in parts[3:]]
    return Texts(parts[0], {"texts": parts[1], "broken": broken[0]}, parts[2], broken[1], held_out)


def write(path: Path, texts: Sequence[str], **fields: Any) -> str:
    """Adds documents to a file."""
    before = path.read_text("utf-8") if path.exists() else ""
    write_text(path, before + "".join(json.dumps({"text": text, **fields}) + "\n" for text in texts))
    return str(path)


def start(recipe: Recipe, texts: Texts, folder: Path) -> RoundsConfig:
    """Writes the documents, trains the model that all annealings start from, and returns the recipe of the rounds."""
    sources = folder / "texts"
    if not sources.exists():
        temporary = folder / "texts.partial"
        for path in temporary.glob("*"):
            path.unlink()
        write(temporary / "default.jsonl", texts.default)
        write(temporary / "raw.jsonl", texts.good, good=True)
        write(temporary / "raw.jsonl", texts.bad, good=False)
        for name, documents in {**texts.positive, **texts.held_out}.items():
            write(temporary / f"{name}.jsonl", documents)
        temporary.rename(sources)
    prepare(PrepareConfig(str(sources / "default.jsonl"), recipe.seq_len, vocab_size=_VOCAB), folder / "default")
    steps = recipe.stable_steps
    pretrain.run(
        pretrain.PretrainConfig(
            model=small_model(_VOCAB, 2, recipe.width, 2, recipe.seq_len),
            mixture=from_folders(str(folder / "default")),
            schedule=wsd(_LR, steps + recipe.decay_steps, steps // 10, recipe.decay_steps),
            train=TrainConfig(steps=steps, batch_size=_BATCH, seed=0),
            checkpoint=CheckpointConfig(every=steps),
        ),
        folder / "run",
    )
    return RoundsConfig(
        raw=str(sources / "raw.jsonl"),
        verification=VerifyConfig(
            checkpoint=str(folder / "run"),
            default=str(folder / "default"),
            candidates={name: str(sources / f"{name}.jsonl") for name in texts.positive},
            tasks=tuple(str(sources / f"{name}.jsonl") for name in texts.held_out),
            decay_steps=recipe.decay_steps,
            num_seeds=recipe.seeds,
        ),
        max_documents=min(map(len, texts.positive.values())),
        # More passes than the paper's 3, over pools that are thousands of times smaller.
        classifier=ClassifierConfig(
            scorer=FastTextConfig(dim=64, lr=0.5, epoch=20, min_count=2, bucket=200_000, quantize=False)
        ),
    )


def good_share(folder: Path) -> float:
    """How many of the documents in a folder are those that are worth keeping."""
    good = [json.loads(line)["metadata"]["good"] for path in folder.glob("*.jsonl") for line in path.open()]
    return sum(good) / len(good)


def measure(bench: Benchmark, language: str, recipe: Recipe, texts: Texts, folder: Path) -> None:
    """Filters by verified and by random seeds, and adds what came out."""
    config = start(recipe, texts, folder)
    rounds.run(dataclasses.replace(config, seeds="random"), folder / "random")
    by_chance = folder / "random" / "round2" / KEPT
    result = rounds.run(dataclasses.replace(config, compare={"random": str(by_chance)}), folder / "rounds")
    scores = result["verification"]["scores"]
    for margin in result["margins"]:
        if margin["second"] in (RAW, "random"):
            low, high = margin["interval"]
            said = f"better by {margin['value']:+.4f}, {low:+.4f} to {high:+.4f}, p = {margin['adjusted_p_value']:.2g}"
            bench.add(
                f"{language}, model annealed on what round 2 keeps ({said})",
                "bits per byte",
                scores[margin["first"]]["mean"],
                larger_is_better=False,
                baseline_name="the raw documents" if margin["second"] == RAW else "what random seeds keep",
                baseline=scores[margin["second"]]["mean"],
            )
    bench.add(
        f"{language}, good documents in what round 2 keeps",
        "of 1",
        good_share(folder / "rounds" / "round2" / KEPT),
        larger_is_better=True,
        baseline_name="random seeds",
        baseline=good_share(by_chance),
    )
    bench.add(
        f"{language}, good documents among the raw ones",
        "of 1",
        len(texts.good) / (len(texts.good) + len(texts.bad)),
        larger_is_better=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs both languages; only the whole recipe is recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="cpu")
    parser.add_argument("--corpora", type=Path, default=Path("runs/corpora"), help="where packages are unpacked")
    parser.add_argument("--workdir", type=Path, default=Path("runs/rounds"))
    args = parser.parse_args(argv)
    recipe = RECIPES[args.recipe]
    bench = Benchmark("rounds", f"python -m benchmarks.rounds --recipe {args.recipe}")
    for language, read in (("English", english), ("Chinese", chinese)):
        measure(bench, language, recipe, read(recipe, args.corpora), args.workdir / args.recipe / language)
    if args.recipe == "cpu":
        bench.write()
    else:
        for row in bench.rows:
            print(row)


if __name__ == "__main__":
    main()
