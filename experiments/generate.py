"""The verb `generate`: continues prompts with a trained model, on the terminal and into a file."""

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from pydantic import NonNegativeInt, PositiveInt

from cpm_jax.common.config import ConfigError, InputError, config_dataclass
from cpm_jax.data.chat import ChatError, Conversation
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.generate import Generator, Piece, collect
from cpm_jax.inference.sampling import SamplingConfig


@config_dataclass
class GenerateConfig:
    """What to continue, with which model, and how.

    Attributes:
        checkpoint: a workdir or a checkpoints folder (the newest whole checkpoint is taken), or one checkpoint; "" is
            the job's own workdir.
        tokenizer: a tokenizer.json or its folder; "" is the one in the workdir of the checkpoint.
        prompts: a prompt, or several.
        prompts_file: a .jsonl file whose records have `prompt` or, for a chat, `messages`; or a .txt file with a prompt
            per line. Without any prompts, lines are read from the standard input until it ends.
        chat: whether a prompt is a user's turn in the tokenizer's chat template, which the assistant answers.
        sampling: the distribution that tokens are drawn from.
        max_new_tokens: most tokens per prompt.
        stop: strings that end an output, and are not part of it.
        seed: of the draws; the same seed, prompts and order give the same outputs.
        batch_size: prompts that are continued together.
        output: .jsonl file to write the outputs to; "" writes none.
    """

    checkpoint: str = ""
    tokenizer: str = ""
    prompts: str | tuple[str, ...] = ()
    prompts_file: str = ""
    chat: bool = False
    sampling: SamplingConfig = SamplingConfig()
    max_new_tokens: PositiveInt = 256
    stop: tuple[str, ...] = ()
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 8
    output: str = ""

    def __post_init__(self) -> None:
        if self.prompts and self.prompts_file:
            raise ConfigError(
                f"GenerateConfig.prompts_file = {self.prompts_file!r}: prompts are given too; give one of the two",
                field="GenerateConfig.prompts_file",
            )
        if self.prompts_file and Path(self.prompts_file).suffix not in (".jsonl", ".txt"):
            raise ConfigError(
                f"GenerateConfig.prompts_file = {self.prompts_file!r}: must be a .jsonl or a .txt file",
                field="GenerateConfig.prompts_file",
            )
        if "" in self.stop:
            raise ConfigError("GenerateConfig.stop = '': a stop string cannot be empty", field="GenerateConfig.stop")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        content: a text, or the messages of a conversation.
        place: where it is from, for error messages.
    """

    content: str | list[dict[str, Any]]
    place: str


def run(config: GenerateConfig, workdir: Path) -> None:
    """Continues the prompts of `config`, with the model in `workdir` if the config names none.

    Outputs go to stdout as they are generated, one prompt after the other; everything else goes to stderr.

    Raises:
        InputError: if the checkpoint, its tokenizer or a prompt cannot be used.
        ConfigError: if a prompt does not leave room for max_new_tokens, or the output cannot be written.
    """
    batches = read_batches(config)
    with open_output(config.output) as output:
        generator = Generator.from_checkpoint(config.checkpoint or workdir, config.tokenizer or None)
        stop = (*config.stop, *end_of_turn(generator.tokenizer)) if config.chat else config.stop
        speed, done = Speed(), 0
        for batch in batches:
            stream = generator.stream(
                [encode(prompt, generator.tokenizer, config.chat) for prompt in batch],
                sampling=config.sampling,
                max_new_tokens=config.max_new_tokens,
                stop=stop,
                seed=config.seed,
                first_index=done,
            )
            printer = Printer(batch, first_index=done, echo=not config.chat)
            pieces = []
            for piece in speed.measure(stream):
                printer.show(piece)
                pieces.append(piece)
            for prompt, completion in zip(batch, collect(pieces), strict=True):
                record = {
                    "index": completion.index,
                    "prompt": prompt.content,
                    "completion": completion.text,
                    "finish_reason": completion.finish_reason,
                    "num_tokens": len(completion.token_ids),
                }
                output.write(json.dumps(record, ensure_ascii=False) + "\n")
            output.flush()
            done += len(batch)
    print(f"{done} prompts, {speed.summary()}", file=sys.stderr)


def read_batches(config: GenerateConfig) -> Iterable[Sequence[Prompt]]:
    """The prompts in batches: those that are given at once, lines of stdin one by one as they come."""
    if config.prompts_file:
        prompts = read_prompts_file(Path(config.prompts_file))
    elif config.prompts:
        given = (config.prompts,) if isinstance(config.prompts, str) else config.prompts
        prompts = [Prompt(text, f"prompt {number}") for number, text in enumerate(given)]
    else:
        return ([prompt] for prompt in _read_stdin())
    return [prompts[first : first + config.batch_size] for first in range(0, len(prompts), config.batch_size)]


def read_prompts_file(path: Path) -> list[Prompt]:
    """Reads `prompt` or `messages` of each record of a .jsonl file, or each line of a .txt file that is not blank.

    Raises:
        InputError: if the file cannot be read or has no prompts, or a record has neither field.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts file {path}: {getattr(error, 'strerror', None) or error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        if path.suffix == ".txt":
            prompts.append(Prompt(line, place))
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{place} is not JSON: {error}") from error
        content = record.get("prompt", record.get("messages")) if isinstance(record, dict) else None
        if not isinstance(content, str | list):
            raise InputError(f'{place}: must be an object with "prompt": "…" or "messages": […]')
        prompts.append(Prompt(content, place))
    if not prompts:
        raise InputError(f"prompts file {path} has no prompts")
    return prompts


def _read_stdin() -> Iterator[Prompt]:
    ask = "> " if sys.stdin.isatty() else ""
    for number in itertools.count(1):
        try:
            line = input(ask)
        except EOFError:
            return
        if line.strip():
            yield Prompt(line, f"line {number}")


def encode(prompt: Prompt, tokenizer: Tokenizer, chat: bool) -> list[int]:
    """The tokens that the model is to continue.

    Args:
        prompt: a text or a conversation.
        tokenizer: of the model.
        chat: whether a text is a user's turn. A conversation always goes through the chat template.

    Raises:
        InputError: if the tokenizer has no chat template, or it refuses the conversation.
    """
    if isinstance(prompt.content, str) and not chat:
        return tokenizer.encode_prompt(prompt.content)
    turns = prompt.content
    messages = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    try:
        text = tokenizer.apply_chat_template(Conversation(messages), add_generation_prompt=True)
    except ChatError as error:
        raise InputError(f"{prompt.place}: {error}") from error
    return tokenizer.encode(text)


def end_of_turn(tokenizer: Tokenizer) -> tuple[str, ...]:
    """What the chat template puts after the assistant's words, as stop strings: "<|im_end|>" for ChatML."""
    said = "x"
    turns = Conversation([{"role": "user", "content": said}, {"role": "assistant", "content": said}])
    text, spans = tokenizer.require_chat_template().render_with_spans(turns)
    end = text[slice(*spans[-1])].rpartition(said)[2].strip()
    return (end,) if end else ()


class Printer:
    """Prints sequences that are generated together one after the other, the first of them as it comes."""

    def __init__(self, prompts: Sequence[Prompt], *, first_index: int, echo: bool, file: TextIO | None = None):
        """Begins with the first prompt.

        Args:
            prompts: the batch.
            first_index: index of its first sequence.
            echo: whether the prompt is printed before its continuation.
            file: where to; None takes stdout.
        """
        self._file = file or sys.stdout
        self._prompts = dict(enumerate(prompts, start=first_index))
        self._echo = echo
        self._waiting: dict[int, list[Piece]] = {index: [] for index in self._prompts}
        self._current = first_index
        self._begin()

    def show(self, piece: Piece) -> None:
        """Takes a piece of any of the sequences."""
        self._waiting[piece.index].append(piece)
        while pieces := self._waiting.get(self._current):
            self._waiting[self._current] = []
            self._write("".join(piece.text for piece in pieces))
            if pieces[-1].finish_reason is None:
                return
            self._write("\n")
            self._current += 1
            self._begin()

    def _begin(self) -> None:
        prompt = self._prompts.get(self._current)
        if prompt is not None and self._echo and isinstance(prompt.content, str):
            self._write(prompt.content)

    def _write(self, text: str) -> None:
        print(text, end="", file=self._file, flush=True)


class Speed:
    """Tokens per second, without the time to compile and to read prompts.

    That time lies before the first piece of each batch, so only what comes after it is counted.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._tokens = 0
        self._counted_tokens = 0
        self._counted_seconds = 0.0

    def measure(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Passes the pieces of a batch on."""
        begun: set[int] = set()
        first = last = time.monotonic()
        for piece in pieces:
            last = time.monotonic()
            if not begun:
                first = last
            self._tokens += len(piece.token_ids)
            self._counted_tokens += len(piece.token_ids) if piece.index in begun else 0
            begun.add(piece.index)
            yield piece
        self._counted_seconds += last - first

    def summary(self) -> str:
        """For example "512 tokens in 8.1 s, 95 tokens/s once compiled"."""
        text = f"{self._tokens:,} tokens in {time.monotonic() - self._start:.1f} s"
        if self._counted_tokens:
            text += f", {self._counted_tokens / self._counted_seconds:,.0f} tokens/s once compiled"
        return text


def open_output(path: str) -> TextIO:
    """Opens the file for the records; without a path they go nowhere.

    Raises:
        ConfigError: if the file cannot be written.
    """
    try:
        return open(path or os.devnull, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"GenerateConfig.output = {path!r}: {error.strerror}", field="GenerateConfig.output"
        ) from error
