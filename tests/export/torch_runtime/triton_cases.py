"""Triton's kernels against plain PyTorch, on a GPU or in Triton's interpreter: a program, as that is chosen at import.

Rotary embedding is compared with our decoder's.

    [TRITON_INTERPRET=1] python -m tests.export.torch_runtime.triton_cases FOLDER

prints the largest error of each case as JSON. FOLDER holds a small model with int4 weights and sparse attention. The
interpreter computes on the CPU.
"""

import itertools
import json
import os
import sys
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import torch

from cpm_jax.modeling import rotary as ours
from cpm_jax.modeling.config import ModelConfig, RopeConfig
from export.torch_runtime import infllm, rope
from export.torch_runtime.config import RopeConfig as RuntimeRope
from export.torch_runtime.config import SparseConfig
from export.torch_runtime.layers import attend_to_all
from export.torch_runtime.linear import QuantizedLinear
from export.torch_runtime.model import RMSNorm, load_model
from export.torch_runtime.triton_kernels import int4_matmul
from export.torch_runtime.triton_kernels.block_scores import block_scores
from export.torch_runtime.triton_kernels.compress_keys import write_kernels
from export.torch_runtime.triton_kernels.rotary import rotate
from export.torch_runtime.triton_kernels.sparse_attention import dense_attention, sparse_attention

Errors = Iterator[tuple[str, float]]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SIZES = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 32, "topk": 3}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, over the largest value where that is above 1."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1))


