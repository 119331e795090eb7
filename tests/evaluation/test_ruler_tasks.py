"""RULER's questions, each property checked on the finished prompt: length, depth, uniqueness, and one right answer."""

import json
import pydoc_data.topics
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_jax.data.errors import DataError
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.errors import TaskError
from cpm_jax.evaluation.ruler.documents_qa import read_qa
from cpm_jax.evaluation.ruler.haystack import Haystack
from cpm_jax.evaluation.ruler.question import PromptFormat
from cpm_jax.evaluation.ruler.scoring import score
from cpm_jax.evaluation.ruler.tasks import TASKS, Materials, check_names, make_question
from tests.evaluation.ruler_oracle import oracle

PROSE = pydoc_data.topics.__file__  # 700 kB of the language's reference
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLE = r"One of the special magic numbers for (\S+) is: (\d+)\."


@pytest.fixture(scope="module")
def tokenizer():
    with open(PROSE, encoding="utf-8") as file:
        return Tokenizer.train([file.read(200_000)], vocab_size=1500)


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack.read(PROSE, tokenizer, 40_000)


@pytest.fixture(scope="module")
def materials(haystack, tokenizer):
    return Materials(haystack, PromptFormat(tokenizer), DEPTHS)


def prompt(question):
    return question.body + question.answer_prefix


@pytest.mark.parametrize("turns", ["plain", "open", "closed"])
@settings(max_examples=25, deadline=None)
@given(task=st.sampled_from(sorted(TASKS)), length=st.integers(1800, 6000), index=st.integers(0, 9))
def test_prompt_and_answer_fill_the_length_and_never_exceed_it(haystack, tokenizer, turns, task, length, index):
    found = make_question(Materials(haystack, PromptFormat(tokenizer, turns), DEPTHS), task, length, index)
    if turns == "plain":
        read = len(tokenizer.encode(prompt(found))) + tokenizer.add_bos
    else:
        said = [("user", found.body), ("assistant", found.answer_prefix.strip())]
        if turns == "closed":
            said = [("user", prompt(found)), ("assistant", "")]
        text = "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in said).removesuffix("<|im_end|>\n")
        read = len(tokenizer.encode(text)) + tokenizer.add_bos
    assert found.num_tokens == read
    assert 0.97 * length < read + found.max_new_tokens <= length


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1800, 5000])
def test_the_prompt_alone_tells_the_answer(materials, task, length):
    for index in range(6):
        question = make_question(materials, task, length, index)
        assert score(question, oracle(prompt(question))) == 1
        assert score(question, "") == 0


@pytest.mark.parametrize("task", TASKS)
def test_a_right_answer_has_room(materials, tokenizer, task):
    question = make_question(materials, task, 2500, 3)
    assert len(tokenizer.encode(" " + ", ".join(question.answers))) < question.max_new_tokens


class TestNeedles:
    @pytest.mark.parametrize("index", range(5))
    @pytest.mark.parametrize("task", ["niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery"])
    def test_each_is_where_its_depth_says_exactly_once(self, materials, tokenizer, task, index):
        question = make_question(materials, task, 6000, index)
        context = question.body.partition("\n\n")[2].rpartition("\n\nQuestion:")[0]
        without = re.sub(NEEDLE, "", context)
        assert len(question.depths) == len(question.answers) == (4 if task[-5:] in ("value", "query") else 1)
        assert question.depths[0] == DEPTHS[index]
        for number, depth in zip(question.answers, question.depths, strict=True):
            assert prompt(question).count(number) == 1
            before = re.sub(NEEDLE, "", context[: re.search(rf"One of the .{{0,60}}{number}\.", context).start()])
            measured = len(tokenizer.encode(before)) / len(tokenizer.encode(without))
            assert measured == pytest.approx(depth, abs=0.02)
        if question.depths[0] == 0:
            assert context.startswith("One of the special")
        if question.depths[0] == 1:
            assert context.endswith(f"{question.answers[0]}.")

    def test_they_stand_between_sentences(self, materials):
        for index in range(10):
            body = make_question(materials, "niah_multikey", 3000, index).body
            for needle in re.finditer(NEEDLE, body):
                before, after = body[: needle.start()].rstrip(" "), body[needle.end() :]
                at_the_end = after.startswith("\n\nQuestion:")  # where the text itself is cut
                assert at_the_end or re.search(r"[.!?\n][\"')\]’”]*$", before), before[-40:]

    @pytest.mark.parametrize(("task", "names", "numbers"), [("niah_multikey", 4, 4), ("niah_multivalue", 1, 4)])
    def test_how_many(self, materials, task, names, numbers):
        told = re.findall(NEEDLE, make_question(materials, task, 3000, 0).body)
        assert len({name for name, _ in told}) == names
        assert len({number for _, number in told}) == len(told) == numbers

    def test_recall_holds_nothing_else(self, materials):
        for index, depth in enumerate(DEPTHS):
            question = make_question(materials, "recall", 4000, index)
            lines = question.body.partition("\n\n")[2].rpartition("\n\nQuestion:")[0].split("\n")
            told = [re.fullmatch(NEEDLE, line).groups() for line in lines]
            assert len({name for name, _ in told}) == len({number for _, number in told}) == len(told) > 50
            place = [number for _, number in told].index(question.answers[0])
            assert place / (len(told) - 1) == pytest.approx(depth, abs=0.01)

    def test_the_context_is_the_text_of_the_haystack(self, materials, haystack):
        body = make_question(materials, "niah_single", 3000, 2).body
        context = body.partition("\n\n")[2].rpartition("\n\nQuestion:")[0]
        left, *_, right = re.split(NEEDLE, context)
        assert len(left) > 1000 < len(right)
        assert left.strip() in haystack.text
        assert right.strip() in haystack.text


