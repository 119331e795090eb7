"""Tasks from files: the three kinds of .jsonl and texts, what is set aside, and files that cannot be used."""

import json

import pytest

from cpm_jax.evaluation.errors import TaskError
from cpm_jax.evaluation.file_tasks import jsonl_task, read_records
from cpm_jax.evaluation.tasks import TaskOptions, make_tasks


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="mine.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return tmp_path / name

    return write


CHOICE = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}


def test_the_answer_is_an_index_or_a_choice(write):
    kind, docs, rejects = read_records(write(CHOICE, CHOICE | {"answer": "3"}, CHOICE | {"id": "more"}))
    assert kind == "choice"
    assert [doc["answer"] for doc in docs] == [1, 0, 1]
    assert all(set(doc) == {"question", "choices", "answer"} for doc in docs)
    assert not rejects


def test_the_answer_may_be_a_letter(write):
    given = [CHOICE | {"answer": "B"}, CHOICE | {"choices": ["B", "A"], "answer": "A"}, CHOICE | {"answer": "C"}]
    _, docs, rejects = read_records(write(*given))
    assert [doc["answer"] for doc in docs] == [1, 1]  # a choice wins over a letter
    assert "neither one of the choices, nor its letter, nor an index from 0 to 1" in rejects[0].reason


def test_what_is_json_but_no_text_is_set_aside(write):
    surrogate = b'{"question": "\\ud800", "choices": ["a", "b"], "answer": 0}'
    choice = b'{"question": "x", "choices": ["a", "\\udfff"], "answer": 0}'
    _, docs, rejects = read_records(write(CHOICE, surrogate, choice, b"[" * 100_000))
    assert (len(docs), [reject.place for reject in rejects]) == (1, ["line 2", "line 3", "line 4"])
    assert "surrogates not allowed" in rejects[0].reason


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert read_records(tmp_path / "a.jsonl") == ("text", [{"text": "a"}, {"text": "b"}], [])


def test_a_choice_wins_over_an_index(write):
    # "1" is the text of choice 0; the number 1 is the index of the other.
    _, docs, _ = read_records(write({"question": "?", "choices": ["1", "2"], "answer": "1"}))
    assert docs[0]["answer"] == 0


def test_lines_that_cannot_be_used_are_set_aside(write):
    path = write(
        CHOICE,
        b'{"question": "cut sho',
        b"\xff\xfe",
        b"",
        [1, 2],
        {"prompt": "another kind", "answer": "x"},
        CHOICE | {"choices": ["one"]},
        CHOICE | {"choices": ["a", ""]},
        CHOICE | {"choices": "ab"},
        CHOICE | {"answer": 2},
        CHOICE | {"answer": -1},
        CHOICE | {"answer": True},
        CHOICE | {"answer": "5"},
        CHOICE | {"question": " "},
        CHOICE | {"question": 3},
        CHOICE,
    )
    _, docs, rejects = read_records(path)
    assert len(docs) == 2
    assert [reject.place for reject in rejects] == [f"line {n}" for n in (2, 3, *range(5, 16))]
    reasons = {int(reject.place[5:]): reject.reason for reject in rejects}
    assert "list, not an object" in reasons[5]
    assert reasons[6] == "it has no 'choices'"
    assert "two or more" in reasons[7]
    assert "nor an index from 0 to 1" in reasons[10]
    assert rejects[0].content == '{"question": "cut sho'


def test_the_first_usable_record_decides_the_kind(write):
    kind, docs, rejects = read_records(write({"other": 1}, {"text": "a"}, CHOICE))
    assert (kind, docs, len(rejects)) == ("text", [{"text": "a"}], 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([b""], "has no usable record. A record is"),
        ([b"{", b"{"], "has no usable record; line 1: .* A record is"),
        ([{"query": "x"}], "its fields are 'query'; a record is"),
    ],
)
def test_files_without_a_record(write, rows, message):
    with pytest.raises(TaskError, match=message):
        read_records(write(*rows))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(TaskError, match=r"task file .*none.jsonl: No such file"):
        jsonl_task(tmp_path / "none.jsonl", "none")
    with pytest.raises(TaskError, match=r"Is a directory"):
        jsonl_task(tmp_path, "folder")


