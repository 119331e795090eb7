"""What a study of verification says: rank correlation, agreement of decisions, false alarms, and cost."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import scipy.stats

from benchmarks.results import Benchmark
from benchmarks.verification_corpora import QUALITY
from benchmarks.verification_trust_study import Recipe, Study
from cpm_jax.curation.verification import Scores, compare_pairs
from cpm_jax.modeling.model_size import count_params


def analyse(study: Study) -> dict[str, Any]:
    """Rank correlation, agreement of decisions, false alarms, and cost."""
    names = list(QUALITY)
    verified, scratch = study.scores("verify", [*names, "default"]), study.scores("scratch", names)
    ours, theirs = ([s.figure(n) for n in names] for s in (verified, scratch))
    pairs = {kind: _decisions(s, names) for kind, s in (("verify", verified), ("scratch", scratch))}
    both = [p for p in pairs["verify"] if pairs["verify"][p] and pairs["scratch"][p]]
    agree = sum(pairs["verify"][p] == pairs["scratch"][p] for p in both)
    tiers = [(a, b) for a, b in combinations(names, 2) if QUALITY[a] != QUALITY[b]]
    recipe = study.recipe
    return {
        "parameters": count_params(recipe.model).total,
        "tokens": {"verify": _tokens(recipe, recipe.decay_steps), "scratch": _tokens(recipe, recipe.scratch_steps)},
        "figures": {
            n: {
                "quality": QUALITY.get(n),
                "verify": verified.figure(n),
                "scratch": scratch.figure(n) if n in names else None,
                "verify_by_domain": {task: verified.figure(n, task) for task in study.bytes},
            }
            for n in [*names, "default"]
        },
        "spearman": float(scipy.stats.spearmanr(ours, theirs).statistic),
        "kendall": float(scipy.stats.kendalltau(ours, theirs).statistic),
        "spearman_with_quality": {
            kind: float(scipy.stats.spearmanr(values, [QUALITY[n] for n in names]).statistic)
            for kind, values in (("verify", ours), ("scratch", theirs))
        },
        "pairs": len(pairs["verify"]),
        "significant_in_both": len(both),
        "agreeing": agree,
        "disagreeing": [list(p) for p in both if pairs["verify"][p] != pairs["scratch"][p]],
        "significant_in_verify_only": [list(p) for p, v in pairs["verify"].items() if v and not pairs["scratch"][p]],
        "significant_in_scratch_only": [list(p) for p, v in pairs["scratch"].items() if v and not pairs["verify"][p]],
        "tiers_told_right": {
            kind: sum(found.get(pair, "") == min(pair, key=lambda n: QUALITY[n]) for pair in tiers) / len(tiers)
            for kind, found in pairs.items()
        },
        "null": null_case(study),
        "seconds_per_cell": {kind: study.seconds(kind) for kind in ("verify", "scratch")},
        "compute_ratio": recipe.scratch_steps / recipe.decay_steps,
        "compute_ratio_with_base": len(names)
        * recipe.scratch_steps
        / (len(names) * recipe.decay_steps + recipe.stable_steps),
    }


def null_case(study: Study, redraws: int = 6, halvings: int = 40) -> dict[str, Any]:
    """How often differences are found among parts of one set.

    Once as they are: a part is the same documents for every seed. With the parts dealt out anew for every seed, so
    that a candidate is a source of which every seed reads other documents. And as two halves of the set, of which
    each seed reads a part of its own, where there are parts enough.
    """
    parts = sorted(name for name in study.sets if name.startswith("part"))
    scores = study.scores("verify", parts)
    found = {"parts": [compare_pairs(scores)], "redrawn": []}
    rng = np.random.default_rng(0)
    for _ in range(redraws):
        deal = np.stack([rng.permutation(len(parts)) for _ in range(study.recipe.verify_seeds)], axis=1)
        values = {
            f"deal{i}": {
                task: np.stack([scores.values[parts[part]][task][seed] for seed, part in enumerate(row)])
                for task in scores.weights
            }
            for i, row in enumerate(deal)
        }
        found["redrawn"].append(compare_pairs(Scores(scores.unit, scores.weights, values)))
    seeds = study.recipe.verify_seeds
    if len(parts) >= 2 * seeds:
        found["halves"] = []
        for _ in range(halvings):
            deal = rng.permutation(len(parts))[: 2 * seeds].reshape(2, seeds)
            values = {
                f"half{i}": {
                    task: np.stack([scores.values[parts[part]][task][seed] for seed, part in enumerate(row)])
                    for task in scores.weights
                }
                for i, row in enumerate(deal)
            }
            found["halves"].append(compare_pairs(Scores(scores.unit, scores.weights, values)))
    return {
        name: {
            "pairs": sum(map(len, rounds)),
            "significant_at_5_percent": sum(p.difference.p_value < 0.05 for pairs in rounds for p in pairs),
            "significant_after_holm": sum(p.significant for pairs in rounds for p in pairs),
            "smallest_p": min(p.difference.p_value for pairs in rounds for p in pairs),
        }
        for name, rounds in found.items()
    }


def _decisions(scores: Scores, names: Sequence[str]) -> dict[tuple[str, str], str]:
    """For each two sets, the one that is significantly better after Holm's correction, or ""."""
    chosen = Scores(scores.unit, scores.weights, {name: scores.values[name] for name in names})
    found = {frozenset((p.first, p.second)): p.first if p.significant else "" for p in compare_pairs(chosen)}
    return {pair: found[frozenset(pair)] for pair in combinations(names, 2)}


