"""Generation: a prompt is read in chunks, then tokens follow by a step that never changes its shape.

Without MTP layers a step makes one token. With them it verifies drafts, and makes one token more than were right. A
draft is right if the model's own draw is the same token, so that the draws of any distribution stay what they are.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from export.torch_runtime.cache import Cache, LengthError
from export.torch_runtime.model import Decoder
from export.torch_runtime.speculative import read_prompt, speculate

# Of one token [B, 1] at one position [1], in a cache: the drafts that were read behind it [B, M], and logits after it
# and each of them [B, M + 1, V]. M is 0 where the model has no MTP layers.
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Without cuDNN, which PyTorch prefers on H100 and B200: it makes a plan for each length that it meets.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class SamplingConfig:
    """The distribution that a token is drawn from; the settings act in this order.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: keeps the k most probable tokens; 0 keeps all.
        top_p: keeps the smallest set of most probable tokens with at least this probability; 1 keeps all.
        seed: of the draws.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for field, works, accepted in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not works:
                raise ValueError(f"{field} = {getattr(self, field)}: must be {accepted}")


@dataclass
class Speed:
    """How long it took; filled while tokens are taken from `generate`.

    Attributes:
        prompt_tokens: tokens that were read.
        prefill_seconds: reading them, up to the first new token.
        new_tokens: tokens that were made.
        decode_seconds: making all of them but the first.
        steps: times that the model read what it had made.
        accepted: drafts that were right in them.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0
    steps: int = 0
    accepted: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens that a step made, in the mean: 1 without drafts, at most M + 1 with those of M MTP layers."""
        return 1 + self.accepted / self.steps if self.steps else 1.0

    @property
    def prefill_rate(self) -> float:
        """Tokens/s of the prompt."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens/s after the first one."""
        return max(self.new_tokens - 1, 0) / self.decode_seconds if self.decode_seconds else 0.0


def sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Draws a token of each row.

    Args:
        logits: float32 [B, V].
        sampling: the distribution.
        generator: of random numbers, on the device of the logits.

    Returns:
        [B].
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        dropped = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered.masked_fill(dropped, -torch.inf))
    # The largest of logits plus Gumbel noise is a draw, and needs no word from the device.
    noise = torch.empty_like(logits).exponential_(generator=generator).log()
    return (logits - noise).argmax(dim=-1)


@contextlib.contextmanager
def _growing(device: torch.device) -> Iterator[None]:
    """Around passes over a cache as far as it is filled: how to attend, and on which GPU Triton launches kernels."""
    with sdpa_kernel(_ATTENTION), torch.cuda.device(device if device.type == "cuda" else -1):
        yield


@torch.inference_mode()
def prefill(model: Decoder, tokens: Tensor, cache: Cache, chunk: int = 512) -> Tensor:
    """Reads a prompt into an empty cache.

    Args:
        model: what reads.
        tokens: [B, T].
        cache: where to.
        chunk: tokens that are read at a time, which bounds the memory of activations and scores.

    Returns:
        Logits after the last token [B, V].

    Raises:
        LengthError: the prompt is empty, or longer than the cache.
    """
    length = tokens.shape[1]
    if not 1 <= length <= cache.length:
        raise LengthError(f"a prompt of {length} tokens: accepted are 1 to {cache.length}, the length of the cache")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: must be at least 1")
    if cache.drafts is not None:
        cache.drafts.tokens[:, :length] = tokens
    with _growing(model.device):
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            positions = torch.arange(start, end, device=tokens.device)
            hidden = model(tokens[:, start:end], positions, cache, num_slots=end)
            if cache.drafts is not None:
                read_prompt(model, hidden, positions, cache, num_slots=end)
        return model.logits(hidden[:, -1])


