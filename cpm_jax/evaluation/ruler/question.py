"""A question about a long text, and how it is made as long as asked for in tokens of the model."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Literal, NamedTuple

from cpm_jax.data.chat import Conversation
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.errors import TaskError

Match = Literal["all", "part"]
# "plain": the model continues the text; "open": it continues an assistant turn; "closed": it answers a user turn.
Turns = Literal["plain", "open", "closed"]
_TOLERANCE = 0.002  # of the length that may stay empty
_FIRST_SIZE = 256  # from which the tokens of larger ones are foretold


class Draft(NamedTuple):
    """What a task writes.

    Attributes:
        body: instruction, context and question.
        answer_prefix: how the answer begins.
        answers: what the answer must hold: all, or one, as the task has it.
        depths: where each answer lies, as the share of the context before it; none where it lies everywhere.
    """

    body: str
    answer_prefix: str
    answers: tuple[str, ...]
    depths: tuple[float, ...] = ()

    @property
    def reference(self) -> str:
        """A right answer, as it would follow the prefix."""
        return f" {', '.join(self.answers)}."


@dataclasses.dataclass(frozen=True)
class Question:
    """One item.

    Attributes:
        task: name of the task.
        length: tokens that prompt and answer may have together.
        index: number among the task's questions of this length.
        body: instruction, context and question.
        answer_prefix: how the answer begins.
        answers: as in `Draft`.
        depths: as in `Draft`.
        match: whether all answers are needed, or one.
        num_tokens: tokens of the prompt.
        max_new_tokens: tokens that are kept free for the answer.
    """

    task: str
    length: int
    index: int
    body: str
    answer_prefix: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    match: Match
    num_tokens: int
    max_new_tokens: int

    @property
    def sha256(self) -> str:
        """By which the same question is known again."""
        content = f"{self.body}\n{self.answer_prefix}\n{self.answers}"
        return hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """What a model is given of a question.

    Attributes:
        tokenizer: of the model.
        turns: whether and how the chat template is used.
    """

    tokenizer: Tokenizer
    turns: Turns = "plain"

    def messages(self, body: str, answer_prefix: str) -> list[dict[str, str]]:
        """The conversation, whose last message the model continues where turns are "open"."""
        if self.turns == "open":
            return [{"role": "user", "content": body}, {"role": "assistant", "content": answer_prefix.strip()}]
        return [{"role": "user", "content": body + answer_prefix}]

    def text(self, body: str, answer_prefix: str) -> str:
        """The text that the model reads, but for a BOS that the tokenizer puts before it.

        Raises:
            DataError: the tokenizer has no chat template.
            ChatError: its template refuses the conversation.
        """
        if self.turns == "plain":
            return body + answer_prefix
        conversation = Conversation(self.messages(body, answer_prefix))
        if self.turns == "open":
            return self.tokenizer.require_chat_template().render_open(conversation)
        return self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True)

    def num_tokens(self, body: str, answer_prefix: str) -> int:
        """Tokens that the model reads, with BOS where the tokenizer puts it and a template does not spell it."""
        text, bos = self.text(body, answer_prefix), self.tokenizer.bos_id
        spelled = bos is not None and text.startswith(self.tokenizer.decode([bos]))
        return len(self.tokenizer.encode(text) if spelled else self.tokenizer.encode_prompt(text))


def fit(
    write: Callable[[int], Draft], prompt_format: PromptFormat, length: int, max_new_tokens: int, what: str
) -> tuple[Draft, int]:
    """Makes a draft as long as fits.

    Args:
        write: makes the draft for a size (tokens of text, or words); longer for a larger size, always the same for
            the same one.
        prompt_format: by which its tokens are counted.
        length: tokens that prompt and answer may have.
        max_new_tokens: of the answer.
        what: the task, for the error.

    Returns:
        The draft, and the tokens of its prompt, at most length - max_new_tokens.

    Raises:
        TaskError: not even the smallest draft fits.
    """
    room = length - max_new_tokens

    def measured(size: int) -> tuple[int, Draft]:
        draft = write(size)
        return prompt_format.num_tokens(draft.body, draft.answer_prefix), draft

    least, best = measured(0)
    if least > room:
        raise TaskError(
            f"task {what} does not fit into {length} tokens: it needs at least {least + max_new_tokens}, of which "
            f"{max_new_tokens} are for the answer"
        )
    low, low_tokens = 0, least  # the longest that is known to fit
    high, high_tokens = 0, 0  # the shortest that is known not to; 0 while none is
    size, tries = min(room - least, _FIRST_SIZE), 0
    while room - low_tokens > max(1, int(_TOLERANCE * length)) and high != low + 1:
        size = max(size, low + 1) if not high else min(max(size, low + 1), high - 1)
        tokens, draft = measured(size)
        if tokens <= room:
            low, low_tokens, best = size, tokens, draft
        else:
            high, high_tokens = size, tokens
        other, other_tokens = (high, high_tokens) if high else (0, least)
        slope = (other_tokens - low_tokens) / (other - low)
        tries += 1
        if high and tries % 8 == 0:  # the line alone may creep up from one side
            size = (low + high) // 2
        else:
            size = low + int((room - low_tokens) / slope) if slope > 0 else 2 * size
    return best, low_tokens
