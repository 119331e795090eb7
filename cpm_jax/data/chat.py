"""Conversations as text: Jinja chat templates, and which characters of the text the assistant says."""

import dataclasses
import datetime
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# The template of a tokenizer that we train: ChatML. What stands in `generation` is learned.
CHATML = """\
{%- if tools %}{{- '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{{- message.content or '' }}
{%- if message.tool_calls %}{{- message.tool_calls | tojson }}{%- endif %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# They bracket what the assistant says while a template is rendered. Unicode guarantees that no text needs them.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_CUT = "\ufdd2"  # marks where the last message of an open conversation ends
_ROLE_OF_SPEAKER = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}


class ChatError(Exception):
    """A conversation that cannot be used.

    Attributes:
        reason: a short class of reasons, by which rejects are counted.
        detail: what exactly was wrong, and where.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What is said in turns.

    Attributes:
        messages: dicts with "role" and "content", and whatever else the chat template uses.
        tools: descriptions of the tools that the assistant may call, as the template wants them.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Conversation":
        """Checks a record of a data set: `messages` with role and content, or `conversations` with from and value.

        Raises:
            ChatError: it is malformed, or the assistant says nothing.
        """
        turns = record.get("messages", record.get("conversations"))
        if not isinstance(turns, list) or not turns:
            raise ChatError("malformed conversation", "the messages are not a list, or an empty one")
        messages = []
        for number, turn in enumerate(turns, start=1):
            if not isinstance(turn, dict):
                raise ChatError("malformed conversation", f"message {number} is {type(turn).__name__}, not an object")
            if "from" in turn:
                speaker = turn["from"]
                role = _ROLE_OF_SPEAKER.get(speaker, speaker) if isinstance(speaker, str) else None
                turn = {"role": role, "content": turn.get("value")}
            if not isinstance(turn.get("role"), str):
                raise ChatError("malformed conversation", f"message {number} has no role")
            if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
                raise ChatError("malformed conversation", f"message {number} has no text content")
            messages.append(turn)
        if not any(m["role"] == "assistant" and (m.get("content") or m.get("tool_calls")) for m in messages):
            raise ChatError("no assistant turn", f"roles: {[m['role'] for m in messages]}")
        tools = record.get("tools")
        if tools is not None and not isinstance(tools, list):
            raise ChatError("malformed conversation", f"tools is {type(tools).__name__}, not a list")
        return cls(messages, tools or None)


class _GenerationTag(jinja2.ext.Extension):
    """The `{% generation %}` block, in which chat templates put what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it from the class)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_bracket"), [], [], body).set_lineno(line)

    def _bracket(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class ChatTemplate:
    """A chat template as Hugging Face defines them: Jinja in a sandbox.

    Attributes:
        source: the Jinja source.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]):
        """Compiles a template.

        Args:
            source: the Jinja source.
            special_tokens: variables such as `bos_token` that templates use.

        Raises:
            ChatError: it is not valid Jinja.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatError("chat template is not valid", str(error)) from error
        self.source = source
        self._special_tokens = special_tokens

    def _render(self, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ChatError("refused by the chat template", str(error)) from error

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Raises:
            ChatError: the template refuses the conversation.
        """
        text = self._render(conversation.messages, conversation.tools, add_generation_prompt)
        return text.replace(_BEGIN, "").replace(_END, "")

    def render_open(self, conversation: Conversation) -> str:
        """The text of a conversation up to the last character of its last message, which is to be continued.

        Raises:
            ChatError: the template refuses the conversation, or leaves its last message out.
        """
        *before, last = conversation.messages
        marked = [*before, last | {"content": f"{last['content']}{_CUT}"}]
        text = self.render(Conversation(marked, conversation.tools))
        if _CUT not in text:
            raise ChatError("chat template leaves out the last message")
        return text[: text.rindex(_CUT)]

    def end_of_turn(self) -> tuple[str, ...]:
        """What the template puts after the assistant's words, as stop strings: "<|im_end|>" for ChatML."""
        said = "x"
        turns = Conversation([{"role": "user", "content": said}, {"role": "assistant", "content": said}])
        text, spans = self.render_with_spans(turns)
        end = text[slice(*spans[-1])].rpartition(said)[2].strip()
        return (end,) if end else ()

    def render_with_spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the ranges of characters that the assistant says (with the end of turn).

        The ranges are what the template puts in `{% generation %}`. If it has no such block, an assistant turn is
        what its message adds to the text after the generation prompt, less white space at its end.

        Raises:
            ChatError: the template refuses the conversation, or renders a turn in another way once others follow.
        """
        marked = self._render(conversation.messages, conversation.tools, False)
        if _BEGIN in marked:
            return _unmark(marked)
        spans = []
        for number, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            before = self._render(conversation.messages[:number], conversation.tools, True)
            after = self._render(conversation.messages[: number + 1], conversation.tools, False)
            if not (marked.startswith(after) and after.startswith(before)):
                raise ChatError("chat template rewrites earlier turns", f"message {number + 1}")
            spans.append((len(before), len(after.rstrip())))
        return marked, spans


def _unmark(marked: str) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    before, *rest = marked.split(_BEGIN)
    text += before
    for piece in rest:
        said, *after = piece.split(_END)
        if len(after) != 1:
            raise ChatError("malformed conversation", f"it contains the noncharacter {_BEGIN!r} or {_END!r}")
        spans.append((len(text), len(text) + len(said)))
        text += said + after[0]
    return text, spans
