"""A task of lm-eval over documents that are at hand, run slice by slice so that finished items can be kept."""

import dataclasses
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cpm_jax.evaluation.errors import TaskError
from cpm_jax.evaluation.lm_eval_adapter import CpmJaxLM
from cpm_jax.evaluation.results import Item, Measured

import datasets  # isort: skip (lm_eval needs it; without lm_eval the adapter has said so)
from lm_eval.api.task import ConfigurableTask  # isort: skip

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

SPLIT = "test"
# Batches of likelihoods that another model than ours is asked for at once.
_BATCHES_AT_ONCE = 16


class OfflineTask(ConfigurableTask):
    """An lm-eval task that is given its documents instead of downloading them; any lm-eval model can run it."""

    def __init__(self, config: Mapping[str, Any], docs: Sequence[Mapping[str, Any]]):
        """Builds the task.

        Args:
            config: as in lm-eval's task files; what they say about data sets is replaced.
            docs: the documents, all of the same fields.
        """
        self._given = datasets.Dataset.from_list([dict(doc) for doc in docs])
        about_data = ("dataset_path", "dataset_name", "training_split", "validation_split", "test_split")
        config = {key: value for key, value in config.items() if key not in about_data}
        super().__init__(config=config | {"test_split": SPLIT, "process_docs": None})

    def download(self, *_: Any, **__: Any) -> None:
        """Takes the given documents."""
        self.dataset = {SPLIT: self._given}


@dataclasses.dataclass(frozen=True)
class Reject:
    """A record that cannot be an item.

    Attributes:
        place: where it is: "line 3", or a file's name.
        reason: what is wrong with it.
        content: the record, or more about the reason.
    """

    place: str
    reason: str
    content: str


