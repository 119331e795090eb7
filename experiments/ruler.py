"""The verb `ruler`: asks a model about long texts and scores it for every task, length and depth."""

import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from cpm_jax.common import exit_codes, provenance
from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.common.files import write_json
from cpm_jax.common.metrics import make_metric_writer
from cpm_jax.common.progress import Progress
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.identity import claim, model_identity
from cpm_jax.evaluation.results import RESULTS_FILE, Item
from cpm_jax.evaluation.ruler.documents_qa import read_qa
from cpm_jax.evaluation.ruler.endpoint import EndpointAnswers
from cpm_jax.evaluation.ruler.haystack import Haystack
from cpm_jax.evaluation.ruler.question import Question
from cpm_jax.evaluation.ruler.runner import (
    METRIC,
    Answers,
    answer_questions,
    load_questions,
    mean_over_tasks,
    settings_of,
    summarize,
)
from cpm_jax.evaluation.ruler.tasks import TASKS, Materials, check_names
from cpm_jax.inference.load import ComputeDType, load_model
from cpm_jax.modeling.config import SparseConfig
from experiments.ruler_report import write_ruler_report

# The adapter needs lm_eval and is imported where it is used: an endpoint does not need the extra.


@config_dataclass
class RulerConfig:
    """Whom to ask, and what.

    Attributes:
        haystack: real text, as `prepare` takes it: a folder, a file, a glob pattern, "stdlib", ….
        checkpoint: a workdir, a checkpoints folder or one checkpoint, a Hugging Face folder, or a .gguf file.
        endpoint: instead of it the base URL of an OpenAI-compatible API; the key is taken from OPENAI_API_KEY.
        model: the model's name at the endpoint.
        tokenizer: a tokenizer.json or its folder; "" is the one that lies with the checkpoint.
        lengths: tokens of prompt and answer together.
        depths: where needles lie, as shares of the context.
        samples: questions of each task for each length and depth.
        tasks: names of tasks; docs/ruler.md lists them.
        questions: of the task qa, a file in SQuAD's format or .jsonl; "" asks about invented people.
        chat: whether questions go through the chat template.
        max_gen_tokens: most tokens of an answer; 0 is what RULER gives each task.
        batch_size: questions that are answered together.
        dtype: what to compute in; "" is what the checkpoint says.
        sparse_config: sparse attention to use with these weights; None is what the checkpoint says.
        seed: of the questions.
        timeout_s: seconds after which a request to the endpoint is given up, and sent again.
    """

    haystack: str
    checkpoint: str = ""
    endpoint: str = ""
    model: str = ""
    tokenizer: str = ""
    lengths: tuple[PositiveInt, ...] | list[PositiveInt] = (1024, 2048, 4096, 8192)
    depths: tuple[float, ...] | list[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: PositiveInt = 5
    tasks: str | tuple[str, ...] | list[str] = tuple(TASKS)
    questions: str = ""
    chat: bool = False
    max_gen_tokens: NonNegativeInt = 0
    batch_size: PositiveInt = 4
    dtype: ComputeDType = ""
    sparse_config: SparseConfig | None = None
    seed: NonNegativeInt = 0
    timeout_s: PositiveFloat = 600.0

    def __post_init__(self) -> None:
        if bool(self.checkpoint) == bool(self.endpoint):
            raise ConfigError(
                f"RulerConfig.checkpoint = {self.checkpoint!r}, endpoint = {self.endpoint!r}: give one of them",
                field="RulerConfig.checkpoint",
            )
        if self.endpoint and not (self.model and self.tokenizer):
            raise ConfigError(
                f"RulerConfig.model = {self.model!r}, tokenizer = {self.tokenizer!r}: an endpoint needs the model's "
                "name there, and its tokenizer, by which prompts get their length",
                field="RulerConfig.model",
            )
        if self.endpoint and self.sparse_config is not None:
            raise ConfigError(
                f"RulerConfig.sparse_config = {self.sparse_config}: an endpoint attends as it does; accepted is None",
                field="RulerConfig.sparse_config",
            )
        for name, least, most in (("lengths", 1, float("inf")), ("depths", 0, 1)):
            values = list(getattr(self, name))
            if not values or values != sorted(set(values)) or not least <= values[0] <= values[-1] <= most:
                accepted = "positive" if name == "lengths" else "from 0 to 1"
                raise ConfigError(
                    f"RulerConfig.{name} = {tuple(values)}: must be numbers {accepted}, ascending, at least one",
                    field=f"RulerConfig.{name}",
                )
        if not self.tasks:
            raise ConfigError("RulerConfig.tasks = (): name at least one task", field="RulerConfig.tasks")

    @property
    def task_names(self) -> tuple[str, ...]:
        """`tasks`, also when it is one."""
        return (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)


class _Asked(NamedTuple):
    """Who is asked: how it answers, by what it is known again, and what it is called."""

    answers: Answers
    identity: Mapping[str, Any]
    name: str
    step: int
    max_length: int | None


def run(config: RulerConfig, workdir: Path) -> None:
    """Makes the questions, has those answered that `workdir` has no answer to, then writes results and report.

    Raises:
        InputError: the model, the endpoint, the haystack or a task cannot be used; the folder holds answers of
            another model or to other questions.
        ConfigError: settings that cannot be used.
        exit_codes.Stop: it was interrupted from the terminal.
    """
    if jax.process_count() > 1:
        raise ConfigError("ruler runs in one process, on its first device: start it on one host")
    check_names(config.task_names)
    qa = read_qa(config.questions) if config.questions else None
    asked = _ask_endpoint(config) if config.endpoint else _ask_checkpoint(config)
    longest = config.lengths[-1]
    if asked.max_length is not None and longest > asked.max_length:
        raise ConfigError(
            f"RulerConfig.lengths = {tuple(config.lengths)}: the model reads up to max_position_embeddings = "
            f"{asked.max_length} tokens",
            field="RulerConfig.lengths",
        )
    prompt_format = asked.answers.prompt_format
    haystack = Haystack.read(config.haystack, prompt_format.tokenizer)
    materials = Materials(haystack, prompt_format, tuple(config.depths), config.seed, qa)
    settings = settings_of(materials, config.max_gen_tokens)
    claim(workdir, asked.identity, settings)
    try:
        questions = _questions(config, materials, workdir)
        items = _items(questions, asked.answers, workdir)
    except KeyboardInterrupt:
        message = f"stopped; questions and answers so far are in {workdir}, and the same command goes on"
        raise exit_codes.Stop(exit_codes.PREEMPTED, message) from None
    results = _results(config, asked, settings, haystack, questions, items)
    write_json(workdir / RESULTS_FILE, results)
    _log(asked.step, results, workdir)
    write_ruler_report(workdir, results=results, questions=questions, items=items)
    for line in _lines(results):
        print(line)
    print(f"report: {workdir / 'report.html'}")


def _ask_checkpoint(config: RulerConfig) -> _Asked:
    from cpm_jax.evaluation.lm_eval_adapter import CpmJaxLM
    from cpm_jax.evaluation.ruler.adapter import AdapterAnswers

    model = load_model(config.checkpoint, config.tokenizer or None, config.dtype, None, config.sparse_config)
    lm = CpmJaxLM(model.config, model.params, model.tokenizer, batch_size=config.batch_size, seed=config.seed)
    answers = AdapterAnswers(lm, chat=config.chat, batch_size=config.batch_size)
    identity = model_identity(model.config, model.params, model.tokenizer.sha256)
    return _Asked(answers, identity, str(model.path), model.step, lm.max_length)


def _ask_endpoint(config: RulerConfig) -> _Asked:
    tokenizer = Tokenizer.load(config.tokenizer)
    answers = EndpointAnswers(
        config.endpoint,
        config.model,
        tokenizer,
        chat=config.chat,
        api_key=os.environ.get("OPENAI_API_KEY", ""),
        parallel=config.batch_size,
        timeout_s=config.timeout_s,
    )
    identity = {"endpoint": config.endpoint, "model": config.model, "tokenizer_sha256": tokenizer.sha256}
    return _Asked(answers, identity, f"{config.model} at {config.endpoint}", 0, None)


def _questions(config: RulerConfig, materials: Materials, workdir: Path) -> dict[tuple[str, int], list[Question]]:
    """The questions by task and length, from the shortest on, so that what does not fit is said first."""
    cells = [(task, length) for length in config.lengths for task in config.task_names]
    count = config.samples * len(config.depths)
    questions, made = {}, 0
    with Progress("questions", len(cells) * count) as bar:

        def on_question() -> None:
            nonlocal made
            made += 1
            bar.update(made)

        for task, length in cells:
            questions[task, length] = load_questions(
                materials,
                task,
                length,
                count,
                workdir,
                max_new_tokens=config.max_gen_tokens,
                on_question=on_question,
            )
    return questions


def _items(
    questions: Mapping[tuple[str, int], list[Question]], answers: Answers, workdir: Path
) -> dict[tuple[str, int], list[Item]]:
    items: dict[tuple[str, int], list[Item]] = {}
    done, scores = 0, list[float]()
    with Progress("ruler", sum(map(len, questions.values()))) as bar:

        def on_item(item: Item) -> None:
            scores.append(item.metrics[METRIC].value)
            bar.update(done + len(scores), score=sum(scores) / len(scores))

        for cell, asked in questions.items():
            items[cell] = answer_questions(asked, answers, workdir, on_item=on_item)
            done += len(asked)
            scores.clear()
            bar.update(done)
    return items


def _results(
    config: RulerConfig,
    asked: _Asked,
    settings: Mapping[str, Any],
    haystack: Haystack,
    questions: Mapping[tuple[str, int], list[Question]],
    items: Mapping[tuple[str, int], list[Item]],
) -> dict[str, Any]:
    tasks: dict[str, dict[str, Any]] = {task: {} for task in config.task_names}
    for (task, length), of_cell in questions.items():
        tasks[task][str(length)] = summarize(of_cell, items[task, length], config.depths)
    means = {
        str(length): mean_over_tasks([cells[str(length)]["score"] for cells in tasks.values()])
        for length in config.lengths
    }
    return {
        "model": asked.name,
        "step": asked.step,
        "settings": dict(settings)
        | {
            "lengths": list(config.lengths),
            "samples": config.samples,
            "haystack": config.haystack,
            "haystack_tokens": haystack.num_tokens,
            "questions": config.questions,
        },
        "mean": means,
        "tasks": tasks,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_revision": provenance.git_revision(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
    }


def _log(step: int, results: Mapping[str, Any], workdir: Path) -> None:
    """Figures under the checkpoint's step, so that a training's checkpoints make a curve."""
    writer = make_metric_writer(workdir, resume_step=step - 1)
    figures = {
        f"ruler/{task}/{length}": cell["score"]["value"]
        for task, cells in results["tasks"].items()
        for length, cell in cells.items()
    }
    writer.write(step, figures | {f"ruler/mean/{length}": mean["value"] for length, mean in results["mean"].items()})
    writer.close()


def _lines(results: Mapping[str, Any]) -> list[str]:
    """The table of scores, task by length."""
    rows = {task: {length: cell["score"] for length, cell in cells.items()} for task, cells in results["tasks"].items()}
    rows["mean"] = results["mean"]
    width = max(map(len, rows))
    return ["".join([" " * width, *(f"{length:>10}" for length in results["mean"])])] + [
        "".join([task.ljust(width), *(f"{figure['value']:>10.3f}" for figure in figures.values())])
        for task, figures in rows.items()
    ]
