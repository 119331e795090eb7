"""Chat templates of the PyTorch runtime: beside ours, and in the command."""

import json
import shutil

import pytest

from cpm_jax.data.chat import ChatError, Conversation
from cpm_jax.data.chat import ChatTemplate as OurTemplate
from export.torch_runtime import cli
from export.torch_runtime.chat import ChatTemplate, until
from export.torch_runtime.config import FolderError, read_config
from export.torch_runtime.text import Tokenizer
from tests.export.small_models import small_tokenizer
from tests.export.torch_runtime.models import exported

TURNS = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "<1 & 2>"},
    {"role": "assistant", "content": "学而时习之"},
    {"role": "user", "content": "more"},
]
# With what templates in the wild use: special tokens, loop controls, blocks of what the assistant says, JSON, errors.
ELABORATE = """{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'system' %}{% continue %}{% endif %}
    {% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
<{{ message['role'] }}>{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] }}</s>{% endgeneration %}{% else %}{{ message | tojson }}{% endif %}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("chat") / "hf"
    exported(place, "llama", small_tokenizer())
    return place


def with_template(folder, place, source, **settings):
    shutil.copytree(folder, place)
    (place / "chat_template.jinja").unlink(missing_ok=True)
    if source is not None:
        (place / "chat_template.jinja").write_text(source, "utf-8")
    (place / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return place


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_conversations_are_those_of_ours(folder, tmp_path, add_generation_prompt):
    asked = Conversation(TURNS)
    mine = small_tokenizer().apply_chat_template(asked, add_generation_prompt=add_generation_prompt)
    assert ChatTemplate(folder).render(TURNS, add_generation_prompt) == mine
    place = with_template(folder, tmp_path / "elaborate", ELABORATE, bos_token={"content": "<s>"})
    ours = OurTemplate(ELABORATE, {"bos_token": "<s>"}).render(asked, add_generation_prompt=add_generation_prompt)
    found = ChatTemplate(place).render(TURNS, add_generation_prompt)
    assert found == ours
    assert '"<1 & 2>"' in found


def test_the_template_may_lie_in_the_settings_of_the_tokenizer(folder, tmp_path):
    place = with_template(folder, tmp_path / "settings", None, chat_template="{{ messages[0].content }}{{ eos_token }}",
                          eos_token="</s>")  # fmt: skip
    assert ChatTemplate(place).render([{"role": "user", "content": "hello"}]) == "hello</s>"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    place = with_template(folder, tmp_path / "named", None, chat_template=named)
    assert ChatTemplate(place).render([{"role": "user", "content": "hello"}]) == "yes"


def test_what_a_template_refuses_is_an_error(folder, tmp_path):
    place = with_template(folder, tmp_path / "elaborate", ELABORATE)
    refused = [{"role": "tool", "content": "4"}]
    with pytest.raises(ValueError, match="refused by the chat template: no tools here"):
        ChatTemplate(place).render(refused)
    with pytest.raises(ChatError, match="no tools here"):
        OurTemplate(ELABORATE, {}).render(Conversation(refused))


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        (None, {}, "has no chat template: neither chat_template.jinja nor in tokenizer_config.json"),
        ("{% for %}", {}, "the chat template of .* is not valid"),
        (None, [], "tokenizer_config.json holds list: accepted is an object"),
    ],
)
def test_folders_without_a_usable_template_are_named(folder, tmp_path, source, settings, said):
    place = with_template(folder, tmp_path / "none", source)
    (place / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(FolderError, match=said):
        ChatTemplate(place)
    assert cli.main([str(place), "--prompt", "hi", "--chat", "--device", "cpu"]) == 3


@pytest.mark.parametrize("size", [1, 2, 5, 50])
def test_a_text_ends_before_what_ends_it(size):
    text = "one <|e two <|end|> three"
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert "".join(until(pieces, "<|end|>")) == "one <|e two "
    assert "".join(until(pieces, "<|fin|>")) == text


def test_a_prompt_is_a_turn_and_the_answer_ends_with_its_turn(folder, tmp_path, capsys, monkeypatch):
    tokenizer, prompts = small_tokenizer(), []

    def answers(words):
        def generate(model, prompt, max_new_tokens, *_, **__):
            del max_new_tokens
            prompts.append(prompt)
            for token in tokenizer.encode(words):
                yield token
                if token in model.config.eos_token_ids:
                    return

        return generate

    args = ["--prompt", "hello", "--chat", "--device", "cpu"]
    asked = Conversation([{"role": "user", "content": "hello"}])
    monkeypatch.setattr(cli, "generate", answers("fine<|im_end|>\nand more"))  # a special token
    assert cli.main([str(folder), *args]) == 0
    assert capsys.readouterr().out == "fine\n"
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n###\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    place = with_template(folder, tmp_path / "plain", plain)
    monkeypatch.setattr(cli, "generate", answers("fine\n###\nand more"))
    assert cli.main([str(place), *args]) == 0
    assert capsys.readouterr().out == "fine\n\n"
    expected = [tokenizer.apply_chat_template(asked, add_generation_prompt=True), "user: hello\n###\nassistant: "]
    assert prompts == [tokenizer.encode(text) for text in expected]


def test_the_command_makes_an_answer(folder, capsys):
    args = ["--prompt", "hello", "--chat", "--device", "cpu", "--max-new-tokens", "8", "--temperature", "0"]
    assert cli.main([str(folder), *args]) == 0
    asked = ChatTemplate(folder).render([{"role": "user", "content": "hello"}])
    read = Tokenizer(folder, read_config(folder)).encode(asked)
    assert f"prompt: {len(read)} tokens" in capsys.readouterr().err
