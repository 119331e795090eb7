"""The verb `rounds`: verify candidate pools, learn from the best, filter, and offer the result to the next round.

A round is a folder with a manifest, written last; what it runs are the verbs `verify` and `classify`, which resume by
themselves. All verifications share one workdir, so that a pool is annealed once, however many rounds ask for it.
"""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from cpm_jax.common import provenance
from cpm_jax.common.config import ConfigError, config_dataclass, config_differences, config_to_dict
from cpm_jax.common.files import sha256, write_json
from cpm_jax.curation.classifier import CLASSIFIER_FILE, ClassifierConfig
from cpm_jax.curation.pools import MIN_DOCUMENTS, PoolError, check_pool
from cpm_jax.curation.quality import SCORE
from cpm_jax.curation.rounds import (
    DROPPED,
    KEPT,
    RAW,
    Pools,
    Seeds,
    Selection,
    choose_seeds,
    compare_scored,
    margin,
    next_pools,
    sample_scored,
    split_scored,
)
from cpm_jax.curation.verification import DEFAULT
from cpm_jax.data.manifest import FILE_NAME
from experiments import classify, verify
from experiments.classify import CLASSIFIER_DIR, SCORED_DIR, ClassifyConfig
from experiments.rounds_report import write_rounds_report
from experiments.verify import VerifyConfig

MANIFEST_FILE = "round.json"
RESULTS_FILE = "results.json"
SETTINGS_FILE = "settings.json"
VERIFICATION_DIR = "verification"


@config_dataclass
class RoundsConfig:
    """What to choose from, what to filter, and how often.

    Attributes:
        raw: source of the documents to filter, the same in every round.
        verification: how pools are compared; its candidates are the positive pools of the first round.
        negative: negative pools of the first round by name; none takes the raw documents.
        num_rounds: rounds; a later call may ask for more.
        seeds: "verify" learns from the positive pool that verification finds best and the negative one that it finds
            worst; "random" from random documents of all pools, the baseline.
        max_documents: most documents of a class that a classifier learns from, chosen by the hash of their text.
        classifier: how it is trained, and where it cuts.
        compare: further sets, by name, that the end result is verified against, such as what another filter keeps.
        part_documents: documents in a file of scored ones, and what a kill costs at most.
        num_workers: processes that score; None for one per core, 0 for none but this one.
    """

    raw: str
    verification: VerifyConfig
    negative: dict[str, str] = dataclasses.field(default_factory=dict)
    num_rounds: PositiveInt = 2
    seeds: Selection = "verify"
    max_documents: PositiveInt | None = None
    classifier: ClassifierConfig = ClassifierConfig()
    compare: dict[str, str] = dataclasses.field(default_factory=dict)
    part_documents: PositiveInt = 10_000
    num_workers: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        if self.classifier.keep_rate is not None:
            raise ConfigError(
                f"RoundsConfig.classifier.keep_rate = {self.classifier.keep_rate}: it is a share of a round's negative "
                "pool, which is another in every round; accepted are threshold and precision",
                field="ClassifierConfig.keep_rate",
            )
        positive, negative = self.verification.candidates, self.negative
        dataclasses.replace(self.verification, candidates={**positive, **negative, **self.compare})  # checks names
        named = [*positive.items(), *negative.items(), *self.compare.items()]
        names, sources = [name for name, _ in named], [source for _, source in named]
        for name, source in named:
            if names.count(name) > 1:
                _refuse("candidates", name, "it is named twice; accepted is a name for each pool")
            if name == RAW or name.startswith((f"{KEPT}_", f"{DROPPED}_")):
                _refuse("candidates", name, f"{RAW}, {KEPT}_<round> and {DROPPED}_<round> name what the rounds make")
            if sources.count(source) > 1:
                _refuse("candidates", name, f"{source} has another name too; give each pool one")
            if name not in self.compare and (Path(source) / FILE_NAME).exists():
                _refuse("candidates", name, f"{source} is a dataset folder; a classifier needs documents")
            if name in negative and source == self.raw:
                _refuse("negative", name, "that is the raw documents, of which some will be kept; leave negative empty")

    @property
    def pools(self) -> Pools:
        """The candidates of the first round."""
        return Pools(self.verification.candidates, self.negative or {RAW: self.raw})


