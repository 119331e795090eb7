"""Answers of one of our models, through its lm-eval adapter."""

from collections.abc import Iterator, Sequence

from lm_eval.api.instance import Instance

from cpm_jax.evaluation.lm_eval_adapter import CpmJaxLM
from cpm_jax.evaluation.ruler.question import PromptFormat, Question


class AdapterAnswers:
    """A model that continues prompts greedily.

    Attributes:
        prompt_format: what it is given.
    """

    def __init__(self, lm: CpmJaxLM, *, chat: bool = False, batch_size: int = 8):
        """Takes a model.

        Args:
            lm: the model.
            chat: whether the question is a user's turn, and the answer's prefix the beginning of the assistant's.
            batch_size: questions that are answered together.

        Raises:
            DataError: `chat`, and the tokenizer has no chat template.
        """
        self.prompt_format = PromptFormat(lm.tokens, "open" if chat else "plain")
        self._lm, self._batch_size = lm, batch_size
        self._until = list(lm.tokens.require_chat_template().end_of_turn()) if chat else []

    def stream(self, questions: Sequence[Question]) -> Iterator[tuple[Question, str]]:
        """Answers questions, batch by batch."""
        for first in range(0, len(questions), self._batch_size):
            batch = questions[first : first + self._batch_size]
            yield from zip(
                batch, self._lm.generate_until([self._request(question) for question in batch], True), strict=True
            )

    def _request(self, question: Question) -> Instance:
        text = self.prompt_format.text(question.body, question.answer_prefix)
        settings = {"until": self._until, "max_gen_toks": question.max_new_tokens}
        return Instance("generate_until", {}, (text, settings), 0, metadata=(question.task, question.index, 1))