class TestVariables:
    def test_the_chain_runs_through_the_text_in_order(self, materials):
        for index in range(5):
            question = make_question(materials, "variable_tracking", 3000, index)
            text = question.body.rpartition("Follow the assignments.")[2]
            chain = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text)
            assert [name for name, _ in chain] == list(question.answers)
            assert [source for _, source in chain[1:]] == list(question.answers[:-1])
            assert DEPTHS[index] in question.depths


class TestCounts:
    @pytest.mark.parametrize(("length", "common", "rare"), [(3000, 6, 1), (6000, 30, 3)])
    def test_common_words_are_as_common_as_in_the_paper(self, materials, length, common, rare):
        question = make_question(materials, "common_words", length, 0)
        counts = Counter(
            re.findall(r"\d+\. (\S+)", question.body.rpartition("numbered list")[2].partition("Question:")[0])
        )
        assert {counts.pop(word) for word in question.answers} == {common}
        assert set(counts.values()) == {rare}
        assert not any(word in other for word in question.answers for other in counts)

    def test_coded_words_follow_zipfs_law(self, materials):
        question = make_question(materials, "frequent_words", 6000, 0)
        words = question.body.partition("are none.\n\n")[2].partition("\n\nQuestion:")[0].split()
        ranked = Counter(words).most_common()
        assert ranked[0][0] == "...."
        assert [word for word, _ in ranked[1:4]] == list(question.answers)
        for rank, (_, count) in enumerate(ranked[:6], start=1):
            assert count == pytest.approx(ranked[0][1] / rank**2, abs=1)