def _refuse(field: str, name: str, why: str) -> None:
    raise ConfigError(f"RoundsConfig.{field} has {name!r}: {why}", field=f"RoundsConfig.{field}")


def run(config: RoundsConfig, workdir: Path) -> dict[str, Any]:
    """Makes the rounds that `workdir` lacks, verifies what they keep, writes results.json and report.html.

    Raises:
        ConfigError: the workdir holds rounds of another recipe, or the verification cannot be made.
        InputError: a pool is too small or cannot be read.
        exit_codes.Stop: it was told to stop; the same command goes on.
    """
    workdir = workdir.resolve()
    manifests = run_rounds(config, workdir)
    filtered = {f"{KEPT}_{m['round']}": str(_folder(workdir, m["round"]) / KEPT) for m in manifests}
    compared = _verify(config, {RAW: config.raw, **filtered, **config.compare}, workdir)
    last = f"{KEPT}_{config.num_rounds}"
    results = {
        "margins": [margin(compared, last, name) for name in compared["ranking"] if name != last],
        "verification": compared,
        "rounds": manifests,
        "config": config_to_dict(config),
    }
    write_json(workdir / RESULTS_FILE, results)
    print(f"{compared['verdict']}\nreport: {write_rounds_report(workdir, results)}")
    return results


def run_rounds(config: RoundsConfig, workdir: Path) -> list[dict[str, Any]]:
    """Makes the rounds that `workdir` lacks, without verifying what they keep, and returns their manifests.

    Raises:
        ConfigError, InputError, exit_codes.Stop: as `run`.
    """
    workdir = workdir.resolve()  # pools of later rounds lie in it, and are known by their paths
    verify.check(config.verification)
    pools, manifests = config.pools, list[dict[str, Any]]()
    _check_pools(config, workdir, 1, pools)
    _claim(workdir, config)
    for number in range(1, config.num_rounds + 1):
        if manifests:
            pools = next_pools(
                pools, Seeds(**_names(manifests[-1])), number - 1, manifests[-1]["counts"], _folder(workdir, number - 1)
            )
            _check_pools(config, workdir, number, pools)
        manifests.append(run_round(config, workdir, number, pools))
    return manifests


def _check_pools(config: RoundsConfig, workdir: Path, number: int, pools: Pools) -> None:
    """Checks, before anything is annealed for a round, that each pool could be a seed, whichever will be chosen.

    Random seeds are of all pools together, and nothing is annealed before the classifier counts those.

    Raises:
        PoolError: one is too small.
        DataError: the source of one does not exist.
    """
    if config.seeds == "random" or (_folder(workdir, number) / MANIFEST_FILE).exists():
        return
    for name, source in pools.sources().items():
        try:
            check_pool(name, source, config.verification.text_field)
        except PoolError as error:
            raise PoolError(f"round {number}: {error}") from error


