"""Chat templates: Jinja in a sandbox, as Hugging Face defines them."""

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from export.torch_runtime.config import FolderError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class _GenerationTag(jinja2.ext.Extension):
    """The `{% generation %}` block, which marks what the assistant says, and changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it from the class)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """The chat template of a folder: `chat_template.jinja`, or the entry of tokenizer_config.json."""

    def __init__(self, folder: str | Path):
        """Reads and compiles it.

        Raises:
            FolderError: there is none, or it is not valid.
        """
        folder = Path(folder)
        settings, file = _settings(folder / "tokenizer_config.json"), folder / "chat_template.jinja"
        try:
            source = file.read_text("utf-8") if file.is_file() else settings.get("chat_template")
        except UnicodeDecodeError as error:
            raise FolderError(f"{file} is not UTF-8: {error.reason}") from error
        if isinstance(source, list):  # of several, each with a name
            source = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}.get("default")
        if not isinstance(source, str):
            raise FolderError(
                f"{folder} has no chat template: neither chat_template.jinja nor in tokenizer_config.json"
            )
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise FolderError(f"the chat template of {folder} is not valid: {error}") from error
        self._special_tokens = {
            name: token.get("content", "") if isinstance(token, Mapping) else str(token)
            for name in _SPECIAL_TOKENS
            if (token := settings.get(name)) is not None
        }

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: turns, each with "role" and "content".
            add_generation_prompt: whether it ends with what the assistant's next turn begins with.

        Raises:
            ValueError: the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ValueError(f"refused by the chat template: {error}") from error

    def end_of_turn(self) -> str:
        """What the template puts after the assistant's words: "<|im_end|>" for ChatML; "" if nothing."""
        said = "x"
        turns = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        return self.render(turns, add_generation_prompt=False).rpartition(said)[2].strip()


def until(pieces: Iterable[str], end: str) -> Iterator[str]:
    """Passes a text on up to `end`, which is not empty, holding back what may be its beginning."""
    held = ""
    for piece in pieces:
        held += piece
        if end in held:
            yield held[: held.index(end)]
            return
        kept = next(size for size in range(min(len(end), len(held)), -1, -1) if held.endswith(end[:size]))
        yield held[: len(held) - kept]
        held = held[len(held) - kept :]
    yield held


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise FolderError(f"{file} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise FolderError(f"{file} holds {type(settings).__name__}: accepted is an object")
    return settings


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
