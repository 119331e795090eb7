"""Our models behind the interface of EleutherAI's lm-evaluation-harness (package `lm_eval`, extra `eval`).

    from lm_eval import simple_evaluate
    simple_evaluate(model=CpmJaxLM(config, params, tokenizer), tasks=["hellaswag"])

Tokenisation, truncation, stop strings and chat templates follow lm-eval's own adapter for Hugging Face models, so that
the same task gives the same figures through either.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cpm_jax.common.config import InputError
from cpm_jax.common.extras import how_to_install
from cpm_jax.common.progress import Progress
from cpm_jax.data.chat import ChatError, Conversation
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.generate import Generator, collect, decoding_params
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.inference.scoring import Score, Scorer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise InputError(f"evaluation needs the package lm_eval ({error}): {how_to_install('eval')}") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_GEN_TOKENS = 256  # of tasks that do not say; lm-eval's default
# Indices of rows that only fill a batch: no run has so many prompts.
_FILLER = 2**31 - 1
_NAMES_OF_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class CpmJaxLM(TemplateLM):
    """A decoder as lm-eval sees it.

    Attributes:
        truncated: (task, document) of the requests whose context did not fit and lost its beginning.
        generator: makes the texts.
        params: parameters as they are computed with, without MTP layers.
        tokens: the tokenizer (`tokenizer` is lm-eval's name for one of Hugging Face's).
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        batch_size: int = 8,
        seed: int = 0,
    ):
        """Prepares scoring and generation; nothing is compiled yet.

        Args:
            config: the model.
            params: its parameters, as in a checkpoint.
            tokenizer: of the model.
            eos_ids: tokens that end a generated text, besides the tokenizer's own.
            batch_size: requests that are read together, and prompts that are continued together.
            seed: of the draws, where a task asks for samples.

        Raises:
            InputError: the tokenizer has more tokens than the model, or neither a BOS nor an EOS.
        """
        super().__init__()
        self.params = decoding_params(config, params)
        self.generator = Generator(config, self.params, tokenizer, eos_ids=eos_ids)
        self.truncated: set[tuple[str | None, int | None]] = set()
        self._scorer = Scorer(config, self.params, batch_size=batch_size)
        self.tokens = tokenizer
        self._batch_size, self._seed = batch_size, seed
        self._end_of_turn: tuple[str, ...] = ()
        if tokenizer.bos_id is None and tokenizer.eos_id is None:
            raise InputError("the tokenizer names neither a BOS nor an EOS token: nothing could precede a first token")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.prefix_token_id if self.tokens.eos_id is None else self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text without context: BOS, or EOS where there is none."""
        token = self.tokens.eos_id if self.tokens.bos_id is None else self.tokens.bos_id
        assert token is not None  # __init__ has seen to it
        return token

    @property
    def max_length(self) -> int:
        """Tokens that the model can read."""
        return self.generator.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells tokenizers apart by, when it caches requests."""
        return self.tokens.sha256

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the chat template, for lm-eval's records; None where none is to be applied."""
        return self.tokens.require_chat_template().source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. From then on outputs also stop where the template ends a turn.

        Args:
            chat_history: messages. Where the template refuses a system message, it is left out, as lm-eval does.
            add_generation_prompt: False leaves the last message open, so that the model goes on with it.

        Raises:
            DataError: the tokenizer has no chat template.
            InputError: the template refuses the conversation.
        """
        template = self.tokens.require_chat_template()
        self._end_of_turn = template.end_of_turn()
        render = self._render if add_generation_prompt else template.render_open
        without_system = [message for message in chat_history if message["role"] != "system"]
        try:
            try:
                return render(Conversation(chat_history))
            except ChatError:
                return render(Conversation(without_system))
        except ChatError as error:
            raise InputError(f"{error} (roles: {[message['role'] for message in chat_history]})") from error

    def _render(self, conversation: Conversation) -> str:
        return self.tokens.apply_chat_template(conversation, add_generation_prompt=True)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, after BOS where that is the tokenizer's convention and the text does not spell it."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokens.decode([self.prefix_token_id]))
        return self.tokens.encode_prompt(string) if add_special_tokens else self.tokens.encode(string)

    def loglikelihood(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations given contexts.

        Args:
            requests: with arguments (context, continuation). An empty context is the prefix token.
            disable_tqdm: whether to show no progress.

        Returns:
            For each the log-likelihood, and whether greedy decoding would give the continuation.
        """
        return self._all(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, the first token being predicted from the prefix token.

        Args:
            requests: with arguments (text,). A text longer than `max_length` is read in lm-eval's rolling windows.
            disable_tqdm: whether to show no progress.
        """
        return self._all(requests, disable_tqdm)

    def _all(self, requests: Sequence["Instance"], disable_tqdm: bool) -> list[Any]:
        """What `stream` gives, the longest requests first, in their order."""
        order = sorted(range(len(requests)), key=lambda place: -sum(map(len, requests[place].args)))
        responses: list[Any] = [None] * len(requests)
        with Progress("score", len(requests), enabled=not disable_tqdm) as bar:
            for done, (place, response) in enumerate(self.stream([requests[index] for index in order]), start=1):
                responses[order[place]] = response
                bar.update(done)
        return responses

    def stream(self, requests: Sequence["Instance"]) -> Iterator[tuple[int, Any]]:
        """Answers requests for likelihoods, yielding each answer as soon as it is known, about in the order given.

        Args:
            requests: as `loglikelihood` or `loglikelihood_rolling` take them.

        Yields:
            The index of a request, and what those methods return for it.
        """
        pairs, owners = list[tuple[list[int], list[int]]](), list[int]()
        for place, request in enumerate(requests):
            windows = self._pairs(request)
            pairs += windows
            owners += [place] * len(windows)
        parts: dict[int, list[Score]] = {place: [] for place in range(len(requests))}
        missing = Counter(owners)
        for index, score in self._scorer.stream(pairs):
            place = owners[index]
            parts[place].append(score)
            missing[place] -= 1
            if not missing[place]:
                yield place, self._answer(requests[place], parts.pop(place))

    def _pairs(self, request: "Instance") -> list[tuple[list[int], list[int]]]:
        """What the model has to score for a request: more than one pair where a text is longer than it can read."""
        if request.request_type == "loglikelihood_rolling":
            return self._windows(self.tok_encode(request.args[0]), self.prefix_token_id)
        context, continuation = self._encode(*request.args)
        if len(continuation) <= self.max_length:
            return [(context, continuation)]
        self.truncated.add((request.task_name, request.doc_id))
        return self._windows(continuation, context[-1])

    def _answer(self, request: "Instance", scores: Sequence[Score]) -> Any:
        if any(score.num_truncated for score in scores):
            self.truncated.add((request.task_name, request.doc_id))
        total = sum(score.log_likelihood for score in scores)
        greedy = all(score.is_greedy for score in scores)
        answer = total if request.request_type == "loglikelihood_rolling" else (total, greedy)
        self.cache_hook.add_partial(request.request_type, request.args, answer)
        return answer

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        # A text that spells out its BOS is predicted from it, not from a second one.
        return (tokens[:1], tokens[1:]) if tokens[:1] == [self.prefix_token_id] else ([self.prefix_token_id], tokens)

    def _windows(self, tokens: list[int], prefix: int) -> list[tuple[list[int], list[int]]]:
        """lm-eval's windows over a long text: each token is predicted once, the last window being full."""
        rolling = utils.get_rolling_token_windows(
            token_list=tokens, prefix_token=prefix, max_seq_len=self.max_length, context_len=1
        )
        # A text without tokens has one empty window.
        return list(map(utils.make_disjoint_window, rolling)) or [([prefix], [])]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, tokens) for _, context, tokens in requests]
        scores = self._scorer.score(pairs, progress=not disable_tqdm)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """Continues prompts until a stop string, EOS or the most tokens.

        Args:
            requests: with arguments (context, generation settings): `until`, `max_gen_toks`, `do_sample` and the fields
                of `SamplingConfig`. Of a context that leaves no room for the output, the end is kept.
            disable_tqdm: whether to show no progress.

        Returns:
            The texts, without what they stopped at. Draws depend on the seed, the document and the number of the
            sample alone.

        Raises:
            InputError: a setting that is not known, or more output than the model can read.
        """
        texts = [""] * len(requests)
        groups: dict[tuple[SamplingConfig, tuple[str, ...], int], list[tuple[list[int], int]]] = {}
        for place, request in enumerate(requests):
            context, settings = request.args
            key = self._generation(settings)
            tokens = self.tok_encode(context)
            room = self.max_length - key[2]
            if len(tokens) > room:
                self.truncated.add((request.task_name, request.doc_id))
            groups.setdefault(key, []).append((tokens[-room:] or [self.prefix_token_id], place))
        indices = _draw_indices(requests)
        done = 0
        with Progress("generate", len(requests), enabled=not disable_tqdm) as bar:
            for (sampling, stop, max_tokens), group in groups.items():
                group.sort(key=lambda item: -len(item[0]))
                for first in range(0, len(group), self._batch_size):
                    batch = group[first : first + self._batch_size]
                    written = self._continue(
                        [tokens for tokens, _ in batch],
                        [indices[place] for _, place in batch],
                        sampling=sampling,
                        max_new_tokens=max_tokens,
                        stop=stop,
                    )
                    for (_, place), text in zip(batch, written, strict=True):
                        texts[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    done += len(batch)
                    bar.update(done)
        return texts

    def _continue(self, prompts: list[list[int]], indices: list[int], **options: Any) -> list[str]:
        """The texts of a batch. A short batch is filled with copies, so that no program is compiled for its size."""
        fill = self._batch_size - len(prompts)
        stream = self.generator.stream(
            prompts + fill * prompts[:1],
            indices=indices + [_FILLER - number for number in range(fill)],
            seed=self._seed,
            **options,
        )
        pieces, unfinished = [], set(indices)
        for piece in stream:
            if piece.index in unfinished:
                pieces.append(piece)
            if piece.finish_reason is not None:
                unfinished.discard(piece.index)
            if not unfinished:  # nobody waits for the copies
                break
        by_index = {completion.index: completion.text for completion in collect(pieces)}
        return [by_index[index] for index in indices]

    def _generation(self, settings: dict[str, Any]) -> tuple[SamplingConfig, tuple[str, ...], int]:
        """Reads lm-eval's generation settings, whose names are those of Hugging Face."""
        settings = dict(settings)
        until = settings.pop("until", None) or []
        given = [settings.pop(name) for name in _NAMES_OF_MAX_TOKENS if name in settings]
        max_tokens = int(given[0]) if given else MAX_GEN_TOKENS
        sampled = settings.pop("do_sample", settings.get("temperature", 0) > 0)
        fields = {name: settings.pop(name) for name in _SAMPLING_FIELDS if name in settings}
        if settings:
            raise InputError(
                f"generation settings {', '.join(map(repr, settings))}: known are 'until', 'do_sample', "
                f"{', '.join(map(repr, (*_NAMES_OF_MAX_TOKENS, *_SAMPLING_FIELDS)))}"
            )
        if not 0 < max_tokens < self.max_length:
            raise InputError(
                f"max_gen_toks = {max_tokens}: must be from 1 to below the model's max_position_embeddings = "
                f"{self.max_length}, which the prompt and the output share"
            )
        penalty = {name: fields[name] for name in ("repetition_penalty",) if name in fields}
        sampling = SamplingConfig(**fields) if sampled else SamplingConfig(temperature=0.0, **penalty)
        stop = dict.fromkeys([until] if isinstance(until, str) else until) | dict.fromkeys(self._end_of_turn)
        stop.pop("", None)  # lm-eval ignores it too
        return sampling, tuple(stop), max_tokens


def _draw_indices(requests: Sequence["Instance"]) -> list[int]:
    """A number for each request that its draws depend on: of the document and the sample, not of this call's others."""
    seen: dict[int, int] = {}
    indices, taken = [], set[int]()
    for place, request in enumerate(requests):
        sample = seen.get(id(request), 0)
        seen[id(request)] = sample + 1
        index = place if request.doc_id is None else request.doc_id * (request.repeats or 1) + sample
        while index in taken:  # requests of several tasks in one call
            index += 1_000_003
        taken.add(index)
        indices.append(index % (2**30))
    return indices
