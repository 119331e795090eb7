"""Tasks that count: which words are the most frequent ones of a list, or of a text in code."""

import math
import random
import string
from collections.abc import Sequence

from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.ruler.question import Draft
from cpm_jax.evaluation.ruler.words import compound_names, distinguishable_words

_NUM_COMMON = 10
_LONG = 4096  # from this many tokens on RULER repeats words more often …
_LONG_WORDS = 600  # … which takes about so many words; a tokenizer that cuts words small has no room for them yet
_ALPHA = 2.0  # the exponent of Zipf's law that coded words follow
_CODED_LETTERS = 6
_TOKENS_PER_CODED_WORD_OF_VOCABULARY = 50


def common_words(tokenizer: Tokenizer, rng: random.Random, length: int, size: int) -> Draft:
    """A list in which ten words are common and all others rare; asked is for the ten.

    Args:
        tokenizer: of the model.
        rng: of all draws.
        length: tokens asked for, which decide how often words are repeated.
        size: how many rare words there are.
    """
    words = distinguishable_words()
    tokens_per_word = len(tokenizer.encode(_numbered(words))) / len(words)
    rng.shuffle(words)
    common, example_common, rare = words[:10], words[10:20], words[20:]
    if length >= max(_LONG, _LONG_WORDS * tokens_per_word):
        example_rare, repeats, example_repeats = rare[:30], (30, 3), (10, 3)
    else:
        example_rare, repeats, example_repeats = rare[:10], (6, 1), (3, 1)
    if size > len(rare):  # names of two words hold none of the common ones
        listed = {*common, *example_common}
        names = compound_names(rng, 2 * (size - len(rare)) + 64)
        rare = rare + [name for name in names if listed.isdisjoint(name.split("-"))]
    example = _list_question(rng, example_common, example_rare, example_repeats)
    draft = _list_question(rng, common, rare[:size], repeats)
    return draft._replace(body=f"{example.body}{example.answer_prefix}{example.reference}\n\n{draft.body}")


def _list_question(rng: random.Random, common: Sequence[str], rare: Sequence[str], repeats: tuple[int, int]) -> Draft:
    words = [*common] * repeats[0] + [*rare] * repeats[1]
    rng.shuffle(words)
    body = (
        "The following numbered list of words holds some words more often than others. Remember the most common ones."
        f"\n\n{_numbered(words)}\n\nQuestion: Which {_NUM_COMMON} words are the most common ones of the list?"
    )
    return Draft(body, f"\nAnswer: The {_NUM_COMMON} most common words of the list are:", tuple(common))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def frequent_words(rng: random.Random, length: int, size: int) -> Draft:
    """Coded words whose frequency falls with the square of their rank; asked is for the first three.

    Args:
        rng: of all draws.
        length: tokens asked for, which decide how many different words there are.
        size: how many words there are, besides the least with which the first three can be told from the others.
    """
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < max(length // _TOKENS_PER_CODED_WORD_OF_VOCABULARY, 8):
        vocabulary["".join(rng.choices(string.ascii_lowercase, k=_CODED_LETTERS))] = None
    # The most frequent word of all is "....", which is to be ignored.
    ranked = ["....", *vocabulary]
    total = size + 60
    shares = [rank**-_ALPHA / (math.pi**2 / 6) for rank in range(1, len(ranked) + 1)]
    words = [word for word, share in zip(ranked, shares, strict=True) for _ in range(int(total * share))]
    rng.shuffle(words)
    body = (
        "The following text is in code. Count how often each coded word appears; the dots '....' are none.\n\n"
        f"{' '.join(words)}\n\nQuestion: Which three coded words appear most often?"
    )
    return Draft(body, "\nAnswer: The three coded words that appear most often are:", tuple(ranked[1:4]))
