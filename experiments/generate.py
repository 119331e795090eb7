"""The verb `generate`: continues prompts with a trained model, on the terminal and into a file."""

import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.sharding import Mesh
from pydantic import NonNegativeInt, PositiveInt

from cpm_jax.common.config import ConfigError, InputError, config_dataclass
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.data.chat import ChatError, Conversation
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.generate import Generator, Piece, collect
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling.config import SparseConfig
from cpm_jax.modeling.int8 import WeightDType
from cpm_jax.modeling.kv_cache import CacheDType


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
        chat: whether a prompt is a user's turn in the tokenizer's chat template, which the assistant answers. Lines
            of the standard input are then the turns of one conversation.
        sampling: the distribution that tokens are drawn from.
        max_new_tokens: most tokens per prompt.
        stop: strings that end an output, and are not part of it.
        seed: of the draws; the same seed, prompts and order give the same outputs.
        batch_size: prompts that are continued together.
        output: .jsonl file to write the outputs to; "" writes none.
        mesh: how parameters and cache lie on the first devices of this machine; one device unless it says otherwise.
        sparse_config: sparse attention to use with these weights; None is what the checkpoint says.
        weight_dtype: "int8" rounds the kernels of the layers to int8 as they are loaded; "" leaves them.
        cache_dtype: what keys and values are held in: "int8", "int4", "bfloat16" or "float32"; "" is the compute dtype.
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
    mesh: MeshConfig = MeshConfig(fsdp=1)
    sparse_config: SparseConfig | None = None
    weight_dtype: WeightDType = ""
    cache_dtype: CacheDType = ""

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

    @property
    def reads_stdin(self) -> bool:
        """Whether prompts are lines of the standard input."""
        return not self.prompts and not self.prompts_file


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
    batches, mesh = read_batches(config), make_decoding_mesh(config.mesh)
    with open_output(config.output) as output:
        generator = Generator.from_checkpoint(
            config.checkpoint or workdir,
            config.tokenizer or None,
            mesh,
            config.sparse_config,
            config.weight_dtype,
            config.cache_dtype,
        )
        stop = config.stop
        if config.chat:
            stop += generator.tokenizer.require_chat_template().end_of_turn()
        dialogue = Dialogue(generator, config.max_new_tokens) if config.chat and config.reads_stdin else None
        speed, done = Speed(), 0
        for batch in batches:
            if dialogue is not None:
                batch = [dialogue.say(prompt) for prompt in batch]
            stream = generator.stream(
                [encode(prompt, generator.tokenizer, config.chat) for prompt in batch],
                sampling=config.sampling,
                max_new_tokens=config.max_new_tokens,
                stop=stop,
                seed=config.seed,
                indices=range(done, done + len(batch)),
            )
            printer = Printer(batch, first_index=done, echo=not config.chat)
            pieces = []
            for piece in speed.measure(stream):
                printer.show(piece)
                pieces.append(piece)
            for prompt, completion in zip(batch, collect(pieces), strict=True):
                if dialogue is not None:
                    dialogue.hear(completion.text)
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


def make_decoding_mesh(config: MeshConfig) -> Mesh | None:
    """The mesh of as many of this machine's devices as its sizes ask for; None for one device.

    Raises:
        ConfigError: if there are not as many, or other processes were joined.
    """
    if jax.process_count() > 1:
        raise ConfigError("generate runs in one process: leave out --distributed and --coordinator_address")
    wanted = jax.device_count() if -1 in config.sizes else math.prod(config.sizes)
    mesh = make_mesh(config, jax.devices()[:wanted])
    return mesh if mesh.size > 1 else None


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


class Dialogue:
    """A conversation of which the user's turns come one by one; the oldest are forgotten when it grows too long."""

    def __init__(self, generator: Generator, max_new_tokens: int):
        """Begins without a word.

        Args:
            generator: gives the chat template and the longest sequence.
            max_new_tokens: room that each answer needs.
        """
        self._tokenizer = generator.tokenizer
        self._longest = generator.config.max_position_embeddings - max_new_tokens
        self._messages: list[dict[str, Any]] = []

    def say(self, prompt: Prompt) -> Prompt:
        """Adds a turn of the user; returns the conversation up to it, as far as the model can read it.

        Raises:
            InputError: if the chat template refuses the conversation.
        """
        self._messages.append({"role": "user", "content": prompt.content})
        forgotten = 0
        while True:
            conversation = Prompt(list(self._messages), prompt.place)
            if len(self._messages) == 1 or len(encode(conversation, self._tokenizer, chat=True)) <= self._longest:
                break
            del self._messages[:2]  # a question and its answer
            forgotten += 1
        if forgotten:
            print(f"(forgotten to make room: the oldest {forgotten} questions with their answers)", file=sys.stderr)
        return conversation

    def hear(self, answer: str) -> None:
        """Adds the assistant's turn."""
        self._messages.append({"role": "assistant", "content": answer})


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
