"""Continues a text with the programs in this script's folder: `python generate.py "Once upon a time" [--max_tokens N]`.

The folder was written by cpm_jax; this needs jax, flatbuffers, numpy, safetensors and tokenizers, and nothing of it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import safetensors.flax
import tokenizers

FOLDER = Path(__file__).resolve().parent


def load(name: str) -> Any:
    """One of the programs, compiled when it is first called; the caches that it is given are overwritten."""
    exported = jax.export.deserialize(bytearray((FOLDER / f"{name}.stablehlo").read_bytes()))
    return jax.jit(exported.call, donate_argnums=(3, 4))


def main() -> None:
    """Reads the prompt at once, then chooses the most probable token each time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--max_tokens", type=int, default=64)
    args = parser.parse_args()
    about = json.loads((FOLDER / "model.json").read_text("utf-8"))
    params = safetensors.flax.load_file(FOLDER / "params.safetensors")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    prefill, decode = load("prefill"), load("decode")

    ids = tokenizer.encode(args.prompt, add_special_tokens=False).ids
    if about["bos_token_id"] is not None:
        ids = [about["bos_token_id"], *ids]
    if not ids:
        parser.error("the prompt has no tokens")
    cache = about["cache"]
    slots = -(-(len(ids) + args.max_tokens) // cache["block"]) * cache["block"]
    if slots > cache["max_slots"]:
        parser.error(f"{len(ids)} tokens and {args.max_tokens} new ones: at most {cache['max_slots']} fit")
    shape = (cache["layers"], 1, cache["kv_heads"], slots, cache["head_dim"])
    keys, values = jnp.zeros(shape, cache["dtype"]), jnp.zeros(shape, cache["dtype"])

    step, tokens, positions = (prefill if len(ids) > 1 else decode), jnp.asarray([ids]), jnp.arange(len(ids))[None]
    new: list[int] = []
    begin = time.perf_counter()
    while len(new) < args.max_tokens:
        logits, keys, values = step(params, tokens.astype(jnp.int32), positions.astype(jnp.int32), keys, values)
        token = int(logits[0, -1].argmax())
        if token in about["eos_token_ids"]:
            break
        new.append(token)
        if len(new) == 2:  # both programs are compiled
            begin = time.perf_counter()
        step, tokens, positions = decode, jnp.asarray([[token]]), positions[:, -1:] + 1
    print(args.prompt + tokenizer.decode(new, skip_special_tokens=False))
    if len(new) > 2:
        print(f"{(len(new) - 2) / (time.perf_counter() - begin):.1f} tokens/s")


if __name__ == "__main__":
    main()