class TestDocuments:
    def test_the_document_is_where_its_depth_says(self, materials, tokenizer):
        for index, depth in enumerate(DEPTHS):
            question = make_question(materials, "qa", 5000, index)
            name = re.search(r"[A-Z]\w+ [A-Z]\. [A-Z]\w+", question.body.rpartition("Question:")[2]).group()
            documents = re.split(r"Document \d+:\n", question.body.rpartition("\n\nAnswer the question")[0])[1:]
            (place,) = [number for number, text in enumerate(documents) if name in text]
            sizes = [len(tokenizer.encode(text)) for text in documents]
            measured = sum(sizes[:place]) / (sum(sizes) - sizes[place])
            assert measured == pytest.approx(depth, abs=0.02)

    @pytest.fixture
    def squad(self, tmp_path):
        paragraphs = [
            {
                "context": f"The river number {i} flows through the city of Town{i}. " + "It is long. " * 20,
                "qas": [
                    {
                        "id": f"q{i}",
                        "question": f"Through which city flows river {i}?",
                        "answers": [{"text": f"Town{i}"}],
                    },
                    {"id": f"n{i}", "question": "Who?", "answers": []},
                ],
            }
            for i in range(30)
        ]
        path = tmp_path / "squad.json"
        path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "rivers", "paragraphs": paragraphs}]}))
        return path

    def test_questions_of_a_file(self, haystack, tokenizer, squad):
        qa = read_qa(squad)
        assert (len(qa.records), len(qa.documents)) == (30, 30)
        materials = Materials(haystack, PromptFormat(tokenizer), DEPTHS, qa=qa)
        for length in (1500, 6000):  # the longer one needs more documents than there are
            question = make_question(materials, "qa", length, 2)
            number = re.search(r"flows river (\d+)", question.body.rpartition("Question:")[2]).group(1)
            assert question.answers == (f"Town{number}",)
            assert question.body.count(f"The river number {number} flows through") == 1
            assert 0.97 * length < question.num_tokens + question.max_new_tokens <= length

    def test_lines_of_json(self, tmp_path):
        path = tmp_path / "qa.jsonl"
        path.write_text('{"question": "Who?", "answers": ["me", "I", "me"], "document": "It is me."}\n')
        assert read_qa(path).records[0].answers == ("me", "I")

    @pytest.mark.parametrize(
        ("name", "content", "fault"),
        [
            ("a.json", '{"data": [{"title": "x"}]}', "paragraphs"),
            ("a.json", "[", "Expecting value"),
            ("a.json", '{"data": []}', "no question with an answer"),
            ("a.jsonl", '{"question": "Who?"}', "line 1: it has no 'document'"),
            ("a.jsonl", '\n{"question": "", "answers": ["x"], "document": "y"}', "line 2: '' is not a text"),
            ("a.jsonl", "[1]", "line 1"),
        ],
    )
    def test_a_file_that_cannot_be_used(self, tmp_path, name, content, fault):
        (tmp_path / name).write_text(content)
        with pytest.raises(TaskError, match=re.escape(fault)):
            read_qa(tmp_path / name)

    def test_no_file(self, tmp_path):
        with pytest.raises(TaskError, match="No such file"):
            read_qa(tmp_path / "none.json")


def test_the_same_seed_makes_the_same_and_another_one_others(materials, haystack, tokenizer):
    for task in TASKS:
        first = make_question(materials, task, 2000, 1)
        assert make_question(materials, task, 2000, 1) == first
        other = make_question(Materials(haystack, PromptFormat(tokenizer), DEPTHS, seed=1), task, 2000, 1)
        assert other.answers != first.answers
        assert make_question(materials, task, 2000, 6).answers != first.answers


def test_a_short_haystack_comes_again(tokenizer):
    short = Haystack(["The first sentence. The second one! 第三句。 And the last."], tokenizer)
    question = make_question(Materials(short, PromptFormat(tokenizer), DEPTHS), "niah_single", 1500, 2)
    assert question.body.count("第三句。") > 20
    assert 0.97 * 1500 < question.num_tokens + question.max_new_tokens <= 1500


class TestWrong:
    @pytest.mark.parametrize("task", TASKS)
    def test_too_short(self, materials, task):
        with pytest.raises(TaskError, match=rf"task {task} does not fit into 100 tokens: it needs at least \d+"):
            make_question(materials, task, 100, 0)

    def test_an_answer_without_room(self, materials):
        with pytest.raises(TaskError, match=r"a right answer takes up to \d+ tokens .* max_gen_tokens = 9"):
            make_question(materials, "niah_multivalue", 2000, 0, max_new_tokens=9)

    def test_no_such_task(self):
        with pytest.raises(TaskError, match="no task 'needle': there are niah_single, "):
            check_names(["niah_single", "needle"])
        with pytest.raises(TaskError, match="twice"):
            check_names(["qa", "qa"])

    def test_no_text(self, tokenizer, tmp_path):
        (tmp_path / "empty.txt").write_text(" \n")
        with pytest.raises(TaskError, match="holds no text"):
            Haystack.read(str(tmp_path), tokenizer, 100)
        with pytest.raises(DataError, match="does not exist"):
            Haystack.read(str(tmp_path / "none"), tokenizer, 100)

    def test_no_chat_template(self, haystack, tokenizer, tmp_path):
        tokenizer.save(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
        bare = Materials(haystack, PromptFormat(Tokenizer.load(tmp_path), "open"), DEPTHS)
        with pytest.raises(DataError, match="no chat template"):
            make_question(bare, "qa", 2000, 0)
