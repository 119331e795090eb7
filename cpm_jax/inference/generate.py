"""Text from a decoder: batches of prompts of any lengths, streamed, with stop strings and reproducible samples."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.data.tokenizer import StreamDecoder, Tokenizer
from cpm_jax.inference.decode_loop import NO_TOKEN, PREFILL_CHUNKS, DecodeState, extend, start
from cpm_jax.inference.load import load_model
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.inference.stop_strings import StopStringFilter
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.decoder import Params
from cpm_jax.modeling.int8 import Int8Kernel, WeightDType
from cpm_jax.modeling.kv_cache import CacheDType

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
    sequence: the long ones when prompt + max_new_tokens exceeds `original_max_position_embeddings`. Attention is sparse
    for a whole sequence when prompt + max_new_tokens exceeds `dense_len` of the model's `sparse_config`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        mesh: Mesh | None = None,
        cache_dtype: CacheDType = "",
        tokens_per_call: int = 16,
        prefill_chunks: Sequence[int] = PREFILL_CHUNKS,
    ):
        """Prepares the parameters for decoding: without MTP layers, and cast to the compute dtype once.

        Args:
            config: the model.
            params: its parameters, as in a checkpoint.
            tokenizer: turns tokens to text.
            eos_ids: tokens that end a sequence, besides the tokenizer's own.
            mesh: what the parameters lie on, from `common.sharding.make_mesh`; the cache is then divided over it by
                sequences and key/value heads. None is one device.
            cache_dtype: what keys and values are held in; "" is the compute dtype.
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
        self._eos_ids = {*eos_ids} if tokenizer.eos_id is None else {*eos_ids, tokenizer.eos_id}
        self._params = decoding_params(config, params)
        if mesh is None:
            self._params = unstack_on_cpu(self._params)
        self._mesh = mesh
        self._cache_dtype: CacheDType = cache_dtype
        self._tokens_per_call = tokens_per_call
        self._prefill_chunks = prefill_chunks

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        tokenizer: str | Path | None = None,
        mesh: Mesh | None = None,
        sparse_config: SparseConfig | None = None,
        weight_dtype: WeightDType = "",
        cache_dtype: CacheDType = "",
    ) -> Self:
        """Loads model and tokenizer of a run.

        Args:
            path: as in `load.load_model`.
            tokenizer: a tokenizer.json or its folder; None takes the one that lies with the model.
            mesh: how the parameters are to lie, whatever they were trained on; None is one device.
            sparse_config: sparse attention to use with these weights; None is what the checkpoint says.
            weight_dtype: "int8" rounds the kernels of the layers to int8; "" leaves them.
            cache_dtype: what keys and values are held in; "" is the compute dtype.

        Raises:
            ConfigError: if the mesh does not divide the parameters, or `sparse_config` or `weight_dtype` does not fit
                the model.
            InputError: if the checkpoint or its tokenizer cannot be used, see `load.load_model`.
        """
        loaded = load_model(path, tokenizer, "", mesh, sparse_config, weight_dtype)
        return cls(
            loaded.config, loaded.params, loaded.tokenizer, eos_ids=loaded.eos_ids, mesh=mesh, cache_dtype=cache_dtype
        )

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        seed: int = 0,
        indices: Sequence[int] | None = None,
    ) -> Iterator[Piece]:
        """Continues a batch of prompts, yielding what is new after every call of the compiled loop.

        Args:
            prompts: token ids, at least one each.
            sampling: the distribution to draw from.
            max_new_tokens: most tokens per sequence.
            stop: strings that end a sequence; neither they nor what follows is part of the text. One that is a special
                token of the tokenizer is looked for among the tokens, as special tokens do not show in the text.
            seed: of the draws.
            indices: index of each prompt among all of the run, if it has several batches; all different. The draws
                depend on it.
                None counts from 0.

        Returns:
            An iterator of pieces of all sequences, in no particular order across sequences; the last one of each has a
            finish reason. The request is checked before it begins.

        Raises:
            ConfigError: for an empty stop string, for max_new_tokens that do not fit into the model's context together
                with a prompt, or for a sequence that attends sparsely where the cache is to be int8 or int4.
            InputError: for an empty prompt, or a token that the model does not have.
        """
        numbers = range(len(prompts)) if indices is None else indices
        self._check(prompts, max_new_tokens, stop, numbers)
        by_kind: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            # The model goes by the length of the cache, which rows of one batch share.
            passed = sum(len(prompt) + max_new_tokens > switch for switch in self.config.switch_lengths)
            by_kind.setdefault(passed, []).append(row)

        def run(rows: Sequence[int]) -> Iterator[Piece]:
            chosen = [numbers[row] for row in rows]
            with self._on_mesh():
                state = start(
                    self._params,
                    [prompts[row] for row in rows],
                    config=self.config,
                    sampling=sampling,
                    max_new_tokens=max_new_tokens,
                    seed=seed,
                    indices=chosen,
                    cache_dtype=self._cache_dtype,
                    prefill_chunks=self._prefill_chunks,
                )
            return self._run(state, chosen, sampling, max_new_tokens, stop)

        return itertools.chain.from_iterable(map(run, by_kind.values()))

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
            with self._on_mesh():
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

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        """Puts the mesh in context, where compiled functions look for it."""
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()

    def _ends(self, stop: Sequence[str]) -> dict[int, FinishReason]:
        """The tokens that end a sequence, and what it is then said to end with."""
        ends: dict[int, FinishReason] = {}
        for text in stop:
            ids = self.tokenizer.encode(text)
            if len(ids) == 1 and not self.tokenizer.decode(ids, skip_special_tokens=True):
                ends[ids[0]] = "stop"
        for token in self._eos_ids:
            ends[token] = "eos"
        return ends

    def _check(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str], indices: Sequence[int]
    ) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {max_new_tokens}: must be at least 1", field="max_new_tokens")
        if "" in stop:
            raise ConfigError("stop = '': a stop string cannot be empty", field="stop")
        longest = self.config.max_position_embeddings
        for index, prompt in zip(indices, prompts, strict=True):
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


def decoding_params(config: ModelConfig, params: Params) -> Params:
    """Parameters without MTP layers, with matrices and biases in the compute dtype.

    The model casts them to it in any case before it multiplies, so casting them once changes no result and halves what
    every token has to read. Norm scales are used in float32, scales of FP8 and of ternary weights are taken from the
    stored values, and int8 kernels are multiplied as they are.
    """
    params = {name: value for name, value in params.items() if name != "mtp_layers"}
    if config.fp8 or config.ternary is not None:
        return params

    def cast(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array | Int8Kernel) -> jax.Array | Int8Kernel:
        if isinstance(leaf, Int8Kernel) or path[-1].key == "scale":
            return leaf
        return jnp.asarray(leaf, config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=lambda leaf: isinstance(leaf, Int8Kernel))


def unstack_on_cpu(params: Params) -> Params:
    """On a CPU the same parameters with a tuple of L arrays for each stack, which `modeling.block.run_layers` unrolls.

    XLA's CPU backend copies a layer that is sliced out of its stack before it multiplies, for every token: three times
    the memory traffic of reading the weights, which is what decoding is bound by. Accelerators keep the stack, which
    compiles faster.
    """
    if jax.default_backend() != "cpu":
        return params
    return params | {"layers": jax.tree.map(lambda stack: tuple(jnp.unstack(stack)), params["layers"])}
