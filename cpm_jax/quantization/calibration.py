"""Sequences of real text to calibrate on: the paper takes 1,024 at random from the training data."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.quantization.config import QuantizationError


def calibration_sequences(
    texts: Iterable[str], tokenizer: Tokenizer, count: int, length: int, seed: int = 0
) -> Int[np.ndarray, "count length"]:
    """Draws sequences evenly from texts, which are read to their end and not kept.

    A text is cut into sequences of `length` tokens; what is left at its end is joined with the texts after it, with the
    token between that ends a text. Where the tokenizer begins texts with a BOS, every sequence begins with it, since
    that is what the model's first tokens then are.

    Args:
        texts: any documents.
        tokenizer: of the model.
        count: sequences wanted.
        length: tokens of each.
        seed: of the draw.

    Raises:
        QuantizationError: the texts are too short for `count` sequences, or these for a token of text.
    """
    rng = np.random.default_rng(seed)
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    size = length - len(begin)
    if size < 1:
        raise QuantizationError(f"calibration sequences of {length} tokens are BOS and nothing else: take longer ones")
    kept: list[list[int]] = []
    seen, rest = 0, []
    for text in texts:
        rest += tokenizer.encode(text) + end
        while len(rest) >= size:
            sequence, rest = begin + rest[:size], rest[size:]
            # Reservoir sampling: each of the sequences so far is kept with the same probability.
            place = seen if seen < count else int(rng.integers(0, seen + 1))
            if place < count:
                kept[place : place + 1] = [sequence]
            seen += 1
    if seen < count:
        raise QuantizationError(
            f"the calibration texts have {seen} sequences of {length} tokens, and {count} are wanted: give more text, "
            "or take fewer or shorter sequences"
        )
    return np.asarray(kept, np.int32)
