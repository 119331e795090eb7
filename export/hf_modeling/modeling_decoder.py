"""A decoder for `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, written by cpm_jax.

One text serves the layouts of MiniCPM, InternLM2 and MiMo, which differ in names, biases and factors. Attention is
grouped-query attention with rotary embedding and, beyond `sparse_config["dense_len"]` tokens, InfLLM v2 (arXiv
2509.24663, section 3): each query and key/value head attends to a few blocks of keys, by a mask. That computes what
sparse attention does, in the time of dense attention. Multi-token layers are left in the file: generation has no use
for them.

Keys are cached as they were before rotation, because frequencies may depend on the length of the sequence (LongRoPE,
dynamic NTK) and all keys that meet in one softmax must be rotated alike. Frequencies and sparse attention follow the
number of tokens so far, padding included; what is cached of a token stays as it was computed at the length of its time.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from export.hf_modeling.configuration_decoder import DecoderConfig

QUERIES = 512  # that choose blocks at a time, to bound the memory of their scores
SPARSE_DEFAULTS: dict[str, Any] = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
    "lse_approximation": True,
    "variant": "huggingface",  # one local block more, and one by score fewer, than in the paper
}


def rotary_frequencies(config: DecoderConfig, length: int) -> tuple[Tensor, float]:
    """Radians per position of each pair of dimensions, float64 [H/2], and the factor on cosines and sines.

    Rules: linear (arXiv 2306.15595), dynamic NTK, YaRN (2309.00071), LongRoPE (2402.13753) and that of Llama 3.
    """
    rope, half, longest = config.rope_parameters, config.head_dim // 2, config.max_position_embeddings
    theta, kind = rope["rope_theta"], rope["rope_type"]
    original = rope.get("original_max_position_embeddings") or longest
    factor = rope.get("factor") or longest / original
    index = torch.arange(half, dtype=torch.float64)
    plain = theta ** -(index / half)
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "dynamic":
        stretch = factor * max(length / longest, 1.0) - (factor - 1)
        return (theta * stretch ** (half / (half - 1))) ** -(index / half), 1.0
    scale = rope.get("attention_factor")
    if kind == "longrope":
        divisors = torch.tensor(rope["long_factor" if length > original else "short_factor"], dtype=torch.float64)
        usual = math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original else 1.0
        return plain / divisors, scale or usual
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = (original * plain / (2 * math.pi) - low) / (high - low)
    elif kind == "yarn":
        turns = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
        low, high = (half * math.log(original / (2 * math.pi * turn)) / math.log(theta) for turn in turns)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        kept = 1 - (index - low) / max(high - low, 0.001)
        scale = scale or 0.1 * math.log(factor) + 1
    else:
        raise ValueError(
            f"config.json: rope_type = {kind!r}: this file computes default, linear, dynamic, yarn, longrope and llama3"
        )
    kept = kept.clamp(0, 1)
    return plain * kept + plain / factor * (1 - kept), scale or 1.0


def rotation(config: DecoderConfig, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [B, S], float32 [B, 1, S, H/2].

    A frequency is counted in 2^-32 turns, so that whole turns can be taken away before float32 rounds the angle.
    """
    frequencies, scale = rotary_frequencies(config, length)
    counts = frequencies * (2**32 / (2 * math.pi))
    whole = counts.round()
    rest = (counts - whole).float().to(positions.device)
    turns = (positions[:, None, :, None] * whole.long().to(positions.device) + 2**31) % 2**32 - 2**31
    angles = (turns.float() + positions[:, None, :, None] * rest) * (2 * math.pi / 2**32)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[i], x[i + H/2]) of x [B, heads, S, H] in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def kernel_scores(q: Tensor, k: Tensor, positions: Tensor, size: int, stride: int) -> Tensor:
    """Scores of kernels, which are means of `size` keys every `stride`; -inf where one ends behind the query.

    Args:
        q: queries [K, G, T, H].
        k: keys [K, S, H].
        positions: of the queries [T].
        size: keys of a kernel.
        stride: from one kernel's first key to the next one's.

    Returns:
        float32 [K, G, T, J].
    """
    k = functional.pad(k, (0, 0, 0, max(size - k.shape[1], 0)))  # one kernel, which no query sees, where there is none
    kernels = k.float().unfold(1, size, stride).mean(dim=-1)  # [K, J, H]
    scores = torch.einsum("kgth,kjh->kgtj", q.float(), kernels) * q.shape[-1] ** -0.5
    ends = torch.arange(kernels.shape[1], device=q.device) * stride + size - 1
    return scores.masked_fill(ends > positions[:, None], -math.inf)


