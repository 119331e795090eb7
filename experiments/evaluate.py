"""The verb `evaluate`: scores a model on tasks that work offline, item by item, and compares it with another."""

import dataclasses
import datetime
import math
from pathlib import Path
from typing import Any

import jax
from pydantic import NonNegativeInt, PositiveInt

from cpm_jax.common import exit_codes, provenance
from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.common.files import write_json
from cpm_jax.common.metrics import make_metric_writer
from cpm_jax.inference.load import ComputeDType, LoadedModel, load_model
from cpm_jax.modeling.config import SparseConfig
from cpm_jax.modeling.int8 import WeightDType

# What needs lm_eval is imported where it is used: `--help` and dry runs do not need the extra.


@config_dataclass
class EvaluateConfig:
    """What to evaluate, on what, and how.

    Attributes:
        checkpoint: a workdir, a checkpoints folder or one checkpoint, a Hugging Face folder, or a .gguf file.
        tasks: names of tasks, .jsonl files or dataset folders; docs/evaluate.md lists them.
        tokenizer: a tokenizer.json or its folder; "" is the one that lies with the model.
        limit: items of each task at most, from the first on; 0 is all. A later run may ask for more.
        num_fewshot: examples in each prompt; None is what each task says.
        chat: whether prompts go through the tokenizer's chat template.
        max_gen_tokens: most tokens of an output; 0 is what each task says.
        batch_size: requests that are read, and prompts that are continued, together.
        dtype: what to compute in; "" is what the checkpoint says.
        seed: of few-shot examples, generated questions and draws.
        compare: folder of another evaluation of the same items; "" compares with none.
        allow_unsafe_code: whether code that the model wrote may run where no sandbox can be built.
        sparse_config: sparse attention to use with these weights; None is what the checkpoint says.
        weight_dtype: "int8" rounds the kernels of the layers to int8 as they are loaded; "" leaves them.
    """

    checkpoint: str
    tasks: str | tuple[str, ...] | list[str]
    tokenizer: str = ""
    limit: NonNegativeInt = 0
    num_fewshot: NonNegativeInt | None = None
    chat: bool = False
    max_gen_tokens: NonNegativeInt = 0
    batch_size: PositiveInt = 8
    dtype: ComputeDType = ""
    seed: NonNegativeInt = 0
    compare: str = ""
    allow_unsafe_code: bool = False
    sparse_config: SparseConfig | None = None
    weight_dtype: WeightDType = ""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("EvaluateConfig.tasks = (): name at least one task", field="EvaluateConfig.tasks")

    @property
    def task_names(self) -> tuple[str, ...]:
        """`tasks`, also when it is one."""
        return (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)


def run(config: EvaluateConfig, workdir: Path) -> None:
    """Runs the items that `workdir` does not have yet, then writes results.json, metrics and report.html.

    Raises:
        InputError: a task, the model, or the other evaluation cannot be used; lm_eval or data is not installed; the
            folder holds results of another model or of other settings.
        ConfigError: settings that cannot be used.
        exit_codes.Stop: it was interrupted from the terminal.
    """
    if jax.process_count() > 1:
        raise ConfigError("evaluate runs in one process, on its first device: start it on one host")

    from cpm_jax.evaluation.comparison import compare, read_results
    from cpm_jax.evaluation.identity import claim, model_identity
    from cpm_jax.evaluation.lm_eval_adapter import CpmJaxLM
    from cpm_jax.evaluation.results import RESULTS_FILE
    from cpm_jax.evaluation.runner import Settings, build_task, run_task
    from cpm_jax.evaluation.tasks import TaskOptions, make_tasks
    from experiments.evaluate_report import write_evaluation_report

    settings = Settings(config.num_fewshot, config.chat, config.max_gen_tokens, config.seed)
    options = TaskOptions(config.seed, config.limit, config.max_gen_tokens, config.allow_unsafe_code)
    if config.compare:
        read_results(Path(config.compare))  # better said now than after the evaluation
    tasks = make_tasks(config.task_names, options)  # a wrong name is said before the model is read
    model = load_model(
        config.checkpoint, config.tokenizer or None, config.dtype, None, config.sparse_config, config.weight_dtype
    )
    if config.chat:
        model.tokenizer.require_chat_template()
    identity = model_identity(model.config, model.params, model.tokenizer.sha256)
    lm = CpmJaxLM(
        model.config,
        model.params,
        model.tokenizer,
        eos_ids=model.eos_ids,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    model = model._replace(params={})  # the adapter has them in the type that it computes in
    claim(workdir, identity, dataclasses.asdict(settings))
    for task in tasks:
        build_task(lm, task, settings, limit=config.limit)
    try:
        found = {task.name: run_task(lm, task, workdir, batch_size=config.batch_size) for task in tasks}
    except KeyboardInterrupt:
        message = f"stopped; the items so far are in {workdir}, and the same command goes on with the others"
        raise exit_codes.Stop(exit_codes.PREEMPTED, message) from None
    summaries = {name: result.summary for name, result in found.items()}
    results: dict[str, Any] = {
        "checkpoint": str(model.path),
        "step": model.step,
        "settings": dataclasses.asdict(settings) | {"limit": config.limit, "batch_size": config.batch_size},
        "tasks": summaries,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_revision": provenance.git_revision(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
    }
    write_json(workdir / RESULTS_FILE, results)
    _log(model, summaries, workdir)
    comparison = compare(workdir, Path(config.compare)) if config.compare else []
    if comparison:
        write_json(workdir / RESULTS_FILE, results | {"compared_with": config.compare, "comparison": _rows(comparison)})
    write_evaluation_report(
        workdir,
        results=results,
        items={name: result.items for name, result in found.items()},
        comparison=comparison,
        other=config.compare,
    )
    for line in _lines(summaries):
        print(line)
    for paired in comparison:
        print(paired.verdict)
    print(f"report: {workdir / 'report.html'}")


def _log(model: LoadedModel, summaries: dict[str, Any], workdir: Path) -> None:
    """Figures under the checkpoint's step, so that evaluations of a training's checkpoints make a curve."""
    writer = make_metric_writer(workdir, resume_step=model.step - 1)
    writer.write(
        model.step,
        {
            f"eval/{name}/{metric}": math.nan if figure["value"] is None else figure["value"]
            for name, summary in summaries.items()
            for metric, figure in summary["metrics"].items()
        },
    )
    writer.close()


def _rows(comparison: list[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(paired) | {"verdict": paired.verdict} for paired in comparison]


def _lines(summaries: dict[str, Any]) -> list[str]:
    """A line for each figure, in columns."""
    rows = []
    for name, summary in summaries.items():
        for metric, figure in summary["metrics"].items():
            error = "" if figure["standard_error"] is None else f"± {figure['standard_error']:.4f}"
            value = "not finite" if figure["value"] is None else f"{figure['value']:.4f}"
            rows.append((name, metric, value, error, f"n = {figure['n']}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