@dataclasses.dataclass
class HarnessTask:
    """What `evaluate` runs.

    Attributes:
        name: name of the task, unique in a run.
        task: the lm-eval task.
        main_metric: the metric to be quoted.
        data: where the documents are from, in a few words.
        rejects: records that could not be used.
    """

    name: str
    task: OfflineTask
    main_metric: str
    data: str
    rejects: Sequence[Reject] = ()

    def __post_init__(self) -> None:
        self._instances: dict[int, list[Instance]] = {}

    @property
    def num_fewshot(self) -> int:
        """Examples in each prompt."""
        return self.task.config.num_fewshot or 0

    def higher_is_better(self, metric: str) -> bool:
        """Which way a metric is good."""
        return bool(self.task.higher_is_better()[metric.partition(",")[0]])

    def build(
        self, lm: "TemplateLM", *, limit: int = 0, num_fewshot: int | None = None, chat: bool = False, seed: int = 0
    ) -> None:
        """Makes the prompts, the same for the same arguments.

        Args:
            lm: whose chat template is used.
            limit: items at most, from the first on; 0 is all.
            num_fewshot: examples in each prompt; None is what the task says. A task that says 0 keeps it.
            chat: whether prompts go through the chat template, examples being earlier turns.
            seed: of the choice of examples.

        Raises:
            TaskError: there are not as many examples.
        """
        task = self.task
        if num_fewshot is not None and task.config.num_fewshot != 0:
            task.set_config("num_fewshot", num_fewshot)
        samples = task.fewshot_cfg.samples
        available = len(samples) if isinstance(samples, list) else len(task.eval_docs) - 1
        if self.num_fewshot > available:
            raise TaskError(
                f"task {self.name}: num_fewshot = {self.num_fewshot}: there are {available} examples to choose from"
            )
        task.set_fewshot_seed(seed)
        task.build_all_requests(
            limit=limit or None,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            chat_template=lm.apply_chat_template if chat else None,
        )
        grouped = defaultdict(list)
        for instance in task.instances:
            grouped[instance.doc_id].append(instance)
        self._instances = {
            index: sorted(grouped[index], key=lambda instance: instance.idx) for index in sorted(grouped)
        }

    def hashes(self) -> dict[int, tuple[str, str]]:
        """The document hash and the prompt of each item, by its index."""
        return {index: (_hash(group[0].doc), group[0].args[0]) for index, group in self._instances.items()}

    def run(self, lm: "TemplateLM", indices: Collection[int], *, batch_size: int) -> Iterator[list[Item]]:
        """Runs items, yielding some as soon as they are known, the longest items first.

        Args:
            lm: any lm-eval model. Ours gives likelihoods one by one; others, and outputs, are asked for slices of whole
                batches.
            indices: the items to run, of those that `build` made.
            batch_size: of the model.
        """
        order = sorted(indices, key=lambda index: -max(_size(instance) for instance in self._instances[index]))
        generative = self.task.OUTPUT_TYPE == "generate_until"
        if isinstance(lm, CpmJaxLM) and not generative:
            yield from self._run_stream(lm, order)
            return
        at_once = batch_size if generative else batch_size * _BATCHES_AT_ONCE
        chosen: list[int] = []
        requests = 0
        for index in order:
            chosen.append(index)
            requests += self.task.config.repeats * len(self._instances[index])
            if requests >= at_once:
                yield self._run_slice(lm, chosen)
                chosen, requests = [], 0
        if chosen:
            yield self._run_slice(lm, chosen)

    def _run_stream(self, lm: CpmJaxLM, indices: Sequence[int]) -> Iterator[list[Item]]:
        """Asks for all likelihoods at once, and finishes an item when it has all of its own."""
        instances = [instance for index in indices for instance in self._instances[index]]
        owners = [index for index in indices for _ in self._instances[index]]
        missing = Counter(owners)
        for place, response in lm.stream(instances):
            instances[place].resps = [response]
            missing[owners[place]] -= 1
            if not missing[owners[place]]:
                yield self._finish([owners[place]], lm)

    def _run_slice(self, lm: "TemplateLM", indices: Sequence[int]) -> list[Item]:
        instances = [instance for index in indices for instance in self._instances[index]]
        requests = [instance for instance in instances for _ in range(instance.repeats or 1)]
        method = getattr(lm, instances[0].request_type)
        for instance in instances:
            instance.resps = []
        for instance, response in zip(requests, method(requests, disable_tqdm=True), strict=True):
            instance.resps.append(response)
        return self._finish(indices, lm)

    def _finish(self, indices: Sequence[int], lm: "TemplateLM") -> list[Item]:
        # lm-eval's filters work on whatever instances a task holds: here those that are finished.
        self.task._instances = [instance for index in indices for instance in self._instances[index]]
        self.task.apply_filters()
        return [self._item(index, lm) for index in indices]

    def _item(self, index: int, lm: "TemplateLM") -> Item:
        group = self._instances[index]
        doc = group[0].doc
        metrics: dict[str, Measured] = {}
        filters = list(group[0].filtered_resps)
        for name in filters:
            results = self.task.process_results(doc, [instance.filtered_resps[name] for instance in group])
            suffix = f",{name}" if len(filters) > 1 else ""
            metrics |= {f"{metric}{suffix}": _measured(metric, value) for metric, value in results.items()}
        choices = tuple(instance.args[1] for instance in group) if self.task.OUTPUT_TYPE == "multiple_choice" else ()
        responses = [response for instance in group for response in instance.resps]
        truncated = isinstance(lm, CpmJaxLM) and (group[0].task_name, index) in lm.truncated
        return Item(
            index=index,
            doc_hash=_hash(doc),
            prompt=group[0].args[0],
            choices=choices,
            target=str(self.task.doc_to_target(doc)),
            responses=tuple(list(response) if isinstance(response, tuple) else response for response in responses),
            metrics=metrics,
            truncated=truncated,
        )


def _size(instance: "Instance") -> int:
    return sum(len(argument) for argument in instance.args if isinstance(argument, str))


def _hash(doc: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()


def _measured(metric: str, value: Any) -> Measured:
    if metric == "bits_per_byte":  # lm-eval gives (log-likelihood, bytes)
        return Measured(-value[0] / math.log(2), value[1])
    return Measured(float(value))
