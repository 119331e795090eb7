"""Two rounds on real texts, English and Chinese: is what they keep better than the raw documents, and than by chance?

`python -m benchmarks.rounds [--recipe cpu] [--languages English] [--corpora DIR] [--workdir DIR]`: what is done is kept
in the workdir, annealing by annealing, so that a call that was interrupted goes on. `results/rounds.json` is written
after each language. A heap of good and bad documents (`rounds_texts`) is filtered twice, by classifiers whose seeds
were verified and by those whose seeds were random documents of the same pools; models annealed on what both keep, and
on the raw documents, are compared on held-out passages.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rounds_texts
from benchmarks.results import Benchmark
from benchmarks.rounds_texts import Texts
from benchmarks.verification_trust_study import small_model
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
        passages: held out of each domain.
    """

    width: int
    seq_len: int
    stable_steps: int
    decay_steps: int
    seeds: int
    passages: int


RECIPES = {
    # Minutes: to see that a machine has everything.
    "smoke": Recipe(32, 64, 40, 10, 2, 20),
    # At most half an hour of two idle cores. In the study of verification the standard error of a difference was
    # 0.005 bits per byte with annealings of 40 steps, nearly all of it the seeds' and a third of it the passages'.
    "cpu": Recipe(64, 128, 800, 100, 3, 200),
}
_BATCH, _VOCAB, _LR = 10, 2048, 0.01
LANGUAGES: Mapping[str, Callable[[Path, int], Texts]] = {
    "English": rounds_texts.english,
    "Chinese": rounds_texts.chinese,
}


def write(path: Path, texts: Sequence[str], **fields: Any) -> str:
    """Adds documents to a file."""
    before = path.read_text("utf-8") if path.exists() else ""
    write_text(path, before + "".join(json.dumps({"text": text, **fields}) + "\n" for text in texts))
    return str(path)


def write_texts(texts: Texts, folder: Path) -> None:
    """Writes each role's documents: `default`, `raw`, `pools/<name>` and `held_out/<domain>`, whole or not at all."""
    temporary = folder.with_suffix(".partial")
    for path in temporary.rglob("*.jsonl"):
        path.unlink()
    write(temporary / "default.jsonl", texts.default)
    write(temporary / "raw.jsonl", texts.good, good=True)
    write(temporary / "raw.jsonl", texts.bad, good=False)
    for kind, sets in (("pools", texts.pools), ("held_out", texts.held_out)):
        for name, documents in sets.items():
            write(temporary / kind / f"{name}.jsonl", documents)
    temporary.rename(folder)


def start(recipe: Recipe, sources: Path, folder: Path) -> RoundsConfig:
    """Trains the model that all annealings start from, and returns the recipe of the rounds.

    Args:
        recipe: the size.
        sources: what `write_texts` wrote.
        folder: of the language.
    """
    # The texts are small: processes would take longer to start than they save.
    prepare(
        PrepareConfig(str(sources / "default.jsonl"), recipe.seq_len, vocab_size=_VOCAB, num_workers=0),
        folder / "default",
    )
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
    pools = {path.stem: str(path) for path in sorted((sources / "pools").glob("*.jsonl"))}
    return RoundsConfig(
        raw=str(sources / "raw.jsonl"),
        verification=VerifyConfig(
            checkpoint=str(folder / "run"),
            default=str(folder / "default"),
            candidates=pools,
            tasks=tuple(str(path) for path in sorted((sources / "held_out").glob("*.jsonl"))),
            decay_steps=recipe.decay_steps,
            num_seeds=recipe.seeds,
            num_workers=0,
        ),
        max_documents=min(_lines(Path(path)) for path in pools.values()),
        # More passes than the paper's 3, over pools that are thousands of times smaller.
        classifier=ClassifierConfig(
            scorer=FastTextConfig(
                dim=64, lr=0.5, epoch=20, min_count=2, bucket=200_000, vocab_size=4096, quantize=False
            )
        ),
        num_workers=0,
    )


def _lines(path: Path) -> int:
    return path.read_text("utf-8").count("\n")


def read_good(folder: Path) -> list[bool]:
    """Of each document in a folder, whether it is one that is worth keeping."""
    return [json.loads(line)["metadata"]["good"] for path in sorted(folder.glob("*.jsonl")) for line in path.open()]


def measure(bench: Benchmark, language: str, recipe: Recipe, corpora: Path, folder: Path) -> None:
    """Filters by verified and by random seeds, and adds what came out."""
    sources = folder / "texts"
    if not sources.exists():
        write_texts(LANGUAGES[language](corpora, recipe.passages), sources)
    config = start(recipe, sources, folder)
    rounds.run_rounds(dataclasses.replace(config, seeds="random"), folder / "random")
    by_chance = folder / "random" / "round2" / KEPT
    result = rounds.run(dataclasses.replace(config, compare={"random": str(by_chance)}), folder / "rounds")
    scores = result["verification"]["scores"]
    seeds = ", then ".join("/".join(r["seeds"]["positive"] + r["seeds"]["negative"]) for r in result["rounds"])
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
    raw = [json.loads(line)["good"] for line in (sources / "raw.jsonl").open(encoding="utf-8")]
    for name, found in (("verified", folder / "rounds"), ("random", folder / "random")):
        kept = read_good(found / "round2" / KEPT)
        bench.add(
            f"{language}, good documents in the {len(kept)} of {len(raw)} that round 2 keeps, {name} seeds"
            + (f" ({seeds})" if name == "verified" else ""),
            "of 1",
            sum(kept) / len(kept),
            larger_is_better=True,
            baseline_name="the raw documents",
            baseline=sum(raw) / len(raw),
        )
        bench.add(
            f"{language}, good raw documents that round 2 keeps, {name} seeds",
            "of 1",
            sum(kept) / sum(raw),
            larger_is_better=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the languages one after another; only the whole recipe is recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="cpu")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=list(LANGUAGES))
    parser.add_argument("--corpora", type=Path, default=Path("runs/corpora"), help="where packages are unpacked")
    parser.add_argument("--workdir", type=Path, default=Path("runs/rounds"))
    args = parser.parse_args(argv)
    recipe = RECIPES[args.recipe]
    bench = Benchmark("rounds", f"python -m benchmarks.rounds --recipe {args.recipe}")
    for language in args.languages:
        measure(bench, language, recipe, args.corpora, args.workdir / args.recipe / language)
        if args.recipe == "cpu":
            bench.write()
    if args.recipe != "cpu":
        for row in bench.rows:
            print(row)


if __name__ == "__main__":
    main()
