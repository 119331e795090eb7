"""Scores as in RULER's paper: the share of the expected strings that an answer holds, or whether it holds any."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from cpm_jax.evaluation.results import Estimate, ratio
from cpm_jax.evaluation.ruler.question import Question


def found(question: Question, answer: str) -> list[bool]:
    """Which of the expected strings an answer holds, capital letters aside."""
    return [expected.lower() in answer.lower() for expected in question.answers]


def score(question: Question, answer: str) -> float:
    """RULER's `string_match_all` (the share of the strings that were found) or `string_match_part` (any of them)."""
    hits = found(question, answer)
    return float(any(hits)) if question.match == "part" else sum(hits) / len(hits)


def by_depth(
    questions: Sequence[Question], answers: Mapping[int, str], depths: Sequence[float]
) -> dict[float, Estimate]:
    """The score at each depth: of what lies nearest to it, how much was found.

    Args:
        questions: of one task and length.
        answers: by the question's index.
        depths: of the grid.

    Returns:
        By depth, those without anything left out; nothing for a task whose answers lie everywhere. Standard errors
        take questions as independent draws.
    """
    sums: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for question in questions:
        hits = found(question, answers[question.index])
        values = hits if question.match == "all" else [any(hits)]
        of_question: dict[float, list[bool]] = defaultdict(list)
        for depth, hit in zip(question.depths, values if question.depths else (), strict=True):
            of_question[min(depths, key=lambda other: abs(other - depth))].append(hit)
        for depth, at_depth in of_question.items():
            sums[depth].append((sum(at_depth), len(at_depth)))
    cells = {depth: np.array(sums[depth], np.float64) for depth in depths if depth in sums}
    return {depth: ratio(cell[:, 0], cell[:, 1]) for depth, cell in cells.items()}
