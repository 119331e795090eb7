"""Real texts for the study of rounds, English and Chinese: a heap of good and bad documents, and pools to choose from.

Of three candidate pools one is good. Of the raw documents about a third is: the others are mails that sell, pages that
are half navigation, filled-in forms, and text of another language or out of order. No document has two roles. Held out
are passages of the good domains, of the default mix's, and of one that no pool has.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import chinese_texts
from benchmarks.verification_corpora import (
    MAILS,
    filled,
    mail_chunks,
    mails_of,
    package,
    read_corpora,
    with_boilerplate,
)

_CHARACTERS = 3_000_000  # of the good English documents
_PASSAGE = {"English": 300, "Chinese": 80}  # characters: about a row of the study's model
_FORMS = (
    "什么是{a}？{a}是一种用于{c}的{b}。",
    "最优惠的{a}，{b}全网最低价，点击查看{a}评测。",
    "关于{a}的十个技巧：了解{b}如何改善您的{c}。",
    "总而言之，{a}和{b}对{c}非常重要。",
)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The documents of a language by role.

    Attributes:
        default: of the default mix.
        pools: candidates for the positive seed; only "texts" is good.
        good: the raw documents that are worth keeping.
        bad: the other raw documents.
        held_out: passages of each domain.
    """

    default: Sequence[str]
    pools: Mapping[str, Sequence[str]]
    good: Sequence[str]
    bad: Sequence[str]
    held_out: Mapping[str, Sequence[str]]


def english(folder: Path, passages: int) -> Texts:
    """Essays, a handbook and a glossary among spam, navigation, templates and French."""
    found = read_corpora(folder, characters=_CHARACTERS, parts=2, passages=passages, passage=_PASSAGE["English"])
    candidates = found.candidates
    clean, spam, forms = candidates["clean"], candidates["spam_mixed"][1::2], candidates["templated"]
    size = len(clean) // 4
    wrapped = candidates["boilerplate"][: size // 2]  # of the first documents, which have no other role
    return Texts(
        found.default,
        {"texts": clean[size : 2 * size], "mails": spam[: len(spam) // 2], "listings": forms[:size]},
        clean[2 * size : 3 * size],
        [*spam[len(spam) // 2 :], *wrapped, *forms[size : size + size // 2], *candidates["french"][: size // 2]],
        found.held_out,
    )


def chinese(folder: Path, passages: int) -> Texts:
    """News, a manual and quotations among navigation, templates, English spam and characters out of order."""
    rng = random.Random(0)
    manual, furniture = chinese_texts.manual(folder)
    domains = {
        "news": chinese_texts.news(folder),
        "manual": manual,
        "quotations": chinese_texts.quotations(folder),
        "reviews": chinese_texts.documents(chinese_texts.reviews(folder, "pos")),
        "reference": chinese_texts.reference(folder),
    }
    held_out = {}
    for name, documents in domains.items():
        rng.shuffle(documents)
        count = len(documents) // 6 if name != "reference" else len(documents)
        held_out[name] = chinese_passages(documents[:count], passages, _PASSAGE["Chinese"], rng)
        domains[name] = documents[count:]
    quotations = domains["quotations"]
    half = len(quotations) // 2
    real = [*domains["news"], *domains["manual"], *quotations[:half]]
    rng.shuffle(real)
    size = len(real) // 4
    half_size = size // 2
    spam = [text[: chinese_texts.LENGTH] for text in mail_chunks(mails_of(package(folder, MAILS), "spam-*"))]
    rng.shuffle(spam)
    lengths = [len(text) for text in real]
    forms = filled(_FORMS, chinese_texts.common_words(folder), lengths[: size + half_size], rng)
    wrapped = [with_boilerplate(text.replace("\n", "\n\n"), furniture, rng) for text in real[:half_size]]
    broken = ["".join(rng.sample(text, len(text))) for text in real[half_size:size]]
    return Texts(
        [*domains["reviews"], *quotations[half:]],
        {"texts": real[size : 2 * size], "mails": spam[:size], "listings": forms[:size]},
        real[2 * size : 3 * size],
        [*wrapped, *broken, *forms[size:], *spam[size : size + half_size]],
        held_out,
    )


def chinese_passages(documents: Sequence[str], count: int, length: int, rng: random.Random) -> list[str]:
    """Passages of many places."""
    places = [text[at : at + length] for text in documents for at in range(0, len(text) - length, length)]
    return rng.sample(places, min(count, len(places)))
