"""Text from a decoder: batches of prompts of any lengths, streamed, with stop strings and reproducible samples."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from cpm_jax.checkpoints.manager import find_checkpoint, find_tokenizer, restore_params
from cpm_jax.common.config import ConfigError, InputError, config_from_dict
from cpm_jax.data.tokenizer import StreamDecoder, Tokenizer
from cpm_jax.inference.decode_loop import NO_TOKEN, PREFILL_CHUNKS, DecodeState, extend, start
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.inference.stop_strings import StopStringFilter
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params

DEFAULT_SAMPLING = SamplingConfig()

FinishReason = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new in one sequence.

    Attributes:
        index: which prompt it continues.
        text: new text; may be empty while a character or a possible stop string is incomplete.
        token_ids: new tokens, with the end-of-sequence token and those of a stop string.
        finish_reason: why the sequence ends here; None if it goes on.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished sequence: the joined `Piece`s of one prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class _Row:
    """The host's side of one sequence: tokens to text, and what ends it."""

    def __init__(self, index: int, tokenizer: Tokenizer, stop: Sequence[str], ends: Mapping[int, FinishReason]):
        self.index = index
        self.finished = False
        self._decoder = StreamDecoder(tokenizer)
        self._filter = StopStringFilter(stop)
        self._ends = ends

    def push(self, tokens: Sequence[int], left: int) -> Piece:
        """Takes new tokens up to the one that ends the sequence, `left` being how many it may still get."""
        text, taken = "", list[int]()
        reason: FinishReason | None = None
        for token in tokens:
            taken.append(token)
            reason = self._ends.get(token)
            if reason is None:
                text += self._filter.push(self._decoder.add(token))
            if reason is None and self._filter.stopped:
                reason = "stop"
            if reason is not None:
                break
        if reason is None and len(taken) == left:
            reason = "length"
        if reason is not None and not self._filter.stopped:
            # The last characters may be incomplete, or look like the beginning of a stop string.
            text += self._filter.push(self._decoder.flush()) + self._filter.flush()
        self.finished = reason is not None
        return Piece(self.index, text, tuple(taken), reason)


