"""Chat templates and their masks against `transformers`."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from cpm_jax.data.chat import ChatError, ChatTemplate, Conversation
from cpm_jax.data.encoding import Encoder
from cpm_jax.data.errors import DataError
from cpm_jax.data.tokenizer import Tokenizer

CONVERSATIONS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello, naïve 🙂 world"}],
    [
        {"role": "system", "content": "Answer in Chinese."},
        {"role": "user", "content": "two\nlines  "},
        {"role": "assistant", "content": "数据\n\n  def f(): pass"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "<|im_end|> injected"},
        {"role": "assistant", "content": "  ok\n"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "now", "description": "the time <in> UTC", "parameters": {}}}]
# As CHATML, but without a generation block.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In the manner of Llama 2: the assistant has no header, its turn ends with </s>; uses filters and macros.
INSTRUCT = (
    "{%- macro wrap(text) -%}[INST] {{ text | trim }} [/INST]{%- endmacro -%}"
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ wrap(message['content']) }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %} {{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["def f(): pass", "hello world assistant user"] * 10, 300).save(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer, messages, **options):
    encoder = Encoder(tokenizer, "chat", 1000, "reject")
    return encoder.encode_conversation(Conversation(messages, **options))


def with_template(folder, theirs, source):
    ours = Tokenizer.load(folder)
    ours.chat_template = ChatTemplate(source, ours.special_tokens)
    theirs.chat_template = source
    return ours


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", ["ChatML", "Instruct"])
def test_tokens_and_mask_equal_those_of_transformers(folder, messages, template):
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    if template == "Instruct":
        ours = with_template(folder, theirs, INSTRUCT)
        messages = [message for message in messages if message["role"] != "system"]
    expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    tokens, mask = encode(ours, messages)
    assert tokens.tolist() == expected["input_ids"]
    assert mask.astype(int).tolist() == expected["assistant_masks"]
    assert 0 < mask.sum() < len(mask)


def test_text_equals_that_of_transformers(folder, theirs):
    ours = Tokenizer.load(folder)
    for tools in (None, TOOLS):
        for prompt in (False, True):
            conversation = Conversation(CONVERSATIONS[1], tools)
            expected = theirs.apply_chat_template(
                CONVERSATIONS[1], tools=tools, add_generation_prompt=prompt, tokenize=False
            )
            assert ours.apply_chat_template(conversation, add_generation_prompt=prompt) == expected


def test_only_the_assistant_is_learned(folder):
    ours = Tokenizer.load(folder)
    for messages in CONVERSATIONS:
        tokens, mask = encode(ours, messages)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]]))).reshape(-1, 2)
        said = [ours.decode(tokens[begin:end]) for begin, end in edges]
        assert said == [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_templates_without_generation_block(folder, messages):
    ours = Tokenizer.load(folder)
    expected = encode(ours, messages)
    ours.chat_template = ChatTemplate(PLAIN, ours.special_tokens)
    tokens, mask = encode(ours, messages)
    assert tokens.tolist() == expected[0].tolist()
    assert mask.tolist() == expected[1].tolist()


def test_template_that_rewrites_earlier_turns_is_refused():
    source = "{% for m in messages %}{{ m.content if loop.last else '...' }}\n{% endfor %}"
    with pytest.raises(ChatError, match="chat template rewrites earlier turns: message 2"):
        ChatTemplate(source, {}).render_with_spans(Conversation(CONVERSATIONS[1][1:]))


def test_templates_are_sandboxed():
    for source in ("{{ messages.append(1) }}", "{{ messages.__class__.__mro__ }}"):
        with pytest.raises(ChatError, match="refused by the chat template"):
            ChatTemplate(source, {}).render(Conversation(CONVERSATIONS[0]))
    with pytest.raises(ChatError, match="no role system"):
        ChatTemplate(INSTRUCT, {"bos_token": "", "eos_token": ""}).render(Conversation(CONVERSATIONS[1]))
    with pytest.raises(ChatError, match="chat template is not valid"):
        ChatTemplate("{% for %}", {})


def test_tool_calls_are_learned(folder):
    ours = Tokenizer.load(folder)
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    messages = [{"role": "user", "content": "time?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    conversation = Conversation.from_record({"messages": messages, "tools": TOOLS})
    tokens, mask = encode(ours, conversation.messages, tools=conversation.tools)
    assert '"name": "now"' in ours.decode(tokens[mask])
    assert "the time <in> UTC" in ours.decode(tokens)


def test_sharegpt():
    record = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    assert Conversation.from_record(record).messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "not a list, or an empty one"),
        ({"messages": "hi"}, "not a list, or an empty one"),
        ({"messages": ["hi"]}, "message 1 is str"),
        ({"messages": [{"content": "hi"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user"}]}, "message 1 has no text content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "message 1 has no text content"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant turn"),
        ({"conversations": [{"from": 3, "value": "hi"}]}, "message 1 has no role"),
        ({"conversations": [{"from": ["a"], "value": "hi"}]}, "message 1 has no role"),
        ({"messages": CONVERSATIONS[0], "tools": "now"}, "tools is str"),
    ],
)
def test_malformed_conversations(record, message):
    with pytest.raises(ChatError, match=message):
        Conversation.from_record(record)


def test_a_text_with_our_brackets_is_refused(folder):
    messages = [{"role": "user", "content": "\ufdd0"}, {"role": "assistant", "content": "x"}]
    with pytest.raises(ChatError, match="noncharacter"):
        encode(Tokenizer.load(folder), messages)


def test_tokenizer_without_template(folder):
    ours = Tokenizer.load(folder)
    ours.chat_template = None
    with pytest.raises(DataError, match=r"put a chat_template\.jinja beside"):
        Encoder(ours, "chat", 10, "reject")
