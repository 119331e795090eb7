"""Tasks that hide sentences in a text: numbers under names, and variables that are assigned one another."""

import random
import string
from collections.abc import Sequence

from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.ruler.haystack import Haystack, insert
from cpm_jax.evaluation.ruler.question import Draft
from cpm_jax.evaluation.ruler.words import compound_names

# As in RULER's configuration: keys, values and queries where a task has several, and assignments after the first.
NUM_KEYS, NUM_VALUES, NUM_QUERIES, NUM_HOPS = 4, 4, 4, 4
_EXAMPLE_TOKENS = 60  # of text in a worked example


def number_needles(
    haystack: Haystack,
    tokenizer: Tokenizer,
    rng: random.Random,
    depth: float,
    size: int,
    *,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Draft:
    """Sentences that give numbers under names; asked is for some of them.

    Args:
        haystack: real text.
        tokenizer: of the model.
        rng: of all draws.
        depth: where the first needle lies that is asked for; the others lie anywhere.
        size: tokens of text.
        keys: names in all.
        values: numbers of each name.
        queries: names that are asked for.
    """
    place = haystack.sentence_start(rng.random())
    names = compound_names(rng, keys)
    numbers = distinct_numbers(rng, keys * values)
    depths = [depth, *(rng.random() for _ in range(keys * values - 1))]
    text = haystack.passage(place, size)
    owners = [name for name in names for _ in range(values)]
    needles = [(d, _needle(name, number)) for d, name, number in zip(depths, owners, numbers, strict=True)]
    asked = queries * values
    return _numbers_question(insert(text, needles, tokenizer), names[:queries], numbers[:asked], depths[:asked])


def recall(rng: random.Random, depth: float, size: int) -> Draft:
    """Associative recall: the whole context is names with their numbers, of which one is asked for.

    Args:
        rng: of all draws.
        depth: where that one stands.
        size: how many names there are besides it.
    """
    names, numbers = compound_names(rng, size + 1), distinct_numbers(rng, size + 1)
    lines = [_needle(name, number) for name, number in zip(names[1:], numbers[1:], strict=True)]
    lines.insert(round(depth * size), _needle(names[0], numbers[0]))
    return _numbers_question("\n".join(lines), names[:1], numbers[:1], [depth])


def distinct_numbers(rng: random.Random, count: int) -> list[str]:
    """Numbers of seven digits, all different."""
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _needle(name: str, number: str) -> str:
    return f"One of the special magic numbers for {name} is: {number}."


def _numbers_question(context: str, names: Sequence[str], numbers: Sequence[str], depths: Sequence[float]) -> Draft:
    whom = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    what, verb = ("special magic number", "is") if len(numbers) == 1 else ("special magic numbers", "are")
    body = (
        f"The following text mentions special magic numbers. Remember them, there will be a question about them.\n\n"
        f"{context}\n\nQuestion: What {verb} the {what} for {whom} that the text mentions?"
    )
    return Draft(body, f"\nAnswer: The {what} for {whom} {verb}", tuple(numbers), tuple(depths))


def variable_tracking(haystack: Haystack, tokenizer: Tokenizer, rng: random.Random, depth: float, size: int) -> Draft:
    """A number is assigned to a variable, that one to the next, and so on; asked is for all that have the number.

    Args:
        haystack: real text.
        tokenizer: of the model.
        rng: of all draws.
        depth: where one of the assignments stands; the others are anywhere, in order.
        size: tokens of text. A worked example comes before it.
    """
    depths = sorted([depth, *(rng.random() for _ in range(NUM_HOPS))])
    variables = _variables(rng, NUM_HOPS + 1, letters=5)
    example_variables = _variables(rng, NUM_HOPS + 1, letters=3)
    value, example_value = map(str, rng.sample(range(10_000, 100_000), 2))
    place, example_place = (haystack.sentence_start(rng.random()) for _ in range(2))
    example_depths = [number / NUM_HOPS for number in range(NUM_HOPS + 1)]
    example = _chain_question(
        insert(
            haystack.passage(example_place, _EXAMPLE_TOKENS),
            _assignments(example_variables, example_value, example_depths),
            tokenizer,
        ),
        example_variables,
        example_value,
        example_depths,
    )
    text = insert(haystack.passage(place, size), _assignments(variables, value, depths), tokenizer)
    draft = _chain_question(text, variables, value, depths)
    return draft._replace(body=f"{example.body}{example.answer_prefix}{example.reference}\n\n{draft.body}")


def _variables(rng: random.Random, count: int, *, letters: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def _assignments(variables: Sequence[str], value: str, depths: Sequence[float]) -> list[tuple[float, str]]:
    sources = [value, *(f"VAR {name}" for name in variables)]
    return [(depth, f"VAR {name} = {source}.") for depth, name, source in zip(depths, variables, sources, strict=False)]


def _chain_question(text: str, variables: Sequence[str], value: str, depths: Sequence[float]) -> Draft:
    body = (
        f"The following text assigns values to variables. Follow the assignments.\n\n{text}\n\n"
        f"Question: Which variables have the value {value}, whether directly or through other variables?"
    )
    prefix = f"\nAnswer: By the assignments in the text, {len(variables)} variables have the value {value}:"
    return Draft(body, prefix, tuple(variables), tuple(depths))
