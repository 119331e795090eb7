"""Attention and the language-model loss, forward and backward, beside plain JAX and PyTorch on the same device.

Repeats are interleaved, so that a busy machine slows all alike; the table has medians.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import Benchmark
from kernels_pallas.attention.api import dot_product_attention
from kernels_pallas.linear_cross_entropy.api import linear_cross_entropy

Side = Callable[[], object]


def attention_sides(batch_size: int, seq_len: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Side]:
    """Output's gradients to q, k and v of causal attention in float32, ours and theirs."""
    import torch

    keys = jax.random.split(jax.random.key(0), 4)
    q, dout = (jax.random.normal(key, (batch_size, seq_len, num_heads, head_dim)) for key in keys[:2])
    k, v = (jax.random.normal(key, (batch_size, seq_len, num_kv_heads, head_dim)) for key in keys[2:])

    def gradients(attend: Callable[..., jax.Array]) -> Side:
        compiled = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v) * dout), argnums=(0, 1, 2)))
        return lambda: jax.block_until_ready(compiled(q, k, v))

    # PyTorch keeps heads before time: its inputs are laid out so beforehand.
    tq, tk, tv = (torch.tensor(np.asarray(x)).transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v))
    torch_dout = torch.tensor(np.asarray(dout)).transpose(1, 2).contiguous()

    def torch_gradients() -> object:
        out = torch.nn.functional.scaled_dot_product_attention(
            tq, tk, tv, is_causal=True, enable_gqa=num_heads != num_kv_heads
        )
        return torch.autograd.grad(out, (tq, tk, tv), torch_dout)

    return {
        "ours": gradients(dot_product_attention),
        "jax.nn.dot_product_attention": gradients(
            lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
        ),
        "torch SDPA": torch_gradients,
    }


def loss_sides(batch_size: int, seq_len: int, d_model: int, vocab_size: int) -> dict[str, Side]:
    """Loss and its gradients to hidden states and kernel in float32, ours and theirs."""
    import torch

    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (batch_size, seq_len, d_model))
    kernel = jax.random.normal(keys[1], (d_model, vocab_size)) / d_model**0.5
    targets = jax.random.randint(keys[2], (batch_size, seq_len), 0, vocab_size)
    weights = jnp.ones((batch_size, seq_len))

    def gradients(implementation: str | None) -> Side:
        def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
            return linear_cross_entropy(hidden, kernel, targets, weights, implementation=implementation)[0]  # type: ignore[arg-type]

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return lambda: jax.block_until_ready(compiled(hidden, kernel))

    leaves = [torch.tensor(np.asarray(x)).requires_grad_() for x in (hidden.reshape(-1, d_model), kernel)]
    torch_targets = torch.tensor(np.asarray(targets)).long().flatten()

    def torch_gradients() -> object:
        loss = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1], torch_targets, reduction="sum")
        return torch.autograd.grad(loss, leaves)

    return {"ours": gradients(None), "JAX with all logits": gradients("reference"), "torch": torch_gradients}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes `results/kernels.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for PyTorch; JAX takes all cores")
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    cases = {
        "attention 8x512, 6 heads of 64": attention_sides(8, 512, 6, 6, 64),
        "attention 8x512, 6 heads of 64 on 2 kv heads": attention_sides(8, 512, 6, 2, 64),
        "attention 1x2048, 9 heads of 64 on 3 kv heads": attention_sides(1, 2048, 9, 3, 64),
        "loss 8x512, width 384, 16,384 words": loss_sides(8, 512, 384, 16_384),
    }
    bench = Benchmark("kernels")
    for case, sides in cases.items():
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for repeat in range(args.repeats + 1):
            for side, call in sides.items():
                begin = time.perf_counter()
                call()
                if repeat:  # the first call compiles
                    seconds[side].append(time.perf_counter() - begin)
        for side, times in seconds.items():
            if side != "ours":
                bench.add(
                    f"{case}, forward+backward",
                    "ms",
                    1e3 * statistics.median(seconds["ours"]),
                    larger_is_better=False,
                    baseline_name=side,
                    baseline=1e3 * statistics.median(times),
                )
    bench.write()


if __name__ == "__main__":
    main()