class Generator:
    """Continues prompts with a model.

    Rows of a batch do not influence each other, and the draws of a sequence depend on the seed, its index and the
    position alone, so a prompt gives the same text alone and in a batch (up to float rounding, which may decide between
    tokens that are all but equally probable).

    MTP layers only serve training; they are left out here. LongRoPE models use one list of factors for a whole
    sequence: the long ones when prompt + max_new_tokens exceeds `original_max_position_embeddings`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        *,
        tokens_per_call: int = 16,
        prefill_chunks: Sequence[int] = PREFILL_CHUNKS,
    ):
        """Prepares the parameters for decoding: without MTP layers, and cast to the compute dtype once.

        Args:
            config: the model.
            params: its parameters, as in a checkpoint.
            tokenizer: turns tokens to text.
            tokens_per_call: tokens that the compiled loop makes before the host looks for stop strings and passes
                text on.
            prefill_chunks: prompt tokens that are read per call, see `decode_loop.start`.

        Raises:
            InputError: if the tokenizer has more tokens than the model.
        """
        if tokenizer.vocab_size > config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model's vocab_size is {config.vocab_size}: "
                "give the tokenizer that the model was trained with"
            )
        self.config = dataclasses.replace(config, num_nextn_predict_layers=0)
        self.tokenizer = tokenizer
        self._params = _decoding_params(config, params)
        self._tokens_per_call = tokens_per_call
        self._prefill_chunks = prefill_chunks

    @classmethod
    def from_checkpoint(cls, path: str | Path, tokenizer: str | Path | None = None) -> Self:
        """Loads model and tokenizer of a run.

        Args:
            path: a workdir or a checkpoints directory (the newest checkpoint that is whole is taken), one checkpoint,
                or an averaged one.
            tokenizer: a tokenizer.json or its folder; None takes the `tokenizer/` of the workdir.

        Raises:
            CheckpointError: if there is no checkpoint, none is whole, or no tokenizer was found with it.
            DataError: if the tokenizer cannot be read.
            InputError: if the tokenizer does not fit the model.
        """
        step_dir = find_checkpoint(path)
        folder = tokenizer or find_tokenizer(step_dir)
        loaded = Tokenizer.load(folder)
        params, meta = restore_params(step_dir)
        trained_with = meta.get("fixed", {}).get("tokenizer_sha256", loaded.sha256)
        if trained_with != loaded.sha256:
            raise InputError(
                f"the tokenizer {folder} is not the one that the model in {step_dir} was trained with: its sha256 is "
                f"{loaded.sha256}, not {trained_with}"
            )
        return cls(config_from_dict(ModelConfig, meta["model"]), params, loaded)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        seed: int = 0,
        first_index: int = 0,
    ) -> Iterator[Piece]:
        """Continues a batch of prompts, yielding what is new after every call of the compiled loop.

        Args:
            prompts: token ids, at least one each.
            sampling: the distribution to draw from.
            max_new_tokens: most tokens per sequence.
            stop: strings that end a sequence; neither they nor what follows is part of the text. One that is a special
                token of the tokenizer is looked for among the tokens, as special tokens do not show in the text.
            seed: of the draws.
            first_index: index of the first prompt, when a run has several batches; the draws depend on it.

        Returns:
            An iterator of pieces of all sequences, in no particular order across sequences; the last one of each has a
            finish reason. The request is checked before it begins.

        Raises:
            ConfigError: for an empty stop string, or for max_new_tokens that do not fit into the model's context
                together with a prompt.
            InputError: for an empty prompt, or a token that the model does not have.
        """
        self._check(prompts, max_new_tokens, stop, first_index)
        rope = self.config.rope
        by_factors: dict[bool, list[int]] = {}
        for row, prompt in enumerate(prompts):
            is_long = rope.is_longrope and len(prompt) + max_new_tokens > rope.original_max_position_embeddings
            by_factors.setdefault(is_long, []).append(row)  # The model picks the factors by the length of the cache.

        def run(rows: Sequence[int]) -> Iterator[Piece]:
            indices = [first_index + row for row in rows]
            state = start(
                self._params,
                [prompts[row] for row in rows],
                config=self.config,
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                seed=seed,
                indices=indices,
                prefill_chunks=self._prefill_chunks,
            )
            return self._run(state, indices, sampling, max_new_tokens, stop)

        return itertools.chain.from_iterable(map(run, by_factors.values()))

    def _run(
        self,
        state: DecodeState,
        indices: Sequence[int],
        sampling: SamplingConfig,
        max_new_tokens: int,
        stop: Sequence[str],
    ) -> Iterator[Piece]:
        ends = self._ends(stop)
        end_ids = jnp.asarray(list(ends), jnp.int32)
        rows = [_Row(index, self.tokenizer, stop, ends) for index in indices]
        left = max_new_tokens
        while not all(row.finished for row in rows):
            # Only the host knows of stop strings.
            state = dataclasses.replace(state, finished=jnp.asarray([row.finished for row in rows]))
            state, new_tokens = extend(
                self._params,
                state,
                end_ids,
                num_tokens=self._tokens_per_call,
                config=self.config,
                sampling=sampling,
            )
            for row, tokens in zip(rows, np.asarray(new_tokens).tolist(), strict=True):
                if not row.finished:
                    yield row.push([token for token in tokens if token != NO_TOKEN], left)
            left -= self._tokens_per_call

    def _ends(self, stop: Sequence[str]) -> dict[int, FinishReason]:
        """The tokens that end a sequence, and what it is then said to end with."""
        ends: dict[int, FinishReason] = {}
        for text in stop:
            ids = self.tokenizer.encode(text)
            if len(ids) == 1 and not self.tokenizer.decode(ids, skip_special_tokens=True):
                ends[ids[0]] = "stop"
        if self.tokenizer.eos_id is not None:
            ends[self.tokenizer.eos_id] = "eos"
        return ends

    def _check(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str], first_index: int
    ) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {max_new_tokens}: must be at least 1", field="max_new_tokens")
        if "" in stop:
            raise ConfigError("stop = '': a stop string cannot be empty", field="stop")
        longest = self.config.max_position_embeddings
        for index, prompt in enumerate(prompts, start=first_index):
            if not prompt:
                raise InputError(f"prompt {index} is empty: there is nothing to continue")
            if len(prompt) + max_new_tokens > longest:
                raise ConfigError(
                    f"prompt {index} has {len(prompt)} tokens and max_new_tokens = {max_new_tokens}: together more "
                    f"than the model's max_position_embeddings = {longest}; shorten it or ask for fewer tokens",
                    field="max_new_tokens",
                )
            if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                raise InputError(
                    f"prompt {index} has token ids from {min(prompt)} to {max(prompt)}: must be from 0 to below the "
                    f"model's vocab_size = {self.config.vocab_size}"
                )


def collect(pieces: Iterable[Piece]) -> list[Completion]:
    """Joins the pieces of a batch to its completions, in the order of the prompts.

    Raises:
        ValueError: if the last piece of a sequence is missing.
    """
    by_index: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_index.setdefault(piece.index, []).append(piece)
    completions = []
    for index, parts in sorted(by_index.items()):
        reason = parts[-1].finish_reason
        if reason is None:
            raise ValueError(f"sequence {index} has not ended")
        tokens = tuple(token for part in parts for token in part.token_ids)
        completions.append(Completion(index, "".join(part.text for part in parts), tokens, reason))
    return completions


def _decoding_params(config: ModelConfig, params: Params) -> Params:
    """Parameters without MTP layers, with matrices and biases in the compute dtype.

    The model casts them to it in any case before it multiplies, so casting them once changes no result and halves what
    every token has to read. Norm scales are used in float32, and FP8 scales are taken from the stored values.
    """
    params = {name: value for name, value in params.items() if name != "mtp_layers"}
    if config.fp8:
        return params

    def cast(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array) -> jax.Array:
        return leaf if path[-1].key == "scale" else jnp.asarray(leaf, config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