def visible_blocks(q: Tensor, k: Tensor, positions: Tensor, sparse: dict[str, Any]) -> Tensor:
    """Which blocks of keys each query attends to, by InfLLM v2.

    Args:
        q: queries that choose [K, G, T, H].
        k: keys that they choose by [K, S, H].
        positions: of the queries [T].
        sparse: `SPARSE_DEFAULTS` and what config.json says.

    Returns:
        bool [K, T, C].
    """
    size, stride, block = sparse["kernel_size"], sparse["kernel_stride"], sparse["block_size"]
    scores = kernel_scores(q, k, positions, size, stride)
    # The softmax's normaliser is taken of kernels four times as long and as far apart, or of the kernels themselves.
    coarse = kernel_scores(q, k, positions, 4 * size, 4 * stride) if sparse["lse_approximation"] else scores
    normaliser = coarse.logsumexp(dim=-1, keepdim=True)
    weights = (scores - normaliser).exp().masked_fill(normaliser == -math.inf, 0.0).sum(dim=1)  # [K, T, J]
    # A block has the largest weight of the kernels that touch it: its own, and those before that reach into it.
    blocks, own, before = -(-k.shape[1] // block), block // stride, -(-size // stride) - 1
    padded = functional.pad(weights, (before, max(blocks * own - weights.shape[-1], 0)))
    pooled = padded.unfold(-1, own + before, own).amax(dim=-1)  # [K, T, C]
    index, last = torch.arange(blocks, device=q.device), (positions // block)[:, None]
    local = sparse["window_size"] // block
    chosen = min(sparse["topk"] + local, blocks)
    local += sparse["variant"] == "huggingface"
    pooled = pooled.masked_fill((index < sparse["init_blocks"]) | (index > last - local), math.inf)
    pooled = pooled.masked_fill(index > last, -math.inf)
    best = pooled.sort(dim=-1, descending=True, stable=True).indices[..., :chosen]
    return torch.zeros_like(pooled, dtype=torch.bool).scatter_(-1, best, True) & (index <= last)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, choosing_q: Tensor, choosing_k: Tensor, sparse: dict[str, Any]
) -> Tensor:
    """Attention of the last T tokens of one row of S over the blocks that they choose.

    Args:
        q: rotated queries [K, G, T, H].
        k: rotated keys [K, S, H].
        v: values [K, S, H].
        choosing_q: queries by which blocks are chosen, [K, G, T, H].
        choosing_k: keys by which they are, [K, S, H].
        sparse: as in `visible_blocks`.

    Returns:
        [K, G, T, H].
    """
    slots, first = torch.arange(k.shape[1], device=q.device), k.shape[1] - q.shape[2]
    attended = [q[:, :, :0]]
    for start in range(0, q.shape[2], QUERIES):
        part = slice(start, start + QUERIES)
        positions = slots[first:][part]
        blocks = visible_blocks(choosing_q[:, :, part], choosing_k, positions, sparse)
        mask = blocks[..., slots // sparse["block_size"]] & (slots <= positions[:, None])  # [K, T, S]
        keys, values = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
        attended.append(functional.scaled_dot_product_attention(q[:, :, part], keys, values, mask[:, None]))
    return torch.cat(attended, dim=2)


class Mask(NamedTuple):
    """What the new tokens of a batch see.

    Attributes:
        positions: of all slots [B, S], counted from the first token of a row.
        visible: the slots that each new token sees, bool [B, 1, T, S]; None is all up to its own.
        padding: slots before the first token of each row; None where a row has gaps behind it.
    """

    positions: Tensor
    visible: Tensor | None
    padding: list[int] | None


def make_mask(attention_mask: Tensor | None, batch: int, length: int, past: int, device: torch.device) -> Mask:
    """The mask of `length` new tokens that follow `past` others.

    Raises:
        ValueError: the attention mask is not [B, past + length].
    """
    slots = torch.arange(past + length, device=device)
    causal = slots <= slots[past:, None]  # [T, S]
    if attention_mask is not None and attention_mask.shape != (batch, past + length):
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}: must be {(batch, past + length)}, of the "
            "tokens in the cache and the new ones (caches of fixed length are not supported)"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return Mask(slots.expand(batch, -1), causal if past and length > 1 else None, [0] * batch)
    present = attention_mask.bool()
    # A token of the padding sees itself, so that its softmax is of something; nobody else sees it.
    visible = causal & (present[:, None] | (slots == slots[past:, None]))
    starts = functional.pad(present, (1, 0))
    gaps = bool(((starts[:, 1:] & ~starts[:, :-1]).sum(1) > 1).any())
    positions = (present.cumsum(1) - 1).clamp(min=0)
    return Mask(positions, visible[:, None], None if gaps else present.int().argmax(1).tolist())


class DecoderRMSNorm(nn.Module):
    """Root-mean-square normalisation in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension, keeping its type."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x.dtype)


class DecoderAttention(nn.Module):
    """Grouped-query attention; see the file's beginning."""

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.kv_heads, self.group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        self.sparse = SPARSE_DEFAULTS | config.sparse_config if config.sparse_config else None
        width, kv_width, bias = config.hidden_size, self.kv_heads * self.head_dim, config.attention_bias
        if config.model_type == "internlm2":  # of each key/value head its queries, its key, its value
            self.wqkv = nn.Linear(width, (self.group + 2) * kv_width, bias=bias)
        else:
            self.q_proj = nn.Linear(width, self.group * kv_width, bias=bias)
            self.k_proj = nn.Linear(width, kv_width, bias=bias)
            self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(self.group * kv_width, width, bias=bias and config.model_type != "mimo")

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, N, T, H], those of a key/value head together, keys and values [B, K, T, H]."""
        if hasattr(self, "wqkv"):
            grouped = self.wqkv(x).unflatten(-1, (self.kv_heads, -1, self.head_dim))
            q, k, v = grouped.split([self.group, 1, 1], dim=-2)
            q, k, v = q.flatten(2, 3), k.squeeze(-2), v.squeeze(-2)
        else:
            q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Mask, cache: Cache | None) -> Tensor:
        """Attends to the cached tokens and the new ones [B, T, D]."""
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        cos, sin = angles
        if k.shape[2] != cos.shape[2]:
            raise ValueError("past_key_values: caches of fixed length are not supported; take a DynamicCache")
        past = k.shape[2] - q.shape[2]
        rotated, keys = rotate(q, cos[:, :, past:], sin[:, :, past:]), rotate(k, cos, sin)
        sparse = self.sparse
        if sparse is None or k.shape[2] <= sparse["dense_len"]:
            out = functional.scaled_dot_product_attention(
                rotated, keys, v, mask.visible, is_causal=mask.visible is None and q.shape[2] > 1, enable_gqa=True
            )
        else:
            choosing = (q, k) if sparse["use_nope"] else (rotated, keys)
            out = self.attend_sparsely(rotated, keys, v, choosing, mask, sparse)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def attend_sparsely(
        self, q: Tensor, k: Tensor, v: Tensor, choosing: tuple[Tensor, Tensor], mask: Mask, sparse: dict[str, Any]
    ) -> Tensor:
        """Attends row by row [B, N, T, H], each without its padding, as its blocks are counted from its first token.

        Raises:
            ValueError: a row has gaps.
        """
        if mask.padding is None:
            raise ValueError("attention_mask: sparse attention takes rows that are padded on the left only")
        out = torch.zeros_like(q)
        for row, start in enumerate(mask.padding):
            new = slice(max(start - (k.shape[2] - q.shape[2]), 0), None)  # of the new tokens those that are there
            queries, choosing_q = (x[row, :, new].unflatten(0, (self.kv_heads, -1)) for x in (q, choosing[0]))
            keys, values, choosing_k = (x[row, :, start:] for x in (k, v, choosing[1]))
            attended = sparse_attention(queries, keys, values, choosing_q, choosing_k, sparse)
            out[row, :, new] = attended.flatten(0, 1)
        return out


class DecoderMLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to every position by itself."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and feed-forward layer, each behind a norm and multiplied before it is added."""

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.multiplier = config.scale_depth / math.sqrt(config.num_hidden_layers)
        self.input_layernorm = DecoderRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config, index)
        self.post_attention_layernorm = DecoderRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DecoderMLP(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Mask, cache: Cache | None) -> Tensor:
        """Adds both branches to the residual stream [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache) * self.multiplier
        return x + self.mlp(self.post_attention_layernorm(x)) * self.multiplier


class DecoderPreTrainedModel(PreTrainedModel):
    """What `from_pretrained` has to know."""

    config: DecoderConfig
    config_class = DecoderConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"model\.mtp_layers\..*"]


class DecoderModel(DecoderPreTrainedModel):
    """Everything below the head."""

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = DecoderRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, under whatever name."""
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replaces it."""
        self.embed_tokens = value

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Hidden states [B, T, D] of embedded tokens [B, T, D] that follow those in the cache."""
        past = cache.get_seq_length() if cache is not None else 0
        mask = make_mask(attention_mask, x.shape[0], x.shape[1], past, x.device)
        positions = mask.positions[:, past:]
        if position_ids is not None:
            there = torch.ones_like(positions) if attention_mask is None else attention_mask[:, past:]
            if bool(((position_ids != positions) & (there > 0)).any()):
                raise ValueError(
                    "position_ids: must count the tokens of attention_mask from 0; others are not computed"
                )
        angles = rotation(self.config, mask.positions, past + x.shape[1])
        x = x * self.config.scale_emb
        for layer in self.layers:
            x = layer(x, angles, mask, cache)
        return self.norm(x)


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.model = DecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head, under whatever name."""
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        """Replaces it."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits in float32 [B, T, V], and the loss where labels [B, T] are given.

        Args:
            input_ids: new tokens [B, T].
            attention_mask: [B, past + T], 0 for padding.
            position_ids: of the new tokens; they follow from the mask, and others are refused.
            past_key_values: cache with all earlier tokens.
            inputs_embeds: embedded tokens [B, T, D], in place of `input_ids`.
            labels: tokens to predict, -100 for none; shifted here.
            use_cache: whether to return a cache.
            logits_to_keep: number of last positions to give logits of; 0 is all.
            options: what else transformers passes; for the loss.
        """
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        hidden = self.model(x, attention_mask, position_ids, past_key_values)
        hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        divisor = self.config.hidden_size / self.config.dim_model_base
        logits = self.lm_head(hidden / divisor).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