def eager_step(model: Decoder, cache: Cache) -> Step:
    """A step of decoding that reads the cache as far as it is filled."""
    step = _step(model, cache, static=False)

    def growing_step(token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        with _growing(model.device):
            return step(token, position)

    return growing_step


def static_step(model: Decoder, cache: Cache) -> Step:
    """A step that reads the whole cache by a mask: the same operations on the same memory at every position."""
    return _step(model, cache, static=True)


def _step(model: Decoder, cache: Cache, static: bool) -> Step:
    def step(token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        if cache.drafts is not None:
            return speculate(model, token, position, cache, static)
        return token[:, :0], model.logits(model(token, position, cache, None if static else int(position) + 1))

    return step


def compiled_step(model: Decoder, cache: Cache) -> Step:
    """`static_step` by `torch.compile`, as one graph."""
    return torch.compile(static_step(model, cache), fullgraph=True)


class CudaGraphStep:
    """`static_step` as a CUDA graph: captured once, then replayed with a single launch.

    Capturing runs the step at position 1 of the cache, so it comes before the prompt is read.
    """

    def __init__(self, model: Decoder, cache: Cache, compiled: bool = False):
        """Captures the step.

        Args:
            model: on a CUDA device.
            cache: empty, of the same device.
            compiled: whether what is captured was compiled before.
        """
        step = compiled_step(model, cache) if compiled else static_step(model, cache)
        batch_size = cache.layers[0].keys.shape[0]
        self._token = torch.zeros(batch_size, 1, dtype=torch.long, device=model.device)
        self._position = torch.ones(1, dtype=torch.long, device=model.device)  # drafts need a token before
        with torch.cuda.device(model.device):  # of which streams are, and what is captured
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries allocate, and kernels compile, before the capture
                for _ in range(3):
                    step(self._token, self._position)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._result = step(self._token, self._position)

    def __call__(self, token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Drafts and logits, which the next call writes over."""
        self._token.copy_(token)
        self._position.copy_(position)
        self._graph.replay()
        return self._result


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    *,
    cache_length: int | None = None,
    chunk: int = 512,
    compiled: bool = False,
    cuda_graph: bool | None = None,
    speed: Speed | None = None,
) -> Iterator[int]:
    """Continues a prompt until a token that ends a text (it comes last) or `max_new_tokens`.

    Args:
        model: from `load_model`; with its MTP layers it makes several tokens in a step.
        prompt: token ids.
        max_new_tokens: most tokens to make.
        sampling: how they are drawn; None takes the defaults.
        cache_length: tokens that the cache has room for; None takes what is needed. Whether attention is sparse, and
            LongRoPE's list, go by it.
        chunk: prompt tokens that are read at a time.
        compiled: whether the step is compiled by `torch.compile`.
        cuda_graph: whether it is replayed as a CUDA graph; None: where the model is on a CUDA device.
        speed: filled with times.

    Raises:
        LengthError: the prompt is empty, prompt and new tokens do not fit into the cache, or the cache not into the
            model.
        ValueError: `max_new_tokens` below 1, or a token id that the model does not have.
    """
    if len(prompt) == 0:  # before a step is captured, for which there may be no room
        raise LengthError("a prompt of 0 tokens: at least one is needed to go on from")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if strange := [token for token in prompt if not 0 <= token < model.config.vocab_size]:
        raise ValueError(f"token {strange[0]} in the prompt: must be below vocab_size = {model.config.vocab_size}")
    needed = len(prompt) + max_new_tokens
    cache = model.init_cache(needed if cache_length is None else cache_length)
    if needed > cache.length:
        raise LengthError(
            f"{len(prompt)} prompt tokens and max_new_tokens = {max_new_tokens} in a cache of {cache.length}: at most "
            f"{cache.length} together"
        )
    speed, sampling = speed or Speed(), sampling or SamplingConfig()
    replayed = model.device.type == "cuda" if cuda_graph is None else cuda_graph
    step: Step
    if replayed:
        step = CudaGraphStep(model, cache, compiled)
    else:
        step = compiled_step(model, cache) if compiled else eager_step(model, cache)
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    tokens = torch.tensor([list(prompt)], dtype=torch.long, device=model.device)
    started = time.perf_counter()
    logits = prefill(model, tokens, cache, chunk)
    drafts, position = tokens[0, :0], len(prompt) - 1  # of the last token that was read
    speed.prompt_tokens = len(prompt)
    while True:
        draws = sample(logits, sampling, generator)
        drafted, drawn = torch.stack([functional.pad(drafts, (0, 1), value=-1), draws]).tolist()  # waits for the device
        accepted = next(i for i, token in enumerate(drawn) if token != drafted[i])
        now = time.perf_counter()
        if speed.steps == 0:
            speed.prefill_seconds, started = now - started, now
        speed.accepted += accepted
        for token in drawn[: accepted + 1]:
            speed.new_tokens, speed.decode_seconds = speed.new_tokens + 1, now - started
            yield token
            if token in model.config.eos_token_ids or speed.new_tokens == max_new_tokens:
                return
        position += accepted + 1
        known = draws[accepted : accepted + 1, None]
        following, after = step(known, torch.tensor([position], device=model.device))
        drafts, logits, speed.steps = following[0], after[0], speed.steps + 1