def int4_products() -> Errors:
    """Rows and outputs that fill no tile; few rows, whose inputs are divided among programs, and many.

    Not in bfloat16, whose products the interpreter takes for those of whole numbers.
    """
    for rows, inputs, outputs, group, dtype, most_places in (
        (1, 256, 40, 128, torch.float32, 2**31),
        (5, 96, 72, 32, torch.float16, 2**31),
        (19, 128, 8, 128, torch.float16, 2**31),
        (70, 48, 136, 16, torch.float32, 2**31),
        (7, 32, 16, 32, torch.float32, 100),  # a few rows at a time, as of too long a prompt
    ):
        int4_matmul.MOST_PLACES = most_places
        words = torch.randint(-(2**31), 2**31 - 1, (inputs // 8, outputs), dtype=torch.int32)
        scales = torch.rand(inputs // group, outputs).half() / 8
        zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8)
        linear = QuantizedLinear(words, scales, zeros, torch.randn(outputs, dtype=dtype), bits=4)
        x = torch.randn(2, rows, inputs, dtype=dtype) / inputs**0.5
        expected = (x.float() @ linear.dequantize(torch.float32)).to(dtype) + linear.bias
        linear.kernels = "triton"
        yield (
            f"int4 product of {rows} rows, {inputs} to {outputs}, groups of {group}, {dtype}",
            error(linear(x), expected),
        )


def norms() -> Errors:
    for shape, dtype in (((3, 7, 100), torch.float32), ((1, 1, 64), torch.float32), ((2, 130), torch.bfloat16)):
        norm = RMSNorm(torch.rand(shape[-1]).to(dtype), 1e-5)
        x, branch = torch.randn(2, *shape).to(dtype)
        expected = norm.add(x, branch, 0.25)
        norm.kernels = "triton"
        for name, found, right in zip(("sum", "norm"), norm.add(x, branch, 0.25), expected, strict=True):
            yield f"{name} of {list(shape)}, {dtype}", error(found, right)


def rotaries() -> Errors:
    """Heads that fill no program, LongRoPE on both sides of its switch, parts of a text; q and k lie in one product."""
    for heads, kv_heads, size, first, length, cache_length, dtype in (
        (4, 2, 16, 0, 5, 64, torch.float32),
        (9, 3, 24, 61, 7, 200, torch.float32),
        (32, 2, 128, 130_000, 2, 131_072, torch.float32),
        (7, 7, 64, 3, 1, 64, torch.bfloat16),
    ):
        factors = {"short_factor": (1.0 + np.arange(size // 2) / 8).tolist()}
        factors["long_factor"] = (1.0 + 1.5 * np.arange(size // 2)).tolist()
        theirs = RopeConfig(original_max_position_embeddings=64, **{name: tuple(f) for name, f in factors.items()})
        config = ModelConfig(
            vocab_size=8,
            num_layers=1,
            d_model=heads * size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            d_ff=8,
            max_position_embeddings=cache_length,
            rope=theirs,
        )
        angles = ours.rotation(config, jnp.arange(first, first + length)[None], cache_length)
        product = torch.randn(2, length, heads + 2 * kv_heads, size).to(dtype)
        q, k, _ = product.split([heads, kv_heads, kv_heads], dim=2)
        runtime = RuntimeRope(
            "longrope",
            original_max_position_embeddings=64,
            attention_factor=ours.attention_factor(config),
            short_factor=theirs.short_factor,
            long_factor=theirs.long_factor,
        )
        table = rope.rotary_table(runtime, size, cache_length, DEVICE)[first : first + length]
        for name, x, found in zip(("queries", "keys"), (q, k), rotate(q, k, table), strict=True):
            expected = torch.tensor(np.array(ours.apply_rotary(jnp.asarray(x.float().cpu().numpy()), angles)))
            yield (
                f"rotated {name} {list(x.shape)} from position {first} of {cache_length}, {dtype}",
                error(found, expected.to(dtype)),
            )


def sparse_attentions() -> Errors:
    """Every step of sparse attention, on a cache that is longer than what is filled."""
    cases = (
        (SparseConfig(**SIZES), 61, 3, 2, 16),
        (SparseConfig(**SIZES | {"kernel_size": 11, "variant": "paper", "init_blocks": 0}), 50, 1, 1, 24),
        (SparseConfig(**SIZES | {"block_size": 48, "window_size": 48, "topk": 30}), 61, 5, 1, 32),
    )
    for (sparse, filled, group, kv_heads, size), exact in zip(cases, (False, True, False), strict=True):
        name = f"{filled} keys, {group} heads on each of {kv_heads}, blocks of {sparse.block_size}"
        slots = 144
        at = torch.tensor([0, 16, filled // 2, filled - 2, filled - 1])
        q = torch.randn(2, len(at), kv_heads * group, size)
        keys, values = torch.randn(2, 2, kv_heads, slots, size)
        found, expected = [], []
        for kernel_size, stride in ((sparse.kernel_size, sparse.kernel_stride), sparse.coarse):
            number = infllm.num_kernels(slots, kernel_size, stride)
            for write, results in ((write_kernels, found), (infllm.write_kernels, expected)):
                kernels = torch.zeros(2, kv_heads, number + 1, size)
                for start, end in itertools.pairwise((0, 1, 20, 21, filled)):
                    write(kernels, keys, torch.arange(start, end), kernel_size, stride)
                results.append(kernels[:, :, : max(infllm.num_kernels(filled, kernel_size, stride), 1)])
        for kind, kernels, right in zip(("fine", "coarse"), found, expected, strict=True):
            yield f"{kind} kernels: {name}", error(kernels, right)
        fine, coarse = expected[0], None if exact else expected[1]
        scores = infllm.block_scores(q, fine, coarse, at, filled, 0.3, sparse)
        yield f"block scores: {name}", error(block_scores(q, fine, coarse, at, filled, 0.3, sparse), scores)
        ids = infllm.rank_blocks(scores, at, sparse)
        args = (keys, values), (0.3, sparse.block_size)
        right = infllm.attend_to_blocks(q, *args[0], ids, at, *args[1])
        yield f"attention: {name}", error(sparse_attention(q, *args[0], ids, at, *args[1]), right)
        last = slice(len(at) - 1, len(at))
        one = sparse_attention(q[:, last], *args[0], ids[:, :, last], at[last], *args[1])
        yield f"decoding: {name}", error(one, right[:, last])


def dense_attentions() -> Errors:
    """Few queries over a cache that is filled in part, read to its end or not."""
    for slots, filled, group, kv_heads, size in ((150, 150, 4, 2, 16), (130, 70, 1, 3, 24), (33, 20, 5, 1, 128)):
        at = torch.tensor([filled - 3, filled - 2, filled - 1])
        q = torch.randn(2, len(at), kv_heads * group, size)
        keys, values = torch.randn(2, 2, kv_heads, 160, size)[..., :slots, :]
        for last in (slice(0, 3), slice(2, 3)):
            args = q[:, last], keys, values, at[last], 0.3
            name = f"{args[0].shape[1]} queries over {filled} of {slots} keys, {group} heads on each of {kv_heads}"
            yield f"dense attention: {name}", error(dense_attention(*args), attend_to_all(*args))


@torch.inference_mode()
def whole_model(folder: str) -> Errors:
    """Logits of a prompt and of tokens after it."""
    model = load_model(folder, DEVICE, torch.float32)
    tokens = torch.randint(0, model.config.vocab_size, (1, 27))
    logits = []
    for kernels in ("torch", "triton"):
        model.use_kernels(kernels)
        cache = model.init_cache(64)
        parts = [model(tokens[:, a:b], torch.arange(a, b), cache, b) for a, b in itertools.pairwise((0, 25, 26, 27))]
        logits.append(model.logits(torch.cat(parts, dim=1)))
    yield "logits of a model", error(*logits)


if __name__ == "__main__":
    torch.set_default_device(DEVICE)
    torch.manual_seed(0)
    kernels = int4_products(), norms(), rotaries(), sparse_attentions(), dense_attentions()
    print(json.dumps(dict(itertools.chain(*kernels, whole_model(sys.argv[1])))))