def build(path, **options):
    task = jsonl_task(path, path.stem, max_gen_tokens=options.pop("max_gen_tokens", 0))
    task.build(None, **options)
    return task, [instance.args for instance in task.task.instances]


def test_prompts_of_choices(write):
    _, args = build(write(CHOICE))
    assert args == [("Question: 2 + 2?\nAnswer:", " 3"), ("Question: 2 + 2?\nAnswer:", " 4")]


def test_braces_are_text(write):
    _, args = build(write(CHOICE | {"question": "{{ 1 + 1 }} {% raw"}))
    assert args[0][0] == "Question: {{ 1 + 1 }} {% raw\nAnswer:"
    _, args = build(write({"prompt": "{{ x }} =", "answer": "[1, 2]"}))
    assert args[0][0] == "{{ x }} ="


def test_a_question_of_digits_stays_a_question(write):
    _, args = build(write({"prompt": "12", "answer": 24}))
    assert args[0][0] == "12"


def test_examples_are_other_items(write):
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(5)]
    _, args = build(write(*rows), num_fewshot=3)
    for number, (prompt, _) in enumerate(args):
        *examples, last = prompt.split("\n\n")
        assert last == f"{number} + 1 ="
        assert len(examples) == 3
        assert all(example in {f"{i} + 1 = {i + 1}" for i in range(5) if i != number} for example in examples)
    _, again = build(write(*rows), num_fewshot=3)
    assert again == args
    _, other = build(write(*rows), num_fewshot=3, seed=1)
    assert other != args
    with pytest.raises(TaskError, match="num_fewshot = 5: there are 4 examples to choose from"):
        build(write(*rows), num_fewshot=5)


def test_outputs_end_with_the_line_unless_answers_have_several(write):
    _, args = build(write({"prompt": "a", "answer": "b"}))
    assert args[0][1] == {"until": ["\n"], "max_gen_toks": 256, "do_sample": False}
    _, args = build(write({"prompt": "a", "answer": "b\nc"}), max_gen_tokens=9)
    assert args[0][1] == {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False}


def test_exact_match_is_up_to_white_space_around(write):
    task, _ = build(write({"prompt": "a", "answer": "b c"}))
    doc = task.task.instances[0].doc
    assert [task.task.process_results(doc, [text])["exact_match"] for text in (" b c\n", "b  c", "B c")] == [1, 0, 0]


class TestTexts:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "set" / "more").mkdir(parents=True)
        (tmp_path / "set" / "a.txt").write_text("the quick brown fox")
        (tmp_path / "set" / "b.py").write_text("def f():\n    return 1\n")
        (tmp_path / "set" / "c.txt").write_bytes(b"\xff\xfe\x00")
        (tmp_path / "set" / "more" / "d.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        return tmp_path / "set"

    def texts(self, source, **options):
        (task,) = make_tasks([str(source)], TaskOptions(**options))
        task.build(None)
        return task, [instance.args[0] for instance in task.task.instances]

    def test_a_folder_a_file_a_pattern(self, folder):
        task, texts = self.texts(folder)
        assert texts == ["the quick brown fox", "def f():\n    return 1\n", "one", "two"]
        assert [reject.place for reject in task.rejects] == ["c.txt"]
        assert (task.name, task.main_metric) == ("set", "bits_per_byte")
        assert self.texts(folder / "b.py")[1] == texts[1:2]
        assert self.texts(folder / "*.py")[1] == texts[1:2]
        assert self.texts(folder, limit=2)[1] == texts[:2]
        assert len(self.texts("stdlib", limit=3)[1]) == 3

    def test_no_text(self, tmp_path):
        with pytest.raises(TaskError, match="holds no text"):
            self.texts(tmp_path)
        (tmp_path / "a.txt").write_text(" ")
        with pytest.raises(TaskError, match=r"holds no text: a.txt: it is not a text, or an empty one"):
            self.texts(tmp_path)
