import ast
import textwrap

from benchmarks import finetune
from cpm_jax.data.chat import Conversation


def test_conversations_show_functions_without_their_docstrings():
    records = list(finetune.docstring_conversations())
    assert len(records) > 500
    parsed = 0
    for record in records[::20]:
        question, answer = Conversation.from_record(record).messages
        code = question["content"].partition("```python\n")[2].removesuffix("\n```")
        assert 100 <= len(code) <= 1000
        assert 60 <= len(answer["content"]) <= 600
        # Some strings are indented less than the function they stand in: such code does not parse on its own.
        if (code := textwrap.dedent(code)).startswith(("def ", "@")):
            parsed += 1
            [function] = ast.parse(code + "\n    pass").body
            assert ast.get_docstring(function) is None
    assert parsed > 20


def test_chapters_are_text(tmp_path):
    finetune.write_chapters(tmp_path)
    chapters = sorted(path.stem for path in tmp_path.glob("*.txt"))
    assert {"if", "lambda", "import"} <= set(chapters)
    assert (tmp_path / "if.txt").read_text("utf-8").startswith('The "if" statement')
