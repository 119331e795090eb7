"""Rounds of seeds, classifier and filter: which pools a round learns from, and how what it keeps has changed.

As in Ultra-FineWeb (MiniCPM4 report, §2.2): the pool that makes a model better in verification is the positive seed of
a classifier, and what the classifier infers are candidates of the next round. `experiments/rounds.py` runs the verbs.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cpm_jax.common.config import InputError
from cpm_jax.common.files import write_text
from cpm_jax.curation.pools import MIN_DOCUMENTS, PoolError, hash_fraction

KEPT, DROPPED, RAW = "kept", "dropped", "raw"
Selection = Literal["verify", "random"]
_EXAMPLES = 5
_EXCERPT = 400  # characters of an example


@dataclasses.dataclass(frozen=True)
class Pools:
    """Candidates for the seeds of a round.

    Attributes:
        positive: sources by name.
        negative: the same.
    """

    positive: Mapping[str, str]
    negative: Mapping[str, str]

    def sources(self) -> dict[str, str]:
        """All candidates by name."""
        return {**self.positive, **self.negative}


@dataclasses.dataclass(frozen=True)
class Seeds:
    """What a classifier learns from: names of candidates."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]


def choose_seeds(pools: Pools, ranking: Sequence[str] | None) -> Seeds:
    """Chooses the pools to learn from.

    Args:
        pools: the candidates.
        ranking: their names, the best first: the best positive and the worst negative pool are chosen. None chooses no
            pool and takes all, so that seeds are random documents of all candidates.
    """
    if ranking is None:
        return Seeds(tuple(pools.positive), tuple(pools.negative))
    best = min(pools.positive, key=ranking.index)
    worst = max(pools.negative, key=ranking.index)
    return Seeds((best,), (worst,))


def next_pools(pools: Pools, seeds: Seeds, number: int, counts: Mapping[str, int], folder: Path) -> Pools:
    """The candidates of the next round: the seeds of this one, and what its classifier inferred.

    The raw documents are no longer a negative candidate, since those that were kept are among them.

    Args:
        pools: of this round.
        seeds: of this round.
        number: of this round.
        counts: documents that it kept and dropped.
        folder: of this round.

    Raises:
        PoolError: too few documents were dropped to learn from.
    """
    if counts[DROPPED] < MIN_DOCUMENTS:
        raise PoolError(
            f"round {number + 1}: the negative pool {DROPPED}_{number} has {counts[DROPPED]} documents, needed are at "
            f"least {MIN_DOCUMENTS}: round {number} kept {counts[KEPT]} of {counts[DROPPED] + counts[KEPT]}; raise the "
            "threshold, or ask for fewer rounds"
        )
    positive = {name: pools.positive[name] for name in seeds.positive}
    negative = {name: pools.negative[name] for name in seeds.negative if name != RAW}
    return Pools(
        {**positive, f"{KEPT}_{number}": str(folder / KEPT)},
        {**negative, f"{DROPPED}_{number}": str(folder / DROPPED)},
    )


def margin(results: Mapping[str, Any], first: str, second: str) -> dict[str, Any]:
    """How much better `first` is than `second` in a verification, negative where it is worse.

    Args:
        results: what its results.json holds.
        first: name of a candidate.
        second: name of another.
    """
    pair = next(p for p in results["pairs"] if {p["first"], p["second"]} == {first, second})
    sign = 1 if pair["first"] == first else -1
    return {
        "first": first,
        "second": second,
        "value": sign * pair["value"],
        "interval": sorted(sign * end for end in pair["interval"]),
        "adjusted_p_value": pair["adjusted_p_value"],
        "significant": pair["significant"],
    }


def split_scored(scored: Path, folder: Path, text_field: str = "text") -> None:
    """Divides scored documents into `folder/kept` and `folder/dropped`, a file for each part, one part in memory.

    Files that are there are whole, and are left. What a kill left half written goes: readers of the folder would count
    it.

    Args:
        scored: folder of scored documents.
        folder: of the round.
        text_field: what to call the text: as other pools do, since all are read in one way.
    """
    for unfinished in [path for name in (KEPT, DROPPED) for path in (folder / name).glob(".*.tmp")]:
        unfinished.unlink()
    for part in sorted(scored.glob("part-*.jsonl")):
        lines: dict[str, list[str]] = {KEPT: [], DROPPED: []}
        with part.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                name = _name(row)
                if text_field != "text":
                    line = json.dumps({text_field: row.pop("text"), **row}) + "\n"
                lines[name].append(line)
        for name, found in lines.items():
            path = folder / name / part.name
            if found and not path.exists():
                write_text(path, "".join(found))


def sample_scored(scored: Path, score: str) -> dict[str, list[dict[str, Any]]]:
    """Some documents that are kept and some that are dropped, chosen by the hash of their texts.

    Args:
        scored: folder of scored documents.
        score: name of the score.
    """
    found = {KEPT: _Best(), DROPPED: _Best()}
    for row in _rows(scored):
        found[_name(row)].add(-hash_fraction(row["text"], 0), _example(row, score))
    return {name: best.examples() for name, best in found.items()}


def compare_scored(before: Path, now: Path, score: str) -> dict[str, Any]:
    """How what is kept has changed from one round to the next.

    Both have scored the same documents in the same order, so that memory does not grow with them.

    Args:
        before: folder of the scored documents of the round before.
        now: the same of this round.
        score: name of the score.

    Returns:
        Numbers of documents that both rounds, only one or none keep; `overlap`, both / (both + only one); and
        `examples` of newly kept and newly dropped ones, those whose scores have changed most.

    Raises:
        InputError: the rounds scored different documents.
    """
    counts = {"both": 0, "only_now": 0, "only_before": 0, "neither": 0}
    found = {KEPT: _Best(), DROPPED: _Best()}
    for old, new in itertools.zip_longest(_rows(before), _rows(now)):
        if old is None or new is None or old["text"] != new["text"]:
            raise InputError(
                f"{before} and {now} hold different documents: the raw sources have changed between two rounds; take "
                "another --workdir"
            )
        if _name(old) == _name(new):
            counts["both" if _name(new) == KEPT else "neither"] += 1
            continue
        counts["only_now" if _name(new) == KEPT else "only_before"] += 1
        was = old["scores"][score]
        found[_name(new)].add(abs(new["scores"][score] - was), _example(new, score) | {"score_before": was})
    overlap = counts["both"] / max(1, sum(counts.values()) - counts["neither"])
    return counts | {"overlap": overlap, "examples": {name: best.examples() for name, best in found.items()}}


class _Best:
    """The few examples of the largest weight."""

    def __init__(self) -> None:
        self._found: list[tuple[float, dict[str, Any]]] = []

    def add(self, weight: float, example: dict[str, Any]) -> None:
        """Adds one, which may push another out."""
        self._found = sorted([*self._found, (weight, example)], key=lambda pair: -pair[0])[:_EXAMPLES]

    def examples(self) -> list[dict[str, Any]]:
        """The largest first."""
        return [example for _, example in self._found]


def _example(row: Mapping[str, Any], score: str) -> dict[str, Any]:
    return {"id": row["id"], "score": row["scores"][score], "text": row["text"][:_EXCERPT]}


def _name(row: Mapping[str, Any]) -> str:
    return DROPPED if row["dropped"] else KEPT


def _rows(scored: Path) -> Iterator[Mapping[str, Any]]:
    for part in sorted(scored.glob("part-*.jsonl")):
        with part.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