def run_round(config: RoundsConfig, workdir: Path, number: int, pools: Pools) -> dict[str, Any]:
    """Makes one round, as far as that is not done, and returns its manifest.

    Args:
        config: of all rounds.
        workdir: of all rounds.
        number: of this one, from 1.
        pools: its candidates.
    """
    folder = _folder(workdir, number)
    if (folder / MANIFEST_FILE).exists():
        return read_manifest(folder)
    verified = _verify(config, pools.sources(), workdir) if config.seeds == "verify" else None
    seeds = choose_seeds(pools, verified["ranking"] if verified else None)
    positive, negative = (
        tuple(source for name, source in pools.sources().items() if name in names)
        for names in (seeds.positive, seeds.negative)
    )
    learn = ClassifyConfig(
        mode="train",
        positive=positive,
        negative=negative,
        max_documents=config.max_documents,
        classifier=config.classifier,
        text_field=config.verification.text_field,
    )
    try:
        learned = classify.train(learn, folder / "train")
    except PoolError as error:
        raise PoolError(f"round {number}: {error}") from error
    trained = folder / "train" / CLASSIFIER_DIR
    apply = ClassifyConfig(
        mode="score",
        trained=str(trained),
        input=config.raw,
        part_documents=config.part_documents,
        num_workers=config.num_workers,
        text_field=config.verification.text_field,
    )
    scored = classify.score(apply, folder / "score")
    if scored[KEPT] < MIN_DOCUMENTS:
        raise PoolError(
            f"round {number}: the positive pool {KEPT}_{number} has {scored[KEPT]} of {scored['documents']} documents, "
            f"needed are at least {MIN_DOCUMENTS}; lower the threshold"
        )
    split_scored(folder / "score" / SCORED_DIR, folder, config.verification.text_field)
    before = _folder(workdir, number - 1) / "score" / SCORED_DIR
    manifest = {
        "round": number,
        "candidates": dataclasses.asdict(pools),
        "how": config.seeds,
        "seeds": dataclasses.asdict(seeds),
        "margins": _margins(verified, pools, seeds) if verified else [],
        "verification": verified,
        "classifier": {
            "sha256": sha256(trained / CLASSIFIER_FILE),
            **{name: learned[name] for name in ("average_precision", "threshold", "examples", "held_out", "pools")},
        },
        "counts": {
            name: scored[name]
            for name in ("documents", KEPT, DROPPED, "bytes", "kept_bytes", "set_aside", "quarantined")
        },
        "change": compare_scored(before, folder / "score" / SCORED_DIR, SCORE) if number > 1 else None,
        "examples": sample_scored(folder / "score" / SCORED_DIR, SCORE),
        "files": {
            str(path.relative_to(folder)): sha256(path)
            for name in (KEPT, DROPPED)
            for path in sorted((folder / name).glob("*.jsonl"))
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_revision": provenance.git_revision(),
        "versions": provenance.versions(),
    }
    write_json(folder / MANIFEST_FILE, manifest)
    return read_manifest(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a round that has ended."""
    return json.loads((folder / MANIFEST_FILE).read_text("utf-8"))


def _margins(verified: dict[str, Any], pools: Pools, seeds: Seeds) -> list[dict[str, Any]]:
    """How much better the positive seed is than its rivals, the default mix and the negative seed."""
    (best,), (worst,) = seeds.positive, seeds.negative
    others = [name for name in verified["ranking"] if name in pools.positive and name != best]
    return [margin(verified, best, name) for name in (*others, DEFAULT, worst)]


def _names(manifest: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(names) for name, names in manifest["seeds"].items()}


def _verify(config: RoundsConfig, candidates: dict[str, str], workdir: Path) -> dict[str, Any]:
    return verify.run(dataclasses.replace(config.verification, candidates=candidates), workdir / VERIFICATION_DIR)


def _folder(workdir: Path, number: int) -> Path:
    return workdir / f"round{number}"


def _claim(workdir: Path, config: RoundsConfig) -> None:
    """Takes the workdir for this recipe, or finds that it was taken for it.

    Raises:
        ConfigError: it was taken for another.
    """
    free: Sequence[str] = ("num_rounds", "compare", "num_workers")
    settings = {name: value for name, value in config_to_dict(config).items() if name not in free}
    for name in ("checkpoint", "batch_size", "num_workers", "checkpoint_every", "mesh"):
        del settings["verification"][name]
    path = workdir / SETTINGS_FILE
    if not path.exists():
        write_json(path, settings)
        return
    if changed := config_differences(json.loads(path.read_text("utf-8")), settings):
        said = "; ".join(f"{name}: {was!r} at the last start, now {now!r}" for name, (was, now) in changed.items())
        raise ConfigError(f"{workdir} holds rounds of another recipe: {said}; take another --workdir")