def _tokens(recipe: Recipe, steps: int) -> int:
    return steps * recipe.batch_size * recipe.seq_len


def add_rows(bench: Benchmark, result: Mapping[str, Any]) -> None:
    """Adds the figures of a study."""
    rows = [
        ("rank correlation with training from scratch (Spearman)", max(0.0, result["spearman"])),
        ("rank correlation with training from scratch (Kendall)", max(0.0, result["kendall"])),
        ("pairs that both tell apart", result["significant_in_both"] / result["pairs"]),
        ("of these, pairs in which both prefer the same", result["agreeing"] / max(1, result["significant_in_both"])),
    ]
    for kind, name in (("verify", "verification"), ("scratch", "training from scratch")):
        rows.append((f"pairs of different known quality told right by {name}", result["tiers_told_right"][kind]))
    for metric, value in rows:
        bench.add(metric, "of 1", value, larger_is_better=True)
    for kind, what in (("parts", "the same documents"), ("redrawn", "other documents of the set")):
        null = result["null"][kind]
        for key, how in (("significant_at_5_percent", "at the 5% level"), ("significant_after_holm", "after Holm")):
            bench.add(
                f"null case, {what} in every seed: of {null['pairs']} pairs found different {how}",
                "of 1",
                null[key] / null["pairs"],
                larger_is_better=False,
                baseline_name="the level",
                baseline=0.05,
                goal=1.0,
            )
    if halves := result["null"].get("halves"):
        bench.add(
            f"null case, two halves of the set, each seed with documents of its own: of {halves['pairs']} halvings "
            "found different at the 5% level",
            "of 1",
            halves["significant_at_5_percent"] / halves["pairs"],
            larger_is_better=False,
            baseline_name="the level",
            baseline=0.05,
            goal=1.0,
        )
    bench.add(
        "tokens of a training from scratch / of an annealing",
        "ratio",
        result["compute_ratio"],
        larger_is_better=True,
        baseline_name="the paper's GPU hours, 1,200 / 110",
        baseline=1200 / 110,
    )
    bench.add(
        "the same, the stable run counted and shared by all candidates",
        "ratio",
        result["compute_ratio_with_base"],
        larger_is_better=True,
    )
    seconds = result["seconds_per_cell"]
    bench.add(
        "a cell of verification",
        "seconds",
        seconds["verify"],
        larger_is_better=False,
        baseline_name="a cell from scratch",
        baseline=seconds["scratch"],
    )
    for name, found in result["figures"].items():
        bench.add(
            f"held-out text after verification of {name}",
            "bits/byte",
            found["verify"],
            larger_is_better=False,
            baseline_name="from scratch",
            baseline=found["scratch"],
        )
